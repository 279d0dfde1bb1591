"""The library as torch operators: ``flex_block_attn::plan``, ``::forward`` and ``::backward``; for
masks with an expression ``::exact_forward`` and ``::exact_backward``, which are told its text and
tables too.

In: tensors and numbers. Out: new tensors, which torch allocates here and the library fills.
Called by :mod:`.direct`, and by :mod:`.api`, :mod:`.masks`, :mod:`.moba` and :mod:`.video` where
its short way is not open. Being operators, with what they return known without running them and
with their derivative, they compile into graphs, and autograd and checkpointing see one node each.

Registered by ``define`` and ``impl`` rather than ``custom_op``, whose wrapper costs several times
what the call itself does.
"""

from typing import Any

import torch
from torch import Tensor

from . import _native, launch
from .launch import Exact

_LIBRARY = "flex_block_attn"
# In an entry of a plan's list: the block is partial.
_PARTIAL = torch.iinfo(torch.int32).min

torch.library.define(
    f"{_LIBRARY}::plan",
    "(Tensor blocks, SymInt q_len, SymInt kv_len, int q_block, int kv_block) -> Tensor",
)
torch.library.define(
    f"{_LIBRARY}::forward",
    "(Tensor q, Tensor k, Tensor v, Tensor plan, int q_block, int kv_block, float scale,"
    " bool deterministic, bool alike=False)"
    " -> (Tensor out, Tensor lse)",
)
torch.library.define(
    f"{_LIBRARY}::backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor plan, int q_block, int kv_block, float scale, bool deterministic, bool[3] wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)

torch.library.define(
    f"{_LIBRARY}::exact_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor[] tables, str formula, int q_block,"
    " int kv_block, float scale, bool deterministic) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    f"{_LIBRARY}::exact_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor plan, Tensor[] tables, str formula, int q_block, int kv_block, float scale,"
    " bool deterministic, bool[3] wanted) -> (Tensor dq, Tensor dk, Tensor dv)",
)

plan = torch.ops.flex_block_attn.plan.default
forward = torch.ops.flex_block_attn.forward.default
backward = torch.ops.flex_block_attn.backward.default
exact_forward = torch.ops.flex_block_attn.exact_forward.default
exact_backward = torch.ops.flex_block_attn.exact_backward.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    deterministic: bool,
    exact: Exact | None,
    alike: bool = False,
) -> tuple[Tensor, Tensor]:
    """What ``forward`` gives, or ``exact_forward``. ``alike`` says whether all rows of the mask are
    known to have one list."""
    settings = q_block, kv_block, scale, deterministic
    if exact is None:
        return forward(q, k, v, plan, *settings, alike)
    formula, tables = exact
    return exact_forward(q, k, v, plan, tables, formula, *settings)


def check_devices(q: Tensor, *others: Tensor) -> None:
    """torch comes to a CUDA implementation if any tensor is there; kernels would follow the address
    of another device."""
    if any(tensor.device != q.device for tensor in others):
        raise ValueError("q, k, v, the plan and all else must be on one device")


def _tables_of(exact: Exact | None) -> list[Tensor]:
    return [] if exact is None else exact[1]


def for_copies(tensor: Tensor) -> Tensor:
    """The tensor as a GPU's copy engine takes it. What torch makes is so; an odd slice or an
    expanded tensor becomes a copy."""
    if _native.must_be_copied(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# --- plan ---------------------------------------------------------------------------------------


@torch.library.impl(f"{_LIBRARY}::plan", "CPU")
def _plan_cpu(blocks: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> Tensor:
    sizes = q_len, kv_len, q_block, kv_block
    words = _native.plan_words(sizes)
    result = torch.empty((*blocks.shape[:2], words), dtype=torch.int32)
    raw = blocks.data_ptr(), blocks.shape, blocks.stride()
    _native.write_plan(raw, sizes, (result.data_ptr(), result.numel()))
    return result


@torch.library.impl(f"{_LIBRARY}::plan", "CUDA")
def _plan_cuda(blocks: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> Tensor:
    if blocks.numel() == 0:
        # There is nothing to launch for, but the plan's words are to be right.
        return plan(blocks.cpu(), q_len, kv_len, q_block, kv_block).to(blocks.device)
    sizes = q_len, kv_len, q_block, kv_block
    return launch.plan(blocks, sizes, (*blocks.shape[:2], _native.plan_words(sizes)))


@torch.library.register_fake(f"{_LIBRARY}::plan")
def _plan_fake(blocks: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> Tensor:
    rows, columns = -(-q_len // q_block), -(-kv_len // kv_block)
    # As in the library's plan: counts, order and lists of both sides.
    words = 2 * (rows + columns + rows * columns)
    return blocks.new_empty((*blocks.shape[:2], words), dtype=torch.int32)


def partial_diagonal(plan: Tensor, blocks: int) -> Tensor:
    """The plan of a mask of so many rows and columns, given back with the blocks on its diagonal
    partial: in them the expression counts that a call comes with."""
    # Of rows, then of columns: counts, order and lists.
    sides = plan.unflatten(-1, (2, blocks * (2 + blocks)))
    counts = sides[..., :blocks, None]
    lists = sides[..., 2 * blocks :].unflatten(-1, (blocks, blocks))
    place = torch.arange(blocks, dtype=torch.int32, device=plan.device)
    # Lists end before the memory that they have.
    partial = (lists == place[:, None]) & (place < counts)
    lists.bitwise_or_(partial.to(torch.int32) * _PARTIAL)
    return plan


# --- forward ------------------------------------------------------------------------------------


@torch.library.register_fake(f"{_LIBRARY}::forward")
def _forward_outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    deterministic: bool,
    alike: bool = False,
    exact: Exact | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_outputs(q)
    _native.forward(
        (q, k, v),
        (plan, q_block, kv_block),
        (scale, torch.get_num_threads()),
        (out, lse),
        exact,
    )
    return out, lse


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    deterministic: bool,
    alike: bool = False,
    exact: Exact | None = None,
) -> tuple[Tensor, Tensor]:
    check_devices(q, k, v, plan, *_tables_of(exact))
    if k.shape[2] == 0:
        # There is nothing to launch for, but arguments are to be checked as ever.
        on_cpu = (x.cpu() for x in (q, k, v, plan))
        out, lse = forward(*on_cpu, q_block, kv_block, scale, deterministic)
        return out.to(q.device), lse.to(q.device)
    if scale < 0:
        # Kernels look for the largest score before they scale.
        q, scale = -q, -scale
    inputs = for_copies(q), for_copies(k), for_copies(v)
    return launch.forward(inputs, (plan, q_block, kv_block), scale, exact, alike)


torch.library.impl(f"{_LIBRARY}::forward", "CPU", _forward_cpu)
torch.library.impl(f"{_LIBRARY}::forward", "CUDA", _forward_cuda)


def forward_of(device: torch.device) -> Any:
    """What torch comes to for tensors of a device; where there is one, the mask's expression is the
    last argument."""
    return _forward_cuda if device.type == "cuda" else _forward_cpu


# --- backward -----------------------------------------------------------------------------------


@torch.library.register_fake(f"{_LIBRARY}::backward")
def _backward_outputs(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    deterministic: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator returns tensors: what is not wanted is an empty one.
    dq, dk, dv = (
        torch.empty_like(x) if wants else x.new_empty(0)
        for x, wants in zip((q, k, v), wanted, strict=True)
    )
    return dq, dk, dv


def _backward_cpu(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    deterministic: bool,
    wanted: list[bool],
    exact: Exact | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_outputs(
        dout, dlse, q, k, v, out, lse, plan, q_block, kv_block, scale, deterministic, wanted
    )
    if dout.stride(-1) != 1:
        # As `out.sum().backward()` gives it: one number, expanded.
        dout = dout.contiguous()
    _native.backward(
        (q, k, v, out, lse),
        (dout, dlse),
        (plan, q_block, kv_block),
        (scale, torch.get_num_threads()),
        tuple(x if wants else None for x, wants in zip(gradients, wanted, strict=True)),
        exact,
    )
    return gradients


def _backward_cuda(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    deterministic: bool,
    wanted: list[bool],
    exact: Exact | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    others = () if dlse is None else (dlse,)
    check_devices(q, k, v, out, lse, dout, plan, *others, *_tables_of(exact))
    if scale < 0:
        # As the forward pass: the gradient of -q is less that of q.
        q, scale, negated = -q, -scale, True
    else:
        negated = False
    q, k, v, out, dout = (
        for_copies(x if x.stride(-1) == 1 else x.contiguous()) for x in (q, k, v, out, dout)
    )
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        gradients = dq.zero_(), dk.zero_(), dv.zero_()
    else:
        if dlse is not None:
            dlse = dlse.contiguous()
        keys = k.shape, q_block, kv_block, q.get_device()
        count = _native.backward_workspace(q.shape, deterministic, keys)
        workspace = q.new_empty(count, dtype=torch.float32)
        _native.backward_cuda(
            (q, k, v, out, lse),
            (dout, dlse),
            (plan, q_block, kv_block),
            (scale, deterministic),
            (dq, dk, dv),
            workspace.data_ptr(),
            exact,
        )
        gradients = dq.neg_() if negated else dq, dk, dv
    dq, dk, dv = (
        x if wants else x.new_empty(0) for x, wants in zip(gradients, wanted, strict=True)
    )
    return dq, dk, dv


torch.library.impl(f"{_LIBRARY}::backward", "CPU", _backward_cpu)
torch.library.impl(f"{_LIBRARY}::backward", "CUDA", _backward_cuda)


def backward_of(device: torch.device) -> Any:
    """As :func:`forward_of`."""
    return _backward_cuda if device.type == "cuda" else _backward_cpu


def gradients(
    dout: Tensor, *rest: Any, exact: Exact | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``backward`` gives, or ``exact_backward``."""
    if exact is None:
        return backward(dout, *rest)
    formula, tables = exact
    # The lse's gradient, five tensors and the plan come before the tables.
    return exact_backward(dout, *rest[:7], tables, formula, *rest[7:])


def save(
    ctx: Any, tensors: tuple, results: tuple[Tensor, Tensor], settings: Any, exact: Exact | None
) -> None:
    """Keeps what :func:`differentiate` asks for; ``tensors`` are q, k, v and the plan."""
    q, k, v, plan = tensors
    ctx.formula, tables = (None, []) if exact is None else exact
    ctx.settings = settings
    ctx.save_for_backward(q, k, v, *results, plan, *tables)
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, by: Any = gradients) -> tuple:
    """The gradients of q, k and v, None where nobody wants them, ``by`` what :func:`gradients` or
    another is."""
    if dout is None and dlse is None:
        return None, None, None
    q, k, v, out, lse, plan, *tables = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = list(ctx.needs_input_grad[:3])
    exact = None if ctx.formula is None else (ctx.formula, tables)
    saved = q, k, v, out, lse, plan
    given = by(dout, dlse, *saved, *ctx.settings, wanted, exact=exact)
    dq, dk, dv = (x if wants else None for x, wants in zip(given, wanted, strict=True))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    save(ctx, inputs[:4], output, inputs[4:8], None)
    # What only the forward pass is told comes last.
    ctx.others = (None,) * len(inputs[3:])


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    return *differentiate(ctx, dout, dlse), *ctx.others


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("flex_block_attn has no second derivative")


torch.library.register_autograd(f"{_LIBRARY}::forward", _differentiate, setup_context=_save)
torch.library.register_autograd(f"{_LIBRARY}::backward", _refuse_double_backward)


# --- masks with an expression -------------------------------------------------------------------


@torch.library.register_fake(f"{_LIBRARY}::exact_forward")
def _exact_forward_outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _forward_outputs(q)


def _exact_forward(plain: Any) -> Any:
    """An implementation of ``exact_forward``, from that of ``forward``."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        tables: list[Tensor],
        formula: str,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        return plain(q, k, v, plan, *settings, exact=(formula, tables))

    return call


def _exact_backward(plain: Any) -> Any:
    """Of ``exact_backward`` likewise."""

    def call(
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: Tensor,
        tables: list[Tensor],
        formula: str,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return plain(dout, dlse, q, k, v, out, lse, plan, *settings, (formula, tables))

    return call


@torch.library.register_fake(f"{_LIBRARY}::exact_backward")
def _exact_backward_outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    first, settings = arguments[:8], arguments[10:]
    return _backward_outputs(*first, *settings)


for _device, _forward, _backward in (
    ("CPU", _forward_cpu, _backward_cpu),
    ("CUDA", _forward_cuda, _backward_cuda),
):
    torch.library.impl(f"{_LIBRARY}::exact_forward", _device, _exact_forward(_forward))
    torch.library.impl(f"{_LIBRARY}::exact_backward", _device, _exact_backward(_backward))


def _save_exact(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tables, formula, *settings = inputs[4:]
    save(ctx, inputs[:4], output, settings, (formula, tables))
    ctx.others = None, [None] * len(tables), *(None for _ in inputs[5:])


torch.library.register_autograd(
    f"{_LIBRARY}::exact_forward", _differentiate, setup_context=_save_exact
)
torch.library.register_autograd(f"{_LIBRARY}::exact_backward", _refuse_double_backward)

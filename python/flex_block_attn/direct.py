"""The short way of a call, past torch's dispatcher. In: tensors as users have them. Out: the
result; None where the call must go the long way, by the operators of :mod:`.ops`, and its inputs be
looked at first.

Called by :mod:`.api`, :mod:`.masks`, :mod:`.moba`, :mod:`.video`, :mod:`.ssta_attention` and
``distributed``. torch's dispatcher and the Python code around an operator's derivative take several
times what a call itself takes; where nobody compiles, traces or watches, and kernels take the
tensors as they are, none of it does anything. What is wrong with a call is mostly left to the long
way to say.
"""

from typing import Any

import torch
from torch import Tensor

from . import _native, launch, ops

try:
    from torch._C import _is_tracing, _len_torch_dispatch_stack
    from torch._C._functorch import peek_interpreter_stack
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018
    _CAN_TELL = True
except (ImportError, AttributeError):
    # These names are torch's own. Without them every call goes the long way: slower, never wrong.
    _CAN_TELL = False

# Blocks of queries and keys, the scale, and whether the gradient of q is to repeat.
Settings = tuple[int, int, float, bool]


def plan(
    blocks: Tensor, sizes: tuple[int, int, int, int], video: launch.Video | None = None
) -> Tensor | None:
    """The plan of a mask of 2 to 4 dimensions; ``sizes`` are q_len, kv_len, q_block, kv_block. Of a
    video's tiles, rows that take as long come together."""
    if not _nobody_watches():
        return None
    shape = _native.plan_shape(blocks, sizes)
    return None if shape is None else launch.plan(blocks, sizes, shape, video)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sizes: tuple[int, int, int, int],
    scale: float | None = None,
    return_lse: bool = False,
    exact: launch.Exact | None = None,
    alike: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """The output, and the lse if it is asked for; ``sizes`` are those that the plan is made for.
    ``alike`` says whether all rows of the mask are known to have one list."""
    if not _nobody_watches() or torch.is_autocast_enabled("cuda"):
        return None
    wanted = torch.is_grad_enabled(), return_lse
    return _native.attention(q, k, v, plan, sizes, scale, wanted, exact, alike)


def select(
    q: Tensor,
    k: Tensor,
    order: launch.Order,
    choice: launch.Choice,
    base: Tensor,
    text_mask: Tensor | None = None,
) -> Tensor | None:
    """The mask of chosen tiles, see :func:`launch.select`."""
    if not _nobody_watches():
        return None
    numbers = _native.select_numbers(q, k, order, choice)
    if numbers is None:
        return None
    return launch.select((q, k), order, choice, numbers, base, text_mask)


def differentiable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    settings: Settings,
    exact: launch.Exact | None = None,
    alike: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`ops.attention` gives, of tensors that go together and are on one device."""
    tensors = q, k, v, plan
    if _nobody_watches() and all(_is_plain(x) for x in tensors):
        return _Differentiable.apply(*tensors, settings, exact, alike)
    return ops.attention(*tensors, *settings, exact, alike)


class _Differentiable(torch.autograd.Function):
    """A node of autograd's own: that of an operator costs as much again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        settings: Settings,
        exact: launch.Exact | None,
        alike: bool,
    ) -> tuple[Tensor, Tensor]:
        results = ops.forward_of(q.device)(q, k, v, plan, *settings, alike, exact)
        ops.save(ctx, (q, k, v, plan), results, settings, exact)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        return *ops.differentiate(ctx, dout, dlse, gradients), None, None, None, None


def gradients(
    dout: Tensor, *rest: Any, exact: launch.Exact | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`ops.gradients` gives."""
    if _nobody_watches() and not torch.is_grad_enabled():
        # With the lse's gradient, five tensors and the plan.
        tensors = dout, *rest[:7]
        if all(x is None or _is_plain(x) for x in tensors):
            return ops.backward_of(dout.device)(dout, *rest, exact)
    return ops.gradients(dout, *rest, exact=exact)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers: subclasses may mean something else by what is done to
    them, and torch has tensors whose sign is a note, and zeros without memory."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and (tensor.is_cuda or tensor.is_cpu)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def _nobody_watches() -> bool:
    """No compiler, tracer, mode or transform, and no forward derivative."""
    return (
        _CAN_TELL
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and not _is_tracing()
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
    )

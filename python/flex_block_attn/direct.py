"""The short way of a call on a GPU, past torch's dispatcher. In: tensors as users have them. Out:
the result, or None where the call must go the long way, by the operators of :mod:`.ops`.

Called by :mod:`.api`, :mod:`.masks`, :mod:`.ssta_attention` and ``distributed``. torch's
dispatcher and the Python code around an operator's derivative take several times what a call itself
takes; where nobody differentiates, compiles, traces or watches, and kernels take the tensors as
they are, none of it does anything. What is wrong with a call is mostly left to the long way to say.
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


def gradients(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What ``ops.backward`` gives; nobody differentiates it."""
    if not _nobody_watches() or torch.is_grad_enabled():
        return ops.backward(dout, *rest)
    return ops.backward_of(dout.device)(dout, *rest)


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

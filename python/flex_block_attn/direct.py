"""Whether torch wants more of a call than its result. In: the call's tensors. Out: yes or no.

Called by :mod:`.ops`. torch's dispatcher and the Python code around an operator's derivative take
several times what a call itself takes; where nobody differentiates, compiles, traces or watches,
none of it does anything.
"""

import torch
from torch import Tensor

try:
    from torch._C import _is_tracing, _len_torch_dispatch_stack
    from torch._C._functorch import peek_interpreter_stack
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018
    _CAN_TELL = True
except (ImportError, AttributeError):
    # These names are torch's own. Without them every call goes its whole way: slower, never wrong.
    _CAN_TELL = False


def only_the_result(*tensors: Tensor) -> bool:
    """True if a call on plain tensors need not be an operator to torch: no gradient is wanted,
    backward or forward, and no compiler, tracer, mode or transform stands by."""
    return (
        _CAN_TELL
        and not torch.compiler.is_compiling()
        # Of subclasses only they know what a call means.
        and all(type(tensor) is Tensor for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and forward_ad._current_level < 0
        and not _is_tracing()
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
    )

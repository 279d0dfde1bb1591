"""What sends calls by torch's dispatcher: a subclass, and a mode that sees operators and changes
nothing. In: a tensor's numbers, or nothing. Out: the same. Used by ``test_torch.py`` and
``test_cuda.py``.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Named(torch.Tensor):
    """A subclass of no further meaning."""


class Watched(TorchDispatchMode):
    """Lets all operators do what they do."""

    def __torch_dispatch__(self, call, types, arguments=(), settings=None):
        return call(*arguments, **(settings or {}))

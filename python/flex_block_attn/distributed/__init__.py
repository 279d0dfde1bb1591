"""Attention over several GPUs or processes, on ``torch.distributed`` process groups.

- :func:`ulysses_attention`: each rank computes some heads of the whole sequence;
- :func:`gather_heads`: for masks that depend on all heads.

Every rank of a group must make the same calls in the same order, forward and backward.
"""

from .select import gather_heads
from .ulysses import ulysses_attention

__all__ = [
    "gather_heads",
    "ulysses_attention",
]

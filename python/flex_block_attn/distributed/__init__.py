"""Attention over several GPUs or processes, on ``torch.distributed`` process groups.

- :func:`ulysses_attention`: each rank computes some heads of the whole sequence;
- :func:`context_attention`: each rank computes its own tokens, and is sent the keys that they
  want, by a :class:`ContextPlan` of a static mask or a :class:`DynamicPlan` of one that changes;
- :func:`grid_attention`: both, for ranks in a grid;
- :class:`Layout`: which rank has which tokens;
- :func:`gather_heads`, :func:`gather_blocks`: for masks that depend on all heads or tokens.

Every rank of a group must make the same calls in the same order, forward and backward.
"""

from .context import context_attention
from .dynamic import DynamicPlan
from .grid import grid_attention, grid_shard, grid_unshard
from .layout import Layout
from .plan import ContextPlan
from .report import RankReport, Report
from .select import gather_blocks, gather_heads
from .ulysses import ulysses_attention

__all__ = [
    "ContextPlan",
    "DynamicPlan",
    "Layout",
    "RankReport",
    "Report",
    "context_attention",
    "gather_blocks",
    "gather_heads",
    "grid_attention",
    "grid_shard",
    "grid_unshard",
    "ulysses_attention",
]

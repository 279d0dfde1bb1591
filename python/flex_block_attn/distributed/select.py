"""Choosing blocks by values that several ranks have parts of. In: this rank's values. Out: those
of all ranks.

Called by users who make a mask from q and k. A choice such as the k largest of a mean over heads
turns with the last bit of the mean, and a sum of the ranks' sums has other bits for other numbers
of ranks. Here values are put together first, in an order that does not depend on the ranks:
computed from them, a mask is the same on every rank, and for every number of ranks.
"""

import torch.distributed as dist
from torch import Tensor

from .exchange import gathered, place_in
from .ulysses import shares


def gather_heads(x: Tensor, heads: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Values of all heads, from those of the heads that :func:`ulysses_attention` gives this rank.

    Args:
        x: (batch, heads of this rank, ...), such as means of the query blocks.
        heads: heads of all ranks.
        group: the ranks; all if not given.

    Returns:
        (batch, heads, ...), the same on every rank: ``gather_heads(x, heads).mean(dim=1)`` is what
        one process computes.
    """
    rank, ranks = place_in(group)
    parts = shares(heads, ranks)
    if x.shape[1] != len(parts[rank]):
        raise ValueError(
            f"x has {x.shape[1]} heads, but rank {rank} of {ranks} has {len(parts[rank])} of "
            f"{heads}"
        )
    rows = gathered(x.transpose(0, 1), [len(part) for part in parts], group)
    return rows.transpose(0, 1).contiguous()

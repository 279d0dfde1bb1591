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
from .layout import Layout
from .ulysses import head_parts


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
    parts = head_parts(heads, ranks)
    if x.shape[1] != len(parts[rank]):
        raise ValueError(
            f"x has {x.shape[1]} heads, but rank {rank} of {ranks} has {len(parts[rank])} of "
            f"{heads}"
        )
    rows = gathered(x.transpose(0, 1), [len(part) for part in parts], group)
    return rows.transpose(0, 1).contiguous()


def gather_blocks(
    x: Tensor,
    layout: Layout,
    *,
    dim: int,
    keys: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Values of all blocks in their order, from those of this rank's blocks.

    Args:
        x: a value for each block of queries that the layout gives this rank, along ``dim``, such
            as means of their tokens.
        layout: where blocks are.
        keys: whether the blocks are of keys.
        group: the ranks; all if not given.

    Returns:
        The values of all blocks, the same on every rank and for every number of ranks.
    """
    rank, ranks = place_in(group)
    layout.check_ranks(ranks)
    owners = layout.kv_owners if keys else layout.q_owners
    counts = owners.bincount(minlength=ranks).tolist()
    if x.shape[dim] != counts[rank]:
        raise ValueError(
            f"x has {x.shape[dim]} blocks in dimension {dim}, but rank {rank} has {counts[rank]}"
        )
    rows = gathered(x.movedim(dim, 0), counts, group)
    order = owners.argsort(stable=True).argsort().to(x.device)
    return rows.index_select(0, order).movedim(0, dim).contiguous()

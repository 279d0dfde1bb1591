"""Who computes what, so that all are done at the same time. In: costs. Out: a rank for each.

Pure functions on small tensors of the host; called by :mod:`.layout`, :mod:`.plan` and
:mod:`.dynamic`. Costs are blocks to compute.
"""

import heapq
from math import ceil, prod

import torch
from torch import Tensor

# Neighbours share keys, so an assignment of neighbours is taken if it is balanced so far. Beyond,
# ranks that wait cost more than the bytes that neighbours save.
ENOUGH = 0.95
# Of an H100.
_MULTIPROCESSORS = 132
# Queries, or keys, that one of them has at a time, with the whole list of what they see.
_TILE = 128
# Tiles for each of them, so that the longest list does not keep one busy when all others are done.
_MANY = 24


def balance(loads: Tensor) -> float:
    """Mean over maximum: the share of the time that the ranks compute. 1 if there is nothing."""
    most = loads.max().item()
    return loads.mean().item() / most if most else 1.0


def assign(costs: Tensor, spread: Tensor, ranks: int) -> Tensor:
    """A rank for each of a sequence of stretches of tokens: all ranks get as many, or one more,
    because the rest of a model costs as much for each token; and of those divisions a balanced one.

    The last stretch is the last rank's.

    Args:
        costs: float (stretches,), what the rank that gets it will compute.
        spread: bool (stretches,), those whose keys or queries all ranks want: they are dealt out
            one by one, lest one rank send to all others.
    """
    owners = _neighbours(spread, ranks)
    if balance(_loads(costs, owners, ranks)) < ENOUGH:
        owners = _longest_first(costs, spread, ranks)
    last = int(owners[-1]) if len(owners) else ranks - 1
    # Ranks are alike: whoever has the last stretch becomes the last rank.
    renamed = torch.arange(ranks)
    renamed[last], renamed[ranks - 1] = ranks - 1, last
    return renamed[owners]


def _loads(costs: Tensor, owners: Tensor, ranks: int) -> Tensor:
    return torch.zeros(ranks, dtype=costs.dtype).index_add_(0, owners, costs)


def _dealt(spread: Tensor, ranks: int) -> tuple[Tensor, Tensor, list[int]]:
    """Owners as far as stretches are dealt out, those that are left, and how many of them each
    rank is to have."""
    owners = torch.full(spread.shape, -1)
    dealt = spread.nonzero().flatten()
    count = max(1, len(dealt))
    # Evenly from the end: the last one is the last rank's.
    owners[dealt] = ((torch.arange(1, len(dealt) + 1) * ranks + count - 1) // count) - 1
    left = (owners < 0).nonzero().flatten()
    had = torch.bincount(owners[dealt], minlength=ranks).tolist()
    room = [0] * ranks
    # Later ranks first, so that the last stretch comes to the last rank.
    smallest = [(count, -rank) for rank, count in enumerate(had)]
    heapq.heapify(smallest)
    for _ in left:
        count, rank = heapq.heappop(smallest)
        room[-rank] += 1
        heapq.heappush(smallest, (count + 1, rank))
    return owners, left, room


def _neighbours(spread: Tensor, ranks: int) -> Tensor:
    owners, left, room = _dealt(spread, ranks)
    owners[left] = torch.arange(ranks).repeat_interleave(torch.tensor(room))
    return owners


def _longest_first(costs: Tensor, spread: Tensor, ranks: int) -> Tensor:
    """The costliest stretch that is left goes to the rank with least to do, of those with room."""
    owners, left, room = _dealt(spread, ranks)
    dealt = (owners >= 0).nonzero().flatten()
    loads = _loads(costs[dealt], owners[dealt], ranks).tolist()
    queue = [(load, rank) for rank, load in enumerate(loads) if room[rank]]
    heapq.heapify(queue)
    for stretch in left[costs[left].argsort(descending=True, stable=True)].tolist():
        load, rank = heapq.heappop(queue)
        owners[stretch] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(queue, (load + costs[stretch].item(), rank))
    return owners


def level(loads: Tensor, pieces: Tensor, holders: Tensor) -> Tensor:
    """A rank for each piece of work that only its holders can do, so that the largest load is
    small: pieces with few holders first, each to the holder with least to do.

    Args:
        loads: float (ranks,), what the ranks do already.
        pieces: float (pieces,), costs.
        holders: bool (ranks, pieces), at least one for each piece.
    """
    loads = loads.tolist()
    owners = torch.empty(len(pieces), dtype=torch.long)
    order = (holders.sum(dim=0) - pieces / (pieces.sum() + 1)).argsort(stable=True)
    of_piece = holders.T.tolist()
    for piece in order.tolist():
        able = [rank for rank, holds in enumerate(of_piece[piece]) if holds]
        best = min(able, key=loads.__getitem__)
        owners[piece] = best
        loads[best] += pieces[piece].item()
    return owners


def lasts(counts: Tensor, block_size: int, lines: int) -> float:
    """How long a GPU computes lists of blocks, in tiles with one block each: until multiprocessors
    have shared all of them, and no shorter than one of them takes for the longest.

    Args:
        counts: blocks in each list, (batch, heads, lists).
        block_size: queries, or keys, that have a list.
        lines: batches and heads of an attention, which counts may be fewer of.
    """
    if not counts.numel():
        return 0.0
    return max(float(counts.max()), _evenly(counts, block_size, lines))


def _evenly(counts: Tensor, block_size: int, lines: int) -> float:
    """What each multiprocessor has of lists, if they can be cut anywhere."""
    total = counts.sum().item() * lines / prod(counts.shape[:2]) * block_size / _TILE
    return total / _MULTIPROCESSORS


def pieces(counts: Tensor, block_size: int, lines: int, most: int) -> int:
    """Into how many pieces long lists are to be cut, at most so many, so that none of them takes
    longer than multiprocessors have to do with all lists.

    Args:
        counts, block_size, lines: as for :func:`lasts`.
    """
    longest = float(counts.max()) if counts.numel() else 0.0
    if not longest:
        return 1
    return min(most, ceil(longest / _evenly(counts, block_size, lines)))


def are_many(tokens: float, lines: int) -> bool:
    """Whether so many queries, of so many batches and heads, are so many tiles for each
    multiprocessor that the longest list does not matter."""
    return tokens * lines >= _MANY * _MULTIPROCESSORS * _TILE

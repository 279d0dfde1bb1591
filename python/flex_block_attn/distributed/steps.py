"""What travels, and when: the keys that ranks need of others, in steps. In: a mask's blocks and a
layout. Out: for each step what a rank sends, what it receives, and where that goes.

Called by :mod:`.plan` and :mod:`.dynamic`. On the host all is counted in blocks, which are few;
rows of tensors are made of them on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, block_lengths, upload

# Of two ranks' keys, the share that is wanted from which on all are sent. To choose means that the
# GPU copies keys before they leave and where they arrive, while nothing else runs; all of them go
# and come as they lie, while it computes.
_NEARLY_ALL = 0.75
# Of a smaller share all are sent, too, if it is not small and all can come while a rank computes
# with its own: pairs of tokens that it computes for each token that comes. A GPU that computes 600
# TFLOPS takes as long for them as a connection of 100 GB/s for the token.
_MANY = 0.25
_HIDING = 6000


@dataclass(frozen=True)
class Step:
    """Keys that come from other ranks at once.

    A row is a token of one group of heads: heads with a mask of their own want other keys, so each
    is a group; heads that share a mask are one.
    """

    # (groups, slots): the key blocks that become each group's columns; -1 where it has fewer.
    columns: Tensor
    # Tokens of a group's columns.
    tokens: int
    # Rows from each rank, and to each.
    receive: list[int]
    send: list[int]
    # Of each block to send, by rank it goes to: (group, its first token among the rank's own,
    # tokens).
    sent: Tensor
    # Of each block that comes: (place of its first row among (groups, tokens), tokens).
    came: Tensor
    # Whether all keys of two ranks go across: one group then, and rows are not put together.
    is_whole: bool = False

    def moves(self, device: torch.device) -> "Moves":
        """The step's rows on a device; blocks are few, so this is where they become rows. The
        host does not wait."""
        columns = upload(self.columns, device)
        if self.is_whole:
            none = columns.new_empty(0)
            return Moves(self, columns, none, none, None, None)
        group, start, lengths = upload(self.sent, device).unbind(0)
        count = sum(self.send)
        tokens = _each_row(start, lengths, count) + _offsets(lengths, count)
        places = sources = None
        if len(self.columns) > 1:
            start, came_lengths = upload(self.came, device).unbind(0)
            count = sum(self.receive)
            places = _each_row(start, came_lengths, count) + _offsets(came_lengths, count)
            sources = places.new_zeros(len(self.columns) * self.tokens)
            sources[places] = torch.arange(count, device=device)
        groups = _each_row(group, lengths, sum(self.send))
        return Moves(self, columns, groups, tokens, places, sources)


@dataclass(frozen=True)
class Moves:
    """The rows of a step, on a device."""

    step: Step
    # As the step's.
    columns: Tensor
    # Group, and position among the rank's own tokens, of each row to send; nothing if all keys go.
    groups: Tensor
    tokens: Tensor
    # Where received rows go among (groups, tokens), and, for each of these, the row that comes
    # there, any where none does; None if they lie as they come.
    places: Tensor | None
    sources: Tensor | None


def _each_row(x: Tensor, lengths: Tensor, count: int) -> Tensor:
    """A value of each block, for each of its rows, ``count`` in all."""
    return x.repeat_interleave(lengths, output_size=count)


def _offsets(lengths: Tensor, count: int) -> Tensor:
    """The place of each row in its block."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(count, device=lengths.device) - _each_row(starts, lengths, count)


def groups_of(blocks: Tensor, kv_heads: int) -> int:
    """Groups of heads that want the same keys: one if all share a mask, else a key head each."""
    if blocks.shape[1] > 1 and (not kv_heads or blocks.shape[1] % kv_heads):
        raise ValueError(
            f"kv_heads is {kv_heads}, which does not divide the mask's {blocks.shape[1]} heads"
        )
    return 1 if blocks.shape[1] == 1 else kv_heads


def needs_of(blocks: Tensor, layout: Layout, groups: int) -> Tensor:
    """Which key blocks of others each rank needs for the rows that it computes alone: bool
    (groups, ranks, kv_blocks), on the device of ``blocks``."""
    device = blocks.device
    wanted = blocks.any(dim=0).unflatten(0, (groups, -1)).any(dim=1)
    q_owners, kv_owners, shared = layout.owners(device)
    wanted &= ~shared[:, None]
    rank = torch.arange(layout.ranks, device=device)[:, None]
    # A product of matrices counts the rows that want a block.
    counts = (rank == q_owners).float() @ wanted.float()
    return (counts > 0) & (rank != kv_owners)


def sent_of(needs: Tensor, layout: Layout, chunks: int, pairs: float = 0.0) -> Tensor:
    """Which key blocks of others each rank is sent: those that it needs, but all between two ranks
    that need nearly all, or many while they compute long.

    Args:
        needs: as of :func:`needs_of`, on the host.
        pairs: of tokens, in a head, that a rank computes with its own keys for each token that
            comes if all do, as far as that is known.
    """
    wanted = needs.sum().item() / max(1, len(needs) * len(layout.kv_owners))
    enough = _NEARLY_ALL if pairs < _HIDING else _MANY
    if layout.ranks != 2 or chunks > 1 or wanted < enough:
        return needs
    return _others(layout).expand_as(needs)


def takes_all(needs: Tensor, layout: Layout) -> bool:
    """Whether all keys go to all ranks; ``needs`` are those of :func:`sent_of`."""
    return needs.equal(_others(layout).expand_as(needs))


def _others(layout: Layout) -> Tensor:
    """bool (ranks, kv_blocks): blocks that a rank does not have."""
    return torch.arange(layout.ranks)[:, None] != layout.kv_owners


def steps_of(needs: Tensor, layout: Layout, rank: int, chunks: int) -> list[Step]:
    """The steps of a rank, as many for each; each list of blocks from one rank to another is
    divided between them, so that every step uses all connections.

    Without loops over ranks, groups or blocks: for a dynamic mask this is done in each call.

    Args:
        needs: as of :func:`sent_of`, on the host.
    """
    if not needs.any():
        return []
    if layout.ranks == 2 and chunks == 1 and takes_all(needs, layout):
        return [_whole_step(layout, rank)]
    size, groups = layout.kv_block_size, len(needs)
    owners = layout.kv_owners
    ranks = torch.arange(layout.ranks)[:, None, None]
    came = _Blocks((needs[:, rank] & (owners == ranks)).nonzero(), layout, chunks)
    gone = _Blocks((needs & (owners == rank)).transpose(0, 1).nonzero(), layout, chunks)
    # The rank's own blocks ascend, and only the last may be short.
    starts = ((owners == rank).cumsum(0) - 1) * size
    steps = []
    for chunk in range(chunks):
        send, receive = gone.chunk(chunk), came.chunk(chunk)
        columns, tokens, places = _columns(receive, layout, groups)
        steps.append(
            Step(
                columns,
                tokens,
                receive.rows_of_ranks(),
                send.rows_of_ranks(),
                torch.stack((send.group, starts[send.block], send.lengths)),
                torch.stack((places, receive.lengths)),
            )
        )
    return steps


def _whole_step(layout: Layout, rank: int) -> Step:
    """All keys of two ranks."""
    columns = (layout.kv_owners != rank).nonzero().flatten()[None]
    tokens = [layout.count(each, keys=True) for each in range(2)]
    other = 1 - rank
    receive, send = (
        [n * (each == other) for each in range(2)] for n in (tokens[other], tokens[rank])
    )
    none = torch.empty(0, dtype=torch.long)
    return Step(columns, tokens[other], receive, send, none, none, is_whole=True)


class _Blocks:
    """Blocks on their way from or to ranks, in the order (rank, group, block)."""

    def __init__(self, entries: Tensor, layout: Layout, chunks: int, of_chunk: Any = None):
        self.rank, self.group, self.block = entries.unbind(1)
        self._layout, self._entries, self._chunks = layout, entries, chunks
        self.lengths = block_lengths(layout.kv_len, layout.kv_block_size)[self.block]
        self._of_chunk = of_chunk
        if of_chunk is None:
            # Of a list of n blocks, from one rank for one group, chunk c begins with n c / chunks.
            key = self.rank * (int(self.group.max()) + 1 if len(entries) else 1) + self.group
            _, which, counts = key.unique_consecutive(return_inverse=True, return_counts=True)
            number = torch.arange(len(key)) - (counts.cumsum(0) - counts)[which]
            self._of_chunk = ((number + 1) * chunks - 1).div(counts[which], rounding_mode="floor")

    def chunk(self, chunk: int) -> "_Blocks":
        """Those of a chunk."""
        mine = self._of_chunk == chunk
        return _Blocks(self._entries[mine], self._layout, self._chunks, self._of_chunk[mine])

    def rows_of_ranks(self) -> list[int]:
        """Rows of each rank."""
        counts = torch.zeros(self._layout.ranks, dtype=torch.long)
        return counts.index_add_(0, self.rank, self.lengths).tolist()


def _columns(came: _Blocks, layout: Layout, groups: int) -> tuple[Tensor, int, Tensor]:
    """The columns of a step, their tokens, and where each block's first row goes."""
    size = layout.kv_block_size
    short = layout.kv_len % size
    counts = came.group.bincount(minlength=groups)
    # Lists end in the last slot, where a short block has to be. A group without it, beside others
    # that have it, leaves that slot free.
    has_short = torch.zeros(groups, dtype=torch.bool)
    if short:
        has_short[came.group[came.block == len(layout.kv_owners) - 1]] = True
    free = (~has_short & has_short.any()).long()
    slots = int((counts + free).max())
    tokens = slots * size - (size - short if has_short.any() else 0)
    by_group = came.group.argsort(stable=True)
    number = torch.empty_like(by_group)
    number[by_group] = torch.arange(len(by_group))
    number -= (counts.cumsum(0) - counts)[came.group]
    slot = (slots - free - counts)[came.group] + number
    columns = torch.full((groups, slots), -1)
    columns[came.group, slot] = came.block
    return columns, tokens, came.group * tokens + slot * size

"""What each rank computes and sends. In: a mask and a layout. Out: a :class:`ContextPlan`.

Called by users, who keep plans for as long as they keep masks, and by :mod:`.context`, which
carries them out. Pure: a plan knows all ranks, and needs no process group.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..masks import BlockMask, as_size
from .balance import are_many, balance, lasts, level, pieces
from .cut import mask_of_heads, whole_blocks
from .layout import Layout, Positions, Rows, block_lengths
from .merge import FEW
from .report import RankReport, Report
from .steps import Moves, groups_of, needs_of, sent_of, steps_of, takes_all

# Two launches of a backward pass become one, which has to wait for all keys, if they would take so
# many times as long.
_MUCH_LONGER = 1.25
# Of the best balance that there is, what is as good.
_AS_GOOD = 0.99


@dataclass(frozen=True)
class Shares:
    """Who needs and computes what of a mask."""

    # As the user's; or without its shared rows.
    layout: Layout
    # bool (groups, ranks, kv_blocks): the keys of others that a rank is sent.
    needs: Tensor
    # (groups, kv_blocks): the rank that computes the column in rows that all share.
    column_ranks: Tensor
    # float (ranks,): blocks to compute, means over batch and heads.
    loads: Tensor
    # Whether ranks compute rows alone that the user's layout shares, and cut them into pieces.
    cuts: bool = False


@dataclass(frozen=True)
class Pieces:
    """The forward pass of a rank that cuts its long rows: there are several of each, over some of
    their keys each."""

    # Which of the rank's rows are long.
    long: Positions
    # Pieces of a long row in a launch, at most. A launch's mask is of all rows, each long one with
    # its last piece, and of the other pieces before these.
    most: int


class RankPlan:
    """A plan as one rank carries it out, on one device."""

    def __init__(
        self,
        rank: int,
        rows: Rows,
        local: BlockMask | None,
        steps: list[tuple[Moves, BlockMask | None]],
        sizes: tuple[int, int],
        groups: int,
        together: BlockMask | None = None,
        pieces: Pieces | None = None,
        backward: "RankPlan | None" = None,
    ):
        self.rank = rank
        self.rows = rows
        # Groups of heads that keys travel for.
        self.groups = groups
        # The mask over the keys that the rank has; None if it selects nothing.
        self.local = local
        # Blocks of queries and of keys.
        self.block_sizes = sizes
        # The mask over all keys of two ranks, one's after the other's, if the backward pass is to
        # compute with all at once.
        self.together = together
        # How rows are cut, if they are, which only concerns a forward pass.
        self.pieces = pieces
        # The plan of the backward pass.
        self.backward = self if backward is None else backward
        self._steps = steps

    def known(self) -> list[tuple[Moves, BlockMask | None]]:
        """Steps that are known before anything is computed."""
        return self._steps

    def steps(self) -> list[tuple[Moves, BlockMask | None]]:
        """All steps, as many on each rank: the keys that come, and the mask over them."""
        return self._steps


class ContextPlan:
    """Attention over a static mask, divided between ranks by tokens.

    Each rank computes the queries that it holds, over its own keys and those that others send it:
    blocks that its rows keep, and no more; of heads with masks of their own, each head's. (Two
    ranks that want nearly all keys of each other send all, or many while they compute long: to
    pick some out would take longer.) Rows that the layout has all ranks share are computed piece by
    piece: each column by a rank that has its keys anyway. But if all keys go to all ranks, and rows
    are many, each rank computes its own ones of these alone, where that is as balanced; if rows are
    few, too, of two ranks: then each is computed in pieces.

    Args:
        mask: over the whole sequence, of whole blocks.
        ranks: how many there are; their layout is :meth:`Layout.balanced`.
        layout: where tokens are, instead of ``ranks``.
        chunks: how many parts keys come in; one is computed with while the next is on its way. If
            not given, 1 for two ranks, whose own keys are enough to compute with until all others
            have come, and 2 for more.

    >>> plan = ContextPlan(BlockMask.sliding_window(960, 960, 64, 64, left=64, right=64), ranks=3)
    >>> plan
    ContextPlan(3 ranks, balance 0.96, 4 of 30 blocks sent)
    """

    def __init__(
        self,
        mask: BlockMask,
        ranks: int | None = None,
        *,
        layout: Layout | None = None,
        chunks: int | None = None,
    ):
        blocks = whole_blocks(mask)
        if (ranks is None) == (layout is None):
            raise TypeError("either ranks or layout must be given, and not both")
        self.layout = Layout.balanced(mask, ranks) if layout is None else layout
        sizes = mask.q_len, mask.kv_len, mask.q_block_size, mask.kv_block_size
        if self.layout.sizes != sizes:
            raise ValueError(
                f"mask has (q_len, kv_len, q_block_size, kv_block_size) of {sizes}, "
                f"but the layout {self.layout.sizes}"
            )
        self.chunks = as_chunks(chunks, self.layout.ranks)
        self.mask = mask
        self.blocks = blocks.cpu()
        self._shares: dict[tuple[int, int], Shares] = {}
        self._of_rank: dict[tuple[int, torch.device, int, int], RankPlan] = {}
        self._of_heads: dict[range, ContextPlan] = {}

    @property
    def ranks(self) -> int:
        """How many it is for."""
        return self.layout.ranks

    def of_heads(self, heads: range) -> "ContextPlan":
        """The plan for some query heads, with the same layout."""
        mask = mask_of_heads(self.mask, heads)
        if mask is self.mask:
            return self
        if heads not in self._of_heads:
            self._of_heads[heads] = ContextPlan(mask, layout=self.layout, chunks=self.chunks)
        return self._of_heads[heads]

    def shares(self, kv_heads: int | None = None, lines: int | None = None) -> Shares:
        """Who needs and computes what, where k and v have so many heads, and q so many batches and
        heads together; as many as the mask, if not given."""
        batch, heads = self.blocks.shape[:2]
        groups = groups_of(self.blocks, heads if kv_heads is None else kv_heads)
        key = groups, batch * heads if lines is None else lines
        if key not in self._shares:
            self._shares[key] = self._shares_of(*key)
        return self._shares[key]

    def _shares_of(self, groups: int, lines: int) -> Shares:
        layout = self.layout
        # (groups, q_blocks, kv_blocks), adding up to means over batch and heads.
        kept = self.blocks.double().mean(dim=0).unflatten(0, (groups, -1)).sum(dim=1)
        kept /= self.blocks.shape[1]
        shares = self._shares_in(layout, kept)
        if not takes_all(shares.needs, layout):
            return shares
        # Nothing but a balance is to be had from rows that are shared, and, where rows are few, an
        # end to what takes longest, which pieces have as well.
        cuts = not are_many(layout.q_len / layout.ranks, lines)
        if cuts and not self._can_cut():
            return shares
        alone = self._shares_in(layout.alone(), kept)
        as_good = balance(alone.loads) >= _AS_GOOD * balance(shares.loads)
        return replace(alone, cuts=cuts) if as_good else shares

    def _can_cut(self) -> bool:
        """Whether long rows can be computed in pieces: of two ranks that send all, so that there
        are few launches whose pieces are put together; and if they are whole blocks, because only
        a launch's last block may be short."""
        layout = self.layout
        short = layout.q_len % layout.q_block_size > 0 and bool(layout.shared[-1])
        return layout.ranks == 2 and self.chunks == 1 and bool(layout.shared.any()) and not short

    def _shares_in(self, layout: Layout, kept: Tensor) -> Shares:
        ranks = torch.arange(layout.ranks)[:, None]
        has = ranks == layout.kv_owners
        mine = (ranks == layout.q_owners) & ~layout.shared
        # What ranks compute alone: (ranks, kv_blocks), all of it, and that with their own keys.
        computed = mine.to(kept.dtype) @ kept.sum(dim=0)
        loads, own = computed.sum(dim=1), (computed * has).sum(dim=1)
        come = layout.kv_len - torch.tensor([layout.count(r, keys=True) for r in range(len(has))])
        pairs = own * layout.q_block_size * layout.kv_block_size / come.clamp(min=1)
        needs = needs_of(self.blocks, layout, len(kept))
        needs = sent_of(needs, layout, self.chunks, pairs.min().item())
        # Shared rows in pieces: a column of a group each, for whoever has its keys anyway.
        pieces = kept[:, layout.shared].sum(dim=1)
        owners, total = _dealt(layout, loads, pieces, needs | has)
        if takes_all(needs, layout):
            # Of these rows, too, ranks compute more with their own keys, by as much as of others:
            # in what is computed with the keys of others they would be the longest by far.
            kept_back = _kept_back(layout, own / loads.clamp(min=1e-9), pieces)
            able = (needs & ~kept_back[:, None]) | has
            others, leveled = _dealt(layout, loads, pieces, able)
            if balance(leveled) >= _AS_GOOD * balance(total):
                owners, total = others, leveled
        return Shares(layout, needs, owners, total)

    def of_rank(
        self, rank: int, device: torch.device, kv_heads: int, lines: int | None = None
    ) -> RankPlan:
        """What a rank does where k and v have so many heads, and q so many batches and heads
        together, as many as the mask if not given; made once for a device."""
        groups = groups_of(self.blocks, kv_heads)
        lines = self.blocks.shape[:2].numel() if lines is None else lines
        key = rank, device, groups, lines
        if key not in self._of_rank:
            self._of_rank[key] = self._made(rank, device, self.shares(kv_heads, lines), lines)
        return self._of_rank[key]

    def _made(self, rank: int, device: torch.device, shares: Shares, lines: int) -> RankPlan:
        layout, cpu = shares.layout, torch.device("cpu")
        cut = Cut(self.blocks, layout.rows(rank, cpu), shares.column_ranks == rank, layout)
        steps = steps_of(shares.needs, layout, rank, self.chunks)
        moves = [step.moves(device) for step in steps]
        # Of each launch: columns, and their tokens.
        own = layout.own_columns(rank, cpu), layout.count(rank, keys=True)
        keys = [own, *((step.columns, step.tokens) for step in steps)]
        rows, sizes = layout.rows(rank, device), (layout.q_block_size, layout.kv_block_size)

        def planned(masks: list[BlockMask | None], **more: Any) -> RankPlan:
            local, *others = masks
            of_steps = list(zip(moves, others, strict=True))
            return RankPlan(rank, rows, local, of_steps, sizes, len(shares.needs), **more)

        together = None
        if len(steps) == 1 and steps[0].is_whole and self._waits(shares, lines):
            together = cut.static(_all_columns(layout), layout.kv_len, device)
        plan = planned([cut.static(*each, device) for each in keys], together=together)
        if not shares.cuts:
            return plan
        # Only forward: the backward pass takes its time by columns, however long rows are.
        long = self.layout.shared[self.layout.q_owners == rank]
        counts = [cut.pieces(columns, lines, FEW // len(keys)) for columns, _ in keys]
        masks = [
            cut.static(*each, device, long, count) for each, count in zip(keys, counts, strict=True)
        ]
        in_pieces = Pieces(self.layout.rows(rank, device).shared, max(counts))
        return planned(masks, pieces=in_pieces, backward=plan)

    def _waits(self, shares: Shares, lines: int) -> bool:
        """Whether the backward passes of two ranks wait for all keys: if launches over one's own
        and over the other's would take much longer. So it is where all rows see some keys of each,
        which then are the longest in both."""
        layout, cpu = shares.layout, torch.device("cpu")
        apart, at_once = [], []
        for rank in range(2):
            cut = Cut(self.blocks, layout.rows(rank, cpu), shares.column_ranks == rank, layout)
            parts = [cut.counts(layout.own_columns(each, cpu)) for each in range(2)]
            if not all(part.any() for part in parts):
                return False
            times = (lasts(x, layout.kv_block_size, lines) for x in (*parts, torch.cat(parts, 2)))
            first, second, both = times
            apart.append(first + second)
            at_once.append(both)
        return max(apart) > _MUCH_LONGER * max(at_once)

    def report(
        self, *, heads: int, head_dim: int, kv_heads: int | None = None, itemsize: int = 2
    ) -> Report:
        """Rows, blocks and bytes of each rank, beside those of a ring that sends all keys.

        Args:
            heads, head_dim: of q; the batch is the mask's.
            kv_heads: of k and v, if fewer.
            itemsize: bytes of a number.

        >>> mask = BlockMask.sliding_window(960, 960, 64, 64, left=64, right=64)
        >>> print(ContextPlan(mask, ranks=3).report(heads=8, head_dim=64))
        rank  q blocks    blocks  kv blocks  received    MB in   MB out  MB in a ring
           0         5      14.0          5       1.0      0.1      0.1           1.3
           1         5      15.0          5       2.0      0.3      0.3           1.3
           2         5      14.0          5       1.0      0.1      0.1           1.3
        balance 0.956, 0.5 MB moved, 13.3% of a ring's
        """
        heads, head_dim = as_size("heads", heads), as_size("head_dim", head_dim)
        kv_heads = heads if kv_heads is None else as_size("kv_heads", kv_heads)
        itemsize = as_size("itemsize", itemsize)
        batch = self.blocks.shape[0]
        shares = self.shares(kv_heads, batch * heads)
        layout = shares.layout
        q_tokens = block_lengths(layout.q_len, layout.q_block_size)
        kv_tokens = block_lengths(layout.kv_len, layout.kv_block_size)
        groups = len(shares.needs)
        key = 2 * batch * kv_heads * head_dim * itemsize
        ranks = []
        of_all = int(q_tokens[layout.shared].sum())
        for rank in range(layout.ranks):
            has = layout.kv_owners == rank
            own = int(q_tokens[layout.shared & (layout.q_owners == rank)].sum())
            others = layout.ranks - 1
            query = batch * heads * head_dim * itemsize
            # Partial outputs and gradients travel in float32, with the lse.
            partial = batch * heads * (head_dim + 1) * 4
            keys_in = int((shares.needs[:, rank] * kv_tokens).sum()) * key // groups
            keys_out = int((shares.needs[:, :, has] * kv_tokens[has]).sum()) * key // groups
            ranks.append(
                RankReport(
                    q_blocks=int((layout.q_owners == rank).sum()),
                    blocks=shares.loads[rank].item(),
                    kv_blocks=int(has.sum()),
                    received=shares.needs[:, rank].sum().item() / groups,
                    bytes_in=keys_in + (of_all - own) * query + others * own * partial,
                    bytes_out=keys_out + others * own * query + (of_all - own) * partial,
                    ring_bytes=int(kv_tokens[~has].sum()) * key,
                )
            )
        return Report(ranks)

    def __repr__(self) -> str:
        shares = self.shares()
        sent = shares.needs.sum().item() / len(shares.needs)
        ring = (self.ranks - 1) * len(self.layout.kv_owners)
        return (
            f"ContextPlan({self.ranks} ranks, balance {balance(shares.loads):.2f}, "
            f"{sent:.0f} of {ring} blocks sent)"
        )


def _all_columns(layout: Layout) -> Tensor:
    """The columns of all keys, those of the first rank first, (1, kv_blocks)."""
    return layout.kv_owners.argsort(stable=True)[None]


def _dealt(layout: Layout, loads: Tensor, pieces: Tensor, able: Tensor) -> tuple[Tensor, Tensor]:
    """A rank for each piece of shared rows, of those that are able, bool (groups, ranks,
    kv_blocks); and what ranks compute then."""
    owners = layout.kv_owners.repeat(len(pieces), 1)
    some = pieces > 0
    owners[some] = level(loads, pieces[some], able.transpose(0, 1)[:, some])
    return owners, loads.index_add(0, owners.flatten(), pieces.flatten())


def _kept_back(layout: Layout, shares: Tensor, pieces: Tensor) -> Tensor:
    """Which pieces ranks keep, bool (groups, kv_blocks), so that a rank's own keys come to a share
    of what it computes of shared rows, once the other pieces have been dealt out evenly."""
    ranks = layout.ranks
    keep = ((shares * ranks - 1) / max(1, ranks - 1)).clamp(0, 1)[layout.kv_owners]
    result = pieces > 0
    for rank in range(ranks):
        mine = result & (layout.kv_owners == rank)
        # One of so many, evenly.
        ends = mine.cumsum(dim=1) * keep
        result &= ~mine | (ends.floor() > (ends - keep).floor())
    return result


def as_chunks(chunks: int | None, ranks: int) -> int:
    """Parts that keys come in, if given, else by the number of ranks."""
    if chunks is None:
        return 1 if ranks <= 2 else 2
    chunks = as_size("chunks", chunks)
    if not chunks:
        raise ValueError("chunks must be positive, got 0")
    return chunks


class Cut:
    """Makes masks of a rank's joint rows over some columns."""

    def __init__(self, blocks: Tensor, rows: Rows, computes: Tensor, layout: Layout):
        """``computes`` are the columns that are the rank's in shared rows, (groups, kv_blocks)."""
        self._groups = len(computes)
        computes = computes.repeat_interleave(blocks.shape[1] // self._groups, dim=0)[:, None]
        self._blocks = blocks[:, :, rows.blocks] & (~rows.are_shared[:, None] | computes)
        self._layout = layout
        self._q_len = len(rows.own) + sum(rows.shared_counts)

    def counts(self, columns: Tensor) -> Tensor:
        """Blocks of each of the columns, (batch, heads, slots)."""
        return self._of(columns).sum(dim=2)

    def pieces(self, columns: Tensor, lines: int, most: int) -> int:
        """Into how many pieces long rows are to be cut, at most so many."""
        return pieces(self._of(columns).sum(dim=3), self._layout.q_block_size, lines, most)

    def static(
        self,
        columns: Tensor,
        tokens: int,
        device: torch.device,
        long: Tensor | None = None,
        count: int = 1,
    ) -> BlockMask | None:
        """The mask over columns of so many tokens, (groups or 1, slots); None where it selects
        nothing, which only a mask on the host can be asked.

        Args:
            long: bool (rows,), those that are cut into ``count`` pieces: all but the last of each
                come before all rows.
        """
        blocks = self._of(columns)
        if not blocks.any():
            return None
        if count > 1:
            whole = blocks[:, :, long]
            # Of a row's n blocks, piece p begins with n p / count.
            number = whole.cumsum(dim=3) - 1
            piece = number * count // whole.sum(dim=3, keepdim=True).clamp(min=1)
            *first, blocks[:, :, long] = (whole & (piece == i) for i in range(count))
            blocks = torch.cat([*first, blocks], dim=2)
        return self._mask(blocks.to(device), tokens)

    def dynamic(self, columns: Tensor, tokens: int) -> BlockMask | None:
        """As :meth:`static`, of a mask whose values the host does not know."""
        if not tokens or not self._q_len:
            return None
        return self._mask(self._of(columns), tokens)

    def _of(self, columns: Tensor) -> Tensor:
        if len(columns) == 1:
            # None of the slots are empty.
            return self._blocks.index_select(3, columns[0])
        heads = columns.repeat_interleave(self._blocks.shape[1] // self._groups, dim=0)
        heads = heads[None, :, None].expand(*self._blocks.shape[:3], -1)
        return self._blocks.gather(3, heads.clamp(min=0)) & (heads >= 0)

    def _mask(self, blocks: Tensor, tokens: int) -> BlockMask:
        layout = self._layout
        # Beyond the rows there are pieces, of whole blocks.
        q_len = self._q_len + (blocks.shape[2] - self._blocks.shape[2]) * layout.q_block_size
        return BlockMask(blocks, q_len, tokens, layout.q_block_size, layout.kv_block_size)

"""Plans of masks that are made anew for each call. In: mask values on a device, and a layout. Out:
a :class:`DynamicPlan`.

Called by users of SSTA or MoBA masks. What ranks send depends on the mask, and torch's collectives
want its sizes on the host. So the host has to learn them, once in a call: the blocks that each rank
needs, heads x ranks x blocks bools, are copied to it behind the mask, and it waits for them only
after it has launched the attention over the rank's own keys, with which the GPU is then busy. Every
rank has the whole mask, so sizes need not be exchanged. With ``exchange="all"`` sizes do not depend
on the mask: all keys go to all ranks, and the host waits for nothing.
"""

import weakref

import torch
from torch import Tensor

from ..masks import BlockMask, as_blocks
from .balance import are_many
from .layout import Layout
from .plan import Cut, RankPlan, as_chunks
from .steps import Moves, groups_of, needs_of, sent_of, steps_of

# Steps in which all keys travel, of each layout: they do not depend on masks.
_all_steps: "weakref.WeakKeyDictionary[Layout, dict[tuple, list[Moves]]]" = (
    weakref.WeakKeyDictionary()
)


class DynamicPlan:
    """As :class:`ContextPlan`, for a mask that is used once.

    Args:
        blocks: the whole mask, the same on every rank, bool, (batch or 1, heads or 1, q_blocks,
            kv_blocks) or fewer dimensions; of q, k and v's device. :func:`gather_blocks` helps to
            make it.
        layout: where tokens are: :meth:`Layout.even`, or :meth:`Layout.balanced` of a mask like
            those to come. Rows that it shares are computed where each column's keys are; if these
            are many, and ranks are two or send all keys, each computes its own ones alone, where
            each has as many.
        chunks: how many parts keys come in; one is computed with while the next is on its way. If
            not given, 1 for two ranks, whose own keys are enough to compute with until all others
            have come, and 2 for more.
        exchange: "needed" sends the keys that rows keep; the host waits once in a forward pass,
            after the attention over a rank's own keys has been launched, for a copy of the
            blocks that each rank needs. "all" sends all keys to all ranks, and the host never
            waits; they leave before that attention has all of a GPU. If not given, "all" for two
            ranks, which by many heads' masks need about all of each other, "needed" for more.
    """

    def __init__(
        self,
        blocks: Tensor,
        layout: Layout,
        *,
        chunks: int | None = None,
        exchange: str | None = None,
    ):
        if exchange is None:
            exchange = "all" if layout.ranks == 2 else "needed"
        self.blocks = as_blocks(blocks)
        shape = len(layout.q_owners), len(layout.kv_owners)
        if self.blocks.shape[2:] != shape:
            raise ValueError(
                f"blocks has {tuple(self.blocks.shape[2:])} blocks, but the layout {shape}"
            )
        if exchange not in ("needed", "all"):
            raise ValueError(f'exchange must be "needed" or "all", got {exchange!r}')
        self.layout = layout
        self.chunks = as_chunks(chunks, layout.ranks)
        self.exchange = exchange

    @property
    def ranks(self) -> int:
        """How many it is for."""
        return self.layout.ranks

    def of_heads(self, heads: range) -> "DynamicPlan":
        """The plan for some query heads."""
        if self.blocks.shape[1] == 1:
            return self
        part = self.blocks[:, heads.start : heads.stop]
        return DynamicPlan(part, self.layout, chunks=self.chunks, exchange=self.exchange)

    def of_rank(
        self, rank: int, device: torch.device, kv_heads: int, lines: int | None = None
    ) -> RankPlan:
        """What a rank does where k and v have so many heads, and q so many batches and heads
        together; as many as the mask, if not given."""
        if self.blocks.device != device:
            raise ValueError(f"blocks is on {self.blocks.device}, but q is on {device}")
        lines = self.blocks.shape[:2].numel() if lines is None else lines
        return _DynamicRankPlan(self, self._layout_for(lines), rank, device, kv_heads)

    def _layout_for(self, lines: int) -> Layout:
        """The layout; or without its shared rows, where ranks are better off without."""
        layout = self.layout
        # Long rows want all keys. Of two ranks that choose by scores, others do so, too.
        come = self.exchange == "all" or (layout.ranks == 2 and self.chunks == 1)
        many = are_many(layout.q_len / layout.ranks, lines)
        return layout.alone() if come and many and layout.shared_evenly else layout


class _DynamicRankPlan(RankPlan):
    """Masks are made as their turn comes, and steps when they must be known; both are kept for
    the backward pass."""

    def __init__(
        self, plan: DynamicPlan, layout: Layout, rank: int, device: torch.device, kv_heads: int
    ):
        self._all = plan.exchange == "all"
        # All keys travel for all heads alike.
        groups = 1 if self._all else groups_of(plan.blocks, kv_heads)
        if not self._all:
            self._needs = _OnHost(needs_of(plan.blocks, layout, groups))
        rows = layout.rows(rank, device)
        computes = (layout.owners(device)[1] == rank).repeat(groups, 1)
        self._cut = Cut(plan.blocks, rows, computes, layout)
        self._layout, self._chunks, self._rank, self._device = layout, plan.chunks, rank, device
        self._made = False
        own = layout.own_columns(rank, device)
        local = self._cut.dynamic(own, layout.count(rank, keys=True))
        sizes = layout.q_block_size, layout.kv_block_size
        super().__init__(rank, rows, local, [], sizes, groups)

    def known(self) -> list[tuple[Moves, BlockMask | None]]:
        return self.steps() if self._made or self._all else []

    def steps(self) -> list[tuple[Moves, BlockMask | None]]:
        if not self._made:
            self._steps = [
                (moves, self._cut.dynamic(moves.columns, moves.step.tokens))
                for moves in self._make()
            ]
            self._made = True
        return self._steps

    def _make(self) -> list[Moves]:
        layout, rank, chunks, device = self._layout, self._rank, self._chunks, self._device
        if not self._all:
            # Here the host waits for what the mask needs.
            needs = sent_of(self._needs.wait(), layout, chunks)
            return [step.moves(device) for step in steps_of(needs, layout, rank, chunks)]
        kept = _all_steps.setdefault(layout, {})
        key = rank, chunks, device
        if key not in kept:
            needs = torch.arange(layout.ranks)[None, :, None] != layout.kv_owners
            kept[key] = [step.moves(device) for step in steps_of(needs, layout, rank, chunks)]
        return kept[key]


class _OnHost:
    """A small tensor on its way to the host, behind what is launched already."""

    def __init__(self, x: Tensor):
        self._copy = x
        self._event = None
        if x.is_cuda:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._copy.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy

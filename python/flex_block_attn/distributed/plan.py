"""What each rank computes and sends. In: a mask and a layout. Out: a :class:`ContextPlan`.

Called by users, who keep plans for as long as they keep masks, and by :mod:`.context`, which
carries them out. Pure: a plan knows all ranks, and needs no process group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import BlockMask, as_size
from .balance import balance, level
from .cut import mask_of_heads, whole_blocks
from .layout import Layout, Rows, tokens_of
from .report import RankReport, Report


@dataclass(frozen=True)
class Step:
    """Keys that come from other ranks at once."""

    # Key blocks in the order they come: by rank, ascending within.
    columns: Tensor
    # Tokens from each rank, and to each.
    receive: list[int]
    send: list[int]
    # Positions of the tokens to send among the rank's own, by rank they go to.
    send_tokens: Tensor

    def to(self, device: torch.device) -> "Step":
        """The step with its positions on a device; the host does not wait for them."""
        return Step(self.columns, self.receive, self.send, upload(self.send_tokens, device))


class RankPlan:
    """A plan as one rank carries it out, on one device."""

    def __init__(self, rows: Rows, local: BlockMask | None, steps: list, sizes: tuple):
        self.rows = rows
        # The mask over the keys that the rank has; None if it selects nothing.
        self.local = local
        # Blocks of queries and of keys.
        self.block_sizes = sizes
        self._steps = steps

    def known(self) -> list[tuple[Step, BlockMask | None]]:
        """Steps that are known before anything is computed."""
        return self._steps

    def steps(self) -> list[tuple[Step, BlockMask | None]]:
        """All steps, as many on each rank: the keys that come, and the mask over them."""
        return self._steps


class ContextPlan:
    """Attention over a static mask, divided between ranks by tokens.

    Each rank computes the queries that it holds, over its own keys and those that others send it:
    blocks that its rows keep, in any head, and no more. Rows that the layout has all ranks share
    are computed piece by piece: each column by a rank that has its keys anyway.

    Args:
        mask: over the whole sequence, of whole blocks.
        ranks: how many there are; their layout is :meth:`Layout.balanced`.
        layout: where tokens are, instead of ``ranks``.
        chunks: how many parts keys come in; one is computed with while the next is on its way.

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
        chunks: int = 2,
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
        self.chunks = as_chunks(chunks)
        self.mask = mask
        self.blocks = blocks.cpu()
        layout = self.layout
        self.needs = needs_of(self.blocks, layout)
        kept = self.blocks.double().mean(dim=(0, 1)) if self.blocks.numel() else None
        if kept is None:
            kept = torch.zeros(self.blocks.shape[2:], dtype=torch.float64)
        # Blocks that each rank computes whatever else it is given, and then pieces of shared rows.
        self.loads = torch.zeros(layout.ranks, dtype=torch.float64)
        alone = ~layout.shared
        self.loads.index_add_(0, layout.q_owners[alone], kept[alone].sum(dim=1))
        pieces = kept[layout.shared].sum(dim=0)
        has = self.needs | (torch.arange(layout.ranks)[:, None] == layout.kv_owners)
        self.column_ranks = layout.kv_owners.clone()
        some = pieces > 0
        self.column_ranks[some] = level(self.loads, pieces[some], has[:, some])
        self.loads.index_add_(0, self.column_ranks, pieces)
        self._of_rank: dict[tuple[int, torch.device], RankPlan] = {}
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

    def of_rank(self, rank: int, device: torch.device) -> RankPlan:
        """What a rank does; made once for a device."""
        key = rank, device
        if key not in self._of_rank:
            rows = self.layout.rows(rank, torch.device("cpu"))
            cut = Cut(self.blocks, rows, self.column_ranks == rank, self.layout)
            steps = [
                (step.to(device), cut.static(step.columns, device))
                for step in steps_of(self.needs, self.layout, rank, self.chunks)
            ]
            local = cut.static((self.layout.kv_owners == rank).nonzero().flatten(), device)
            sizes = self.layout.q_block_size, self.layout.kv_block_size
            self._of_rank[key] = RankPlan(self.layout.rows(rank, device), local, steps, sizes)
        return self._of_rank[key]

    def report(
        self, *, heads: int, head_dim: int, kv_heads: int | None = None, itemsize: int = 2
    ) -> Report:
        """Rows, blocks and bytes of each rank, beside those of a ring that sends all keys.

        Args:
            heads, head_dim: of q.
            kv_heads: of k and v, if fewer.
            itemsize: bytes of a number.

        >>> mask = BlockMask.sliding_window(960, 960, 64, 64, left=64, right=64)
        >>> print(ContextPlan(mask, ranks=3).report(heads=8, head_dim=64))
        rank  q blocks    blocks  kv blocks  received    MB in   MB out  MB in a ring
           0         5      14.0          5         1      0.1      0.1           1.3
           1         5      15.0          5         2      0.3      0.3           1.3
           2         5      14.0          5         1      0.1      0.1           1.3
        balance 0.956, 0.5 MB moved, 13.3% of a ring's
        """
        layout = self.layout
        heads, head_dim = as_size("heads", heads), as_size("head_dim", head_dim)
        kv_heads = heads if kv_heads is None else as_size("kv_heads", kv_heads)
        itemsize = as_size("itemsize", itemsize)
        batch = self.blocks.shape[0]
        q_tokens = _lengths(layout.q_len, layout.q_block_size)
        kv_tokens = _lengths(layout.kv_len, layout.kv_block_size)
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
            keys_in = int((self.needs[rank] * kv_tokens).sum()) * key
            keys_out = int((self.needs[:, has] * kv_tokens[has]).sum()) * key
            ranks.append(
                RankReport(
                    q_blocks=int((layout.q_owners == rank).sum()),
                    blocks=self.loads[rank].item(),
                    kv_blocks=int(has.sum()),
                    received=int(self.needs[rank].sum()),
                    bytes_in=keys_in + (of_all - own) * query + others * own * partial,
                    bytes_out=keys_out + others * own * query + (of_all - own) * partial,
                    ring_bytes=int(kv_tokens[~has].sum()) * key,
                )
            )
        return Report(ranks)

    def __repr__(self) -> str:
        sent = int(self.needs.sum())
        ring = (self.ranks - 1) * len(self.layout.kv_owners)
        return (
            f"ContextPlan({self.ranks} ranks, balance {balance(self.loads):.2f}, "
            f"{sent} of {ring} blocks sent)"
        )


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without the host waiting for it."""
    if device.type != "cuda" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def as_chunks(chunks: int) -> int:
    chunks = as_size("chunks", chunks)
    if not chunks:
        raise ValueError("chunks must be positive, got 0")
    return chunks


def needs_of(blocks: Tensor, layout: Layout) -> Tensor:
    """Which key blocks of others each rank needs for the rows that it computes alone, in any head:
    bool (ranks, kv_blocks), on the device of ``blocks``."""
    device = blocks.device
    wanted = blocks.flatten(0, 1).any(dim=0) & ~layout.shared.to(device)[:, None]
    q_owners, kv_owners = layout.q_owners.to(device), layout.kv_owners.to(device)
    rank = torch.arange(layout.ranks, device=device)[:, None]
    # A product of matrices counts the rows that want a block.
    counts = (rank == q_owners).float() @ wanted.float()
    return (counts > 0) & (rank != kv_owners)


def steps_of(needs: Tensor, layout: Layout, rank: int, chunks: int) -> list[Step]:
    """The steps of a rank, as many for each; each list of blocks from one rank to another is
    divided between them, so that every step uses all connections."""
    if not needs.any():
        return []
    size, length = layout.kv_block_size, layout.kv_len
    position = torch.empty(layout.kv_len, dtype=torch.long)
    own = layout.kv_tokens(rank)
    position[own] = torch.arange(len(own))

    def lists(taker: int, giver: int) -> Tensor:
        return (needs[taker] & (layout.kv_owners == giver)).nonzero().flatten()

    came = [lists(rank, giver) for giver in range(layout.ranks)]
    gone = [lists(taker, rank) for taker in range(layout.ranks)]
    steps = []
    for chunk in range(chunks):
        receive = [_part(blocks, chunk, chunks) for blocks in came]
        send = [tokens_of(_part(blocks, chunk, chunks), size, length) for blocks in gone]
        steps.append(
            Step(
                torch.cat(receive),
                [len(tokens_of(blocks, size, length)) for blocks in receive],
                [len(tokens) for tokens in send],
                position[torch.cat(send)],
            )
        )
    return steps


def _part(blocks: Tensor, chunk: int, chunks: int) -> Tensor:
    return blocks[len(blocks) * chunk // chunks : len(blocks) * (chunk + 1) // chunks]


def _lengths(length: int, size: int) -> Tensor:
    return (length - torch.arange(0, length, size)).clamp(max=size)


class Cut:
    """Makes masks of a rank's joint rows over some columns."""

    def __init__(self, blocks: Tensor, rows: Rows, computes: Tensor, layout: Layout):
        # Of a shared row, the rank computes the columns that are its own to compute.
        self._blocks = blocks[:, :, rows.blocks] & (~rows.are_shared[:, None] | computes)
        self._layout = layout
        self._q_len = len(rows.own) + sum(rows.shared_counts)

    def static(self, columns: Tensor, device: torch.device) -> BlockMask | None:
        """The mask over columns, ascending or with the sequence's last block last; None where it
        selects nothing, which only a mask on the host can be asked."""
        blocks = self._blocks[..., columns]
        return self._mask(blocks.to(device), columns) if blocks.any() else None

    def dynamic(self, columns: Tensor) -> BlockMask | None:
        """As :meth:`static`, of a mask whose values the host does not know."""
        if not len(columns) or not self._q_len:
            return None
        return self._mask(self._blocks[..., upload(columns, self._blocks.device)], columns)

    def _mask(self, blocks: Tensor, columns: Tensor) -> BlockMask:
        layout = self._layout
        kv_len = len(tokens_of(columns, layout.kv_block_size, layout.kv_len))
        return BlockMask(blocks, self._q_len, kv_len, layout.q_block_size, layout.kv_block_size)

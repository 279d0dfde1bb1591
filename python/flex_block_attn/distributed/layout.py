"""Which rank holds which tokens. In: a mask or lengths, and a number of ranks. Out: a
:class:`Layout`, by which tensors are divided and put together again.

Called by users and by :mod:`.plan`. A layout outlives masks: a model divides its tokens once, and
each layer's mask is then planned for the same layout.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..masks import BlockMask, as_size
from .balance import assign
from .cut import whole_blocks
from .exchange import gathered, place_in

# A row that keeps so many times the blocks of the middle one is shared: it would want keys that
# nothing else on its rank wants, and take as long as all else there.
_LONG = 2.0


def tokens_of(blocks: Tensor, block_size: int, length: int) -> Tensor:
    """Tokens of blocks, in their order; the last block of a sequence may be shorter."""
    tokens = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    return tokens[tokens < length]


def block_lengths(length: int, block_size: int) -> Tensor:
    """Tokens of each block."""
    return (length - torch.arange(0, length, block_size)).clamp(max=block_size)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without the host waiting for it."""
    if device.type != "cuda" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Positions:
    """Some of a rank's tokens, ascending, in dimension 2 of its tensors: a view of them where they
    follow each other, as all do where shared rows are the sequence's last."""

    def __init__(self, positions: Tensor):
        self._positions = positions
        self._count = len(positions)
        self._start = int(positions[0]) if len(positions) else 0
        last = int(positions[-1]) if len(positions) else -1
        self._together = last + 1 - self._start == len(positions)

    def __len__(self) -> int:
        return self._count

    def to(self, device: torch.device) -> "Positions":
        moved = copy(self)
        moved._positions = self._positions.to(device)
        return moved

    def of(self, x: Tensor) -> Tensor:
        """Their part of a tensor."""
        if self._together:
            return x.narrow(2, self._start, self._count)
        return x.index_select(2, self._positions)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Sets their part of a tensor."""
        if self._together:
            x.narrow(2, self._start, self._count).copy_(part)
        else:
            x.index_copy_(2, self._positions, part)

    def fill(self, write: Callable[..., Any], *tensors: Tensor) -> None:
        """As :meth:`put`, of parts of tensors that a function writes into what it is given."""
        if self._together:
            write(*(x.narrow(2, self._start, self._count) for x in tensors))
            return
        parts = [x.new_empty((*x.shape[:2], self._count, *x.shape[3:])) for x in tensors]
        write(*parts)
        for x, part in zip(tensors, parts, strict=True):
            self.put(x, part)


@dataclass(frozen=True)
class Rows:
    """What a rank computes the queries of: its own, and those that all ranks share, as they lie in
    one tensor."""

    # Which of the rank's queries it computes alone, and which it shares.
    own: "Positions"
    shared: "Positions"
    # Shared queries of each rank.
    shared_counts: list[int]
    # The query blocks of the joint tensor.
    blocks: Tensor
    # Which of its rows all ranks share.
    are_shared: Tensor
    # Whether shared queries come after the rank's own: the sequence's last block has to be last.
    shared_last: bool

    def to(self, device: torch.device) -> "Rows":
        return replace(
            self,
            own=self.own.to(device),
            shared=self.shared.to(device),
            blocks=self.blocks.to(device),
            are_shared=self.are_shared.to(device),
        )

    def own_of(self, joint: Tensor) -> Tensor:
        """Of a joint tensor, the rank's own rows."""
        return joint.narrow(2, 0 if self.shared_last else sum(self.shared_counts), len(self.own))

    def shared_of(self, joint: Tensor) -> Tensor:
        """Of a joint tensor, all shared rows."""
        return joint.narrow(2, len(self.own) * self.shared_last, sum(self.shared_counts))


class Layout:
    """Blocks of queries and keys, divided between ranks.

    A rank's tokens are those of its blocks in ascending order. Where queries and keys are as many,
    they are of the same tokens, and lie on the same rank.

    Args:
        q_owners, kv_owners: the rank of each block of queries, and of keys.
        q_len, kv_len, q_block_size, kv_block_size: as of :class:`flex_block_attn.BlockMask`.
        ranks: how many there are.
        shared_rows: query blocks that all ranks compute together, each over keys that it has:
            such as text that sees everything.

    >>> layout = Layout.even(320, 320, 64, 64, ranks=2)
    >>> layout.q_owners.tolist()
    [0, 0, 1, 1, 1]
    >>> layout.shard(torch.arange(320), 1, dim=0)[0]
    tensor(128)
    """

    def __init__(
        self,
        q_owners: Iterable[int],
        kv_owners: Iterable[int],
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int,
        *,
        ranks: int,
        shared_rows: Iterable[int] = (),
    ):
        self.ranks = _positive("ranks", ranks)
        self.q_len, self.kv_len = as_size("q_len", q_len), as_size("kv_len", kv_len)
        self.q_block_size = _positive("q_block_size", q_block_size)
        self.kv_block_size = _positive("kv_block_size", kv_block_size)
        self.q_owners = self._owners("q_owners", q_owners, self.q_len, self.q_block_size)
        self.kv_owners = self._owners("kv_owners", kv_owners, self.kv_len, self.kv_block_size)
        self.shared = torch.zeros(len(self.q_owners), dtype=torch.bool)
        # With one rank there is no one to share with.
        self.shared[_rows_in("shared_rows", shared_rows, len(self.shared))] = self.ranks > 1
        # Whether each rank has as many of them.
        counts = self.q_owners[self.shared].bincount(minlength=self.ranks)
        self.shared_evenly = len(set(counts.tolist())) == 1
        # What a device has been given already.
        self._rows: dict[tuple[int, torch.device], Rows] = {}
        self._columns: dict[tuple[int, torch.device], Tensor] = {}
        self._of_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._alone: Layout | None = None
        self._counts = [
            [len(tokens) for tokens in map(of, range(self.ranks))]
            for of in (self.q_tokens, self.kv_tokens)
        ]

    def _owners(self, name: str, owners: Iterable[int], length: int, block: int) -> Tensor:
        if isinstance(owners, Tensor):
            owners = owners.tolist()
        owners = torch.tensor([as_size(name, owner) for owner in owners], dtype=torch.long)
        blocks = -(-length // block)
        if len(owners) != blocks:
            raise ValueError(
                f"{name} must be {blocks} ranks, one for each block, got {len(owners)}"
            )
        if blocks and owners.max() >= self.ranks:
            raise ValueError(f"{name} has rank {owners.max()}, but there are {self.ranks} ranks")
        if length % block and owners[-1] != self.ranks - 1:
            # Blocks that come from several ranks lie in the ranks' order, and only the last block
            # of what kernels see may be short.
            raise ValueError(
                f"{name} must give the last block to the last rank, {self.ranks - 1}, because it "
                f"has {length % block} tokens instead of {block}; got {owners[-1]}"
            )
        return owners

    @classmethod
    def even(
        cls,
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int,
        *,
        ranks: int,
        shared_rows: Iterable[int] = (),
    ) -> "Layout":
        """As many tokens for each rank, neighbours together: for masks that come later."""
        q_block = _positive("q_block_size", q_block_size)
        sizes = as_size("q_len", q_len), as_size("kv_len", kv_len)
        sizes = *sizes, q_block, _positive("kv_block_size", kv_block_size)
        costs = torch.zeros(-(-sizes[0] // q_block), dtype=torch.float64)
        return cls._of_costs(costs, shared_rows, sizes, _positive("ranks", ranks))

    @classmethod
    def balanced(
        cls, mask: BlockMask, ranks: int, *, shared_rows: Iterable[int] | None = None
    ) -> "Layout":
        """As many tokens for each rank, and as many blocks of a mask to compute: neighbours
        together if that is balanced, else the longest rows dealt out first.

        Args:
            mask: the mask, or one like those to come.
            ranks: how many there are.
            shared_rows: query blocks that all ranks compute together; if not given, those with
                more than twice the blocks of the middle row.
        """
        blocks = whole_blocks(mask).cpu()
        costs = blocks.sum(dim=3).double().mean(dim=(0, 1)) if blocks.numel() else None
        if costs is None:
            costs = torch.zeros(blocks.shape[2], dtype=torch.float64)
        if shared_rows is None:
            some = costs[costs > 0]
            middle = some.median() if len(some) else 0
            shared_rows = (costs > _LONG * middle).nonzero().flatten().tolist()
        sizes = mask.q_len, mask.kv_len, mask.q_block_size, mask.kv_block_size
        return cls._of_costs(costs, shared_rows, sizes, _positive("ranks", ranks))

    @classmethod
    def _of_costs(
        cls, costs: Tensor, shared_rows: Any, sizes: tuple[int, int, int, int], ranks: int
    ) -> "Layout":
        shared_rows = _rows_in("shared_rows", shared_rows, len(costs))
        q_len, kv_len, q_block, kv_block = sizes
        together = q_len == kv_len
        stretch = lcm(q_block, kv_block) if together else q_block
        in_rows = torch.arange(len(costs)) * q_block // stretch
        count = -(-q_len // stretch)
        spread = torch.zeros(count, dtype=torch.bool)
        alone = torch.ones(len(costs), dtype=torch.bool)
        if ranks > 1:
            alone[shared_rows] = False
            spread[in_rows[~alone]] = True
        stretch_costs = torch.zeros(count, dtype=torch.float64)
        stretch_costs.index_add_(0, in_rows[alone], costs[alone])
        owners = assign(stretch_costs, spread, ranks)
        columns = torch.arange(-(-kv_len // kv_block))
        if together:
            kv_owners = owners[columns * kv_block // stretch]
        else:
            none = torch.zeros(len(columns))
            kv_owners = assign(none, none.bool(), ranks)
        return cls(owners[in_rows], kv_owners, *sizes, ranks=ranks, shared_rows=shared_rows)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """q_len, kv_len, q_block_size and kv_block_size."""
        return self.q_len, self.kv_len, self.q_block_size, self.kv_block_size

    def q_tokens(self, rank: int) -> Tensor:
        """Positions in the sequence of a rank's queries, in the order it has them: what rotary
        embeddings are computed from."""
        blocks = (self.q_owners == rank).nonzero().flatten()
        return tokens_of(blocks, self.q_block_size, self.q_len)

    def kv_tokens(self, rank: int) -> Tensor:
        """As :meth:`q_tokens`, of keys."""
        blocks = (self.kv_owners == rank).nonzero().flatten()
        return tokens_of(blocks, self.kv_block_size, self.kv_len)

    def shard(self, x: Tensor, rank: int, *, dim: int, keys: bool = False) -> Tensor:
        """A rank's part of a tensor of the whole sequence; ``keys`` says whose."""
        length = self.kv_len if keys else self.q_len
        if x.shape[dim] != length:
            raise ValueError(
                f"x has {x.shape[dim]} tokens in dimension {dim}, but the layout has {length}"
            )
        tokens = self.kv_tokens(rank) if keys else self.q_tokens(rank)
        return x.index_select(dim, tokens.to(x.device))

    def unshard(
        self, x: Tensor, *, dim: int, keys: bool = False, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """The tensor of the whole sequence, on every rank, of all ranks' parts. Differentiable:
        the gradient of a part is the sum of all ranks'."""
        rank, ranks = place_in(group)
        self.check_ranks(ranks)
        tokens = [self.kv_tokens(r) if keys else self.q_tokens(r) for r in range(ranks)]
        if x.shape[dim] != len(tokens[rank]):
            raise ValueError(
                f"x has {x.shape[dim]} tokens in dimension {dim}, "
                f"but rank {rank} has {len(tokens[rank])} in the layout"
            )
        rows = gathered(x.movedim(dim, 0), [len(t) for t in tokens], group)
        return rows.index_select(0, torch.cat(tokens).argsort().to(x.device)).movedim(0, dim)

    def count(self, rank: int, *, keys: bool = False) -> int:
        """How many queries a rank has, or keys."""
        return self._counts[keys][rank]

    def check_ranks(self, ranks: int, name: str = "group") -> None:
        """Raises unless a group has as many ranks."""
        if ranks != self.ranks:
            raise ValueError(f"{name} has {ranks} ranks, but the layout is for {self.ranks}")

    def alone(self) -> "Layout":
        """The same tokens on each rank, which computes all of its rows alone."""
        if not self.shared.any():
            return self
        if self._alone is None:
            self._alone = copy(self)
            self._alone.shared = torch.zeros_like(self.shared)
            self._alone._rows, self._alone._of_device = {}, {}
        return self._alone

    def rows(self, rank: int, device: torch.device) -> Rows:
        """What a rank computes, with its tensors on a device."""
        key = rank, device
        if key not in self._rows:
            self._rows[key] = self._rows_of(rank).to(device)
        return self._rows[key]

    def owners(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Owners of queries' and of keys' blocks, and which rows are shared, on a device."""
        if device not in self._of_device:
            host = self.q_owners, self.kv_owners, self.shared
            self._of_device[device] = tuple(upload(x, device) for x in host)
        return self._of_device[device]

    def own_columns(self, rank: int, device: torch.device) -> Tensor:
        """A rank's own key blocks, as columns of all groups of heads: (1, blocks)."""
        key = rank, device
        if key not in self._columns:
            own = (self.kv_owners == rank).nonzero().flatten()[None]
            self._columns[key] = upload(own, device)
        return self._columns[key]

    def _rows_of(self, rank: int) -> Rows:
        mine = self.q_owners == rank
        # Positions among the rank's queries: its blocks ascend, and only the last may be short.
        positions = torch.arange(self.count(rank))
        is_shared = self.shared[mine].repeat_interleave(self.q_block_size)[: len(positions)]
        shared = [
            (self.shared & (self.q_owners == r)).nonzero().flatten() for r in range(self.ranks)
        ]
        counts = [len(tokens_of(blocks, self.q_block_size, self.q_len)) for blocks in shared]
        own = (mine & ~self.shared).nonzero().flatten()
        last = bool(self.shared[-1]) if len(self.shared) else True
        parts = [own, torch.cat(shared)] if last else [torch.cat(shared), own]
        blocks = torch.cat(parts)
        return Rows(
            Positions(positions[~is_shared]),
            Positions(positions[is_shared]),
            counts,
            blocks,
            self.shared[blocks],
            last,
        )

    def __repr__(self) -> str:
        return (
            f"Layout({self.ranks} ranks, {len(self.q_owners)} x {len(self.kv_owners)} blocks of "
            f"{self.q_block_size} x {self.kv_block_size}, {int(self.shared.sum())} rows shared)"
        )


def _positive(name: str, size: int) -> int:
    size = as_size(name, size)
    if not size:
        raise ValueError(f"{name} must be positive, got 0")
    return size


def _rows_in(name: str, rows: Iterable[int], count: int) -> list[int]:
    rows = [as_size(name, row) for row in rows]
    if rows and max(rows) >= count:
        raise ValueError(f"{name} has {max(rows)}, but there are {count} query blocks")
    return rows

"""Rows that all ranks share, on their way: their queries to all ranks, partial results back. In:
values of a rank's rows. Out: those of the joint rows that it computes, and the reverse.

Called by :mod:`.context`.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .exchange import Exchange, copy_wide
from .merge import Merged, Sums
from .plan import RankPlan

# Parts of a row, of all ranks together, that travel as they are: of more, ranks send their sums,
# which are of twice as many bytes as a part.
_FEW = 4
# Where a tensor starts in bytes that are sent.
_ALIGNED = 16


class RowGradients:
    """What the backward pass reads of each of the joint rows."""

    def __init__(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor):
        self.dout, self.dlse, self.out, self.lse = dout, dlse, out, lse


class SharedRows:
    """Rows that all ranks share, on their way: their queries to all ranks, results back."""

    def __init__(self, plan: RankPlan, group: Any):
        self._rows, self._group, self._rank = plan.rows, group, plan.rank
        counts = self._rows.shared_counts
        self._some = any(counts)
        self._mine = len(self._rows.shared)
        self._counts = counts

    def _to_all(self, mine: Tensor, target: Tensor) -> Callable[[], None]:
        """Writes the shared rows of all ranks into a tensor, (batch, heads, rows, ...), from this
        rank's. They leave at once, and are there when the result has been called."""
        rows, place = mine.movedim(2, 0), target.movedim(2, 0)
        # Of one head, they come to where they are to be.
        into = place if place.is_contiguous() else None
        coming = Exchange.to_all(rows, self._counts, self._group, into)

        def arrive() -> None:
            came = coming.wait()
            if into is None:
                copy_wide(target, came.movedim(0, 2))

        return arrive

    def _to_owners(self, rows: Tensor) -> Callable[[], Tensor]:
        """All ranks' results for this rank's shared rows, (ranks, rows, ...), from this rank's
        results for those of all. They leave at once, and are waited for when the result is
        called."""
        ranks = len(self._counts)
        coming = Exchange(rows, self._counts, [self._mine] * ranks, self._group)
        return lambda: coming.wait().view(ranks, self._mine, *rows.shape[1:])

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for values of the joint rows, and of it the rank's own rows and all shared ones;
        x are values of the rank's rows."""
        rows = len(self._rows.own) + sum(self._counts)
        joint = x.new_empty((*x.shape[:2], rows, *x.shape[3:]))
        return joint, self._rows.own_of(joint), self._rows.shared_of(joint)

    def join(self, x: Tensor) -> Callable[[], Tensor]:
        """Values of the joint rows, from those of the rank's: (batch, heads, rows, ...). They
        leave at once, and are waited for when the result is called."""
        if not self._some:
            return lambda: x
        joint, own, shared = self._joint(x)
        arrive = self._to_all(self._rows.shared.of(x), shared)
        # Copied while the others travel.
        copy_wide(own, self._rows.own.of(x))

        def arrived() -> Tensor:
            arrive()
            return joint

        return arrived

    def _shared_of(self, q: Tensor) -> Tensor:
        """Nothing yet for all shared rows, in the dtype of sums."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty((*q.shape[:2], sum(self._counts), *q.shape[3:]), dtype=dtype)

    def _empty(self, q: Tensor) -> Tensor:
        """Nothing yet for the rank's rows."""
        return q.new_empty((*q.shape[:2], len(self._rows.own) + self._mine, *q.shape[3:]))

    def part(self, merged: Merged, q: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """Output and lse of the rank's rows, from those of the joint rows, of which q is; they are
        of no more than so many parts, on each rank."""
        if not self._some:
            return merged.result(q)
        if parts * len(self._counts) <= _FEW:
            # All that there is can be put together at once, where it is wanted.
            merged.fill(parts, q)
            coming = self._parts_to_owners(merged.of(self._rows.shared_of).parts())
        else:
            coming = self._sums_to_owners(merged.of(self._rows.shared_of), q)
        # The rank's own rows are merged while those travel.
        out = self._empty(q)
        lse = out.new_empty(out.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        self._rows.own.fill(merged.of(self._rows.own_of).into, out, lse)
        self._rows.shared.fill(coming().into, out, lse)
        return out, lse

    def _sums_to_owners(self, shared: Merged, q: Tensor) -> Callable[[], Merged]:
        """This rank's shared rows in a part from each rank, from this rank's results for those of
        all; merged here, and in the sums' dtype: a partial output that is rounded, and merged,
        would be rounded twice."""
        out, lse = shared.result(self._shared_of(q))
        coming = self._to_owners(torch.cat((out, lse.unsqueeze(3)), dim=3).movedim(2, 0))

        def arrived() -> Merged:
            of_ranks = coming().movedim(1, 3)
            return Merged([(of_rank[..., :-1], of_rank[..., -1]) for of_rank in of_ranks])

        return arrived

    def _parts_to_owners(self, shared: list[tuple[Tensor, Tensor]]) -> Callable[[], Merged]:
        """As :meth:`_sums_to_owners`, but each rank's parts as they are."""
        counts, me = self._counts, self._rank
        packets = [_Packet(rows, shared) for rows in counts]
        # This rank's parts of its own rows stay.
        send = [packet.size * (rank != me) for rank, packet in enumerate(packets)]
        receive = [packets[me].size * (rank != me) for rank in range(len(counts))]
        parts = [[x.split(counts, dim=2) for x in part] for part in shared]
        places = shared[0][0].new_empty(sum(send), dtype=torch.uint8)
        for rank, place in enumerate(places.split(send)):
            if rank != me:
                targets = packets[rank].tensors(place)
                for i, target in enumerate(targets):
                    torch.stack([part[i][rank] for part in parts], out=target)
        coming = Exchange(places, send, receive, self._group)

        def arrived() -> Merged:
            came: list[tuple[Tensor, Tensor]] = []
            for rank, place in enumerate(coming.wait().split(receive)):
                if rank == me:
                    came += [(out[me], lse[me]) for out, lse in parts]
                else:
                    came += zip(*packets[me].tensors(place), strict=True)
            return Merged(came)

        return arrived

    def gradients(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Callable[[], RowGradients]:
        """What the backward pass reads of the joint rows, from this rank's rows; as :meth:`join`,
        on its way until it is called."""
        if not self._some:
            return lambda: RowGradients(dout, dlse, out, lse)
        douts = self.join(dout)
        own, shared = self._rows.own, self._rows.shared
        # Of a row's output, the derivative reads but the sum of dout * out, and subtracts dlse.
        # With an output of 0 and this dlse it is the same, and no output needs to travel.
        deltas = (shared.of(dout).to(lse.dtype) * shared.of(out)).sum(dim=-1)
        deltas = deltas.neg_() if dlse is None else shared.of(dlse) - deltas
        # Numbers of rows are read as they follow each other: lse and dlse, one after the other.
        mine = torch.cat((shared.of(lse), deltas))
        numbers, own_numbers, all_numbers = self._joint(mine)
        arrive = self._to_all(mine, all_numbers)
        own_lse, own_dlse = own_numbers.chunk(2)
        copy_wide(own_lse, own.of(lse))
        if dlse is None:
            own_dlse.zero_()
        else:
            copy_wide(own_dlse, own.of(dlse))
        joint_out, own_out, shared_out = self._joint(out)
        copy_wide(own_out, own.of(out))
        shared_out.zero_()

        def arrived() -> RowGradients:
            arrive()
            joint_lse, joint_dlse = numbers.chunk(2)
            return RowGradients(douts(), joint_dlse, joint_out, joint_lse)

        return arrived

    def sum(self, dq: Sums, q: Tensor) -> Tensor:
        """Gradients of the rank's queries, from those of the joint rows, of which q is."""
        if not self._some:
            return dq.result(q)
        shared = self._shared_of(q)
        dq.into(shared, self._rows.shared_of)
        coming = self._to_owners(shared.movedim(2, 0))
        out = self._empty(q)
        self._rows.own.fill(lambda target: dq.into(target, self._rows.own_of), out)
        self._rows.shared.put(out, coming().sum(dim=0).movedim(0, 2))
        return out


class _Packet:
    """Parts of some rows as bytes that travel: outputs, then lses, each (parts, batch, heads, rows,
    ...)."""

    def __init__(self, rows: int, parts: list[tuple[Tensor, Tensor]]):
        """For so many rows of parts like these."""
        self._lies: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        self.size = 0
        for x in parts[0]:
            shape = len(parts), *x.shape[:2], rows, *x.shape[3:]
            end = self.size + prod(shape) * x.element_size()
            self._lies.append((self.size, end, x.dtype, shape))
            self.size = -(-end // _ALIGNED) * _ALIGNED

    def tensors(self, place: Tensor) -> list[Tensor]:
        """Outputs and lses in their bytes."""
        return [place[a:b].view(dtype).view(shape) for a, b, dtype, shape in self._lies]

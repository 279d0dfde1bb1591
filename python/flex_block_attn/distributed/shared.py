"""Rows that all ranks share, on their way: their queries to all ranks, partial results back. In:
values of a rank's rows. Out: those of the joint rows that it computes, and the reverse.

Called by :mod:`.context`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .exchange import Exchange
from .merge import Merged, Sums
from .plan import RankPlan


class RowGradients:
    """What the backward pass reads of each of the joint rows."""

    def __init__(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor):
        self.dout, self.dlse, self.out, self.lse = dout, dlse, out, lse


class SharedRows:
    """Rows that all ranks share, on their way: their queries to all ranks, results back."""

    def __init__(self, plan: RankPlan, group: Any):
        self._rows, self._group = plan.rows, group
        counts = self._rows.shared_counts
        self._some = any(counts)
        self._mine = len(self._rows.shared)
        self._counts = counts
        # Of a tensor of the joint rows, the rank's own and the shared ones.
        self._selects = tuple(lambda x, i=i: self._rows.part(x)[i] for i in range(2))

    def _to_all(self, rows: Tensor) -> Exchange:
        """The shared rows of all ranks, (rows, ...), from this rank's."""
        ranks = len(self._counts)
        copies = rows.repeat(ranks, *(1,) * (rows.dim() - 1))
        return Exchange(copies, [self._mine] * ranks, self._counts, self._group)

    def _to_owners(self, rows: Tensor) -> Callable[[], Tensor]:
        """All ranks' results for this rank's shared rows, (ranks, rows, ...), from this rank's
        results for those of all. They leave at once, and are waited for when the result is
        called."""
        ranks = len(self._counts)
        coming = Exchange(rows.contiguous(), self._counts, [self._mine] * ranks, self._group)
        return lambda: coming.wait().view(ranks, self._mine, *rows.shape[1:])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rank's own rows, and those of its rows that are shared, tokens first."""
        own, shared = self._rows.own, self._rows.shared
        return own.of(x), shared.of(x).movedim(2, 0)

    def join(self, x: Tensor) -> Callable[[], Tensor]:
        """Values of the joint rows, from those of the rank's: (batch, heads, rows, ...). They
        leave at once, and are waited for when the result is called."""
        if not self._some:
            return lambda: x
        own, shared = self._split(x)
        coming = self._to_all(shared)
        return lambda: self._rows.join(own, coming.wait().movedim(0, 2))

    def _shared_of(self, q: Tensor) -> Tensor:
        """Nothing yet for all shared rows, in the dtype of sums."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty((*q.shape[:2], sum(self._counts), *q.shape[3:]), dtype=dtype)

    def _empty(self, q: Tensor) -> Tensor:
        """Nothing yet for the rank's rows."""
        return q.new_empty((*q.shape[:2], len(self._rows.own) + self._mine, *q.shape[3:]))

    def _place(self, own: Tensor, shared: Tensor) -> Tensor:
        """The rank's rows in their order."""
        whole = own.new_empty((*own.shape[:2], own.shape[2] + shared.shape[2], *own.shape[3:]))
        self._rows.own.put(whole, own)
        self._rows.shared.put(whole, shared)
        return whole

    def part(self, merged: Merged, q: Tensor) -> tuple[Tensor, Tensor]:
        """Output and lse of the rank's rows, from those of the joint rows, of which q is."""
        if not self._some:
            return merged.result(q)
        own, shared = (merged.of(select) for select in self._selects)
        # The sums' dtype: a partial output that is rounded, and merged, would be rounded twice.
        shared_out, shared_lse = shared.result(self._shared_of(q))
        both = torch.cat((shared_out, shared_lse.unsqueeze(3)), dim=3).movedim(2, 0)
        coming = self._to_owners(both)
        # The rank's own rows are merged while those travel.
        out = self._empty(q)
        own_lse = self._rows.own.fill(out, own.into)
        merged = Merged()
        for of_rank in coming():
            of_rank = of_rank.movedim(0, 2)
            merged.add(of_rank[..., :-1], of_rank[..., -1])
        shared_lse = self._rows.shared.fill(out, merged.into)
        return out, self._place(own_lse, shared_lse)

    def gradients(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Callable[[], RowGradients]:
        """What the backward pass reads of the joint rows, from this rank's rows; as :meth:`join`,
        on its way until it is called."""
        if not self._some:
            return lambda: RowGradients(dout, dlse, out, lse)
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        own_dout, shared_dout = self._split(dout)
        douts = self._to_all(shared_dout)
        own_out, shared_out = self._split(out)
        own_lse, shared_lse = self._split(lse)
        own_dlse, shared_dlse = self._split(dlse)
        # Of a row's output, the derivative reads but the sum of dout * out, and subtracts dlse.
        # With an output of 0 and this dlse it is the same, and no output needs to travel.
        shared_dlse = shared_dlse - (shared_dout.to(lse.dtype) * shared_out).sum(dim=-1)
        numbers = self._to_all(torch.stack((shared_lse, shared_dlse), dim=1))

        def arrived() -> RowGradients:
            of_all = douts.wait().movedim(0, 2)
            lses, dlses = numbers.wait().movedim(0, 3).unbind(0)
            join = self._rows.join
            return RowGradients(
                join(own_dout, of_all),
                join(own_dlse, dlses),
                join(own_out, torch.zeros_like(of_all)),
                join(own_lse, lses),
            )

        return arrived

    def sum(self, dq: Sums, q: Tensor) -> Tensor:
        """Gradients of the rank's queries, from those of the joint rows, of which q is."""
        if not self._some:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            dq.into(out)
            return out
        select_own, select_shared = self._selects
        shared = self._shared_of(q)
        dq.into(shared, select_shared)
        coming = self._to_owners(shared.movedim(2, 0))
        out = self._empty(q)
        self._rows.own.fill(out, lambda target: dq.into(target, select_own))
        self._rows.shared.put(out, coming().sum(dim=0).movedim(0, 2))
        return out

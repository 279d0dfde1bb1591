"""Context parallelism: each rank computes its own queries over the keys that they want.

In: q, k and v of this rank's tokens, and a plan. Out: the output of the same tokens. Called by
users and, for some of the heads, by :mod:`.grid`.

As Ring Attention (arXiv 2310.01889), except that keys travel by what the mask wants instead of
round a ring, straight from their owner. Forward: attention over the rank's own keys while the
first keys of others travel, over these while the next do, and so on; results are merged by their
lses. Rows that all ranks share go the other way: their queries travel, and partial results return.
Backward: keys travel again, because keeping them would take the memory that dividing saves;
gradients of a step need only the final output and lse, and those of keys return to their owners
while the next step computes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..api import _default_scale, _tensors, flex_block_attn
from ..masks import BlockMask
from .cut import check_extents
from .exchange import Exchange, place_in
from .merge import Merged
from .plan import ContextPlan, Moves, RankPlan


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the tokens of all ranks, divided between them by tokens.

    Every rank of the group must call this, with plans of the same mask. Gradients are those of the
    sum of all ranks' losses.

    Args:
        q, k, v: of the tokens that ``plan.layout`` gives this rank, (batch, heads, tokens,
            head_dim), as for :func:`flex_block_attn.flex_block_attn`; k and v may have fewer
            heads.
        plan: a :class:`ContextPlan` or :class:`DynamicPlan`.
        group: the ranks; all if not given.
        scale, return_lse: as for :func:`flex_block_attn.flex_block_attn`.

    Returns:
        ``out``, of q's shape; ``out, lse`` with ``return_lse``.
    """
    q, k, v = _tensors(q, k, v)
    check_plan(plan)
    rank, ranks = place_in(group)
    layout = plan.layout
    layout.check_ranks(ranks)
    check_extents(plan.blocks, q.shape[0], q.shape[1])
    for name, x, keys in (("q", q, False), ("k", k, True)):
        tokens = layout.count(rank, keys=keys)
        if x.shape[2] != tokens:
            raise ValueError(
                f"{name} has {x.shape[2]} tokens, but the layout gives rank {rank} {tokens}"
            )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, but k has {tuple(k.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"k has shape {tuple(k.shape)}, which does not go with {tuple(q.shape)} of q: batch "
            "and head_dim must be equal, and k's heads divide q's"
        )
    scale = _default_scale(q) if scale is None else float(scale)
    of_rank = plan.of_rank(rank, q.device, k.shape[1])
    out, lse = _ContextAttention.apply(q, k, v, of_rank, group, scale)
    return (out, lse) if return_lse else out


def check_plan(plan: Any) -> None:
    if not hasattr(plan, "of_rank"):
        raise TypeError(
            f"plan must be a ContextPlan or DynamicPlan, got {type(plan).__name__}: "
            "ContextPlan(mask, ranks) makes one"
        )


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RankPlan, group: Any, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, q_all = _forward(q, k, v, plan, group, scale)
        ctx.save_for_backward(q_all, k, v, out, lse)
        ctx.settings = plan, group, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        gradients = _backward(dout, dlse, *ctx.saved_tensors, *ctx.settings)
        wanted = ctx.needs_input_grad[:3]
        given = (x if wants else None for x, wants in zip(gradients, wanted, strict=True))
        return *given, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: RankPlan, group: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and lse of the rank's rows, and queries of all rows that it computes."""
    keys = _Keys(k, v, plan, group)
    rows = _SharedRows(plan, group)
    q_all = rows.join(q)
    merged = Merged()

    def attend(k: Tensor, v: Tensor, mask: BlockMask | None) -> None:
        if mask is not None and q_all.numel() and k.numel():
            merged.add(*flex_block_attn(q_all, k, v, mask, scale=scale, return_lse=True))

    attend(k, v, plan.local)
    for (k_, v_), mask in keys:
        attend(k_, v_, mask)

    out, lse = rows.part(*merged.result(q_all), q.dtype)
    return out, lse, q_all


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q_all: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: RankPlan,
    group: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of the rank's tokens.

    The probabilities of any part of the keys are exp(scale q k - lse), lse being that over all
    keys, and all else that the derivative needs of the rest is the row sum of dout * out. So a
    part's gradients are those of an attention that had this output and lse.
    """
    keys = _Keys(k, v, plan, group)
    rows = _SharedRows(plan, group)
    dout = torch.zeros_like(out) if dout is None else dout
    row = rows.gradients(dout, dlse, out, lse)
    sums = lse.dtype
    dq = torch.zeros(q_all.shape, dtype=sums, device=q_all.device)
    gradients = keys.gradients(sums)
    sizes = plan.block_sizes

    def derive(k: Tensor, v: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
        if mask is None or not q_all.numel() or not k.numel():
            return torch.zeros_like(k), torch.zeros_like(v)
        dq_, dk_, dv_ = ops.backward(
            row.dout, row.dlse, q_all, k, v, row.out, row.lse, mask.plan, *sizes, scale, [True] * 3
        )
        dq.add_(dq_)
        return dk_, dv_

    gradients.add(*derive(k, v, plan.local))
    returning = None
    for (k_, v_), mask in keys:
        dk, dv = derive(k_, v_, mask)
        if returning is not None:
            gradients.add_returned(*returning)
        returning = keys.send_back(dk, dv)
    if returning is not None:
        gradients.add_returned(*returning)
    dk, dv = gradients.result()
    return rows.sum(dq).to(q_all.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Keys:
    """k and v as steps bring them: the next are on their way while these are computed with."""

    def __init__(self, k: Tensor, v: Tensor, plan: RankPlan, group: Any):
        self._k, self._v, self._plan, self._group = k, v, plan, group
        self._moves: Moves | None = None
        # What is known can leave before anything else happens.
        known = plan.known()
        self._first = self._leave(known[0][0]) if known else None

    def _leave(self, moves: Moves) -> Exchange:
        # (groups, tokens, batch, heads of a group, head_dim)
        parts = [
            x.unflatten(1, (self._plan.groups, -1)).permute(1, 3, 0, 2, 4)
            for x in (self._k, self._v)
        ]
        rows = [part[moves.groups, moves.tokens] for part in parts]
        return Exchange(torch.stack(rows, dim=1), moves.step.send, moves.step.receive, self._group)

    def __iter__(self) -> Any:
        steps = self._plan.steps()
        coming = self._first
        if steps and coming is None:
            coming = self._leave(steps[0][0])
        self._first = None
        for number, (moves, mask) in enumerate(steps):
            after = self._leave(steps[number + 1][0]) if number + 1 < len(steps) else None
            self._moves = moves
            rows = coming.wait()
            if moves.sources is not None and len(rows):
                rows = rows.index_select(0, moves.sources)
            yield _heads_of(rows, self._plan.groups), mask
            coming = after

    def send_back(self, dk: Tensor, dv: Tensor) -> tuple[Moves, Exchange]:
        """Gradients of the keys that came last, on their way to their owners."""
        moves = self._moves
        rows = _rows_of(dk, dv, self._plan.groups)
        if moves.places is not None:
            rows = rows.index_select(0, moves.places)
        return moves, Exchange(rows, moves.step.receive, moves.step.send, self._group)

    def gradients(self, dtype: torch.dtype) -> "_KeyGradients":
        """Nothing yet, for the rank's own keys."""
        return _KeyGradients(self._k, self._plan.groups, dtype)


def _rows_of(k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Rows as they travel, (groups * tokens, 2, batch, heads of a group, head_dim)."""
    both = torch.stack((k, v)).unflatten(2, (groups, -1))
    return both.permute(2, 4, 0, 1, 3, 5).flatten(0, 1).contiguous()


def _heads_of(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """k and v, (batch, heads, tokens, head_dim), of rows as they travel."""
    # Either groups or the heads of one are 1, so nothing is copied.
    both = rows.unflatten(0, (groups, -1)).permute(2, 3, 0, 4, 1, 5)
    k, v = both.flatten(2, 3).unbind(0)
    return k, v


class _KeyGradients:
    """Sums of gradients of a rank's keys and values, from all ranks that had them."""

    def __init__(self, k: Tensor, groups: int, dtype: torch.dtype):
        batch, heads, self._tokens, head_dim = k.shape
        shape = groups * self._tokens, 2, batch, heads // groups, head_dim
        self._groups = groups
        self._rows = torch.zeros(shape, dtype=dtype, device=k.device)

    def add(self, dk: Tensor, dv: Tensor) -> None:
        """Those of all keys."""
        for total, gradient in zip(_heads_of(self._rows, self._groups), (dk, dv), strict=True):
            total.add_(gradient)

    def add_returned(self, moves: Moves, coming: Exchange) -> None:
        """Those that others send back: one rank's after the other, so that a token that several
        had is summed in the same order each time."""
        rows = coming.wait().to(self._rows.dtype)
        numbers, send = moves.groups * self._tokens + moves.tokens, moves.step.send
        for places, part in zip(numbers.split(send), rows.split(send), strict=True):
            if len(places):
                self._rows.index_add_(0, places, part)

    def result(self) -> tuple[Tensor, Tensor]:
        """dk and dv, (batch, heads, tokens, head_dim)."""
        return _heads_of(self._rows, self._groups)


class _RowGradients:
    """What the backward pass reads of each of the joint rows."""

    def __init__(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor):
        self.dout, self.dlse, self.out, self.lse = dout, dlse, out, lse


class _SharedRows:
    """Rows that all ranks share, on their way: their queries to all ranks, results back."""

    def __init__(self, plan: RankPlan, group: Any):
        self._rows, self._group = plan.rows, group
        counts = self._rows.shared_counts
        self._some = any(counts)
        self._mine = len(self._rows.shared)
        self._counts = counts

    def _to_all(self, rows: Tensor) -> Exchange:
        """The shared rows of all ranks, (rows, ...), from this rank's."""
        ranks = len(self._counts)
        copies = rows.repeat(ranks, *(1,) * (rows.dim() - 1))
        return Exchange(copies, [self._mine] * ranks, self._counts, self._group)

    def _to_owners(self, rows: Tensor) -> Tensor:
        """All ranks' results for this rank's shared rows, (ranks, rows, ...), from this rank's
        results for those of all."""
        ranks = len(self._counts)
        came = Exchange(rows.contiguous(), self._counts, [self._mine] * ranks, self._group).wait()
        return came.view(ranks, self._mine, *rows.shape[1:])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rank's own rows, and those of its rows that are shared, tokens first."""
        own, shared = self._rows.own, self._rows.shared
        return own.of(x), shared.of(x).movedim(2, 0)

    def join(self, x: Tensor) -> Tensor:
        """Values of the joint rows, from those of the rank's: (batch, heads, rows, ...)."""
        if not self._some:
            return x
        own, shared = self._split(x)
        return self._rows.join(own, self._to_all(shared).wait().movedim(0, 2))

    def _place(self, own: Tensor, shared: Tensor) -> Tensor:
        """The rank's rows in their order."""
        whole = own.new_empty((*own.shape[:2], own.shape[2] + shared.shape[2], *own.shape[3:]))
        self._rows.own.put(whole, own)
        self._rows.shared.put(whole, shared)
        return whole

    def part(self, out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output, in a dtype, and lse of the rank's rows, from those of the joint rows."""
        if not self._some:
            return out.to(dtype), lse
        out, shared_out = self._rows.part(out)
        lse, shared_lse = self._rows.part(lse)
        # The sums' dtype: a partial output that is rounded, and merged, would be rounded twice.
        both = torch.cat((shared_out.to(lse.dtype), shared_lse.unsqueeze(3)), dim=3).movedim(2, 0)
        merged = Merged()
        for of_rank in self._to_owners(both):
            of_rank = of_rank.movedim(0, 2)
            merged.add(of_rank[..., :-1], of_rank[..., -1])
        shared_out, shared_lse = merged.result(shared_out)
        out = self._place(out.to(dtype), shared_out.to(dtype))
        return out, self._place(lse, shared_lse)

    def gradients(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> _RowGradients:
        """What the backward pass reads of the joint rows, from this rank's rows."""
        if not self._some:
            return _RowGradients(dout, dlse, out, lse)
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
        of_all = douts.wait().movedim(0, 2)
        lses, dlses = numbers.wait().movedim(0, 3).unbind(0)
        join = self._rows.join
        return _RowGradients(
            join(own_dout, of_all),
            join(own_dlse, dlses),
            join(own_out, torch.zeros_like(of_all)),
            join(own_lse, lses),
        )

    def sum(self, dq: Tensor) -> Tensor:
        """Gradients of the rank's queries, from those of the joint rows."""
        if not self._some:
            return dq
        own, shared = self._rows.part(dq)
        shared = self._to_owners(shared.movedim(2, 0)).sum(dim=0).movedim(0, 2)
        return self._place(own, shared)

"""Context parallelism: each rank computes its own queries over the keys that they want.

In: q, k and v of this rank's tokens, and a plan. Out: the output of the same tokens. Called by
users and, for some of the heads, by :mod:`.grid`.

As Ring Attention (arXiv 2310.01889), except that keys travel by what the mask wants instead of
round a ring, straight from their owner. Forward: attention over the rank's own keys while the
first keys of others travel, over these while the next do, and so on; results are merged by their
lses. Rows that all ranks share go the other way: their queries travel, and partial results return;
of two ranks, some are computed in pieces instead (:mod:`.pieces`).
Backward: keys travel again, because keeping them would take the memory that dividing saves;
gradients of a step need only the final output and lse, and those of keys return to their owners
while the next step computes. The rank's own keys come first and last, by halves of the heads, so
that there is something to compute while the first keys come and the last gradients return. Where
that would leave a GPU idle, because there are few heads and some keys that all rows see, all keys
are waited for, and computed with at once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import direct
from ..api import as_inputs, default_scale, flex_block_attn
from ..masks import BlockMask
from .cut import check_extents
from .dynamic import DynamicPlan
from .exchange import place_in
from .keys import Keys, Together
from .merge import Merged, Sums
from .pieces import RowPieces
from .plan import ContextPlan, RankPlan
from .shared import SharedRows


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan | DynamicPlan,
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
    q, k, v = as_inputs(q, k, v)
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
    scale = default_scale(q) if scale is None else float(scale)
    of_rank = plan.of_rank(rank, q.device, k.shape[1], q.shape[0] * q.shape[1])
    out, lse = _ContextAttention.apply(q, k, v, of_rank, group, scale)
    return (out, lse) if return_lse else out


def check_plan(plan: Any) -> None:
    """Raises unless it is one."""
    if not isinstance(plan, (ContextPlan, DynamicPlan)):
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
        # Pieces of rows are the forward pass's alone.
        ctx.save_for_backward(q_all if plan.pieces is None else q, k, v, out, lse)
        ctx.settings = plan.backward, group, scale
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
    rows = SharedRows(plan, group) if plan.pieces is None else RowPieces(plan.pieces)
    # A group's exchanges follow each other. What the first attention waits for leaves first, lest
    # it wait for keys as well.
    joined = rows.join(q)
    keys = Keys(k, v, plan, group)
    q_all = joined()
    merged = Merged()

    def attend(k: Tensor, v: Tensor, mask: BlockMask | None) -> None:
        if mask is not None and q_all.numel() and k.numel():
            keys.let_pass()
            # Some launches have fewer pieces of long rows, which are the first.
            q = q_all if mask.q_len == q_all.shape[2] else q_all[:, :, -mask.q_len :]
            merged.add(*flex_block_attn(q, k, v, mask, scale=scale, return_lse=True))

    attend(k, v, plan.local)
    for (k_, v_), mask in keys:
        attend(k_, v_, mask)

    out, lse = rows.part(merged, q_all, 1 + len(plan.steps()))
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
    rows = SharedRows(plan, group)
    dout = torch.zeros_like(out) if dout is None else dout
    settings = *plan.block_sizes, scale, torch.are_deterministic_algorithms_enabled()
    if plan.together is not None:
        # What is ready leaves first.
        of_all = Together(k, v, plan, group)
        row = rows.gradients(dout, dlse, out, lse)()
        of_rows = row.dout, row.dlse, q_all, *of_all.wait(), row.out, row.lse, plan.together.plan
        dq_, *of_keys = direct.gradients(*of_rows, *settings, [True] * 3)
        returning = of_all.gradients(*of_keys)
        dq = Sums([slice(0, q_all.shape[1])], lse.dtype)
        dq.add(dq_)
        return rows.sum(dq, q_all), *returning()
    # The order is that of the forward pass, for the same reason.
    joined = rows.gradients(dout, dlse, out, lse)
    keys = Keys(k, v, plan, group)
    row = joined()
    gradients = keys.gradients(lse.dtype)
    sharing = q_all.shape[1] // max(1, k.shape[1])
    stretches = _stretches(k.shape[1], bool(plan.steps()))
    q_stretches = [slice(s.start * sharing, s.stop * sharing) for s in stretches]
    dq = Sums(q_stretches, lse.dtype)

    def derive(
        k: Tensor, v: Tensor, mask: BlockMask | None, stretch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if mask is None or not q_all.numel() or not k.numel():
            return torch.zeros_like(k), torch.zeros_like(v)
        of_rows = row.dout, row.dlse, q_all, k, v, row.out, row.lse, mask.plan
        if stretch is not None and len(stretches) > 1:
            of_rows = _of_heads(q_stretches[stretch], *of_rows)
        keys.let_pass()
        dq_, dk_, dv_ = direct.gradients(*of_rows, *settings, [True] * 3)
        dq.add(dq_, stretch)
        return dk_, dv_

    def derive_own(stretch: int) -> None:
        heads = stretches[stretch]
        gradients.add(heads, *derive(k[:, heads], v[:, heads], plan.local, stretch))

    derive_own(0)
    returning = None
    for (k_, v_), mask in keys:
        dk, dv = derive(k_, v_, mask)
        if returning is not None:
            gradients.add_returned(returning)
        returning = keys.send_back(dk, dv)
    for stretch in range(1, len(stretches)):
        derive_own(stretch)
    if returning is not None:
        gradients.add_returned(returning)
    dk, dv = gradients.result()
    return rows.sum(dq, q_all), dk.to(k.dtype), dv.to(v.dtype)


def _stretches(heads: int, travels: bool) -> list[slice]:
    """Of key heads, those that a rank derives over its own keys while keys of others come, and
    those while their last gradients return."""
    if not travels or heads < 2:
        return [slice(0, heads)]
    return [slice(0, heads // 2), slice(heads // 2, heads)]


def _of_heads(
    heads: slice,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
) -> tuple[Tensor | None, ...]:
    """What the backward pass reads, of some query heads, whose k and v these are."""
    dout, q, out = (x[:, heads] for x in (dout, q, out))
    # Numbers of rows and plans are read as they follow each other.
    dlse = None if dlse is None else dlse[:, heads].contiguous()
    plan = plan if plan.shape[1] == 1 else plan[:, heads].contiguous()
    return dout, dlse, q, k, v, out, lse[:, heads].contiguous(), plan

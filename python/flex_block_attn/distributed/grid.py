"""Both at once: ranks in a grid, tokens divided along one side of it, heads along the other.

In: q, k and v of this rank's tokens, a plan, and the two groups that this rank is in. Out: the
output of the same tokens. Called by users.

The ranks of a heads group have the tokens of one rank of the plan's layout, in equal parts. They
exchange heads (:mod:`.ulysses`), so that each has all of those tokens for its heads; then the
ranks with the same heads exchange keys (:mod:`.context`). Heads cap the one, the other has no cap;
the first belongs between GPUs of one host, the second between hosts.
"""

import torch.distributed as dist
from torch import Tensor

from ..api import as_inputs, default_scale
from .context import check_plan, context_attention
from .cut import check_extents
from .dynamic import DynamicPlan
from .exchange import gathered, place_in
from .layout import Layout
from .plan import ContextPlan
from .ulysses import by_heads, chunk_lengths


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan | DynamicPlan,
    *,
    context_group: dist.ProcessGroup | None,
    heads_group: dist.ProcessGroup | None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the tokens of all ranks, divided between them by tokens and by heads.

    Args:
        q, k, v: of this rank's tokens, which are those of :func:`grid_shard`, (batch, heads,
            tokens, head_dim), as for :func:`flex_block_attn.flex_block_attn`.
        plan: of as many ranks as ``context_group`` has.
        context_group: the ranks with the same place in their heads groups, such as
            ``mesh.get_group("context")`` of a DeviceMesh.
        heads_group: the ranks that share the tokens of one of the plan's, such as
            ``mesh.get_group("heads")``.
        scale, return_lse: as for :func:`flex_block_attn.flex_block_attn`.

    Returns:
        ``out``, of q's shape; ``out, lse`` with ``return_lse``.
    """
    q, k, v = as_inputs(q, k, v)
    check_plan(plan)
    check_extents(plan.blocks, q.shape[0], q.shape[1])
    lengths = _lengths(plan.layout, context_group, heads_group)
    kv_lengths = _lengths(plan.layout, context_group, heads_group, keys=True)
    scale = default_scale(q) if scale is None else float(scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        part = plan.of_heads(heads)
        return context_attention(q, k, v, part, group=context_group, scale=scale, return_lse=True)

    results = by_heads(
        q, k, v, attend, heads_group, None, lengths, kv_lengths, return_lse, "heads_group"
    )
    return results if return_lse else results[0]


def grid_shard(
    x: Tensor,
    layout: Layout,
    *,
    dim: int,
    context_group: dist.ProcessGroup | None,
    heads_group: dist.ProcessGroup | None,
    keys: bool = False,
) -> Tensor:
    """This rank's part of a tensor of the whole sequence; ``keys`` says whose."""
    lengths = _lengths(layout, context_group, heads_group, keys)
    rank, _ = place_in(context_group, "context_group")
    part, _ = place_in(heads_group, "heads_group")
    return layout.shard(x, rank, dim=dim, keys=keys).split(lengths, dim=dim)[part]


def grid_unshard(
    x: Tensor,
    layout: Layout,
    *,
    dim: int,
    context_group: dist.ProcessGroup | None,
    heads_group: dist.ProcessGroup | None,
    keys: bool = False,
) -> Tensor:
    """The tensor of the whole sequence, on every rank, of all ranks' parts. Differentiable: the
    gradient of a part is the sum of all ranks'."""
    lengths = _lengths(layout, context_group, heads_group, keys)
    part, _ = place_in(heads_group, "heads_group")
    if x.shape[dim] != lengths[part]:
        raise ValueError(
            f"x has {x.shape[dim]} tokens in dimension {dim}, but this rank has {lengths[part]}"
        )
    rows = gathered(x.movedim(dim, 0), lengths, heads_group).movedim(0, dim)
    return layout.unshard(rows, dim=dim, keys=keys, group=context_group)


def _lengths(
    layout: Layout,
    context_group: dist.ProcessGroup | None,
    heads_group: dist.ProcessGroup | None,
    keys: bool = False,
) -> list[int]:
    """Tokens of each rank of the heads group."""
    rank, ranks = place_in(context_group, "context_group")
    layout.check_ranks(ranks, "context_group")
    _, parts = place_in(heads_group, "heads_group")
    return chunk_lengths(layout.count(rank, keys=keys), parts)

"""Tokens and heads divided at once, over 4 processes. Against: one process."""

import pytest
import torch
import torch.distributed as dist
from reference import random_qkv, relative_error
from test_context import CASES
from torch.distributed.device_mesh import DeviceMesh

from flex_block_attn import flex_block_attn
from flex_block_attn.distributed import (
    ContextPlan,
    DynamicPlan,
    Layout,
    grid_attention,
    grid_shard,
    grid_unshard,
)


def one_and_many(group, case, sides, dynamic=False):
    """Errors of outputs and gradients of a case, of this rank's tokens."""
    ranks = dist.get_world_size(group)
    ordered = torch.arange(ranks).reshape(sides)
    mesh = DeviceMesh("cpu", ordered, mesh_dim_names=("context", "heads"))
    groups = {
        "context_group": mesh.get_group("context"),
        "heads_group": mesh.get_group("heads"),
    }
    mask, heads, batch, shared = CASES[case]()
    q, k, v = random_qkv(batch, heads, mask.q_len, mask.kv_len, 16, torch.float64)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flex_block_attn(*whole, mask, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), whole, (dout, dlse))

    layout = Layout.balanced(mask, sides[0], shared_rows=shared)
    plan = DynamicPlan(mask.blocks, layout) if dynamic else ContextPlan(mask, layout=layout)

    def mine(x, keys=False):
        return grid_shard(x, layout, dim=2, keys=keys, **groups)

    local = [mine(q), mine(k, True), mine(v, True)]
    local = [x.clone().requires_grad_() for x in local]
    results = grid_attention(*local, plan, return_lse=True, **groups)
    gradients = torch.autograd.grad(results, local, (mine(dout), mine(dlse)))
    only = grid_attention(*local, plan, **groups)
    return {
        "out": relative_error(results[0], mine(out)),
        "only out": relative_error(only, mine(out)),
        "lse": relative_error(results[1].exp(), mine(lse).exp()),
        "dq": relative_error(gradients[0], mine(expected[0])),
        "dk": relative_error(gradients[1], mine(expected[1], True)),
        "dv": relative_error(gradients[2], mine(expected[2], True)),
        "whole": relative_error(grid_unshard(results[0], layout, dim=2, **groups), out),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(ranks, case, dynamic):
    for errors in ranks.run(4, one_and_many, case=case, sides=(2, 2), dynamic=dynamic):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("sides", [(4, 1), (1, 4)])
def test_grids_of_one_side(ranks, sides):
    for errors in ranks.run(4, one_and_many, case="tiles and text", sides=sides):
        assert max(errors.values()) < 1e-12, errors


def refusals(group):
    """Texts of what is refused; nothing of it may reach a collective."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("context", "heads"))
    groups = {
        "context_group": mesh.get_group("context"),
        "heads_group": mesh.get_group("heads"),
    }
    mask, _, _, _ = CASES["dense"]()
    q = torch.zeros(1, 2, 25, 16)
    texts = []
    for plan, x in ((ContextPlan(mask, 4), q), (ContextPlan(mask, 2), q), (mask, q)):
        with pytest.raises((TypeError, ValueError)) as caught:
            grid_attention(x, x, x, plan, **groups)
        texts.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        grid_unshard(q, Layout.balanced(mask, 2), dim=2, **groups)
    return [*texts, str(caught.value)]


def test_errors_name_the_argument(ranks):
    ranks_differ, tokens, plan, parts = ranks.run(4, refusals)[0]
    assert ranks_differ == "context_group has 2 ranks, but the layout is for 4"
    assert "q has 25 tokens, but rank 0 should have 24 of lengths [24, 24]" in tokens
    assert "plan must be a ContextPlan or DynamicPlan, got BlockMask" in plan
    assert parts == "x has 25 tokens in dimension 2, but this rank has 24"

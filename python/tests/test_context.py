"""Context parallelism over 1 to 4 processes. Against: one process."""

import pytest
import torch
import torch.distributed as dist
from reference import random_qkv, relative_error

from flex_block_attn import BlockMask, flex_block_attn
from flex_block_attn.distributed import (
    ContextPlan,
    DynamicPlan,
    Layout,
    context_attention,
    gather_blocks,
)
from flex_block_attn.distributed import balance as balancing
from flex_block_attn.distributed import plan as planning


def random_mask(q_len, kv_len, q_block, kv_block, heads, density=0.4, batch=1):
    blocks = torch.rand(batch, heads, -(-q_len // q_block), -(-kv_len // kv_block)) < density
    # Rows without any key, and keys that no row wants.
    blocks[:, :, 1::3] = False
    blocks[:, :, :, 2::5] = False
    return BlockMask(blocks, q_len, kv_len, q_block, kv_block)


def tiles_and_more():
    """A sliding tile window, some more tiles for each head, and text, as SSTA has it."""
    mask = BlockMask.sta((2, 3, 2), (1, 3, 1), tile_tokens=16, text_tokens=39)
    blocks = mask.blocks.expand(1, 4, -1, -1) | (torch.rand(1, 4, 15, 15) < 0.2)
    return BlockMask(blocks, mask.q_len, mask.kv_len, 16, 16)


def choice_and_text(heads, text, places=(24, 25)):
    """Tiles that rows choose anywhere, so that ranks want nearly all keys of each other, and two
    blocks of text that see all: twice as long as the other rows, and more."""
    blocks = torch.rand(1, heads, 26, 26) < 0.3
    blocks[..., places] = blocks[:, :, places] = True
    return BlockMask(blocks, 384 + text, 384 + text, 16, 16)


# Each gives (mask, heads of q and of k, batch, shared rows), a new mask each time.
CASES = {
    "dense": lambda: (BlockMask.full(100, 100, 16, 16), (2, 2), 2, None),
    "causal": lambda: (BlockMask.causal(200, 200, 16, 16), (2, 2), 1, None),
    "sliding window": lambda: (
        BlockMask.sliding_window(150, 150, 16, 16, left=20, right=7),
        (3, 3),
        1,
        None,
    ),
    "tiles and text": lambda: (tiles_and_more(), (4, 4), 1, None),
    "choice and text": lambda: (choice_and_text(4, 32), (4, 2), 1, [24, 25]),
    "choice and text, 1 head": lambda: (choice_and_text(1, 32), (1, 1), 1, [24, 25]),
    "choice and short text": lambda: (choice_and_text(2, 25), (2, 2), 2, [24, 25]),
    "choice and text between": lambda: (
        choice_and_text(2, 32, [3, 20]),
        (2, 1),
        2,
        [3, 20],
    ),
    "text first": lambda: (random_mask(133, 133, 16, 16, 2), (2, 2), 1, [0, 1, 2]),
    "all rows shared": lambda: (random_mask(90, 90, 16, 16, 1), (2, 2), 1, range(6)),
    "grouped heads, empty rows": lambda: (random_mask(140, 140, 16, 32, 6), (6, 2), 2, None),
    "a mask for each batch": lambda: (random_mask(70, 70, 32, 16, 1, batch=2), (1, 1), 2, [1]),
    "other keys than queries": lambda: (random_mask(61, 133, 16, 32, 4), (4, 1), 1, [0]),
    "fewer blocks than ranks": lambda: (BlockMask.full(20, 20, 16, 16), (1, 1), 1, None),
    "nothing at all": lambda: (random_mask(64, 64, 16, 16, 1, density=0), (1, 1), 1, [0]),
}


def plan_of(kind, mask, ranks, shared, chunks):
    sizes = mask.q_len, mask.kv_len, mask.q_block_size, mask.kv_block_size
    if kind == "static":
        layout = Layout.balanced(mask, ranks, shared_rows=shared)
        return ContextPlan(mask, layout=layout, chunks=chunks)
    layout = Layout.even(*sizes, ranks=ranks, shared_rows=shared or ())
    return DynamicPlan(mask.blocks, layout, chunks=chunks, exchange=kind)


def one_and_many(group, case, kind="static", chunks=2, dtype=torch.float64):
    """Errors of outputs and gradients of a case, of this rank's tokens."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mask, heads, batch, shared = CASES[case]()
    q, k, v = random_qkv(batch, heads, mask.q_len, mask.kv_len, 16, dtype)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flex_block_attn(*whole, mask, return_lse=True, scale=0.3)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), whole, (dout, dlse))

    plan = plan_of(kind, mask, ranks, shared, chunks)
    layout = plan.layout

    def mine(x, keys=False):
        return layout.shard(x, rank, dim=2, keys=keys)

    local = [mine(q), mine(k, True), mine(v, True)]
    local = [x.clone().requires_grad_() for x in local]
    results = context_attention(*local, plan, group=group, scale=0.3, return_lse=True)
    gradients = torch.autograd.grad(results, local, (mine(dout), mine(dlse)))
    assert results[0].dtype == dtype
    errors = {
        "out": relative_error(results[0], mine(out)),
        "lse": relative_error(results[1].exp(), mine(lse).exp()),
        "dq": relative_error(gradients[0], mine(expected[0])),
        "dk": relative_error(gradients[1], mine(expected[1], True)),
        "dv": relative_error(gradients[2], mine(expected[2], True)),
        "whole": relative_error(layout.unshard(results[0], dim=2, group=group), out),
    }
    # Without the lse, and without its gradient.
    only = context_attention(*local, plan, group=group, scale=0.3)
    again = torch.autograd.grad(only, local, mine(dout))
    reference = torch.autograd.grad(flex_block_attn(*whole, mask, scale=0.3), whole, dout)
    errors["dk without lse"] = relative_error(again[1], mine(reference[1], True))
    errors["dq without lse"] = relative_error(again[0], mine(reference[0]))
    return errors


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(ranks, size, case):
    for errors in ranks.run(size, one_and_many, case=case):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("kind", ["needed", "all"])
@pytest.mark.parametrize("case", CASES)
def test_plans_made_for_each_call(ranks, case, kind):
    for errors in ranks.run(3, one_and_many, case=case, kind=kind):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("kind", ["static", "needed", "all"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_exchange_keys_at_once(ranks, case, kind):
    """Those that are wanted, or, if these are nearly all, all as they lie."""
    for errors in ranks.run(2, one_and_many, case=case, kind=kind, chunks=1):
        assert max(errors.values()) < 1e-12, errors


def of_two_ranks(group, case, kind, multiprocessors):
    """What a rank's plan is for a GPU of so many multiprocessors, and errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balancing, "_MULTIPROCESSORS", multiprocessors)
        # So few rows are not balanced by chance.
        patch.setattr(planning, "_AS_GOOD", 0.8)
        mask, heads, batch, shared = CASES[case]()
        plan = plan_of(kind, mask, 2, shared, 1)
        rank, device = dist.get_rank(group), torch.device("cpu")
        of_rank = plan.of_rank(rank, device, heads[1], batch * heads[0])
        ((moves, _),) = of_rank.steps()
        errors = one_and_many(group, case, kind, chunks=1)
    pieces = of_rank.pieces.most if of_rank.pieces else 1
    together = of_rank.backward.together is not None
    return moves.step.is_whole, sum(of_rank.rows.shared_counts), pieces, together, errors


@pytest.mark.parametrize("kind", ["static", "needed"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("choice")])
@pytest.mark.parametrize("multiprocessors", [1e-3, 132])
def test_two_ranks_that_send_all(ranks, case, kind, multiprocessors):
    """On a GPU that is kept busy, text is shared no longer, and the backward pass begins before
    keys have come; on one that is not, text is computed in pieces, or shared, if the mask is made
    in each call or pieces were no whole blocks, and all keys are waited for."""
    busy = multiprocessors < 1
    cuts = not busy and kind == "static" and case != "choice and short text"
    for whole, shared, pieces, together, errors in ranks.run(
        2, of_two_ranks, case=case, kind=kind, multiprocessors=multiprocessors
    ):
        assert whole and (shared == 0) == (busy or cuts)
        assert (pieces > 1) == cuts
        assert together == (kind == "static" and not busy)
        assert max(errors.values()) < 1e-12, errors


def in_pieces(group, case, counts):
    """Errors where launches have so many pieces of each long row."""
    given = list(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "pieces", lambda *_: given.pop(0))
        patch.setattr(planning, "_AS_GOOD", 0.8)
        errors = one_and_many(group, case, chunks=1)
    # Both were asked for.
    assert not given
    return errors


@pytest.mark.parametrize("case", ["choice and text", "choice and text between"])
@pytest.mark.parametrize("counts", [(1, 1), (1, 3), (4, 2), (2, 20)])
def test_long_rows_in_pieces(ranks, case, counts):
    """As many for each launch or not, or more than there are blocks."""
    for errors in ranks.run(2, in_pieces, case=case, counts=counts):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("chunks", [1, 5])
def test_chunks(ranks, chunks):
    for errors in ranks.run(3, one_and_many, case="tiles and text", chunks=chunks):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("case", ["tiles and text", "choice and text"])
@pytest.mark.parametrize("size, chunks", [(4, 2), (2, 1)])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_dtypes(ranks, dtype, tolerance, size, chunks, case):
    """Of bfloat16, each part's output and gradients are rounded once more than in one process."""
    for errors in ranks.run(size, one_and_many, case=case, dtype=dtype, chunks=chunks):
        assert max(errors.values()) < tolerance, errors


def test_one_rank(ranks):
    (errors,) = ranks.run(1, one_and_many, case="tiles and text")
    assert max(errors.values()) < 1e-12, errors


def repeated(group):
    """Outputs and gradients of two calls."""
    rank = dist.get_rank(group)
    mask, heads, batch, _ = CASES["tiles and text"]()
    plan = ContextPlan(mask, dist.get_world_size(group))
    q, k, v = random_qkv(batch, heads, mask.q_len, mask.kv_len, 16)
    local = [plan.layout.shard(x, rank, dim=2).requires_grad_() for x in (q, k, v)]
    runs = []
    for _ in range(2):
        out = context_attention(*local, plan, group=group)
        runs.append([out, *torch.autograd.grad(out.sin().sum(), local)])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_results_repeat(ranks):
    assert all(ranks.run(4, repeated))


def chosen_by_means(group):
    """A mask of the most similar blocks, from means that all ranks have parts of."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    q, k, v = random_qkv(1, 2, 160, 160, 16)
    layout = Layout.even(160, 160, 16, 16, ranks=ranks)
    local = [layout.shard(x, rank, dim=2) for x in (q, k, v)]
    means = [x.unflatten(2, (-1, 16)).mean(dim=3) for x in local[:2]]
    queries = gather_blocks(means[0], layout, dim=2, group=group)
    keys = gather_blocks(means[1], layout, dim=2, keys=True, group=group)
    chosen = (queries @ keys.transpose(2, 3)).topk(3).indices
    blocks = torch.zeros(1, 2, 10, 10, dtype=torch.bool).scatter_(3, chosen, True)
    out = context_attention(*local, DynamicPlan(blocks, layout), group=group)
    expected = flex_block_attn(q, k, v, BlockMask(blocks, 160, 160, 16, 16))
    assert relative_error(out, layout.shard(expected, rank, dim=2)) < 1e-6
    return blocks


def test_a_choice_over_all_blocks_is_the_same_for_any_number_of_ranks(ranks):
    masks = [mask for size in (1, 2, 3, 4) for mask in ranks.run(size, chosen_by_means)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def partial_gradients(group):
    """Only some inputs need gradients; the second derivative is refused."""
    mask, heads, batch, _ = CASES["tiles and text"]()
    plan = ContextPlan(mask, dist.get_world_size(group))
    q, k, v = random_qkv(batch, heads, mask.q_len, mask.kv_len, 16)
    local = [plan.layout.shard(x, dist.get_rank(group), dim=2) for x in (q, k, v)]
    local[1].requires_grad_()
    out = context_attention(*local, plan, group=group)
    (dk,) = torch.autograd.grad(out.sin().sum(), local[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dk.sum().backward()
    with torch.no_grad():
        return context_attention(*local, plan, group=group).requires_grad


def test_gradients_of_some_inputs(ranks):
    assert ranks.run(2, partial_gradients) == [False, False]


def refusals(group):
    """Texts of what is refused; nothing of it may reach a collective."""
    mask = BlockMask.full(64, 64, 16, 16)
    plan = ContextPlan(mask, 2)
    q = torch.zeros(1, 4, 32, 16)
    texts = {}

    def refused(name, *args):
        with pytest.raises((TypeError, ValueError)) as caught:
            context_attention(*args, group=group)
        texts[name] = str(caught.value)

    refused("plan", q, q, q, mask)
    refused("ranks", q, q, q, ContextPlan(mask, 3))
    refused("tokens", q[:, :, 1:], q, q, plan)
    refused("keys", q, q[:, :, 1:], q[:, :, 1:], plan)
    refused("values", q, q, q[:, :2], plan)
    refused("heads", q, q[:, :3], q[:, :3], plan)
    per_head = BlockMask(torch.ones(3, 4, 4).bool(), 64, 64, 16, 16)
    refused("extent", q, q, q, ContextPlan(per_head, 2))
    return texts


def test_errors_name_the_argument(ranks):
    texts = ranks.run(2, refusals)[1]
    for name, text in {
        "plan": "plan must be a ContextPlan or DynamicPlan, got BlockMask",
        "ranks": "group has 2 ranks, but the layout is for 3",
        "tokens": "q has 31 tokens, but the layout gives rank 1 32",
        "keys": "k has 31 tokens, but the layout gives rank 1 32",
        "values": "v has shape (1, 2, 32, 16), but k has (1, 4, 32, 16)",
        "heads": "k has shape (1, 3, 32, 16), which does not go with (1, 4, 32, 16) of q",
        "extent": "mask has a heads extent of 3, but must have 1 or that of q, 4",
    }.items():
        assert text in texts[name]

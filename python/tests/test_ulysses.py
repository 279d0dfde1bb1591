"""Ulysses over 1 to 4 processes. Against: one process."""

import pytest
import torch
import torch.distributed as dist
from reference import random_qkv, relative_error

from flex_block_attn import BlockMask, flex_block_attn
from flex_block_attn.distributed import gather_heads, ulysses_attention
from flex_block_attn.distributed.ulysses import chunk_lengths


def empty_rows(q_len, kv_len, heads):
    blocks = torch.rand(1, heads, -(-q_len // 16), -(-kv_len // 32)) < 0.4
    blocks[:, :, 1::3] = False
    return BlockMask(blocks, q_len, kv_len, 16, 32)


# Each gives (mask, heads of q and of k, batch, text tokens), a new mask each time.
CASES = {
    "dense": lambda: (BlockMask.full(100, 100, 16, 16), (4, 4), 2, 0),
    "sliding window": lambda: (
        BlockMask.sliding_window(150, 150, 16, 16, left=20, right=7),
        (5, 5),
        1,
        0,
    ),
    "tiles and text": lambda: (
        BlockMask.sta((2, 3, 2), (1, 3, 1), tile_tokens=16, text_tokens=23),
        (3, 3),
        1,
        23,
    ),
    "a mask for each head, grouped heads": lambda: (empty_rows(90, 90, 6), (6, 2), 2, 10),
    "grouped heads that ranks cut": lambda: (empty_rows(70, 70, 6), (6, 3), 1, 0),
    "other keys than queries": lambda: (empty_rows(61, 133, 4), (4, 1), 1, 0),
    "fewer heads than ranks": lambda: (empty_rows(64, 64, 1), (1, 1), 1, 5),
    "fewer tokens than ranks": lambda: (BlockMask.full(2, 2, 16, 16), (4, 4), 1, 0),
}


def one_and_many(group, case, uneven, dtype):
    """Errors of outputs and gradients of a case, of this rank's tokens."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mask, heads, batch, text_tokens = CASES[case]()
    q, k, v = random_qkv(batch, heads, mask.q_len, mask.kv_len, 16, dtype)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flex_block_attn(*whole, mask, return_lse=True, scale=0.3)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), whole, (dout, dlse))

    q_total, kv_total = mask.q_len - text_tokens, mask.kv_len - text_tokens
    lengths, kv_lengths = chunk_lengths(q_total, ranks), chunk_lengths(kv_total, ranks)
    if uneven:
        lengths = kv_lengths = [q_total, *[0] * (ranks - 1)]
    start, kv_start = sum(lengths[:rank]), sum(kv_lengths[:rank])
    mine = slice(start, start + lengths[rank])
    kv_mine = slice(kv_start, kv_start + kv_lengths[rank])
    image = [
        x[:, :, part].clone().requires_grad_()
        for x, part in zip((q, k, v), (mine, kv_mine, kv_mine), strict=True)
    ]
    text = None
    if text_tokens:
        text = [x[:, :, -text_tokens:].clone().requires_grad_() for x in (q, k, v)]
    results = ulysses_attention(
        *image,
        mask,
        group=group,
        text=text,
        lengths=lengths if uneven else None,
        scale=0.3,
        return_lse=True,
    )
    errors = {}
    if text is None:
        got_out, got_lse = results
        gradients = torch.autograd.grad(results, image, (dout[:, :, mine], dlse[:, :, mine]))
    else:
        got_out, text_out, got_lse, text_lse = results
        errors["text out"] = relative_error(text_out, out[:, :, -text_tokens:])
        errors["text lse"] = relative_error(text_lse.exp(), lse[:, :, -text_tokens:].exp())
        # The loss is the sum of all ranks': each takes a part of the text's.
        share = 1 / ranks
        gradients = torch.autograd.grad(
            results,
            [*image, *text],
            (
                dout[:, :, mine],
                dout[:, :, -text_tokens:] * share,
                dlse[:, :, mine],
                dlse[:, :, -text_tokens:] * share,
            ),
        )
        for name, partial, whole_gradient in zip("qkv", gradients[3:], expected, strict=True):
            total = partial.contiguous()
            dist.all_reduce(total, group=group)
            errors[f"text d{name}"] = relative_error(total, whole_gradient[:, :, -text_tokens:])
    errors["out"] = relative_error(got_out, out[:, :, mine])
    errors["lse"] = relative_error(got_lse.exp(), lse[:, :, mine].exp())
    for name, got, want, part in zip(
        "qkv", gradients, expected, (mine, kv_mine, kv_mine), strict=False
    ):
        errors[f"d{name}"] = relative_error(got, want[:, :, part])
    return errors


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(ranks, size, case):
    for errors in ranks.run(size, one_and_many, case=case, uneven=False, dtype=torch.float64):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("case", ["dense", "tiles and text"])
def test_all_tokens_on_one_rank(ranks, case):
    for errors in ranks.run(3, one_and_many, case=case, uneven=True, dtype=torch.float32):
        assert max(errors.values()) < 1e-5, errors


def test_one_rank(ranks):
    """A group of one is no special case to callers."""
    (errors,) = ranks.run(
        1, one_and_many, case="tiles and text", uneven=False, dtype=torch.bfloat16
    )
    assert max(errors.values()) < 1e-2, errors


def shared_choice(group):
    """A mask by the mean over heads, made inside: the output, and the mask's blocks."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    q, k, v = random_qkv(2, (6, 3), 96, 96, 16)
    made = []

    def choose(q, k, heads):
        means = q.unflatten(2, (6, 16)).mean(dim=3)
        queries = gather_heads(means, 6, group=group).mean(dim=1, keepdim=True)
        scores = queries @ queries.transpose(2, 3)
        blocks = torch.zeros_like(scores, dtype=torch.bool)
        made.append(blocks.scatter_(3, scores.topk(3).indices, True))
        return BlockMask(made[0], 96, 96, 16, 16)

    n = 96 // ranks
    mine = slice(rank * n, (rank + 1) * n)
    image = [x[:, :, mine] for x in (q, k, v)]
    out = ulysses_attention(*image, choose, group=group, lengths=[n] * ranks)
    expected = flex_block_attn(q, k, v, BlockMask(made[0], 96, 96, 16, 16))
    assert relative_error(out, expected[:, :, mine]) < 1e-6
    return made[0]


def test_a_choice_over_all_heads_is_the_same_for_any_number_of_ranks(ranks):
    masks = [mask for size in (1, 2, 3, 4) for mask in ranks.run(size, shared_choice)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def refusals(group):
    """Texts of what is refused; nothing of it may reach a collective."""
    mask = BlockMask.full(64, 64, 16, 16)
    q = torch.zeros(1, 4, 32, 16)
    texts = {}

    def refused(name, *args, **kwargs):
        with pytest.raises((TypeError, ValueError)) as caught:
            ulysses_attention(*args, group=group, **kwargs)
        texts[name] = str(caught.value)

    refused("mask", q, q, q, torch.ones(4, 4).bool())
    refused("length", q[:, :, :31], q[:, :, :31], q[:, :, :31], mask)
    refused("lengths", q, q, q, mask, lengths=[64])
    refused("function", q, q, q, lambda q, k, heads: mask)
    refused("heads", q, q[:, :3], q[:, :3], mask)
    refused("values", q, q, q[:, :2], mask)
    refused("text", q, q, q, mask, text=(q, q))
    refused("text shape", q, q, q, mask, text=(q[:, :2], q, q))
    refused("extent", q, q, q, BlockMask(torch.ones(3, 4, 4).bool(), 64, 64, 16, 16))
    return texts


def test_errors_name_the_argument(ranks):
    texts = ranks.run(2, refusals)[1]
    for name, text in {
        "mask": "mask must be a BlockMask or a function that makes one, got Tensor",
        "length": "q has 31 tokens, but rank 1 should have 32 of lengths [32, 32]",
        "lengths": "lengths must be 2 numbers, one for each rank, got 1",
        "function": "lengths must be given where mask is a function",
        "heads": "k has 3 heads, which do not divide the 4 of q",
        "values": "v has shape (1, 2, 32, 16), but k has (1, 4, 32, 16)",
        "text": "text must be three tensors",
        "text shape": "text's q has shape (1, 2, 32, 16), but must agree with q",
        "extent": "mask has a heads extent of 3, but must have 1 or that of q, 4",
    }.items():
        assert text in texts[name]


def test_without_process_groups():
    mask = BlockMask.full(64, 64, 16, 16)
    q = torch.zeros(1, 4, 64, 16)
    with pytest.raises(RuntimeError, match="torch.distributed is not initialised"):
        ulysses_attention(q, q, q, mask)

"""MoBA of language models against a definition over tokens, in float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, random_qkv, relative_error

from flex_block_attn import flex_block_attn_func
from flex_block_attn.moba import create_moba_mask, moba_attention, moba_attention_varlen


def seen_chunks(q, k, chunk_size, topk, block_size):
    """For one head and each block of queries, the chunks of the best scores and the own one; and
    by how much the last of them beat the next."""
    result = []
    for first in range(0, len(q), block_size):
        own = first // chunk_size
        query = q[first : first + block_size].mean(0)
        scores = [query @ k[c * chunk_size : (c + 1) * chunk_size].mean(0) for c in range(own)]
        order = sorted(range(own), key=lambda c: -scores[c])
        taken = order[: topk - 1]
        gap = scores[taken[-1]] - scores[order[topk - 1]] if 1 < topk <= own else torch.inf
        result.append(({*taken, own}, gap))
    return result


def reference(q, k, v, chunks, chunk_size, block_size):
    """Causal attention of one head over the chunks that each block of queries sees."""
    tokens = torch.arange(len(q))
    mask = tokens[:, None] >= tokens
    for number, (seen, _) in enumerate(chunks):
        rows = slice(number * block_size, (number + 1) * block_size)
        mask[rows] &= torch.isin(tokens // chunk_size, torch.tensor(sorted(seen)))
    scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@given(
    st.integers(1, 200),
    st.sampled_from([(16, 16), (32, 16), (48, 16), (64, 32)]),
    st.integers(1, 6),
    st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_attention_and_gradients(length, sizes, topk, heads, dtype, seed):
    torch.manual_seed(seed)
    chunk_size, block_size = sizes
    q, k, v = (x.requires_grad_() for x in random_qkv(2, heads, length, length, 8, dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    groups = heads[0] // heads[1]
    expected, sure = [], True
    for b in range(2):
        for h in range(heads[0]):
            one = exact[0][b, h], exact[1][b, h // groups], exact[2][b, h // groups]
            chunks = seen_chunks(one[0], one[1], chunk_size, topk, block_size)
            # Means are rounded to the dtype: where scores are that close, either is right.
            sure &= all(gap > 0.02 for _, gap in chunks)
            expected.append(reference(*one, chunks, chunk_size, block_size))
    assume(sure)
    expected = torch.stack(expected).unflatten(0, (2, heads[0]))
    out = moba_attention(q, k, v, chunk_size, topk, block_size=block_size)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    wanted = torch.autograd.grad(expected, exact, dout.double())
    for name, one, other in zip("qkv", got, wanted, strict=True):
        # A single key has all of the weight, and the gradients of q and k are 0.
        error = relative_error(one, other) if other.norm() > 1e-9 else one.norm().item()
        assert error < 2 * TOLERANCE[dtype], f"d{name}"


def test_no_query_sees_the_future():
    q, k, v = random_qkv(1, 2, 160, 160, 16)
    out = moba_attention(q, k, v, 32, 2, block_size=16)
    k[:, :, 100:], v[:, :, 100:] = 7, 9
    # The block of token 100 is chosen for by its mean query, which has not changed.
    again = moba_attention(q, k, v, 32, 2, block_size=16)
    assert torch.equal(out[:, :, :100], again[:, :, :100])


@pytest.mark.parametrize(
    "lengths", [(37, 63, 1, 100), (0, 50, 0, 31), (64, 32, 45), (160,), (16, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sequences_of_any_lengths_are_each_for_itself(lengths, dtype):
    tokens, ends = sum(lengths), torch.tensor((0, *lengths)).cumsum(0)
    q, k, v = (torch.randn(tokens, h, 16).to(dtype).requires_grad_() for h in (4, 2, 2))
    for cu_seqlens in (ends, ends.int(), ends.tolist()):
        out = moba_attention_varlen(q, k, v, cu_seqlens, 32, 2, block_size=16, scale=0.3)
    one = (x.split(lengths) for x in (q, k, v))
    expected = [
        moba_attention(*(x.transpose(0, 1)[None] for x in part), 32, 2, block_size=16, scale=0.3)
        for part in zip(*one, strict=True)
        if len(part[0])
    ]
    expected = torch.cat(expected, dim=2)[0].transpose(0, 1)
    assert out.shape == q.shape and out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    dout = torch.randn_like(out)
    pairs = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected))
    for got, wanted in zip(*pairs, strict=True):
        assert relative_error(got, wanted) < TOLERANCE[dtype]


def test_compiles_to_one_graph():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, (4, 2), 150, 150, 16))

    def packed(*inputs):
        inputs = (x[0].transpose(0, 1) for x in inputs)
        return moba_attention_varlen(*inputs, [0, 70, 150], 32, 2, block_size=16)

    for attend in (lambda *x: moba_attention(*x, 32, 2, block_size=16), packed):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        expected, got = attend(q, k, v), compiled(q, k, v)
        assert torch.allclose(got, expected)
        wanted = torch.autograd.grad(expected.sum(), (q, k, v))
        for one, other in zip(torch.autograd.grad(got.sum(), (q, k, v)), wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_all_chunks_are_causal_attention():
    q, k, v = random_qkv(2, 2, 150, 150, 16, torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(moba_attention(q, k, v, 32, 99, block_size=16), expected)


def test_the_mask_alone_computes_whole_diagonal_blocks():
    q, k, v = random_qkv(1, 1, 96, 96, 16)
    mask = create_moba_mask(q, k, 32, 2, block_size=16)
    assert torch.equal(mask, mask.tril()) and mask.diagonal(dim1=-2, dim2=-1).all()
    whole = flex_block_attn_func(q, k, v, 16, 16, mask)
    causal = moba_attention(q, k, v, 32, 2, block_size=16)
    # The last query of a block sees all of it either way.
    assert torch.allclose(whole[:, :, 15::16], causal[:, :, 15::16], atol=1e-6)
    assert not torch.allclose(whole[:, :, ::16], causal[:, :, ::16], atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 40}, "chunk_size must be a positive multiple of block_size 16, got 40"),
        ({"chunk_size": 0}, "chunk_size must be a positive multiple of block_size 16, got 0"),
        ({"block_size": 24}, "block_size must be a positive multiple of 16, got 24"),
        ({"topk": 0}, "topk must be positive, got 0"),
        ({"k": torch.zeros(1, 1, 32, 8)}, "k must have q's 64 tokens, got 32"),
    ],
)
def test_mistakes_are_named(arguments, message):
    q = k = v = torch.zeros(1, 1, 64, 8)
    fine = {"q": q, "k": k, "v": v, "chunk_size": 32, "topk": 2, "block_size": 16}
    with pytest.raises(ValueError) as caught:
        moba_attention(**fine | arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("cu_seqlens", [[], [0], [0, 63], [1, 64], [0, 40, 30, 64]])
def test_sequences_that_are_none_are_named(cu_seqlens):
    q = torch.zeros(64, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to the 64 tokens"):
        moba_attention_varlen(q, q, q, cu_seqlens, 32, 2, block_size=16)
    with pytest.raises(ValueError, match="v must be .* of q's 64 tokens, got shape .60, 2, 8"):
        moba_attention_varlen(q, q, q[:60], [0, 64], 32, 2, block_size=16)

"""Random shapes, blocks, masks and types against the dense float64 reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, assert_matches, random_qkv

from flex_block_attn import BlockMask, flex_block_attn_func

BLOCK_SIZES = st.integers(1, 6).map(lambda n: 16 * n)


@st.composite
def cases(draw):
    """Arguments of ``assert_matches``: q, k, v, blocks and the block sizes."""
    batch, kv_heads, groups = (draw(st.integers(1, limit)) for limit in (2, 2, 3))
    q_len, kv_len = draw(st.integers(0, 130)), draw(st.integers(0, 130))
    q_block, kv_block = draw(BLOCK_SIZES), draw(BLOCK_SIZES)
    head_dim = 8 * draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    heads = groups * kv_heads
    leading = draw(
        st.sampled_from([(), (1,), (heads,), (1, 1), (1, heads), (batch, 1), (batch, heads)])
    )
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))

    torch.manual_seed(draw(st.integers(0, 2**32)))
    q, k, v = random_qkv(batch, (heads, kv_heads), q_len, kv_len, head_dim, dtype)
    blocks = torch.rand(*leading, -(-q_len // q_block), -(-kv_len // kv_block)) < density
    return q, k, v, blocks, q_block, kv_block


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_attention_matches_the_reference(case):
    assert_matches(*case)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_a_case_alone_is_the_same_as_among_others(case, data):
    """Each batch and head is computed by itself: alone it gives the same bits."""
    q, k, v, blocks, q_block, kv_block = case
    out = flex_block_attn_func(*case[:3], q_block, kv_block, blocks)
    b = data.draw(st.integers(0, q.shape[0] - 1))
    h = data.draw(st.integers(0, q.shape[1] - 1))
    shared = h // (q.shape[1] // k.shape[1])
    own = blocks.expand(q.shape[0], q.shape[1], *blocks.shape[-2:])[b, h]
    q, k, v = q[b, h][None, None], k[b, shared][None, None], v[b, shared][None, None]
    alone = flex_block_attn_func(q, k, v, q_block, kv_block, own)
    assert torch.equal(alone[0, 0], out[b, h])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 3), st.integers(1, 3))
def test_finer_blocks_of_the_same_mask_change_nothing(case, q_parts, kv_parts):
    """A block cut into smaller ones is the same mask."""
    q, k, v, blocks, q_block, kv_block = case
    merged = blocks[..., ::q_parts, ::kv_parts]
    coarse = flex_block_attn_func(q, k, v, q_parts * q_block, kv_parts * kv_block, merged)
    fine = merged.repeat_interleave(q_parts, -2).repeat_interleave(kv_parts, -1)
    fine = fine[..., : blocks.shape[-2], : blocks.shape[-1]]
    difference = flex_block_attn_func(q, k, v, q_block, kv_block, fine).double() - coarse.double()
    assert difference.norm() <= TOLERANCE[q.dtype] * (coarse.double().norm() + 1e-30)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_density_counts_the_tokens_of_the_dense_mask(case):
    q, k, _, blocks, q_block, kv_block = case
    mask = BlockMask(blocks, q.shape[2], k.shape[2], q_block, kv_block)
    dense = mask.to_dense()
    expected = dense.double().mean().item() if dense.numel() else 0.0
    assert abs(mask.density() - expected) < 1e-12

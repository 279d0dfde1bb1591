"""Thread blocks that compute in pairs, sharing keys: the same results as others, in graphs too.

All of it needs a Hopper GPU; without one the tests are skipped and say why.
"""

import math

import pytest
import torch
from gpu import NEEDS_HOPPER
from reference import attention, relative_error

from flex_block_attn import BlockMask, flex_block_attn

pytestmark = NEEDS_HOPPER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "heads, q_len, kv_len, block", [(8, 5000, 900, 384), (3, 12000, 700, 64), (40, 1000, 1000, 128)]
)
def test_dense_masks(heads, q_len, kv_len, block, dtype):
    """A mask that is known to be dense, and one that is and is not known to be."""
    q = torch.randn(1, heads, q_len, 128, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, heads, kv_len, 128, device="cuda", dtype=dtype) for _ in "kv")
    known = BlockMask.full(q_len, kv_len, block, block).to("cuda")
    unknown = BlockMask(known.blocks, q_len, kv_len, block, block)
    assert known.alike and not unknown.alike

    def run(mask):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = flex_block_attn(*inputs, mask, return_lse=True)
        return out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    for got, expected in zip(run(known), run(unknown), strict=True):
        assert relative_error(got, expected) < 5e-3
    expected, _ = attention(q[:, :2], k[:, :2], v[:, :2], known.blocks, block, block)
    with torch.inference_mode():
        first = flex_block_attn(q, k, v, known)
        assert relative_error(first[:, :2], expected) < 5e-3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flex_block_attn(q, k, v, known)
        for _ in range(3):
            out.fill_(math.nan)
            graph.replay()
            assert torch.equal(out, first)


@pytest.mark.parametrize("block, kv_block", [(256, 192), (384, 128), (384, 384), (768, 64)])
def test_blocks_of_many_queries(block, kv_block):
    """Pairs have two tiles of a block at a time: of rows that are long, short and empty."""
    heads, q_len, kv_len = 24, 5000, 1400
    q = torch.randn(1, heads, q_len, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, heads, kv_len, 128, device="cuda", dtype=q.dtype) for _ in "kv")
    rows, columns = -(-q_len // block), -(-kv_len // kv_block)
    blocks = torch.rand(1, heads, rows, columns, device="cuda") < 0.4
    blocks[:, :, 1] = True
    blocks[:, ::2, 2] = False
    mask = BlockMask(blocks, q_len, kv_len, block, kv_block)
    with torch.inference_mode():
        out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
        few = [0, 7]
        expected, expected_lse = attention(
            q[:, few], k[:, few], v[:, few], blocks[:, few], block, kv_block
        )
        assert relative_error(out[:, few], expected) < 5e-3
        torch.testing.assert_close(lse[:, few].double(), expected_lse, atol=2e-3, rtol=1e-6)
        # Heads one by one are computed by other kernels.
        for head in (3, 23):
            one = slice(head, head + 1)
            mask_of_head = BlockMask(blocks[:, one], q_len, kv_len, block, kv_block)
            alone = flex_block_attn(q[:, one], k[:, one], v[:, one], mask_of_head)
            assert relative_error(out[:, one], alone) < 5e-3
        for _ in range(5):
            assert torch.equal(flex_block_attn(q, k, v, mask), out)

"""Attention and its gradients against the dense float64 reference, for every kind of input."""

import pytest
import torch
from reference import TOLERANCE, assert_matches, attention, random_qkv, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from flex_block_attn import BlockMask, flex_block_attn, flex_block_attn_func

DTYPES = list(TOLERANCE)


def random_blocks(*shape: int, density: float = 0.5) -> torch.Tensor:
    """A random mask whose rows all have a block (the first), as long as there is one."""
    blocks = torch.rand(shape) < density
    blocks[..., :1] = True
    return blocks


def count(length: int, block: int) -> int:
    return -(-length // block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    q, k, v = random_qkv(2, (4, 2), 200, 168, 40, dtype)
    blocks = random_blocks(2, 4, 5, 6)
    blocks[1, 2, 3] = False
    assert_matches(q, k, v, blocks, 48, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 128, 256])
def test_head_dims(head_dim, dtype):
    q, k, v = random_qkv(1, 2, 96, 112, head_dim, dtype)
    assert_matches(q, k, v, random_blocks(1, 2, 3, 7), 32, 16)


@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (6, 2), (6, 1)], ids=str)
def test_key_heads_are_shared_by_groups_of_query_heads(heads):
    q, k, v = random_qkv(2, heads, 96, 96, 16)
    assert_matches(q, k, v, random_blocks(2, heads[0], 3, 3), 32, 32)


@pytest.mark.parametrize(
    "q_block, kv_block",
    [(16, 16), (16, 64), (64, 16), (32, 48), (80, 112), (64, 192), (192, 128), (16, 384),
     (384, 16), (128, 384), (384, 384)],
)  # fmt: skip
def test_block_sizes(q_block, kv_block):
    q, k, v = random_qkv(1, 2, 450, 410, 24)
    blocks = random_blocks(1, 2, count(450, q_block), count(410, kv_block))
    assert_matches(q, k, v, blocks, q_block, kv_block)


@pytest.mark.parametrize(
    "q_len, kv_len",
    [(1, 1), (1, 100), (100, 1), (15, 17), (33, 250), (250, 33), (64, 128), (128, 64), (127, 129)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths(q_len, kv_len, dtype):
    q, k, v = random_qkv(2, 2, q_len, kv_len, 32, dtype)
    assert_matches(q, k, v, random_blocks(count(q_len, 32), count(kv_len, 16)), 32, 16)


@pytest.mark.parametrize("scale", [None, 1, 0.3, 0.0, -0.2, 5.0])
def test_scales(scale):
    q, k, v = random_qkv(1, 2, 64, 80, 16, torch.float64)
    assert_matches(q, k, v, random_blocks(4, 5), 16, 16, scale)


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(1, 2, 64, 80, 16, torch.float64)
    assert_matches(1e3 * q, k, v, random_blocks(4, 5), 16, 16)


def test_the_two_functions_agree():
    q, k, v = random_qkv(2, 3, 100, 90, 16)
    blocks = random_blocks(2, 3, 4, 3)
    out = flex_block_attn_func(q, k, v, 32, 32, blocks)
    assert torch.equal(out, flex_block_attn(q, k, v, BlockMask(blocks, 100, 90, 32, 32)))
    assert relative_error(out, attention(q, k, v, blocks, 32, 32)[0]) < 1e-5


# --- queries without keys, tensors without elements ----------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_blocks(dtype):
    q, k, v = random_qkv(1, 2, 70, 64, 16, dtype)
    blocks = random_blocks(1, 2, 5, 4)
    blocks[0, 0, 1] = blocks[0, 1, 4] = False
    # Neither do keys that nobody sees get a gradient.
    blocks[..., 3] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flex_block_attn(*leaves, BlockMask(blocks, 70, 64, 16, 16), return_lse=True)
    assert not out[0, 0, 16:32].any() and not out[0, 1, 64:].any()
    assert lse[0, 0, 16:32].isneginf().all() and lse[0, 1, 64:].isneginf().all()
    assert lse.isinf().sum() == 16 + 6
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), lse.exp()))
    assert not dq[0, 0, 16:32].any() and not dq[0, 1, 64:].any()
    assert not dk[:, :, 48:].any() and not dv[:, :, 48:].any()
    assert all(x.isfinite().all() and x.any() for x in (dq, dk, dv))


def test_a_mask_without_blocks():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 40, 50, 16))
    mask = BlockMask(torch.zeros(3, 4, dtype=torch.bool), 40, 50, 16, 16)
    out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
    assert not out.any() and lse.isneginf().all()
    for gradient in torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "batch, heads, q_len, kv_len",
    [(0, 2, 32, 48), (2, 0, 32, 48), (2, 2, 0, 48), (2, 2, 32, 0), (2, 2, 0, 0)],
)
def test_nothing(batch, heads, q_len, kv_len):
    q, k, v = (x.requires_grad_() for x in random_qkv(batch, heads, q_len, kv_len, 16))
    mask = BlockMask(torch.ones(q_len // 16, kv_len // 16) > 0, q_len, kv_len, 16, 16)
    out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == q.shape[:3] and lse.isneginf().all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    for gradient, tensor in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


# --- layouts -------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_transposed_views():
    """(batch, sequence, heads, head_dim) tensors are used as they are, and give their like."""
    q, k, v = random_qkv(2, 3, 100, 100, 16)
    blocks = random_blocks(1, 1, 4, 4)
    expected = flex_block_attn_func(q, k, v, 32, 32, blocks)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous()
    with Operators() as operators:
        out = flex_block_attn_func(q, k, v, 32, 32, blocks)
    assert operators.names == {"flex_block_attn::plan", "flex_block_attn::forward"}
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    assert_matches(q, k, v, blocks, 32, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_packed_tensor(dtype):
    """q, k and v out of one (batch, sequence, 3, heads, head_dim) tensor, as of one projection."""
    packed = torch.randn(2, 100, 3, 2, 24).to(dtype).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    blocks = random_blocks(4, 4)
    with Operators() as operators:
        out = flex_block_attn_func(q, k, v, 32, 32, blocks)
    views = {"aten::unsqueeze", "aten::detach"}
    assert operators.names - views == {"flex_block_attn::plan", "flex_block_attn::forward"}
    assert out.transpose(1, 2).is_contiguous()
    dout = torch.randn(out.shape).to(dtype)
    (gradient,) = torch.autograd.grad(out, packed, dout)

    exact = packed.detach().double().requires_grad_()
    exact_out, _ = attention(*exact.permute(2, 0, 3, 1, 4), blocks, 32, 32)
    (exact_gradient,) = torch.autograd.grad(exact_out, exact, dout.double())
    assert relative_error(out, exact_out) < TOLERANCE[dtype]
    assert relative_error(gradient, exact_gradient) < TOLERANCE[dtype]


def test_expanded_tensors():
    """Keys of one head expanded to all heads, and a query repeated along the sequence."""
    q = torch.randn(1, 4, 1, 16).expand(2, 4, 64, 16)
    k, v = (torch.randn(2, 1, 64, 16).expand(2, 4, 64, 16) for _ in "kv")
    assert_matches(q, k, v, random_blocks(2, 4, 4, 4), 16, 16)


def test_sequences_cut_out_of_longer_ones():
    """What lies beside a slice is never read: it is NaN here."""
    tensors = []
    for length in (70, 90, 90):
        padded = torch.full((2, 2, length + 40, 32), torch.nan)
        padded[:, :, 20 : length + 20, 8:24] = torch.randn(2, 2, length, 16)
        tensors.append(padded[:, :, 20 : length + 20, 8:24])
    assert_matches(*tensors, random_blocks(5, 6), 16, 16)


# --- nothing else matters ------------------------------------------------------------------------


def run(q, k, v, mask):
    """Output, lse and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = flex_block_attn(*leaves, mask, return_lse=True)
    gradients = torch.autograd.grad((out, lse), leaves, (torch.cos(out), torch.sin(lse)))
    return out, lse, *gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_equal_whatever_memory_held_before(dtype):
    q, k, v = random_qkv(2, (4, 2), 150, 140, 24, dtype)
    mask = BlockMask.random(150, 140, 32, 16, density=0.5, seed=1, heads=4)
    first = run(q, k, v, mask)
    for garbage in (torch.nan, torch.inf, 1e4):
        # Freed at once, so that the next tensors of this size are likely to land there.
        [torch.full_like(x, garbage) for x in first for _ in range(3)]
        for a, b in zip(first, run(q, k, v, mask), strict=True):
            assert torch.equal(a, b)


def test_blocks_that_are_not_selected_are_not_read():
    q, k, v = random_qkv(1, 2, 64, 96, 16)
    mask = BlockMask(random_blocks(4, 6), 64, 96, 16, 16)
    mask = BlockMask(mask.blocks & (torch.arange(6) != 2), 64, 96, 16, 16)
    expected = run(q, k, v, mask)
    k[:, :, 32:48] = v[:, :, 32:48] = torch.nan
    for a, b in zip(expected, run(q, k, v, mask), strict=True):
        assert torch.equal(a, b)

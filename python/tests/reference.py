"""Dense attention in float64, what the tests compare the package with, and the comparison.

Plain torch on purpose, sharing no code with the package: a mask of blocks becomes one of tokens by
indexing, scores outside of it -inf, and the gradients are autograd's.
"""

import torch
from torch import Tensor

from flex_block_attn import BlockMask, flex_block_attn

# Error by norm that outputs and gradients may have: what rounding to the dtype leaves.
TOLERANCE = {
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}
# Absolute error of lse, which is float64 for float64 tensors and float32 for all others.
LSE_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def token_mask(blocks: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> Tensor:
    """A mask of blocks, of 2 to 4 dimensions, as one of tokens with 4."""
    while blocks.dim() < 4:
        blocks = blocks[None]
    rows = torch.arange(q_len) // q_block
    columns = torch.arange(kv_len) // kv_block
    return blocks.bool()[:, :, rows[:, None], columns[None, :]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse in float64, differentiable. A query without any key has output 0, lse -inf
    and no gradient."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = q.shape[3] ** -0.5 if scale is None else scale

    mask = token_mask(blocks, q.shape[2], k.shape[2], q_block, kv_block)
    scores = (scale * q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    has_keys = mask.any(dim=3, keepdim=True)
    # A row of -inf would give NaN, and so would its gradient even where it is not used after.
    scores = torch.where(has_keys, scores, 0.0)
    out = torch.where(has_keys, scores.softmax(dim=3), 0.0) @ v
    lse = torch.where(has_keys[..., 0], scores.logsumexp(dim=3), -torch.inf)
    return out, lse


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, or the former where that is 0."""
    expected = expected.double()
    difference = (got.double() - expected).norm().item()
    return difference / (expected.norm().item() or 1.0)


def random_qkv(
    batch: int,
    heads: int | tuple[int, int],
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v; ``heads`` are those of q, and those of k and v if they differ."""
    q_heads, kv_heads = heads if isinstance(heads, tuple) else (heads, heads)
    return tuple(
        torch.randn(batch, h, n, head_dim, generator=generator).to(dtype)
        for h, n in ((q_heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )


def assert_matches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
) -> None:
    """Output, lse and the gradients from both, of the package and of the reference, agree as far
    as the dtype allows; where a query has no key, all are exactly what they should be."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    mask = BlockMask(blocks, q.shape[2], k.shape[2], q_block, kv_block)
    out, lse = flex_block_attn(*leaves, mask, scale=scale, return_lse=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact_out, exact_lse = attention(*exact, blocks, q_block, kv_block, scale)

    assert out.dtype == q.dtype and out.shape == q.shape
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[q.dtype]
    error = relative_error(out, exact_out)
    assert error < tolerance, f"out: {error}"
    empty = exact_lse.isinf()
    assert torch.equal(lse.isneginf(), empty), "lse is not -inf just where no key is"
    error = (lse.double() - exact_lse)[~empty].abs().max().item() if not empty.all() else 0.0
    assert error < LSE_TOLERANCE[lse.dtype], f"lse: {error}"
    assert not out[empty].any(), "out of a query without keys is not 0"

    dout = torch.randn(out.shape).to(out.dtype)
    dlse = torch.randn(lse.shape).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    exact_gradients = torch.autograd.grad(
        (exact_out, exact_lse), exact, (dout.double(), dlse.double())
    )
    for name, got, expected in zip("qkv", gradients, exact_gradients, strict=True):
        error = relative_error(got, expected)
        assert error < tolerance, f"d{name}: {error}"
    assert not gradients[0][empty].any(), "gradient of a query without keys is not 0"

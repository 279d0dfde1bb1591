"""Mixture of block attention (MoBA) for language models: causal, each query sees the chunks of keys
that suit it best, and its own chunk. In: q, k and v. Out: attention, exact to the token.

Called by users. The method's own function chooses chunks for each query; a block mask chooses them
for a block of queries, by their mean. Source: arXiv 2502.13189.
"""

import torch
from torch import Tensor

from .api import as_inputs, flex_block_attn
from .masks import BlockMask, as_size
from .selection import block_means, keep_top, similarity


def create_moba_mask(
    q: Tensor, k: Tensor, chunk_size: int, topk: int, block_size: int = 64
) -> Tensor:
    """For each block of queries, the blocks of the chunks that it sees, up to its own block.

    Args:
        q: queries, (batch, q_heads, sequence, head_dim).
        k: keys, (batch, kv_heads, sequence, head_dim); kv_heads divides q_heads.
        chunk_size: tokens of a chunk, a multiple of block_size. A chunk's score is the product of
            its mean key and the mean query.
        topk: chunks that a query sees, the one it is in among them. Chunks behind it are never
            seen; where fewer come before, fewer are.
        block_size: tokens of a block of the mask, 16 or a multiple of it.

    Returns:
        bool (batch, q_heads, blocks, blocks), lower triangular; the diagonal is set. A mask of
        blocks knows no order inside of a block: that of the diagonal is :func:`moba_attention`'s.

    >>> q = k = torch.randn(1, 1, 128, 8)
    >>> create_moba_mask(q, k, chunk_size=32, topk=1, block_size=16)[0, 0, :4, :4].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    blocks_of_chunk = _check_sizes(chunk_size, topk, block_size)
    scores = similarity(block_means(q, block_size), block_means(k, chunk_size))
    rows, chunks = scores.shape[-2:]
    own = torch.arange(rows, device=q.device)[:, None] // blocks_of_chunk
    chunk = torch.arange(chunks, device=q.device)
    scores = scores.masked_fill_(chunk > own, -torch.inf).masked_fill_(chunk == own, torch.inf)
    # Where fewer chunks than topk came before, some behind were taken: they go with the triangle.
    seen = keep_top(scores, topk)
    return seen.repeat_interleave(blocks_of_chunk, dim=-1)[..., :rows].tril()


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    topk: int,
    *,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over the chunks of :func:`create_moba_mask`.

    Args:
        q: queries, (batch, q_heads, sequence, head_dim).
        k, v: keys and values, (batch, kv_heads, sequence, head_dim); kv_heads divides q_heads.
            Dtypes are those of :func:`flex_block_attn`. Differentiable; the choice has no gradient.
        chunk_size, topk, block_size: as for :func:`create_moba_mask`.
        scale: factor of ``q k^T``; ``1 / sqrt(head_dim)`` if not given.

    Returns:
        The output, of q's shape and dtype.

    The blocks below the diagonal are those of a block mask. The blocks on it, whose queries see a
    part of their keys, are computed by torch in float32: ``sequence * block_size`` scores for each
    head. Both parts are joined by their lse.
    """
    q, k, v = as_inputs(q, k, v)
    _check_sizes(chunk_size, topk, block_size)
    length = q.shape[2]
    if k.shape[2] != length:
        raise ValueError(f"k must have q's {length} tokens, got {k.shape[2]}")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    below = create_moba_mask(q, k, chunk_size, topk, block_size).tril(-1)
    mask = BlockMask(below, length, length, block_size, block_size)
    far, far_lse = flex_block_attn(q, k, v, mask, scale=scale, return_lse=True)
    near, near_lse = _diagonal(q, k, v, block_size, scale)
    # Each part's share of the sum that the whole softmax divides by.
    lse = torch.logaddexp(far_lse, near_lse)
    shares = (torch.exp(part - lse)[..., None] for part in (far_lse, near_lse))
    return sum(part * share for part, share in zip((far, near), shares, strict=True)).to(q.dtype)


def _check_sizes(chunk_size: int, topk: int, block_size: int) -> int:
    """Blocks of a chunk."""
    chunk_size, block_size = as_size("chunk_size", chunk_size), as_size("block_size", block_size)
    if block_size == 0 or block_size % 16:
        raise ValueError(f"block_size must be a positive multiple of 16, got {block_size}")
    if chunk_size == 0 or chunk_size % block_size:
        raise ValueError(
            f"chunk_size must be a positive multiple of block_size {block_size}, got {chunk_size}"
        )
    if as_size("topk", topk) == 0:
        raise ValueError("topk must be positive, got 0")
    return chunk_size // block_size


def _diagonal(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention inside of each block: output and lse, float32 (float64 for float64)."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    missing = -length % block_size
    wide = torch.promote_types(q.dtype, torch.float32)
    # Padding comes last, so that no query before it sees it.
    q, k, v = (
        torch.nn.functional.pad(x.to(wide), (0, 0, 0, missing)).unflatten(2, (-1, block_size))
        for x in (q, k, v)
    )
    q = q.unflatten(1, (-1, groups))
    scores = scale * q @ k.unsqueeze(2).mT
    later = torch.ones(block_size, block_size, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    out = scores.softmax(-1) @ v.unsqueeze(2)
    out, lse = (x.flatten(1, 2).flatten(2, 3) for x in (out, scores.logsumexp(-1)[..., None]))
    return out[:, :, :length], lse[:, :, :length, 0]

"""Mixture of block attention (MoBA) for language models: causal, each query sees the chunks of keys
that suit it best, and its own chunk. In: q, k and v, of sequences of one length or of many. Out:
attention, exact to the token.

Called by users. The method's own function chooses chunks for each query; a block mask chooses them
for a block of queries, by their mean. Source: arXiv 2502.13189.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from . import direct, ops
from .api import as_inputs, default_scale, is_deterministic
from .masks import as_size
from .selection import block_means, keep_top, similarity

CAUSAL = "q >= kv"
"""Which pairs count of a block on the diagonal."""


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

    Blocks on the diagonal are partial: kernels leave out the keys behind a query.
    """
    q, k, v = as_inputs(q, k, v)
    _check_sizes(chunk_size, topk, block_size)
    length = q.shape[2]
    if k.shape[2] != length:
        raise ValueError(f"k must have q's {length} tokens, got {k.shape[2]}")
    mask = create_moba_mask(q, k, chunk_size, topk, block_size)
    return _attend(q, k, v, mask, block_size, scale)


def moba_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    chunk_size: int,
    topk: int,
    *,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """:func:`moba_attention` of sequences of any lengths that lie one behind the other; none sees
    another.

    Args:
        q: queries of all sequences, (tokens, q_heads, head_dim).
        k, v: keys and values, (tokens, kv_heads, head_dim); kv_heads divides q_heads.
        cu_seqlens: where sequences start, and where the last ends: ascending, from 0 to the number
            of tokens. Integers on the host; a tensor on a GPU is waited for.
        Others: as for :func:`moba_attention`. Chunks are counted from the start of a sequence.

    Returns:
        The output, of q's shape and dtype.

    It is one attention over all sequences, whose mask has a byte for each pair of their blocks.
    Where sequences start inside of blocks, tokens are copied apart.

    >>> q = k = v = torch.randn(100, 2, 16)
    >>> out = moba_attention_varlen(q, k, v, [0, 37, 100], chunk_size=32, topk=1, block_size=16)
    >>> out.shape
    torch.Size([100, 2, 16])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or len(x) != len(q):
            raise ValueError(
                f"{name} must be (tokens, heads, head_dim) of q's {len(q)} tokens, "
                f"got shape {tuple(x.shape)}"
            )
    q, k, v = as_inputs(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)))
    _check_sizes(chunk_size, topk, block_size)
    starts = _starts(cu_seqlens, q.shape[2])
    # The sequences' blocks among those of all.
    counts = [-(-(end - start) // block_size) for start, end in pairwise(starts)]
    firsts = list(accumulate(counts, initial=0))
    mask = torch.zeros(1, q.shape[1], firsts[-1], firsts[-1], dtype=torch.bool, device=q.device)
    for (start, end), (first, behind) in zip(pairwise(starts), pairwise(firsts), strict=True):
        if start < end:
            own = slice(first, behind)
            one = (x[:, :, start:end] for x in (q, k))
            mask[..., own, own] = create_moba_mask(*one, chunk_size, topk, block_size)
    if all(start == first * block_size for start, first in zip(starts[:-1], firsts[:-1])):
        return _attend(q, k, v, mask, block_size, scale)[0].transpose(0, 1)
    # No query sees what fills up the last block of a sequence: all of it comes behind.
    places = [
        torch.arange(end - start, device=q.device) + first * block_size
        for (start, end), first in zip(pairwise(starts), firsts)
    ]
    index = torch.cat(places)
    q, k, v = (_apart(x, index, firsts[-1] * block_size) for x in (q, k, v))
    out = _attend(q, k, v, mask, block_size, scale)
    return out.index_select(2, index)[0].transpose(0, 1)


def _starts(cu_seqlens: Tensor | Sequence[int], tokens: int) -> list[int]:
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    starts = [as_size("cu_seqlens", x) for x in values]
    ascending = all(start <= end for start, end in pairwise(starts))
    if not starts or not ascending or starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(f"cu_seqlens must ascend from 0 to the {tokens} tokens, got {starts}")
    return starts


def _apart(x: Tensor, index: Tensor, places: int) -> Tensor:
    """Tokens at these places of so many, the others 0."""
    return x.new_zeros(*x.shape[:2], places, x.shape[3]).index_copy(2, index, x)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, scale: float | None
) -> Tensor:
    """Attention over a lower triangular mask of blocks, causal where they lie on the diagonal."""
    sizes = q.shape[2], k.shape[2], block_size, block_size
    plan = direct.plan(mask, sizes)
    plan = ops.partial_diagonal(ops.plan(mask, *sizes) if plan is None else plan, mask.shape[-1])
    scale = default_scale(q) if scale is None else float(scale)
    exact = CAUSAL, []
    done = direct.attention(q, k, v, plan, sizes, scale, exact=exact)
    if done is None:
        settings = block_size, block_size, scale, is_deterministic(False)
        done = direct.differentiable(q, k, v, plan, settings, exact)
    return done[0]


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

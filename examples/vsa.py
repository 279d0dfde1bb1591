"""Video sparse attention (VSA, arXiv 2505.13389) made of the pieces of `flex_block_attn.selection`.

A coarse attention over the means of small tiles is a result of its own, and its scores choose the
tiles of the fine one:

    coarse = softmax(Q_c K_c^T / sqrt(d)) V_c, repeated for the tokens of a tile
    out = gate * coarse + attention over the chosen tiles

Here the canvas is made of whole tiles; the method pools and attends the true tokens of tiles that
stick out.
"""

from math import ceil, prod

from torch import Tensor

from flex_block_attn import flex_block_attn_func
from flex_block_attn.selection import keep_top
from flex_block_attn.ssta_attention import tile, untile


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thw: tuple[int, int, int],
    sparsity: float,
    tile_thw: tuple[int, int, int] = (4, 4, 4),
    gate: Tensor | float = 1.0,
) -> Tensor:
    """The output, (batch, heads, T * H * W, head_dim) as q, k and v.

    Args:
        thw: T, H and W, multiples of the tile's.
        sparsity: share of tiles that a tile does not see, from 0 to 1.
        gate: factor of the coarse part, of the output's shape; learned.
    """
    block = prod(tile_thw)
    q, k, v = (tile(x, thw, tile_thw) for x in (q, k, v))
    # Not block_means: the coarse part is trained through its means.
    coarse_q, coarse_k, coarse_v = (x.unflatten(2, (-1, block)).mean(3) for x in (q, k, v))
    scores = coarse_q @ coarse_k.mT / q.shape[3] ** 0.5
    coarse = (scores.softmax(-1) @ coarse_v).repeat_interleave(block, dim=2)

    count = max(1, ceil((1 - sparsity) * scores.shape[-1]))
    fine = flex_block_attn_func(q, k, v, block, block, keep_top(scores, count))
    return gate * untile(coarse, thw, tile_thw) + untile(fine, thw, tile_thw)

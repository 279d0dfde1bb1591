"""VMoBA (arXiv 2506.23858) made of the pieces of `flex_block_attn.selection`.

Mixture of block attention for video: chunks are runs of frames (1-D), boxes of rows and columns
over all frames (2-D), or boxes (3-D), from layer to layer another; a chunk always sees itself, and
others by count or until their scores add up. The method chooses for each query token as well as for
chunks of queries; a block mask chooses for chunks.
"""

from math import prod

import torch
from torch import Tensor

from flex_block_attn import flex_block_attn_func
from flex_block_attn.selection import block_means, keep_top, similarity
from flex_block_attn.ssta_attention import tile, untile


def chunk_of_layer(
    layer: int, thw: tuple[int, int, int], frames: int, box_hw: tuple[int, int], box_thw: tuple
) -> tuple[int, int, int]:
    """The chunk, in tokens along (time, height, width): layers take 1-D, 2-D and 3-D in turn."""
    time, height, width = thw
    return [(frames, height, width), (time, *box_hw), tuple(box_thw)][layer % 3]


def vmoba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thw: tuple[int, int, int],
    chunk_thw: tuple[int, int, int],
    *,
    topk: int | None = None,
    mass: float | None = None,
) -> Tensor:
    """The output, (batch, heads, T * H * W, head_dim) as q, k and v.

    Args:
        thw: T, H and W, multiples of the chunk's, which holds a multiple of 16 tokens.
        topk: chunks that a chunk sees, itself among them; or
        mass: a chunk sees itself, and the best others until they have this share of all scores,
            of which each row's lowest counts 0 and its highest 1.
    """
    if (topk is None) == (mass is None):
        raise ValueError(f"one of topk and mass must be given, got {topk} and {mass}")
    block = prod(chunk_thw)
    q, k, v = (tile(x, thw, chunk_thw) for x in (q, k, v))
    scores = similarity(block_means(q, block), block_means(k, block))
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=q.device)
    if topk is not None:
        seen = keep_top(scores.masked_fill(own, torch.inf), topk)
    else:
        seen = own | until_mass(scores, own, mass)
    return untile(flex_block_attn_func(q, k, v, block, block, seen), thw, chunk_thw)


def until_mass(scores: Tensor, own: Tensor, mass: float) -> Tensor:
    """The own chunk, and the fewest best others that reach the mass with it."""
    low, high = scores.aminmax(dim=-1, keepdim=True)
    share = (scores - low) / (high - low).clamp(min=1e-12)
    order = share.masked_fill(own, torch.inf).argsort(dim=-1, descending=True)
    share = share.gather(-1, order)
    before = share.cumsum(-1) - share
    wanted = before < mass * share.sum(-1, keepdim=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, wanted)

"""FastVideo's sliding tile attention over this library, for any canvas.

FastVideo calls `sliding_tile_attention` of a package `st_attn`, whose kernels know three canvases.
Installed before FastVideo is imported, this module takes that name:

    from examples.fastvideo_sta import install

    install()
    import fastvideo
"""

import sys
import types
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from flex_block_attn import BlockMask, flex_block_attn
from flex_block_attn.ssta_attention import create_sta_3d_mask

TILE = (6, 8, 8)


def sliding_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: list[tuple[int, int, int]],
    text_length: int,
    has_text: bool = True,
    dit_seq_shape: str = "30x48x80",
) -> Tensor:
    """Attention of (batch, heads, sequence, head_dim) in tile order, text behind.

    Args:
        window_size: of each head, in tiles along (time, height, width).
        text_length: tokens of text that are attended; those behind them are not.
        has_text: whether there is any.
        dit_seq_shape: the canvas, as "30x48x80".
    """
    canvas = tuple(int(side) for side in dit_seq_shape.split("x"))
    windows = tuple(tuple(int(side) for side in window) for window in window_size)
    tokens = prod(canvas) + (text_length if has_text else 0)
    mask = sta_mask(canvas, windows, q.shape[2], tokens, q.device)
    return flex_block_attn(q, k[:, :, :tokens], v[:, :, :tokens], mask)


@lru_cache(maxsize=64)
def sta_mask(
    canvas: tuple[int, int, int],
    windows: tuple[tuple[int, int, int], ...],
    q_len: int,
    kv_len: int,
    device: torch.device,
) -> BlockMask:
    """A mask for each head, planned once for all steps of a model."""
    block, text = prod(TILE), q_len - prod(canvas)
    blocks = torch.stack([create_sta_3d_mask(canvas, TILE, window, text) for window in windows])
    # Keys end with the text that counts, queries with its padding.
    blocks = blocks[..., : -(-kv_len // block)]
    return BlockMask(blocks.to(device), q_len, kv_len, block, block)


def install() -> None:
    """Makes `import st_attn` find this module's function."""
    module = types.ModuleType("st_attn", __doc__)
    module.sliding_tile_attention = sliding_tile_attention
    sys.modules["st_attn"] = module

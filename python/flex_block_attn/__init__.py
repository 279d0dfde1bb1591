"""Exact block-sparse attention: ``softmax(scale * q k^T restricted to a block mask) v``.

- :func:`flex_block_attn_func`: the drop-in, over a block mask as a tensor;
- :func:`flex_block_attn`: over a :class:`BlockMask`, with scale and lse;
- :class:`BlockMask`: masks from tensors or patterns, planned once;
- :func:`create_block_mask`: masks from functions of single tokens, as FlexAttention has them;
  :func:`and_masks` and :func:`or_masks` join such functions, :func:`forget_masks` frees what is
  kept of them;
- :func:`video_attention`: over the tiles of a video, whose tokens stay where they are;
- :func:`create_sparse_mask`, :func:`visualize_attn_mask`: helpers for mask tensors;
- :mod:`.ssta_attention`: sparse attention of video models, STA, MoBA and SSTA;
- :mod:`.moba`: mixture of block attention, causal, for language models;
- :mod:`.selection`: pooling, scores and top-k, of which such selections are made.

Tensors are (batch, heads, sequence, head_dim); any strides will do as long as the last dimension
is contiguous, so a transposed (batch, sequence, heads, head_dim) tensor needs no copy.
"""

from . import moba, selection, ssta_attention
from ._native import __version__
from .api import flex_block_attn, flex_block_attn_func
from .masks import BlockMask, create_block_mask, create_sparse_mask, forget_masks
from .trace import and_masks, or_masks
from .utils import visualize_attn_mask
from .video import video_attention

__all__ = [
    "BlockMask",
    "__version__",
    "and_masks",
    "create_block_mask",
    "create_sparse_mask",
    "flex_block_attn",
    "flex_block_attn_func",
    "forget_masks",
    "moba",
    "or_masks",
    "selection",
    "ssta_attention",
    "video_attention",
    "visualize_attn_mask",
]

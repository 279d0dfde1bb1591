"""Sparse attention of video models: sliding tiles (STA), chosen tiles (MoBA), both (SSTA).

In: q, k and v over a video of (time, height, width) tokens with text behind; or only its sizes.
Out: attention, or masks for :func:`flex_block_attn_func`.

Called by users; :func:`ssta_3d_attention` is what HunyuanVideo-1.5 calls. The video is padded to
whole tiles, tokens are put tile by tile, so that a tile is a block, and text is padded to whole
blocks; on a GPU only in effect: kernels read and write tokens where they are (:mod:`.video`). As
the released checkpoints were trained so, padding is attended like any token, unless a caller wants
none.

Sources: STA, arXiv 2502.04507; MoBA, arXiv 2502.13189; SSTA, the technical report of
HunyuanVideo-1.5, arXiv 2511.18870.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import direct, video
from .api import as_inputs, default_scale, flex_block_attn, flex_block_attn_func, is_deterministic
from .masks import BlockMask, as_size, as_triple
from .selection import block_means, importance, keep_mass, keep_top, similarity, tile_means
from .tiles import (
    Canvas,
    FromTiles,
    ToTiles,
    Triple,
    check_tokens,
    kept,
    means_of_tiles,
    places_of,
    tile,
    untile,
)

__all__ = [
    "create_moba_3d_mask",
    "create_ssta_3d_mask",
    "create_sta_3d_mask",
    "ssta_3d_attention",
    "tile",
    "untile",
]

SPARSE_TYPES = ("sta", "block_attn", "ssta")
SAMPLING_TYPES = ("similarity", "importance")
PAD_TYPES = ("zero", "repeat", "exact")

MASS_CELLS = (2, 2, 2)
"""Cells of a tile in the selection by threshold, whatever ``adaptive_pool`` says."""


# --- masks --------------------------------------------------------------------------------------


def create_sta_3d_mask(
    canvas_thw: Triple,
    tile_thw: Triple,
    kernel_thw: Triple,
    text_len: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of sliding tiles: a tile sees those of a window around it, whose centre is clamped
    at the borders. Blocks of text see everything and are seen by all.

    Args:
        canvas_thw: tokens along (time, height, width); the last tiles may stick out.
        tile_thw: the tile's tokens along each axis, 16 or a multiple of it in all.
        kernel_thw: the window along each axis, in tiles. An even width w acts as w + 1, one that
            is wider than the axis sees all of it.
        text_len: tokens of text behind the video.
        device: where the mask is wanted; torch's default device if not given.

    Returns:
        bool (blocks, blocks), tiles first, then ``ceil(text_len / tokens of a tile)`` of text.

    >>> create_sta_3d_mask((1, 1, 64), (1, 1, 16), (1, 1, 3)).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 0],
            [0, 1, 1, 1],
            [0, 1, 1, 1]], dtype=torch.int32)
    """
    canvas = Canvas.new(canvas_thw, tile_thw, kernel_thw, text_len)
    device = torch.get_default_device() if device is None else torch.device(device)
    # A copy: what is kept must not be changed.
    return _sta(canvas, device).blocks[0, 0].clone()


def create_moba_3d_mask(
    q: Tensor,
    k: Tensor,
    canvas_thw: Triple,
    topk: int,
    tile_thw: Triple,
    text_len: int = 0,
    *,
    threshold: float = 0.0,
    lambda_: float | None = None,
    mask_share_within_head: bool = True,
    sampling_type: str | None = None,
    adaptive_pool: Triple | None = None,
    padding: str | None = None,
) -> Tensor:
    """The mask of chosen tiles: each tile sees those whose mean key suits its mean query. Blocks
    of text see everything and are seen by all. No tile is forced to see itself.

    Args:
        q, k: queries and keys in tile order, (batch, heads, sequence, head_dim); the sequence is
            all tiles, padding included, and perhaps text behind, which is not looked at. Heads of
            k divide those of q.
        canvas_thw, tile_thw, text_len: as for :func:`create_sta_3d_mask`.
        topk: tiles that a tile sees; all if there are no more.
        threshold: if above 0, a tile sees the fewest tiles whose probabilities reach it, 8 at
            least and ``topk`` at most. For "similarity" only; tiles then are compared by the means
            of 2 x 2 x 2 cells.
        lambda_: for "importance" alone, and needed there: the weight of being alike, from 0 to 1,
            against that of being unlike the other keys.
        mask_share_within_head: whether heads are averaged, and share a mask.
        sampling_type: "similarity", the product of the means, or "importance", see
            :func:`flex_block_attn.selection.importance`.
        adaptive_pool: cells of a tile along each axis whose means are compared side by side; one
            if not given.
        padding: None where q and k are in tile order. Else they are as
            :func:`flex_block_attn.video_attention` takes them, in (time, height, width) order with
            text behind, and this is its argument of that name: nothing is moved to choose tiles.

    Returns:
        bool (batch, heads or 1, blocks, blocks), on q's device.
    """
    canvas = Canvas.new(canvas_thw, tile_thw, (1, 1, 1), text_len)
    choice = _Choice.new(
        topk, threshold, lambda_, mask_share_within_head, sampling_type, adaptive_pool
    )
    _check_order(q, k, canvas, padding)
    return _chosen(q, k, canvas, choice, padding, _text(canvas, q.device))


def create_ssta_3d_mask(
    q: Tensor,
    k: Tensor,
    canvas_thw: Triple,
    topk: int,
    tile_thw: Triple,
    kernel_thw: Triple,
    text_len: int = 0,
    *,
    threshold: float = 0.0,
    lambda_: float | None = None,
    text_mask: Tensor | None = None,
    mask_share_within_head: bool = True,
    sampling_type: str | None = None,
    adaptive_pool: Triple | None = None,
    padding: str | None = None,
) -> Tensor:
    """Sliding tiles and chosen tiles: the union of the two masks.

    Args:
        text_mask: bool or integer (batch, text_len), which tokens of text count. Those that do
            come first. Blocks of text behind them see only themselves and are seen by nobody else;
            one block is kept at least, and the padding inside of the last one is attended.
        Others: as for :func:`create_sta_3d_mask` and :func:`create_moba_3d_mask`.

    Returns:
        bool (batch, heads or 1, blocks, blocks), on q's device.
    """
    canvas = Canvas.new(canvas_thw, tile_thw, kernel_thw, text_len)
    choice = _Choice.new(
        topk, threshold, lambda_, mask_share_within_head, sampling_type, adaptive_pool
    )
    _check_order(q, k, canvas, padding)
    _check_text_mask(text_mask, q, canvas)
    return _chosen(q, k, canvas, choice, padding, _sta(canvas, q.device).blocks, text_mask)


@dataclass(frozen=True)
class _Choice:
    """How tiles are chosen."""

    topk: int
    threshold: float
    lambda_: float | None
    share: bool
    cells: Triple | None

    @classmethod
    def new(
        cls,
        topk: Any,
        threshold: float,
        lambda_: float | None,
        share: Any,
        sampling_type: str | None,
        adaptive_pool: Any,
    ) -> "_Choice":
        """From what a caller says, by its names."""
        topk = as_size("topk", topk)
        if topk == 0:
            raise ValueError("topk must be positive, got 0")
        _one_of("sampling_type", sampling_type, SAMPLING_TYPES)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
        if sampling_type == "importance":
            if threshold > 0:
                raise NotImplementedError(
                    'threshold must be 0 where sampling_type is "importance", whose scores are no '
                    f"probabilities, got {threshold}"
                )
            if lambda_ is None or not 0 <= lambda_ <= 1:
                raise ValueError(
                    'lambda_ must be from 0 to 1 where sampling_type is "importance", '
                    f"got {lambda_}"
                )
        elif lambda_ is not None:
            raise ValueError(
                f'lambda_ must be None where sampling_type is "similarity", got {lambda_}'
            )
        cells = None if adaptive_pool is None else as_triple("adaptive_pool", adaptive_pool)
        if threshold > 0:
            cells = MASS_CELLS
        return cls(topk, float(threshold), lambda_, bool(share), cells)

    def is_native(self) -> bool:
        """Whether our kernels know of it."""
        return self.threshold == 0 and self.cells in (None, (1, 1, 1))


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        listed = ", ".join(f'"{each}"' for each in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def _check_order(q: Any, k: Any, canvas: Canvas, padding: str | None) -> None:
    """Raises if q and k are not what tiles can be chosen of, in tile order or as they lie."""
    if padding is None:
        _check_tiles(q, k, canvas)
        return
    _one_of("padding", padding, video.PADDINGS)
    for name, x in (("q", q), ("k", k)):
        check_tokens(name, x, canvas.tokens, "canvas_thw and text_len need")
    _check_pair(q, k)


def _check_tiles(q: Any, k: Any, canvas: Canvas) -> None:
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[2] < canvas.video_blocks * canvas.block:
            raise ValueError(
                f"{name} must be (batch, heads, sequence, head_dim) of at least "
                f"{canvas.video_blocks} tiles of {canvas.block} tokens, got shape {tuple(x.shape)}"
            )
    _check_pair(q, k)


def _check_pair(q: Tensor, k: Tensor) -> None:
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"k must have q's batch {q.shape[0]} and head_dim {q.shape[3]}, "
            f"got shape {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k"
        )
    if k.device != q.device:
        raise ValueError(f"k is on {k.device}, but q is on {q.device}")


def _check_text_mask(text_mask: Any, q: Tensor, canvas: Canvas) -> None:
    batch, device = q.shape[0], q.device
    if text_mask is None:
        return
    if not isinstance(text_mask, Tensor):
        raise TypeError(f"text_mask must be a torch.Tensor, got {type(text_mask).__name__}")
    if text_mask.shape != (batch, canvas.text_len):
        raise ValueError(
            f"text_mask must be (batch, text_len), here {(batch, canvas.text_len)}, "
            f"got shape {tuple(text_mask.shape)}"
        )
    if text_mask.device != device:
        raise ValueError(f"text_mask is on {text_mask.device}, but q is on {device}")


@kept
def _sta(canvas: Canvas, device: torch.device) -> BlockMask:
    """As :meth:`BlockMask.sta`, but made on the device, by steps that can be traced."""
    tiles = torch.ones(1, 1, dtype=torch.bool, device=device)
    for n, window in zip(canvas.tiles, canvas.window, strict=True):
        place, half = torch.arange(n, device=device), window // 2
        # Where no centre is far enough from both ends, the upper bound wins.
        centre = place.clamp(min=half).clamp(max=n - 1 - half)
        seen = (centre[:, None] - place).abs() <= half
        tiles = (tiles[:, None, :, None] & seen[:, None]).flatten(2).flatten(0, 1)
    mask = _text(canvas, device).clone()
    mask[: canvas.video_blocks, : canvas.video_blocks] = tiles
    tokens = canvas.blocks * canvas.block
    return BlockMask(mask, tokens, tokens, canvas.block, canvas.block)


@kept
def _text(canvas: Canvas, device: torch.device) -> Tensor:
    """What text sees and is seen by, and no pair of tiles."""
    video = torch.arange(canvas.blocks, device=device) < canvas.video_blocks
    return ~(video[:, None] & video)


def _chosen(
    q: Tensor,
    k: Tensor,
    canvas: Canvas,
    choice: _Choice,
    padding: str | None,
    base: Tensor,
    text_mask: Tensor | None = None,
) -> Tensor:
    """A mask of its own for each batch and head, or each batch: the tiles that are chosen, and
    those of `base`, without padded text. By kernels of ours where they take such a choice."""
    if choice.is_native():
        zeros_count = None if padding is None else padding == "zero"
        order = canvas.thw, canvas.tile, canvas.text_len, zeros_count
        how = choice.topk, choice.lambda_, choice.share
        mask = direct.select(q, k, order, how, base, text_mask)
        if mask is not None:
            return mask
    pooled = _pooled(q, k, canvas, choice, padding)
    return _without_padded_text(_choose(*pooled, canvas, choice, base), text_mask, canvas)


@torch.no_grad()
def _pooled(
    q: Tensor, k: Tensor, canvas: Canvas, choice: _Choice, padding: str | None
) -> list[Tensor]:
    """What tiles are compared by: of tokens in tile order, or, with a padding, as they lie."""
    if padding is not None:
        if choice.cells is None:
            return [means_of_tiles(x, canvas, padding) for x in (q, k)]
        # Cells are means of padding, too: one that is half empty counts half.
        places = places_of(canvas, "zero", q.device)
        q, k = (ToTiles.apply(x, *places) for x in (q, k))
    tiles = (x.narrow(2, 0, canvas.video_blocks * canvas.block) for x in (q, k))
    if choice.cells is None:
        return [block_means(x, canvas.block) for x in tiles]
    return [tile_means(x, canvas.tile, choice.cells) for x in tiles]


@torch.no_grad()
def _choose(q: Tensor, k: Tensor, canvas: Canvas, choice: _Choice, base: Tensor) -> Tensor:
    """A mask of its own for each batch and head: the tiles that are chosen by what their tokens are
    pooled to, and those of `base`.

    The base is copied once, and chosen tiles are written over it: a union costs nothing.
    """
    n = canvas.video_blocks
    if choice.share:
        q, k = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
    scores = similarity(q, k) if choice.lambda_ is None else importance(q, k, choice.lambda_)
    mask = base.expand(*scores.shape[:2], *base.shape[-2:]).clone()
    tiles = mask[:, :, :n, :n]
    if choice.threshold > 0:
        keep_mass(scores, choice.threshold, choice.topk, into=tiles)
    else:
        keep_top(scores, choice.topk, into=tiles)
    return mask


def _without_padded_text(mask: Tensor, text_mask: Tensor | None, canvas: Canvas) -> Tensor:
    """The mask in which blocks of nothing but padded text see themselves alone."""
    if text_mask is None:
        return mask
    valid = (text_mask != 0).sum(1)
    # Whole blocks, rounded up, one at least: what is behind them is padding.
    first = canvas.video_blocks + (-(-valid // canvas.block)).clamp(min=1)
    index = torch.arange(canvas.blocks, device=mask.device)
    used = (index < first[:, None])[:, None]
    padded_diagonal = torch.diag_embed(~used)
    return mask & used[..., None] & used[..., None, :] | padded_diagonal


# --- attention ----------------------------------------------------------------------------------


def ssta_3d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thw: Triple,
    topk: int = 1,
    tile_thw: Triple = (6, 8, 8),
    kernel_thw: Triple = (3, 3, 3),
    text_len: int = 0,
    sparse_type: str = "ssta",
    threshold: float = 0.0,
    lambda_: float | None = None,
    pad_type: str = "zero",
    text_mask: Tensor | None = None,
    mask_share_within_head: bool = True,
    sampling_type: str | None = None,
    adaptive_pool: Triple | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse attention of a video with text behind, in and out in (time, height, width) order.

    Args:
        q, k, v: (batch, heads, sequence, head_dim), T * H * W tokens of video, then ``text_len``
            of text; any strides whose last is 1. k and v may have fewer heads, which divide q's.
            Dtypes are those of :func:`flex_block_attn_func`. Differentiable.
        thw: T, H and W. Where T is 1 (an image) and the tile has several frames, a tile of as many
            tokens and one frame is taken (384, 128, 64 or 16 tokens), and a window of itself.
        topk: tiles that are chosen for a tile. (HunyuanVideo-1.5 halves its own setting where T is
            31 or less, before it calls.)
        tile_thw: tokens of a tile along each axis; a multiple of 16 in all.
        kernel_thw: the window of "sta" and "ssta" along each axis, in tiles.
        text_len: tokens of text.
        sparse_type: "sta", sliding tiles; "block_attn", chosen tiles; "ssta", both together.
        threshold, lambda_, mask_share_within_head, sampling_type, adaptive_pool: how tiles are
            chosen, see :func:`create_moba_3d_mask`; "sta" does not look at them.
        pad_type: what fills up the tiles at the borders, and is attended: "zero", or "repeat" for
            the token nearest to it; text is filled up with its last token in both cases. Or
            "exact": nothing is, and attention is over the tokens that there are, which is not what
            released checkpoints were trained with, and faster.
        text_mask: as for :func:`create_ssta_3d_mask`; "block_attn" does not look at it, as models
            expect that were trained with it.

    Returns:
        The output, of q's shape and dtype, and the share of blocks that were computed, a float32
        tensor without dimensions on q's device: ``float(density)`` waits for the GPU, handing it
        on does not.

    >>> q = k = v = torch.randn(1, 2, 4 * 8 * 8 + 20, 64)
    >>> out, density = ssta_3d_attention(
    ...     q, k, v, (4, 8, 8), topk=2, tile_thw=(2, 4, 4), kernel_thw=(1, 1, 3), text_len=20,
    ...     sampling_type="importance", lambda_=0.7,
    ... )
    >>> out.shape, density.shape
    (torch.Size([1, 2, 276, 64]), torch.Size([]))
    """
    _one_of("sparse_type", sparse_type, SPARSE_TYPES)
    _one_of("pad_type", pad_type, PAD_TYPES)
    canvas = Canvas.new(thw, tile_thw, kernel_thw, text_len, name="thw")
    choice = None
    if sparse_type != "sta":
        choice = _Choice.new(
            topk, threshold, lambda_, mask_share_within_head, sampling_type, adaptive_pool
        )
    q, k, v = as_inputs(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tokens(name, x, canvas.tokens, "thw and text_len need")
    _check_pair(q, k)
    _check_text_mask(text_mask, q, canvas)

    if pad_type == "exact" or pad_type == "zero" and q.is_cuda and video.is_native(q, canvas):
        # Tokens stay where they are.
        mask = _mask(q, k, canvas, choice, pad_type, sparse_type, text_mask)
        plan = video.plan_of(mask, q, canvas)
        settings = default_scale(q), is_deterministic(False)
        out = video.attend(q, k, v, plan, canvas, pad_type, *settings)
    else:
        places = places_of(canvas, pad_type, q.device)
        tiled = [ToTiles.apply(x, *places) for x in (q, k, v)]
        mask = _mask(*tiled[:2], canvas, choice, None, sparse_type, text_mask)
        if isinstance(mask, BlockMask):
            out = flex_block_attn(*tiled, mask)
        else:
            out = flex_block_attn_func(*tiled, canvas.block, canvas.block, mask)
        del tiled  # Three padded copies, which the next need not be added to.
        out = FromTiles.apply(out, *places)
    blocks = mask.blocks if isinstance(mask, BlockMask) else mask
    return out, blocks.mean(dtype=torch.float32)


def _mask(
    q: Tensor,
    k: Tensor,
    canvas: Canvas,
    choice: _Choice | None,
    padding: str | None,
    sparse_type: str,
    text_mask: Tensor | None,
) -> Tensor | BlockMask:
    """The mask of a call; one that is known from sizes alone is planned once."""
    if sparse_type == "block_attn":
        return _chosen(q, k, canvas, choice, padding, _text(canvas, q.device))
    sliding = _sta(canvas, q.device)
    if choice is not None:
        return _chosen(q, k, canvas, choice, padding, sliding.blocks, text_mask)
    if text_mask is None:
        return sliding
    return _without_padded_text(sliding.blocks, text_mask, canvas)

"""Videos as tiles of tokens: sizes, and moving tokens to tiles and back. In: tensors in (time,
height, width) order, sizes. Out: tensors in tile order, where a tile is a block of attention.

Called by :mod:`.ssta_attention` and :mod:`.video`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .masks import as_size, as_triple

Triple = tuple[int, int, int]

MOST_KEPT = 32
"""Results of each function that are kept: a model has few shapes."""

IMAGE_TILES = {384: (1, 16, 24), 128: (1, 16, 8), 64: (1, 8, 8), 16: (1, 4, 4)}
"""For a canvas of one frame: by its tokens, the tile that stands in for one of several frames."""


Made = TypeVar("Made")


def kept_in(results: dict[Any, Made], key: Any, make: Callable[[], Made]) -> Made:
    """The result of a key; if there is none it is made, and kept unless only one use may see its
    tensors: those of a traced program, and those of a CUDA graph that is being captured, which hold
    nothing before the graph is replayed."""
    if torch.compiler.is_compiling():
        return make()
    result = results.get(key)
    if result is None:
        # Made for inference alone, they could not be used in training after.
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            results[key] = result
    return result


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """A function of hashable arguments that keeps the tensors it makes, see :func:`kept_in`, as
    :func:`lru_cache` would."""
    results: dict[tuple, Made] = {}

    @wraps(make)
    def get(*arguments: Any) -> Made:
        result = kept_in(results, arguments, lambda: make(*arguments))
        while len(results) > MOST_KEPT:
            results.pop(next(iter(results)), None)
        return result

    return get


def tile(x: Tensor, canvas_thw: Triple, tile_thw: Triple, sp_size: int = 1) -> Tensor:
    """Puts tokens tile by tile: from (t, h, w) order to the order of (tile t, tile h, tile w, t, h,
    w inside of the tile).

    Args:
        x: (batch, heads, T * H * W, head_dim), of any dtype.
        canvas_thw: T, H and W, multiples of the tile's.
        tile_thw: the tile's tokens along each axis.
        sp_size: of sequence parallelism: x then is made of so many parts of T / sp_size frames
            each, frame t of part r being frame ``t * sp_size + r`` of the video.

    >>> tile(torch.arange(8).reshape(1, 1, 8, 1), (1, 2, 4), (1, 2, 2)).flatten().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    (time, height, width), (a, b, c), sp_size = _tiling(x, canvas_thw, tile_thw, sp_size)
    x = x.unflatten(2, (sp_size, time // sp_size, height, width)).transpose(2, 3)
    x = x.flatten(2, 3).unflatten(2, (-1, a)).unflatten(4, (-1, b)).unflatten(6, (-1, c))
    return x.permute(0, 1, 2, 4, 6, 3, 5, 7, 8).flatten(2, 7)


def untile(x: Tensor, canvas_thw: Triple, tile_thw: Triple, sp_size: int = 1) -> Tensor:
    """What undoes :func:`tile`, of the same arguments."""
    (time, height, width), (a, b, c), sp_size = _tiling(x, canvas_thw, tile_thw, sp_size)
    x = x.unflatten(2, (time // a, height // b, width // c, a, b, c))
    x = x.permute(0, 1, 2, 5, 3, 6, 4, 7, 8).reshape(
        *x.shape[:2], time // sp_size, sp_size, height * width, x.shape[-1]
    )
    return x.transpose(2, 3).flatten(2, 4)


def _tiling(x: Any, canvas_thw: Any, tile_thw: Any, sp_size: Any) -> tuple[Triple, Triple, int]:
    canvas, tile_thw = as_triple("canvas_thw", canvas_thw), as_triple("tile_thw", tile_thw)
    sp_size = as_size("sp_size", sp_size)
    if any(tokens % side for tokens, side in zip(canvas, tile_thw, strict=True)):
        raise ValueError(f"canvas_thw must be made of whole tiles of {tile_thw}, got {canvas}")
    if sp_size == 0 or canvas[0] % sp_size:
        raise ValueError(f"sp_size must divide the {canvas[0]} frames of canvas_thw, got {sp_size}")
    check_tokens("x", x, prod(canvas), "canvas_thw needs")
    return canvas, tile_thw, sp_size


def check_tokens(name: str, x: Any, tokens: int, reason: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[2] != tokens:
        raise ValueError(
            f"{name} must be (batch, heads, sequence, head_dim) of {tokens} tokens, "
            f"which {reason}, got shape {tuple(x.shape)}"
        )


@dataclass(frozen=True)
class Canvas:
    """Sizes of a video with text behind, in tokens and in blocks."""

    thw: Triple
    tile: Triple
    window: Triple
    text_len: int

    @classmethod
    def new(
        cls, thw: Any, tile_thw: Any, window: Any, text_len: Any, name: str = "canvas_thw"
    ) -> "Canvas":
        """From what a caller says; `name` is the caller's for `thw`."""
        canvas = as_triple(name, thw)
        tile_thw, window = as_triple("tile_thw", tile_thw), as_triple("kernel_thw", window)
        if canvas[0] == 1 and tile_thw[0] > 1:
            # An image, and the tile of the model's videos.
            if prod(tile_thw) not in IMAGE_TILES:
                raise ValueError(
                    f"tile_thw must have {', '.join(map(str, sorted(IMAGE_TILES)))} tokens, or be "
                    f"of one frame, where {name} is {canvas}, got {tile_thw}"
                )
            tile_thw, window = IMAGE_TILES[prod(tile_thw)], (1, 1, 1)
        if prod(tile_thw) % 16:
            raise ValueError(f"tile_thw must hold a multiple of 16 tokens, got {tile_thw}")
        return cls(canvas, tile_thw, window, as_size("text_len", text_len))

    @classmethod
    def of_tiles(cls, thw: Any, tile_thw: Any, text_len: Any) -> "Canvas":
        """Without a window, and of these tiles, be it of an image."""
        canvas, tile_thw = as_triple("canvas_thw", thw), as_triple("tile_thw", tile_thw)
        if prod(tile_thw) % 16:
            raise ValueError(f"tile_thw must hold a multiple of 16 tokens, got {tile_thw}")
        return cls(canvas, tile_thw, (1, 1, 1), as_size("text_len", text_len))

    @property
    def block(self) -> int:
        """Tokens of a tile, and of a block of text."""
        return prod(self.tile)

    @property
    def tiles(self) -> Triple:
        """Tiles along each axis, the last ones perhaps padded."""
        return tuple(-(-n // side) for n, side in zip(self.thw, self.tile, strict=True))

    @property
    def video_blocks(self) -> int:
        """Tiles."""
        return prod(self.tiles)

    @property
    def blocks(self) -> int:
        """Tiles and blocks of text."""
        return self.video_blocks + -(-self.text_len // self.block)

    @property
    def places(self) -> int:
        """Tokens if all tiles were whole."""
        return self.video_blocks * self.block + self.text_len

    @property
    def tokens(self) -> int:
        """Tokens before any padding."""
        return prod(self.thw) + self.text_len


class Places(NamedTuple):
    """Where tokens go when they are put tile by tile, as indices of tokens and of places."""

    to_tiles: Tensor
    """For each place, the token that it gets."""
    from_tiles: Tensor
    """For each token, its place."""
    blank: Tensor
    """Places that get 0."""
    padding: Tensor
    """All places that are no token's own: blank ones, and those of copies."""
    copies: Tensor
    """Places of copies of tokens that have a place already."""
    copied: Tensor
    """Tokens, among them all that are copied."""
    copied_from: Tensor
    """For each of `copies`, the index in `copied` of its token."""


def means_of_tiles(x: Tensor, canvas: Canvas, padding: str) -> Tensor:
    """The mean token of each tile, (batch, heads, tiles, head_dim), of tokens as they lie; of a
    tile at a border that of its tokens alone ("exact"), or of them and zeros ("zero"). Float32,
    rounded to x's dtype before; x is read once."""
    sums = x[:, :, : prod(canvas.thw)].unflatten(2, canvas.thw)
    counts = torch.ones(1, device=x.device)
    # From the last axis, whose sums are the most.
    for axis in (2, 1, 0):
        n, side = canvas.thw[axis], canvas.tile[axis]
        sums = _sums(sums, 2 + axis, side)
        first = torch.arange(canvas.tiles[axis], device=x.device) * side
        along = (n - first).clamp(max=side)
        counts = (along[:, None] * counts).flatten()
    counts = canvas.block if padding == "zero" else counts[:, None]
    return (sums.flatten(2, 4) / counts).to(x.dtype).float()


def _sums(x: Tensor, dim: int, side: int) -> Tensor:
    """Sums of each ``side`` neighbours along a dimension, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rest = x.shape[dim] % side
    whole = (
        x.narrow(dim, 0, x.shape[dim] - rest).unflatten(dim, (-1, side)).sum(dim + 1, dtype=dtype)
    )
    if not rest:
        return whole
    last = x.narrow(dim, x.shape[dim] - rest, rest).sum(dim, keepdim=True, dtype=dtype)
    return torch.cat([whole, last], dim)


@kept
def places_of(canvas: Canvas, pad_type: str, device: torch.device) -> Places:
    """The places of a canvas, and where they are 0 or copies, by `pad_type`."""
    # No step's size depends on values, so all of it can be traced, and none waits for a GPU.
    video = prod(canvas.thw)
    padded = tuple(n * side for n, side in zip(canvas.tiles, canvas.tile, strict=True))
    inside = torch.ones(1, dtype=torch.bool, device=device)
    tokens = torch.zeros(1, dtype=torch.long, device=device)
    for n, end in zip(padded, canvas.thw, strict=True):
        axis = torch.arange(n, device=device)
        inside = (inside[:, None] & (axis < end)).flatten()
        tokens = (tokens[:, None] * end + axis.clamp(max=end - 1)).flatten()
    inside, tokens = (
        tile(x.view(1, 1, -1, 1), padded, canvas.tile).flatten() for x in (inside, tokens)
    )
    text = torch.arange(canvas.blocks * canvas.block - prod(padded), device=device)
    # Text is padded by its last token.
    to_tiles = torch.cat([tokens, video + text.clamp(max=canvas.text_len - 1)])

    own = torch.cat([inside, text < canvas.text_len])
    # Places in order, those of a token's own last, which then are put in the tokens' order.
    order = own.byte().argsort(stable=True)
    padding, own_places = order[: -canvas.tokens], order[-canvas.tokens :]
    from_tiles = torch.empty_like(own_places).scatter_(0, to_tiles[own_places], own_places)
    blank = prod(padded) - video if pad_type == "zero" else 0
    copies = padding[blank:]
    # Copies are of any tokens, or of the last alone.
    first = canvas.tokens - 1 if pad_type == "zero" and len(copies) else 0
    copied = torch.arange(first, canvas.tokens if len(copies) else 0, device=device)
    copied_from = to_tiles[copies] - first
    return Places(to_tiles, from_tiles, padding[:blank], padding, copies, copied, copied_from)


def _take(x: Tensor, index: Tensor, blank: Tensor) -> Tensor:
    """Tokens of (batch, heads, tokens, head_dim) by index, those at the places `blank` being 0."""
    # A copy of bytes: the wider its elements, the fewer instructions.
    taken = x.view(torch.int64) if _has_wide_rows(x) else x
    taken = taken.index_select(2, index).view(x.dtype)
    return taken.index_fill_(2, blank, 0) if len(blank) else taken


def _has_wide_rows(x: Tensor) -> bool:
    """Whether all rows start and end at whole int64 numbers."""
    if torch.compiler.is_compiling():
        return False  # The compiler has ways of its own, and does not know of offsets.
    steps = (*x.stride()[:3], x.storage_offset(), x.shape[3])
    size = x.element_size()
    return x.stride(3) == 1 and not any(step * size % torch.int64.itemsize for step in steps)


class ToTiles(torch.autograd.Function):
    """Tokens to tiles, padded. One copy, and so is its gradient: that of indexing in general would
    add 16-bit numbers one by one."""

    @staticmethod
    def forward(x: Tensor, *places: Tensor) -> Tensor:
        places = Places(*places)
        return _take(x, places.to_tiles, places.blank)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        places = Places(*ctx.saved_tensors)
        result = _take(grad, places.from_tiles, places.blank[:0])
        if len(places.copies):
            # A token's copies may be hundreds: summed in float32, and rounded once.
            own = result.index_select(2, places.copied)
            total = own.to(torch.promote_types(own.dtype, torch.float32))
            copies = grad.index_select(2, places.copies).to(total.dtype)
            total = total.index_add(2, places.copied_from, copies)
            result = result.index_copy(2, places.copied, total.to(result.dtype))
        return result, *(None,) * len(places)


class FromTiles(torch.autograd.Function):
    """Tokens back from tiles, padding left behind."""

    @staticmethod
    def forward(x: Tensor, *places: Tensor) -> Tensor:
        places = Places(*places)
        return _take(x, places.from_tiles, places.blank[:0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        places = Places(*ctx.saved_tensors)
        return _take(grad, places.to_tiles, places.padding), *(None,) * len(places)

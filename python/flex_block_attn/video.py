"""Attention over a video whose tokens stay where they are: :func:`video_attention`, its operators.

In: q, k and v in (time, height, width) order with text behind, and which tiles see which. Out: the
output in the same order. On a GPU tiles are fetched from and written to the tensors in place; what
a tile has beside the video is neither read nor computed.

Called by users, and by :mod:`.ssta_attention`.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import _native, direct, ops
from .api import as_inputs, default_scale, is_deterministic, same_device
from .masks import BlockMask, as_blocks
from .tiles import Canvas, FromTiles, ToTiles, Triple, check_tokens, kept_in, places_of

PADDINGS = ("exact", "zero")
LARGEST = (2047, 1023, 1023)
"""Tokens along each axis, tiles being whole, that kernels take."""
MOST_PLACES = 2**25
"""Tokens, tiles being whole, that they take."""

_LIBRARY = "flex_block_attn"

torch.library.define(
    f"{_LIBRARY}::video_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor plan, int[] sizes, float scale, bool deterministic)"
    " -> (Tensor out, Tensor lse)",
)
torch.library.define(
    f"{_LIBRARY}::video_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor plan, int[] sizes,"
    " float scale, bool deterministic, bool[3] wanted) -> (Tensor dq, Tensor dk, Tensor dv)",
)

forward = torch.ops.flex_block_attn.video_forward.default
backward = torch.ops.flex_block_attn.video_backward.default


def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    canvas_thw: Triple,
    tile_thw: Triple,
    mask: BlockMask | Tensor,
    *,
    text_len: int = 0,
    padding: str = "exact",
    scale: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention over the tiles of a video, in and out in (time, height, width) order.

    Args:
        q, k, v: (batch, heads, sequence, head_dim), T * H * W tokens of video, then ``text_len`` of
            text; any strides whose last is 1. k and v may have fewer heads, which divide q's. On a
            GPU nothing is copied, unless batches lie at a distance that is no multiple of that of
            heads.
        canvas_thw: T, H and W. Tiles at the borders may stick out.
        tile_thw: tokens of a tile along each axis; in all a multiple of 16, on a GPU of 128.
        mask: which tiles see which: bool (blocks, blocks), (heads, blocks, blocks) or (batch,
            heads, blocks, blocks), in which heads and batch may be 1, tiles first in (t, h, w)
            order, then text in blocks of as many tokens; or a :class:`BlockMask` of such blocks,
            which is planned once, as those of :func:`create_sta_3d_mask` may be.
        text_len: tokens of text.
        padding: "exact", attention over the tokens that there are; or "zero", as models were
            trained whose tiles were padded with zeros, and text with its last token, all of which
            are attended.
        scale: factor of ``q k^T``; ``1 / sqrt(head_dim)`` if not given.
        deterministic: as for :func:`flex_block_attn_func`.

    Returns:
        The output, of q's shape and dtype, differentiable. A token that sees no block gets 0.

    >>> q = k = v = torch.randn(1, 2, 3 * 5 * 9 + 20, 64)  # 2 x 1 x 2 tiles, and a block of text
    >>> mask = torch.ones(5, 5, dtype=torch.bool)
    >>> video_attention(q, k, v, (3, 5, 9), (2, 8, 8), mask, text_len=20).shape
    torch.Size([1, 2, 155, 64])
    """
    if padding not in PADDINGS:
        raise ValueError(f'padding must be one of "exact", "zero", got {padding!r}')
    canvas = Canvas.of_tiles(canvas_thw, tile_thw, text_len)
    q, k, v = as_inputs(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tokens(name, x, canvas.tokens, "canvas_thw and text_len need")
    plan = plan_of(mask, q, canvas)
    scale = default_scale(q) if scale is None else float(scale)
    settings = scale, is_deterministic(deterministic)
    if q.is_cuda and padding == "zero" and not is_native(q, canvas):
        places = places_of(canvas, "zero", q.device)
        tiled = (ToTiles.apply(x, *places) for x in (q, k, v))
        out, _ = direct.differentiable(*tiled, plan, (canvas.block, canvas.block, *settings))
        return FromTiles.apply(out, *places)
    return attend(q, k, v, plan, canvas, padding, *settings)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    canvas: Canvas,
    padding: str,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """:func:`video_attention` of arguments that go together."""
    sizes = [*canvas.thw, *canvas.tile, canvas.text_len, int(padding == "zero")]
    return forward(q, k, v, plan, sizes, scale, deterministic)[0]


def is_native(q: Tensor, canvas: Canvas) -> bool:
    """Whether kernels take such a video as it lies."""
    sides = (n * side for n, side in zip(canvas.tiles, canvas.tile, strict=True))
    return (
        q.shape[3] in (64, 128)
        and canvas.block % 128 == 0
        and canvas.places < MOST_PLACES
        and all(side <= most for side, most in zip(sides, LARGEST, strict=True))
    )


def plan_of(mask: Any, q: Tensor, canvas: Canvas) -> Tensor:
    """The plan of a mask of tiles and blocks of text: a tensor, or a :class:`BlockMask`, with which
    it is kept."""
    if isinstance(mask, BlockMask):
        same_device("mask", mask.plan, q)
        if mask.expression is not None:
            raise ValueError(
                "mask must be of whole blocks: tokens of a video have no numbers that the function "
                "of a mask could be asked for"
            )
        sizes = mask.q_block_size, mask.kv_block_size, *mask.blocks.shape[2:]
        needed = (canvas.block, canvas.block, canvas.blocks, canvas.blocks)
        if sizes != needed:
            raise ValueError(
                f"mask has {sizes[2]} x {sizes[3]} blocks of {sizes[0]} x {sizes[1]} tokens, but "
                f"canvas_thw, tile_thw and text_len need {needed[2]} x {needed[3]} of {needed[0]} "
                f"x {needed[1]}"
            )
        return _kept_plan(mask, q, canvas)
    return _new_plan(as_blocks(mask), q, canvas)


def _new_plan(blocks: Tensor, q: Tensor, canvas: Canvas) -> Tensor:
    same_device("mask", blocks, q)
    sizes = canvas.places, canvas.places, canvas.block, canvas.block
    video = (canvas.thw, canvas.tile, canvas.text_len, False)
    plan = direct.plan(blocks, sizes, video if q.is_cuda and is_native(q, canvas) else None)
    return ops.plan(blocks, *sizes) if plan is None else plan


_PLANS: WeakKeyDictionary[BlockMask, dict[Canvas, Tensor]] = WeakKeyDictionary()


def _kept_plan(mask: BlockMask, q: Tensor, canvas: Canvas) -> Tensor:
    """A mask's own plan, or, where that is of use, one that knows of the tiles."""
    if not q.is_cuda or torch.compiler.is_compiling() or not is_native(q, canvas):
        return mask.plan
    plans = _PLANS.setdefault(mask, {})
    return kept_in(plans, canvas, lambda: _new_plan(mask.blocks, q, canvas))


# --- operators ----------------------------------------------------------------------------------


def _raw(sizes: Sequence[int]) -> tuple:
    return tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6], bool(sizes[7])


def _places(sizes: Sequence[int]) -> int:
    """Tokens if all tiles were whole."""
    thw, tile, text_len, _ = _raw(sizes)
    return Canvas.of_tiles(thw, tile, text_len).places


def _in_lines(x: Tensor) -> Tensor:
    """The tensor as kernels take a video's: batches are whole heads apart, too."""
    x = ops.for_copies(x)
    batch, heads, _, _ = x.shape
    if batch > 1 and heads > 1 and x.stride(0) % x.stride(1):
        return x.clone(memory_format=torch.contiguous_format)
    return x


@torch.library.register_fake(f"{_LIBRARY}::video_forward")
def _forward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sizes: Sequence[int],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    rows = (*q.shape[:2], _places(sizes))
    return torch.empty_like(q), q.new_empty(rows, dtype=ops.lse_dtype(q))


@torch.library.impl(f"{_LIBRARY}::video_forward", "CPU")
def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sizes: Sequence[int],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_outputs(q, k, v, plan, sizes, scale, deterministic)
    settings = scale, torch.get_num_threads()
    block = _block(sizes)
    plans = plan, block, block
    _native.forward((q, k, v), plans, settings, (out, lse), video=_raw(sizes))
    return out, lse


@torch.library.impl(f"{_LIBRARY}::video_forward", "CUDA")
def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    sizes: Sequence[int],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    ops.check_devices(q, k, v, plan)
    out = _written_like(q)
    lse = q.new_empty((*q.shape[:2], _places(sizes)), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    if scale < 0:
        # Kernels look for the largest score before they scale.
        q, scale = -q, -scale
    block = _block(sizes)
    _native.forward_cuda(
        tuple(_in_lines(x) for x in (q, k, v)),
        (plan, block, block),
        scale,
        out,
        lse,
        None,
        _raw(sizes),
    )
    return out, lse


def _written_like(x: Tensor) -> Tensor:
    """A tensor that kernels write, of x's strides if they take them."""
    made = torch.empty_like(x)
    return made if _in_lines(made) is made else x.new_empty(x.shape)


def _block(sizes: Sequence[int]) -> int:
    return sizes[3] * sizes[4] * sizes[5]


@torch.library.register_fake(f"{_LIBRARY}::video_backward")
def _backward_outputs(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    sizes: Sequence[int],
    scale: float,
    deterministic: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator returns tensors: what is not wanted is an empty one.
    dq, dk, dv = (
        torch.empty_like(x) if wants else x.new_empty(0)
        for x, wants in zip((q, k, v), wanted, strict=True)
    )
    return dq, dk, dv


@torch.library.impl(f"{_LIBRARY}::video_backward", "CPU")
def _backward_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    sizes: Sequence[int],
    scale: float,
    deterministic: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_outputs(
        dout, q, k, v, out, lse, plan, sizes, scale, deterministic, wanted
    )
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    block = _block(sizes)
    _native.backward(
        (q, k, v, out, lse),
        (dout, None),
        (plan, block, block),
        (scale, torch.get_num_threads()),
        tuple(x if wants else None for x, wants in zip(gradients, wanted, strict=True)),
        video=_raw(sizes),
    )
    return gradients


@torch.library.impl(f"{_LIBRARY}::video_backward", "CUDA")
def _backward_cuda(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    sizes: Sequence[int],
    scale: float,
    deterministic: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    ops.check_devices(q, k, v, out, lse, dout, plan)
    negated = scale < 0
    if negated:
        # As the forward pass: the gradient of -q is less that of q.
        q, scale = -q, -scale
    q, k, v, out, dout = (
        _in_lines(x if x.stride(-1) == 1 else x.contiguous()) for x in (q, k, v, out, dout)
    )
    dq, dk, dv = (_written_like(x) for x in (q, k, v))
    if q.numel() == 0:
        gradients = dq.zero_(), dk.zero_(), dv.zero_()
    else:
        block = _block(sizes)
        shape = (*lse.shape, q.shape[3])
        count = _native.backward_workspace(shape, deterministic)
        workspace = q.new_empty(count, dtype=torch.float32)
        _native.backward_cuda(
            (q, k, v, out, lse),
            (dout, None),
            (plan, block, block),
            (scale, deterministic),
            (dq, dk, dv),
            workspace.data_ptr(),
            None,
            _raw(sizes),
        )
        gradients = dq.neg_() if negated else dq, dk, dv
    dq, dk, dv = (
        x if wants else x.new_empty(0) for x, wants in zip(gradients, wanted, strict=True)
    )
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple:
    q, k, v, out, lse, plan = ctx.saved_tensors
    if dout is None:
        return (None,) * 7
    wanted = list(ctx.needs_input_grad[:3])
    gradients = backward(dout, q, k, v, out, lse, plan, *ctx.settings, wanted)
    given = (x if wants else None for x, wants in zip(gradients, wanted, strict=True))
    return (*given, None, None, None, None)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("flex_block_attn has no second derivative")


torch.library.register_autograd(f"{_LIBRARY}::video_forward", _differentiate, setup_context=_save)
torch.library.register_autograd(f"{_LIBRARY}::video_backward", _refuse_double_backward)

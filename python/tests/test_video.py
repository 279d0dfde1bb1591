"""Attention over videos whose tokens stay where they are, against places written out.

On CPUs; ``test_cuda.py`` has the same on GPUs.
"""

import math

import pytest
import torch
import video_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import relative_error

from flex_block_attn import BlockMask, create_block_mask, video_attention
from flex_block_attn.ssta_attention import create_sta_3d_mask, ssta_3d_attention
from flex_block_attn.tiles import Canvas, means_of_tiles

TILES = [(1, 4, 4), (2, 2, 4), (2, 4, 4), (1, 1, 16), (4, 4, 3)]
SIZES = st.tuples(
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9)),
    st.sampled_from(TILES),
    st.integers(0, 40),
)


def random_mask(sizes, batch: int, heads: int, density: float):
    thw, tile, text_len = sizes
    blocks = Canvas.of_tiles(thw, tile, text_len).blocks
    return torch.rand(batch, heads, blocks, blocks) < density


def tokens_of(sizes, batch=2, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64):
    thw, _, text_len = sizes
    tokens = math.prod(thw) + text_len
    return [
        torch.randn(batch, h, tokens, head_dim, dtype=dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


@given(SIZES, st.sampled_from(["exact", "zero"]), st.floats(0.2, 1), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_as_over_places(sizes, padding, density, seed):
    torch.manual_seed(seed)
    thw, tile, text_len = sizes
    mask = random_mask(sizes, 2, 4, density)
    leaves = tokens_of(sizes)
    out = video_attention(*leaves, thw, tile, mask, text_len=text_len, padding=padding)
    expected = reference.video_attention(*leaves, thw, tile, mask, text_len, padding, None)
    assert relative_error(out.detach(), expected.detach()) < 1e-12
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, dout), strict=True):
        assert relative_error(got, wanted) < 1e-11


SIZE = (3, 5, 9), (2, 4, 4), 20


@pytest.mark.parametrize("padding", ["exact", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_layouts_scales(padding, dtype):
    torch.manual_seed(0)
    thw, tile, text_len = SIZE
    mask = random_mask(SIZE, 1, 1, 0.5)
    tokens = math.prod(thw) + text_len
    together = torch.randn(2, tokens, 3, 4, 32).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    for scale in (0.3, -0.3, 0.0):
        settings = {"text_len": text_len, "padding": padding, "scale": scale}
        out = video_attention(q, k, v, thw, tile, mask[0, 0], **settings)
        expected = reference.video_attention(q, k, v, thw, tile, mask, text_len, padding, scale)
        assert out.dtype == dtype
        assert relative_error(out, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_masks_planned_once_and_sliding_tiles():
    thw, tile, text_len = SIZE
    mask = create_sta_3d_mask(thw, tile, (1, 3, 1), text_len)
    canvas = Canvas.of_tiles(thw, tile, text_len)
    planned = BlockMask(mask, canvas.places, canvas.places, canvas.block, canvas.block)
    q, k, v = tokens_of(SIZE)
    outs = [video_attention(q, k, v, thw, tile, m, text_len=text_len) for m in (mask, planned)]
    assert torch.equal(*outs)
    expected = reference.video_attention(q, k, v, thw, tile, mask[None, None], 20, "exact", None)
    assert relative_error(outs[0].detach(), expected.detach()) < 1e-12


def test_rows_without_tiles_give_zero():
    thw, tile, text_len = SIZE
    mask = random_mask(SIZE, 1, 1, 1.0)
    mask[:, :, 0] = False
    q, k, v = tokens_of(SIZE)
    out = video_attention(q, k, v, thw, tile, mask, text_len=text_len)
    assert not out[:, :, 0].any() and out[:, :, -1].all()
    dq = torch.autograd.grad(out.sum(), q)[0]
    assert not dq[:, :, 0].any() and dq.isfinite().all()


def test_compiled():
    thw, tile, text_len = SIZE
    mask = random_mask(SIZE, 1, 1, 0.5)
    leaves = tokens_of(SIZE, dtype=torch.float32)

    def attend(*x):
        return video_attention(*x, thw, tile, mask, text_len=text_len)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    dout = torch.randn_like(leaves[0])
    results = [
        (out := f(*leaves), *torch.autograd.grad(out, leaves, dout)) for f in (attend, compiled)
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"padding": "repeat"}, "padding must be one of"),
        ({"tile_thw": (1, 3, 3)}, "tile_thw must hold a multiple of 16"),
        ({"canvas_thw": (3, 5, 8)}, "q must be .* of 140 tokens"),
        ({"text_len": 21}, "q must be .* of 156 tokens"),
        ({"mask": torch.ones(3, 3).bool()}, "3.*3"),
    ],
)
def test_mistakes_are_named(changed, message):
    thw, tile, text_len = SIZE
    arguments = {"canvas_thw": thw, "tile_thw": tile, "text_len": text_len}
    arguments |= {"mask": random_mask(SIZE, 1, 1, 0.5), **changed}
    with pytest.raises(ValueError, match=message):
        video_attention(*tokens_of(SIZE), **arguments)


def test_masks_that_do_not_fit_are_refused():
    thw, tile, text_len = SIZE
    q, k, v = tokens_of(SIZE)
    other = BlockMask.full(64, 64, 16, 16)
    with pytest.raises(
        ValueError, match="4 x 4 blocks of 16 x 16 tokens, but .* need 13 x 13 of 32"
    ):
        video_attention(q, k, v, thw, tile, other, text_len=text_len)
    exact = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 404, 404, BLOCK_SIZE=32)
    with pytest.raises(ValueError, match="mask must be of whole blocks"):
        video_attention(q, k, v, thw, tile, exact, text_len=text_len)


# --- SSTA ---------------------------------------------------------------------------------------


@given(SIZES, st.sampled_from(["exact", "zero"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_means_of_tiles(sizes, padding):
    thw, tile, text_len = sizes
    canvas = Canvas.of_tiles(thw, tile, text_len)
    x = torch.randn(2, 3, canvas.tokens, 8)
    got = means_of_tiles(x, canvas, padding)
    for block in range(canvas.video_blocks):
        rows = [
            torch.zeros(2, 3, 8) if token is None else x[:, :, token]
            for token, at, _ in reference.places(thw, tile, 0, padding)
            if at == block
        ]
        assert torch.allclose(got[:, :, block], torch.stack(rows).mean(0), atol=1e-6)


@pytest.mark.parametrize("sparse_type", ["sta", "block_attn", "ssta"])
@pytest.mark.parametrize("choice", [{}, {"threshold": 0.9}, {"adaptive_pool": (2, 2, 2)}])
def test_ssta_over_the_tokens_there_are(sparse_type, choice):
    """All that padding is for is left out: the same as over the tiles chosen."""
    torch.manual_seed(1)
    thw, tile, text_len = SIZE
    q, k, v = tokens_of(SIZE)
    options = {
        "tile_thw": tile,
        "kernel_thw": (1, 3, 1),
        "text_len": text_len,
        "sparse_type": sparse_type,
        "pad_type": "exact",
        "sampling_type": "similarity",
        "mask_share_within_head": False,
        **choice,
    }
    out, density = ssta_3d_attention(q, k, v, thw, 10_000, **options)
    if sparse_type == "sta":
        mask = create_sta_3d_mask(thw, tile, (1, 3, 1), text_len)[None, None]
    elif choice.get("threshold"):
        assert 0 < float(density) <= 1
        return
    else:
        mask = random_mask(SIZE, 1, 1, 2.0)
    expected = reference.video_attention(q, k, v, thw, tile, mask, text_len, "exact", None)
    assert relative_error(out.detach(), expected.detach()) < 1e-12
    assert float(density) == pytest.approx(float(mask.double().mean()))


def test_ssta_chooses_tiles_by_the_means_of_their_tokens():
    torch.manual_seed(2)
    thw, tile, text_len = SIZE
    canvas = Canvas.of_tiles(thw, tile, text_len)
    q, k, v = (x.detach() for x in tokens_of(SIZE))
    options = {"sampling_type": "similarity", "pad_type": "exact", "mask_share_within_head": False}
    out, _ = ssta_3d_attention(q, k, v, thw, 3, tile, (1, 1, 1), text_len, "block_attn", **options)
    pooled = [means_of_tiles(x, canvas, "exact").double() for x in (q, k)]
    scores = pooled[0] @ pooled[1].repeat_interleave(2, 1).mT
    n = canvas.video_blocks
    mask = random_mask(SIZE, 1, 1, 2.0).repeat(2, 4, 1, 1)
    mask[:, :, :n, :n] = False
    mask[:, :, :n, :n].scatter_(3, scores.topk(3).indices, True)
    expected = reference.video_attention(q, k, v, thw, tile, mask, text_len, "exact", None)
    assert relative_error(out, expected) < 1e-12

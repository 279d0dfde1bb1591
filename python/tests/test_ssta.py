"""Sparse attention of video models against the formulas, written out in ``ssta_reference.py``.

Masks must be equal, up to near-ties: see ``ssta_choices.py``.
"""

import math
import warnings

import numpy as np
import pytest
import ssta_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssta_choices import (
    TIE,
    TILES,
    compare_choice,
    in_order,
    near_ties_of_settings,
    random_tokens,
    reference_choice,
    tiled,
    without_topk,
)

from flex_block_attn import BlockMask, selection
from flex_block_attn.ssta_attention import (
    create_moba_3d_mask,
    create_ssta_3d_mask,
    create_sta_3d_mask,
    ssta_3d_attention,
    tile,
    untile,
)

OUT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SIZES = st.fixed_dictionaries(
    {
        "thw": st.tuples(st.integers(2, 5), st.integers(1, 7), st.integers(1, 7)),
        "tile_thw": st.sampled_from(TILES),
        "kernel_thw": st.tuples(*[st.integers(1, 6)] * 3),
        "text_len": st.integers(0, 40),
    }
)
CHOICES = st.fixed_dictionaries(
    {
        "topk": st.integers(1, 12) | st.just(10_000),
        "mask_share_within_head": st.booleans(),
        "adaptive_pool": st.none() | st.tuples(*[st.integers(1, 3)] * 3),
    }
).flatmap(
    lambda choice: st.sampled_from(
        [
            {"sampling_type": "similarity"},
            {"sampling_type": "similarity", "threshold": 0.5},
            {"sampling_type": "similarity", "threshold": 0.999},
            {"sampling_type": "importance", "lambda_": 0.7},
            {"sampling_type": "importance", "lambda_": 0.0},
            {"sampling_type": "importance", "lambda_": 1.0},
        ]
    ).map(lambda kind: choice | kind)
)


# --- tiles --------------------------------------------------------------------------------------


@given(st.sampled_from(TILES), st.tuples(*[st.integers(1, 3)] * 3), st.sampled_from([1, 2, 3]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tile_and_back(tile_thw, counts, sp_size):
    canvas = [side * n for side, n in zip(tile_thw, counts, strict=True)]
    canvas[0] *= sp_size
    x = torch.arange(2 * 3 * math.prod(canvas) * 2).reshape(2, 3, -1, 2)
    video = x
    if sp_size > 1:
        # Part r holds the frames t * sp_size + r.
        video = x.unflatten(2, (sp_size, canvas[0] // sp_size, -1)).transpose(2, 3).flatten(2, 4)
    expected = tiled(video, {"thw": canvas, "tile_thw": tile_thw, "text_len": 0})
    got = tile(x, canvas, tile_thw, sp_size)
    assert np.array_equal(got.numpy(), expected)
    assert torch.equal(untile(got, canvas, tile_thw, sp_size), x)


# --- masks --------------------------------------------------------------------------------------


@given(SIZES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_sta_masks(sizes):
    mask = create_sta_3d_mask(*in_order(sizes))
    text_blocks = -(-sizes["text_len"] // math.prod(sizes["tile_thw"]))
    thw, tile_thw, window, _ = in_order(sizes)
    assert np.array_equal(mask.numpy(), reference.sta_mask(thw, tile_thw, window, text_blocks))


def test_sta_windows_that_are_even_or_wider_than_the_axis():
    def axis(tiles, window):
        return create_sta_3d_mask((tiles, 4, 4), (1, 4, 4), (window, 1, 1)).int().tolist()

    assert axis(6, 2) == axis(6, 3)
    assert sum(axis(6, 2)[0]) == 3
    # The range of centres is empty: its upper end wins, and all is seen.
    assert all(sum(row) == 3 for row in axis(3, 4))
    assert all(sum(row) == 2 for row in axis(2, 9))


@given(SIZES, CHOICES, st.sampled_from(list(TIE)), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_chosen_masks(sizes, choice, dtype, seed):
    torch.manual_seed(seed)
    q, k, _ = random_tokens(sizes, 2, 2, 8, dtype)
    q, k = tiled(q, sizes), tiled(k, sizes)
    expected = reference_choice(q, k, sizes, choice, dtype)
    q, k = (torch.from_numpy(x).to(dtype) for x in (q, k))
    thw, tile_thw, window, text_len = in_order(sizes)

    mask = create_moba_3d_mask(
        q, k, thw, choice["topk"], tile_thw, text_len, **without_topk(choice)
    )
    assert mask.shape[:2] == (2, 1 if choice["mask_share_within_head"] else 2)
    n = len(expected[0][0])
    compare_choice(mask[:, :, :n, :n], expected, TIE[dtype])
    assert mask[:, :, n:].all() and mask[..., n:].all()

    both = create_ssta_3d_mask(
        q, k, thw, choice["topk"], tile_thw, window, text_len, **without_topk(choice)
    )
    assert torch.equal(both, mask | create_sta_3d_mask(thw, tile_thw, window, text_len))


def test_near_ties_are_few():
    """200 settings as models have them: of all chosen blocks, those that another order of sums
    chooses otherwise."""
    ties, blocks = near_ties_of_settings(200, "cpu")
    assert ties <= blocks / 1000


def test_a_tile_of_zero_mean_is_chosen_by_none_for_that():
    """Where the mean key is 0, its cosine is 0 rather than NaN, which top-k takes for the best."""
    q, k = torch.randn(2, 1, 2, 6 * 16, 8)
    k[:, :, 16:32] = 0
    k[:, :, 17] = 1
    k[:, :, 18] = -1
    q[:, :, :16] = 0
    options = {"sampling_type": "importance", "mask_share_within_head": False}
    scores = selection.importance(selection.block_means(q, 16), selection.block_means(k, 16), 1.0)
    assert scores.isfinite().all() and (scores[..., 1] == 0).all()
    assert (scores[:, :, 0] == 0).all()
    mask = create_moba_3d_mask(q, k, (6, 4, 4), 2, (1, 4, 4), lambda_=1.0, **options)
    assert (mask.sum(-1) == 2).all()
    # It wins where all others are unlike the query, and only there.
    best = scores[:, :, 1:].argsort(-1, descending=True)[..., :2]
    assert torch.equal(mask[:, :, 1:, 1], (best == 1).any(-1))


def test_one_tile():
    q = k = torch.randn(1, 1, 16, 8)
    for choice in (
        {"sampling_type": "similarity"},
        {"sampling_type": "importance", "lambda_": 0.5},
    ):
        mask = create_moba_3d_mask(q, k, (1, 4, 4), 3, (1, 4, 4), **choice)
        assert mask.tolist() == [[[[True]]]]


def test_shared_heads_of_keys():
    """k may have fewer heads than q: the same as with each of them repeated."""
    q, k = torch.randn(1, 6, 128, 8), torch.randn(1, 2, 128, 8)
    for choice in (
        {"sampling_type": "similarity"},
        {"sampling_type": "importance", "lambda_": 0.5},
    ):
        arguments = (4, 8, 4), 3, (1, 4, 4)
        options = {"mask_share_within_head": False, **choice}
        got = create_moba_3d_mask(q, k, *arguments, **options)
        repeated = create_moba_3d_mask(q, k.repeat_interleave(3, dim=1), *arguments, **options)
        assert torch.equal(got, repeated)


@pytest.mark.parametrize("valid", [(0, 1), (16, 17), (50, 33), (48, 32)])
def test_padded_text_is_cut_off(valid):
    q, k = torch.randn(2, 2, 3, 8 * 16, 8)
    text_mask = torch.arange(50) < torch.tensor(valid)[:, None]
    options = {"sampling_type": "similarity", "mask_share_within_head": False}
    arguments = (8, 4, 4), 2, (1, 4, 4), (3, 1, 1), 50
    whole = create_ssta_3d_mask(q, k, *arguments, **options)
    for mask in (text_mask, text_mask.int(), text_mask.float()):
        got = create_ssta_3d_mask(q, k, *arguments, text_mask=mask, **options)
        for b in range(2):
            for h in range(3):
                expected = reference.without_padded_text(whole[b, h].numpy(), 8, valid[b], 16)
                assert np.array_equal(got[b, h].numpy(), expected)
        assert got.any(-1).all()


# --- attention ----------------------------------------------------------------------------------


def reference_attention(q, k, v, sizes, masks, pad_type):
    """The output (batch, heads, sequence, head_dim) under masks (batch, heads or 1, ...)."""
    q, k, v = (tiled(x, sizes, pad_type) for x in (q, k, v))
    block = math.prod(sizes["tile_thw"])
    masks = np.broadcast_to(masks, (*q.shape[:2], *masks.shape[-2:]))
    outs = [
        [
            reference.from_tiles(
                reference.attention(q[b, h], k[b, h], v[b, h], masks[b, h], block),
                *(sizes[name] for name in ("thw", "tile_thw", "text_len")),
            )
            for h in range(q.shape[1])
        ]
        for b in range(q.shape[0])
    ]
    return torch.from_numpy(np.array(outs))


@given(
    SIZES,
    CHOICES,
    st.sampled_from(["sta", "block_attn", "ssta"]),
    st.sampled_from(["zero", "repeat"]),
    st.booleans(),
    st.sampled_from(list(TIE)),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_attention(sizes, choice, sparse_type, pad_type, masked, dtype, seed):
    torch.manual_seed(seed)
    q, k, v = random_tokens(sizes, 2, 2, 8, dtype)
    text_mask = torch.arange(sizes["text_len"]) < torch.randint(0, 41, (2, 1)) if masked else None
    out, density = ssta_3d_attention(
        q, k, v, **sizes, **choice, sparse_type=sparse_type, pad_type=pad_type, text_mask=text_mask
    )

    thw, tile_thw, window, text_len = in_order(sizes)
    block = math.prod(tile_thw)
    mask = create_sta_3d_mask(thw, tile_thw, window, text_len)[None, None]
    if sparse_type != "sta":
        places = [torch.from_numpy(tiled(x, sizes, pad_type)).to(dtype) for x in (q, k)]
        arguments = thw, choice["topk"], tile_thw, text_len
        chosen = create_moba_3d_mask(*places, *arguments, **without_topk(choice))
        mask = chosen if sparse_type == "block_attn" else mask | chosen
    masks = mask.expand(2, *mask.shape[1:]).numpy()
    if masked and sparse_type != "block_attn":
        video = math.prod(-(-n // side) for n, side in zip(thw, tile_thw, strict=True))
        valid = text_mask.sum(1).tolist()
        masks = np.array(
            [
                [reference.without_padded_text(head, video, one_valid, block) for head in one]
                for one, one_valid in zip(masks, valid, strict=True)
            ]
        )
    expected = reference_attention(q, k, v, sizes, masks, pad_type)
    assert out.shape == q.shape and out.dtype == dtype
    assert (out.double() - expected).norm() <= OUT_TOLERANCE[dtype] * expected.norm()
    assert density.shape == () and density.dtype == torch.float32
    assert abs(float(density) - masks.mean()) < 1e-6


@pytest.mark.parametrize("pad_type", ["zero", "repeat"])
@pytest.mark.parametrize("sparse_type", ["sta", "ssta"])
def test_gradients(sparse_type, pad_type):
    """Those of plain torch: padding by indices, attention over the mask, all in float64."""
    sizes = {"thw": (3, 5, 6), "tile_thw": (2, 4, 2), "kernel_thw": (1, 1, 3), "text_len": 20}
    choice = {"topk": 3, "sampling_type": "importance", "lambda_": 0.7}
    leaves = [x.double().requires_grad_() for x in random_tokens(sizes, 2, 2, 8, torch.float32)]
    options = {"sparse_type": sparse_type, "pad_type": pad_type, "mask_share_within_head": False}
    out, _ = ssta_3d_attention(*leaves, **sizes, **choice, **options)

    # Places as token numbers from 1 on, 0 where nothing is.
    tokens = leaves[0].shape[2]
    numbers = tiled(torch.arange(1, tokens + 1).view(1, 1, -1, 1), sizes, pad_type).flatten()
    numbers = torch.from_numpy(numbers).long()
    zero = torch.zeros(2, 2, 1, 8, dtype=torch.float64)
    q, k, v = (torch.cat([zero, x], dim=2)[:, :, numbers] for x in leaves)
    thw, tile_thw, window, text_len = in_order(sizes)
    mask = create_sta_3d_mask(thw, tile_thw, window, text_len)
    if sparse_type == "ssta":
        arguments = thw, 3, tile_thw, text_len
        mask = mask | create_moba_3d_mask(
            q, k, *arguments, sampling_type="importance", lambda_=0.7, mask_share_within_head=False
        )
    mask = mask.repeat_interleave(16, -1).repeat_interleave(16, -2)
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    own = torch.stack([(numbers == token).nonzero()[0, 0] for token in range(1, tokens + 1)])
    expected = (scores.softmax(-1) @ v)[:, :, own]
    assert (out - expected).abs().max() < 1e-12

    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    wanted = torch.autograd.grad(expected, leaves, dout)
    for name, one, other in zip("qkv", got, wanted, strict=True):
        assert (one - other).abs().max() < 1e-11, f"d{name}"


def test_gradients_of_copies_are_rounded_once():
    """A text token that fills 383 places collects 384 gradients, which bf16 could not add up."""
    sizes = {"thw": (6, 8, 8), "tile_thw": (6, 8, 8), "kernel_thw": (1, 1, 1), "text_len": 1}
    q, k, v = (x.requires_grad_() for x in random_tokens(sizes, 1, 1, 16, torch.bfloat16))
    out, _ = ssta_3d_attention(q, k, v, **sizes, sparse_type="sta")
    (dv,) = torch.autograd.grad(out.sum(), v)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact_out, _ = ssta_3d_attention(*exact, **sizes, sparse_type="sta")
    (exact_dv,) = torch.autograd.grad(exact_out.sum(), exact[2])
    assert (dv - exact_dv).norm() < 5e-3 * exact_dv.norm()


def test_strided_tensors():
    """(batch, sequence, heads, head_dim) as a view, an odd slice, and an expanded tensor."""
    sizes = {"thw": (3, 5, 6), "tile_thw": (2, 4, 2), "kernel_thw": (1, 1, 3), "text_len": 20}
    q, k, v = random_tokens(sizes, 2, 2, 8, torch.bfloat16)
    expected, _ = ssta_3d_attention(q, k, v, **sizes, sparse_type="sta")
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(ssta_3d_attention(*views, **sizes, sparse_type="sta")[0], expected)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert torch.equal(ssta_3d_attention(odd, k, v, **sizes, sparse_type="sta")[0], expected)
    same = k[:, :1].expand_as(k)
    copied, _ = ssta_3d_attention(q, same.contiguous(), v, **sizes, sparse_type="sta")
    assert torch.equal(ssta_3d_attention(q, same, v, **sizes, sparse_type="sta")[0], copied)


@pytest.mark.parametrize(
    ("video_tile", "image_tile"),
    [((6, 8, 8), (1, 16, 24)), ((2, 8, 8), (1, 16, 8)), ((4, 4, 4), (1, 8, 8)),
     ((4, 2, 2), (1, 4, 4))],
)  # fmt: skip
def test_images_take_a_tile_of_one_frame(video_tile, image_tile):
    q, k, v = torch.randn(3, 1, 2, 20 * 30 + 10, 16)
    choice = {"topk": 2, "text_len": 10, "sampling_type": "importance", "lambda_": 0.7}
    image = ssta_3d_attention(
        q, k, v, (1, 20, 30), tile_thw=video_tile, kernel_thw=(3, 3, 3), **choice
    )
    plain = ssta_3d_attention(
        q, k, v, (1, 20, 30), tile_thw=image_tile, kernel_thw=(1, 1, 1), **choice
    )
    assert torch.equal(image[0], plain[0]) and torch.equal(image[1], plain[1])


def test_released_settings_by_position():
    """As HunyuanVideo-1.5 calls: lists and numpy numbers, all arguments by position."""
    q, k, v = torch.randn(3, 1, 2, 7 * 9 * 8 + 30, 32).to(torch.bfloat16)
    text_mask = torch.ones(1, 30, dtype=torch.long)
    out, density = ssta_3d_attention(
        q, k, v, [7, 9, 8], np.int64(2), [6, 8, 8], [3, 3, 3], 30, "ssta", 0.0, 0.7, "zero",
        text_mask, 0, "importance", None,
    )  # fmt: skip
    assert out.shape == q.shape and out.isfinite().all()
    assert f"{density:.2f}" == "1.00"


def test_a_gate_reads_nothing_back():
    """No step's shape depends on values, else a GPU would have to be waited for: it all runs on
    tensors without values."""
    q = torch.empty(2, 2, 16 * 16, 8, device="meta")
    options = {"mask_share_within_head": False}
    for choice in (
        {"sampling_type": "similarity"},
        {"sampling_type": "similarity", "threshold": 0.5},
        {"sampling_type": "importance", "lambda_": 0.7},
    ):
        mask = create_ssta_3d_mask(
            q, q, (4, 8, 8), 3, (1, 4, 4), (3, 3, 3), 20,
            text_mask=torch.empty(2, 20, device="meta"), **choice, **options,
        )  # fmt: skip
        assert mask.shape == (2, 2, 18, 18)


def test_compiles_to_one_graph():
    q, k, v = torch.randn(3, 1, 2, 4 * 5 * 6 + 10, 16).requires_grad_().unbind()

    def attend(q, k, v):
        return ssta_3d_attention(
            q, k, v, (4, 5, 6), 2, (2, 4, 2), (1, 3, 3), 10, sampling_type="importance", lambda_=0.7
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it traces
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        out, density = compiled(q, k, v)
    expected, expected_density = attend(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(density, expected_density)
    got = torch.autograd.grad(out.sum(), q)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), q)[0])


def test_autocast_and_checkpointing():
    q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16).requires_grad_().unbind()
    arguments = (
        (4, 8, 8),
        3,
        (2, 4, 4),
        (1, 1, 1),
        0,
        "ssta",
        0.0,
        0.7,
        "zero",
        None,
        0,
        "importance",
    )
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ssta_3d_attention(q, k, v, *arguments)
    cast, _ = ssta_3d_attention(*(x.bfloat16() for x in (q, k, v)), *arguments)
    assert out.dtype == torch.bfloat16 and torch.equal(out, cast)
    plain, _ = ssta_3d_attention(q, k, v, *arguments)
    again, _ = torch.utils.checkpoint.checkpoint(
        ssta_3d_attention, q, k, v, *arguments, use_reentrant=False
    )
    for one, other in zip(
        torch.autograd.grad(plain.sum(), (q, k, v)),
        torch.autograd.grad(again.sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_training_after_inference():
    """What a shape's first call keeps, under inference_mode, is good for training."""
    q, k, v = torch.randn(3, 1, 2, 3 * 8 * 8 + 7, 16).unbind()
    for sparse_type in ("sta", "block_attn", "ssta"):
        options = {"text_len": 7, "sparse_type": sparse_type, "sampling_type": "similarity"}
        arguments = (3, 8, 8), 2, (1, 8, 4), (3, 1, 1)
        with torch.inference_mode():
            expected, _ = ssta_3d_attention(q, k, v, *arguments, **options)
        leaf = q.clone().requires_grad_()
        out, _ = ssta_3d_attention(leaf, k, v, *arguments, **options)
        out.sum().backward()
        assert torch.equal(out, expected)


def test_masks_do_not_change_what_is_kept():
    """The mask of a shape is kept for the next call: a caller's changes stay the caller's."""
    arguments = (4, 4, 4), (1, 4, 4), (1, 1, 1)
    mask = create_sta_3d_mask(*arguments)
    expected = mask.clone()
    mask[:] = True
    assert torch.equal(create_sta_3d_mask(*arguments), expected)
    assert torch.equal(BlockMask.sta((4, 1, 1), (1, 1, 1), tile_tokens=16).blocks[0, 0], expected)


# --- mistakes -----------------------------------------------------------------------------------

Q = torch.randn(1, 2, 4 * 4 * 4 + 5, 8)
TRIPLE = "three positive numbers (time, height, width)"


def attend(q=Q, k=Q, v=Q, thw=(4, 4, 4), **options):
    """A call that is fine unless something is replaced."""
    fine = {"topk": 2, "tile_thw": (1, 4, 4), "kernel_thw": (1, 1, 1), "text_len": 5}
    return ssta_3d_attention(q, k, v, thw, **fine | {"sampling_type": "similarity"} | options)


BAD = [
    (lambda: attend(sparse_type="dense"), ValueError,
     'sparse_type must be one of "sta", "block_attn", "ssta", got \'dense\''),
    (lambda: attend(sampling_type=None), ValueError,
     'sampling_type must be one of "similarity", "importance", got None'),
    (lambda: attend(pad_type="mean"), ValueError,
     'pad_type must be one of "zero", "repeat", "exact", got \'mean\''),
    (lambda: attend(lambda_=0.7), ValueError,
     'lambda_ must be None where sampling_type is "similarity", got 0.7'),
    (lambda: attend(sampling_type="importance"), ValueError,
     'lambda_ must be from 0 to 1 where sampling_type is "importance", got None'),
    (lambda: attend(sampling_type="importance", lambda_=2), ValueError,
     'lambda_ must be from 0 to 1 where sampling_type is "importance", got 2'),
    (lambda: attend(sampling_type="importance", lambda_=0.7, threshold=0.5), NotImplementedError,
     'threshold must be 0 where sampling_type is "importance", whose scores are no probabilities, '
     "got 0.5"),
    (lambda: attend(threshold=1.5), ValueError, "threshold must be from 0 to 1, got 1.5"),
    (lambda: attend(topk=0), ValueError, "topk must be positive, got 0"),
    (lambda: attend(topk=1.5), TypeError, "topk must be an integer, got float"),
    (lambda: attend(thw=4), TypeError, f"thw must be {TRIPLE}, got int"),
    (lambda: attend(thw=(4, 4)), ValueError, f"thw must be {TRIPLE}, got 2"),
    (lambda: attend(tile_thw=(0, 4, 4)), ValueError, f"tile_thw must be {TRIPLE}, got [0, 4, 4]"),
    (lambda: attend(kernel_thw=(1, 0, 1)), ValueError,
     f"kernel_thw must be {TRIPLE}, got [1, 0, 1]"),
    (lambda: attend(adaptive_pool=(1, 0, 1)), ValueError,
     f"adaptive_pool must be {TRIPLE}, got [1, 0, 1]"),
    (lambda: attend(tile_thw=(1, 3, 4)), ValueError,
     "tile_thw must hold a multiple of 16 tokens, got (1, 3, 4)"),
    (lambda: attend(thw=(1, 4, 16), tile_thw=(2, 4, 4)), ValueError,
     "tile_thw must have 16, 64, 128, 384 tokens, or be of one frame, where thw is (1, 4, 16), "
     "got (2, 4, 4)"),
    (lambda: attend(text_len=6), ValueError,
     "q must be (batch, heads, sequence, head_dim) of 70 tokens, which thw and text_len need, "
     "got shape (1, 2, 69, 8)"),
    (lambda: attend(v=Q[:, :, 1:]), ValueError,
     "v must be (batch, heads, sequence, head_dim) of 69 tokens, which thw and text_len need, "
     "got shape (1, 2, 68, 8)"),
    (lambda: attend(k=Q.expand(2, -1, -1, -1)), ValueError,
     "k must have q's batch 1 and head_dim 8, got shape (2, 2, 69, 8)"),
    (lambda: attend(q=Q[:, :1]), ValueError,
     "q has 1 heads, which is no multiple of the 2 heads of k"),
    (lambda: attend(q=Q.int()), TypeError,
     "q is int32, but only float16, bfloat16, float32 and float64 are supported"),
    (lambda: attend(text_mask=[1]), TypeError, "text_mask must be a torch.Tensor, got list"),
    (lambda: attend(text_mask=torch.ones(1, 4)), ValueError,
     "text_mask must be (batch, text_len), here (1, 5), got shape (1, 4)"),
    (lambda: attend(text_mask=torch.ones(1, 5, device="meta")), ValueError,
     "text_mask is on meta, but q is on cpu"),
    (lambda: create_moba_3d_mask(Q[:, :, :63], Q, (4, 4, 4), 1, (1, 4, 4),
                                 sampling_type="similarity"), ValueError,
     "q must be (batch, heads, sequence, head_dim) of at least 4 tiles of 16 tokens, got shape "
     "(1, 2, 63, 8)"),
    (lambda: create_moba_3d_mask(Q, Q, (4, 4, 4), 1, (1, 4, 4), 4, padding="exact",
                                 sampling_type="similarity"), ValueError,
     "q must be (batch, heads, sequence, head_dim) of 68 tokens, which canvas_thw and text_len "
     "need, got shape (1, 2, 69, 8)"),
    (lambda: create_moba_3d_mask(Q, Q, (4, 4, 4), 1, (1, 4, 4), 5, padding="repeat",
                                 sampling_type="similarity"), ValueError,
     'padding must be one of "exact", "zero", got \'repeat\''),
    (lambda: tile(Q, (4, 4, 4), (1, 4, 4)), ValueError,
     "x must be (batch, heads, sequence, head_dim) of 64 tokens, which canvas_thw needs, got shape "
     "(1, 2, 69, 8)"),
    (lambda: tile(Q, (4, 4, 4), (3, 4, 4)), ValueError,
     "canvas_thw must be made of whole tiles of (3, 4, 4), got (4, 4, 4)"),
    (lambda: untile(Q, (4, 4, 4), (1, 4, 4), sp_size=3), ValueError,
     "sp_size must divide the 4 frames of canvas_thw, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message

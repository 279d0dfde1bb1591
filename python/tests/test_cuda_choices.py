"""Tiles chosen by our kernels on a GPU: as by torch, and as by the formulas; up to near-ties.

All of it needs a Hopper GPU; without one the tests are skipped and say why.
"""

import math

import pytest
import torch
from gpu import NEEDS_HOPPER, tensor
from ssta_choices import TIE, near_ties_of_settings

from flex_block_attn import direct, ssta_attention
from flex_block_attn.selection import importance, similarity
from flex_block_attn.ssta_attention import (
    create_moba_3d_mask,
    create_ssta_3d_mask,
    ssta_3d_attention,
)
from flex_block_attn.tiles import Canvas

pytestmark = NEEDS_HOPPER

SAMPLINGS = [
    {"sampling_type": "similarity"},
    {"sampling_type": "importance", "lambda_": 0.7},
]


@pytest.fixture
def by_kernels(monkeypatch):
    """Whether kernels of ours took each of the choices that were made."""
    taken, select = [], direct.select

    def watched(*arguments):
        mask = select(*arguments)
        taken.append(mask is not None)
        return mask

    monkeypatch.setattr(direct, "select", watched)
    return taken


def by_torch(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.setattr(direct, "select", lambda *_: None)
        return make()


def compare(got, expected, q, k, canvas, choice, padding):
    """Tiles that differ, each of which must be as good as one that is kept; and those chosen."""
    n = canvas.video_blocks
    assert got.shape == expected.shape
    assert torch.equal(got[:, :, n:], expected[:, :, n:])
    assert torch.equal(got[..., n:], expected[..., n:])
    pooled = ssta_attention._pooled(q, k, canvas, choice, padding)
    if choice.share:
        pooled = [x.mean(1, keepdim=True) for x in pooled]
    lambda_ = choice.lambda_
    scores = similarity(*pooled) if lambda_ is None else importance(*pooled, lambda_)
    differing = (got != expected)[:, :, :n, :n]
    last = scores.topk(min(choice.topk, n), dim=-1).values[..., -1:]
    gaps = (scores - last).abs() / scores.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert not (differing & (gaps > TIE[q.dtype])).any()
    return int(differing.sum()), scores.shape[0] * scores.shape[1] * n * min(choice.topk, n)


@pytest.mark.parametrize("padding", [None, "zero", "exact"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "thw, tile, text_len, head_dim, kv_heads, layout, dtype",
    [
        ((31, 45, 80), (6, 8, 8), 256, 128, 4, "tokens first", torch.bfloat16),
        ((7, 13, 50), (2, 4, 8), 100, 64, 2, "heads first", torch.float16),
        ((5, 30, 31), (3, 4, 4), 0, 128, 1, "together", torch.bfloat16),
        ((9, 64, 64), (1, 4, 8), 70, 64, 4, "tokens first", torch.float16),
    ],
)
def test_choices_are_torchs(
    thw, tile, text_len, head_dim, kv_heads, layout, dtype, sampling, share, padding,
    by_kernels, monkeypatch,
):  # fmt: skip
    canvas = Canvas.new(thw, tile, (3, 3, 3), text_len)
    tokens = canvas.places if padding is None else canvas.tokens
    generator = torch.Generator("cuda").manual_seed(text_len)
    q, k = (tensor((2, h, tokens, head_dim), layout, dtype, generator) for h in (4, kv_heads))
    settings = {**sampling, "mask_share_within_head": share, "padding": padding}
    text_mask = torch.rand(2, text_len, device="cuda", generator=generator) < 0.3

    def make():
        return (
            create_moba_3d_mask(q, k, thw, 20, tile, text_len, **settings),
            create_ssta_3d_mask(q, k, thw, 20, tile, (3, 3, 3), text_len, **settings),
            create_ssta_3d_mask(
                q, k, thw, 20, tile, (3, 3, 3), text_len, text_mask=text_mask, **settings
            ),
        )

    choice = ssta_attention._Choice.new(
        20, 0.0, sampling.get("lambda_"), share, sampling["sampling_type"], None
    )
    got = make()
    assert by_kernels == [True] * 3
    for one, other in zip(got, by_torch(monkeypatch, make), strict=True):
        ties, blocks = compare(one, other, q, k, canvas, choice, padding)
        print(f"{ties} near-ties in {blocks} chosen blocks")
        assert ties <= blocks / 200
    # The same again, to the last bit.
    assert all(torch.equal(a, b) for a, b in zip(got, make(), strict=True))


def test_choices_are_those_of_the_formulas(by_kernels):
    ties, blocks = near_ties_of_settings(100, "cuda", head_dim=64)
    assert ties <= blocks / 1000
    assert by_kernels.count(True) >= 100


def test_of_equal_scores_the_first_are_kept(by_kernels):
    """All tokens alike, and one tile of zeros, which has cosine 0 with everything."""
    q = torch.ones(1, 2, 40 * 16, 64, device="cuda", dtype=torch.bfloat16)
    sizes = (1, 1, 40 * 16), 3, (1, 1, 16)
    for sampling in SAMPLINGS:
        mask = create_moba_3d_mask(q, q, *sizes, **sampling)
        assert mask[..., :3].all() and not mask[..., 3:].any()
    k = q.clone()
    k[:, :, 16:32] = 0
    mask = create_moba_3d_mask(q, k, *sizes, sampling_type="similarity")
    assert mask[..., [0, 2, 3]].all() and mask.sum(-1).unique().tolist() == [3]
    # It is redundant with nothing, and like nothing.
    for lambda_, kept in ((0.1, [0, 1, 2]), (1.0, [0, 2, 3])):
        mask = create_moba_3d_mask(q, k, *sizes, sampling_type="importance", lambda_=lambda_)
        assert mask[..., kept].all() and mask.sum(-1).unique().tolist() == [3]
    assert all(by_kernels)


@pytest.mark.parametrize(
    "tiles, head_dim, dtype, settings",
    [
        (6145, 64, torch.bfloat16, {"sampling_type": "similarity"}),
        (50, 32, torch.bfloat16, {"sampling_type": "similarity"}),
        (50, 64, torch.float32, {"sampling_type": "similarity"}),
        (50, 64, torch.bfloat16, {"sampling_type": "similarity", "threshold": 0.5}),
        (50, 64, torch.bfloat16, {"sampling_type": "similarity", "adaptive_pool": (1, 1, 2)}),
    ],
)
def test_other_choices_are_left_to_torch(tiles, head_dim, dtype, settings, by_kernels):
    q, k = torch.randn(2, 1, 1, tiles * 16, head_dim, device="cuda", dtype=dtype).unbind()
    mask = create_moba_3d_mask(q, k, (1, 1, tiles * 16), 9, (1, 1, 16), **settings)
    assert mask.shape == (1, 1, tiles, tiles) and mask.any(-1).all()
    assert not any(by_kernels)


def test_compiled_calls_are_left_to_torch(by_kernels):
    thw, text_len = (4, 8, 16), 16
    q, k, v = torch.randn(3, 1, 2, math.prod(thw) + text_len, 64, device="cuda").bfloat16()

    def attend(q, k, v):
        return ssta_3d_attention(
            q, k, v, thw, 2, (2, 8, 8), (1, 1, 1), text_len, sampling_type="importance", lambda_=0.7
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, _ = compiled(q, k, v)
    assert not any(by_kernels)
    expected, _ = attend(q, k, v)
    assert by_kernels[-1]
    torch.testing.assert_close(out, expected)

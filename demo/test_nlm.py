"""The attention is non-local means: against sums over distances, written out in float64.

In: a few small crops of noise over a pattern. Out: pytest's verdict, in seconds. The attention is a
softmax written out here, so the file runs without the library; with it, its results are compared
as well, under each of the demo's masks. Run by `pytest demo`.
"""

import pytest
import torch

from demo import nlm

SIGMA = 25 / 255
GRID = nlm.Grid(4, 64, 32)
"""1 x 4 x 2 tiles: enough for both sparse masks to leave out some blocks."""
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"
"""Distances as they are defined, where torch would else take the detour that is to be tested."""


@pytest.fixture(scope="module")
def noisy() -> torch.Tensor:
    """A moving pattern with noise."""
    t, y, x = torch.meshgrid(
        *(torch.arange(float(n)) for n in (GRID.frames, GRID.height, GRID.width)), indexing="ij"
    )
    colours = [torch.sin((x + t) / 3 + c) * torch.cos(y / (4 + c)) for c in range(3)]
    generator = torch.Generator().manual_seed(1)
    clean = 0.5 + 0.4 * torch.stack(colours, dim=-1)
    return clean + SIGMA * torch.randn(clean.shape, generator=generator)


def softmax_attention(problem: nlm.Problem):
    """Attention as its formula says."""
    scores = problem.scale * problem.q.double() @ problem.k.double().mT
    out = torch.softmax(scores, dim=-1) @ problem.v.double()
    return out.to(problem.v.dtype), torch.logsumexp(scores, dim=-1)


def direct(noisy: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Non-local means by its definition, in raster order: no products, no softmax, no lse."""
    noisy = noisy.double()
    features, patches = nlm.cut_patches(nlm.smooth(noisy)), nlm.cut_patches(noisy)
    # Smoothing by (1, 2, 1) / 4 both ways leaves (6 / 16)^2 of the noise's variance.
    gap = 2 * (SIGMA * 6 / 16) ** 2 * features.shape[1]
    squares = torch.cdist(features, features, compute_mode=BY_DIFFERENCES).square()
    squares.fill_diagonal_(gap)
    weights = torch.exp(-squares / (nlm.STRENGTH * gap))
    if allowed is not None:
        weights = weights * allowed
    return nlm.join_patches(weights @ patches / weights.sum(1, keepdim=True), GRID)


def test_patches_join_to_the_video_they_were_cut_from(noisy):
    torch.testing.assert_close(nlm.join_patches(nlm.cut_patches(noisy), GRID), noisy)


def test_a_tile_is_a_box_of_the_video():
    order = GRID.order()
    assert torch.equal(order.sort().values, torch.arange(GRID.tokens))
    frames, rows, columns = GRID.shape
    for tile in order.reshape(-1, GRID.tile_tokens):
        t, y, x = tile // (rows * columns), tile // columns % rows, tile % columns
        spans = tuple(int(axis.max() - axis.min()) + 1 for axis in (t, y, x))
        assert spans == GRID.tile


def test_attention_is_non_local_means(noisy):
    problem = nlm.pose(noisy, SIGMA, GRID)
    result = nlm.finish(problem, GRID, *softmax_attention(problem))
    torch.testing.assert_close(result.double(), direct(noisy), atol=2e-5, rtol=0)


def test_weights_survive_bfloat16(noisy):
    exact = nlm.pose(noisy, SIGMA, GRID)
    rounded = nlm.pose(noisy, SIGMA, GRID, torch.bfloat16)
    weights = [p.scale * (p.q.double() @ p.k.double().mT) for p in (exact, rounded)]
    # A score's error is a weight's relative error.
    assert (weights[0].softmax(-1) - weights[1].softmax(-1)).abs().max() < 0.05
    result = nlm.finish(rounded, GRID, *softmax_attention(rounded))
    assert (result.double() - direct(noisy)).square().mean().sqrt() < 0.004


@pytest.mark.parametrize("name", ["dense", "window", "sta", "moba", "ssta"])
def test_the_library_agrees(noisy, name):
    pytest.importorskip("flex_block_attn")
    pytest.importorskip("tqdm")
    pytest.importorskip("PIL")
    from demo import denoise

    problem = nlm.pose(noisy, SIGMA, GRID)
    mask = denoise.make_masks(GRID, problem)[name]
    tokens = mask.to_dense()[0, 0]
    assert bool(tokens.all()) == (name == "dense")
    order = GRID.order()
    raster = torch.empty_like(tokens)
    raster[order[:, None], order[None, :]] = tokens

    result = nlm.finish(problem, GRID, *denoise.attend(name, mask, problem))
    torch.testing.assert_close(result.double(), direct(noisy, raster), atol=1e-4, rtol=0)

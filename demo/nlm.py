"""Non-local means as attention.

In: a noisy video [frames, height, width, 3], from which `pose` makes tensors q, k, v
[1, 1, tokens, head_dim]; then what an exact attention makes of those, from which `finish` makes the
denoised video.
Called by `denoise.py`, which brings the attention (dense or block-sparse), and by `test_nlm.py`.

The algorithm is that of A. Buades, B. Coll, J.-M. Morel, "A non-local algorithm for image
denoising" (CVPR 2005): a patch of the video is replaced by a mean over patches j of the whole
video, each weighed by how alike the two look,

    estimate_i = sum_j w_ij patch_j / sum_j w_ij        w_ij = exp(-|f_i - f_j|^2 / h^2).

Noise differs from patch to patch and averages out; what the patches share stays. Attention
computes the same thing. Since |f_i - f_j|^2 = |f_i|^2 - 2 f_i.f_j + |f_j|^2, and since a softmax
over j does not see the first term, which is the same for every j,

    estimate = softmax(scale * (f_i.f_j - |f_j|^2 / 2)) patches        scale = 2 / h^2,

and the term in |f_j|^2 becomes part of the product by one more feature: 1 in q, -|f_j|^2 / 2 in k.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PATCH = 4
"""Side of a patch in pixels: 4 * 4 pixels of 3 colours are 48 numbers. Patches of 5 or more were
no better on the default clip, and cost more."""

STRIDE = 2
"""Pixels from one patch to the next. Patches of 4 at stride 2 overlap, so each pixel is estimated
by 4 patches, and a token stands for 4 pixels: attention costs a sixteenth of what it would at
stride 1."""

STRENGTH = 0.3
"""h^2, as a share of the squared distance that noise alone puts between two equal patches. Less
keeps noise, more blurs: tuned once, on the default clip."""

BEFORE = (PATCH - STRIDE) // 2
AFTER = PATCH - STRIDE - BEFORE
"""How far a patch reaches out before and behind its square of STRIDE by STRIDE pixels."""

SMOOTHING = torch.tensor([1.0, 2.0, 1.0]) / 4
"""The filter, along rows and along columns, of the copy in which patches are compared."""


@dataclass(frozen=True)
class Grid:
    """Where tokens sit in the video, and the order in which attention gets them.

    Tokens are grouped into tiles, boxes of (frames, rows, columns) of tokens, and a tile's tokens
    stand together: a block of attention then is a box of video that meets another box.
    """

    frames: int
    height: int
    width: int
    tile: tuple[int, int, int] = (4, 8, 8)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.frames, self.height // STRIDE, self.width // STRIDE

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles along time, height and width."""
        return tuple(tokens // side for tokens, side in zip(self.shape, self.tile))

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.tile[0] * self.tile[1] * self.tile[2]

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def order(self) -> torch.Tensor:
        """The raster index (time, row, column) of each token, in tile order."""
        (t, h, w), (tt, th, tw) = self.tiles, self.tile
        raster = torch.arange(self.tokens).reshape(t, tt, h, th, w, tw)
        return raster.permute(0, 2, 4, 1, 3, 5).reshape(-1)


def cut_patches(video: torch.Tensor) -> torch.Tensor:
    """Every patch of the video, flattened: [tokens, 48] in raster order.

    There is one for each square of STRIDE by STRIDE pixels, which is its middle; the border is
    mirrored.
    """
    padded = F.pad(video.permute(0, 3, 1, 2), (BEFORE, AFTER, BEFORE, AFTER), mode="reflect")
    patches = padded.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH * PATCH)


def join_patches(patches: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The video in which each pixel is the mean of what all patches over it say.

    Patches as `cut_patches` makes them; undoes it when nothing was changed.
    """
    frames, rows, columns = grid.shape
    canvas = ((rows - 1) * STRIDE + PATCH, (columns - 1) * STRIDE + PATCH)
    stacked = patches.reshape(frames, rows * columns, -1).transpose(1, 2)
    total = F.fold(stacked, canvas, PATCH, stride=STRIDE)
    count = F.fold(torch.ones_like(stacked[:1]), canvas, PATCH, stride=STRIDE)
    inside = (total / count)[:, :, BEFORE : BEFORE + grid.height, BEFORE : BEFORE + grid.width]
    return inside.permute(0, 2, 3, 1)


def smooth(video: torch.Tensor) -> torch.Tensor:
    """The video after SMOOTHING along rows and columns of each frame."""
    size = len(SMOOTHING)
    kernel = torch.outer(SMOOTHING, SMOOTHING).to(video).expand(3, 1, size, size)
    padded = F.pad(video.permute(0, 3, 1, 2), (size // 2,) * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=3).permute(0, 2, 3, 1)


@dataclass
class Problem:
    """Denoising, put as an attention. Tensors are [1, 1, tokens, head_dim] in tile order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    self_weight: float
    """The weight that a patch shall have in its own estimate, where equal patches have 1."""
    mean: float
    """What was subtracted from the pixels in v."""


def pose(noisy: torch.Tensor, sigma: float, grid: Grid, dtype=torch.float32) -> Problem:
    """Queries, keys and values of a noisy video.

    Features f are the patches of a lightly smoothed copy: smoothing leaves 14 % of the noise's
    variance and most of the picture, so that distances tell patches apart by what they show.
    Values are the patches of the noisy video itself, whole: v needs q's head_dim anyway, and a
    patch for an answer gives each pixel several estimates to average where its centre alone
    would give one.
    """
    order = grid.order()
    features = cut_patches(smooth(noisy))[order]
    # Distances do not change when all features move together, and small numbers round less.
    features = (features - features.mean(0)).to(dtype)
    mean = float(noisy.mean())
    values = (cut_patches(noisy)[order] - mean).to(dtype)

    # -|f|^2 / 2 as what fits `dtype` and what that leaves: in bfloat16, with 8 bits, the first
    # part alone would be off by more than the distances that matter.
    half_square = -features.to(noisy.dtype).square().sum(1, keepdim=True) / 2
    high = half_square.to(dtype)
    low = (half_square - high.to(noisy.dtype)).to(dtype)
    one = torch.ones_like(high)

    # Two patches that show the same lie |f_i - f_j|^2 = `gap` apart, on average, for noise alone.
    noise = sigma**2 * float(SMOOTHING.square().sum()) ** 2
    gap = 2 * noise * features.shape[1]
    h_squared = STRENGTH * gap

    # Zeros add nothing to a product; whole multiples of 16 are what vector units like best.
    head_dim = -(-(features.shape[1] + 2) // 16) * 16

    def tensor(*columns: torch.Tensor) -> torch.Tensor:
        joined = torch.cat(columns, dim=1)
        return F.pad(joined, (0, head_dim - joined.shape[1]))[None, None]

    return Problem(
        q=tensor(features, one, one),
        k=tensor(features, high, low),
        v=tensor(values),
        scale=2 / h_squared,
        self_weight=float(torch.exp(torch.tensor(-gap / h_squared))),
        mean=mean,
    )


def reweigh_self(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The estimates, each patch's own part brought down to the weight of its equals.

    A patch is at distance 0 from itself, but its equals are at `gap`, as their noise differs: left
    alone it outweighs them all and its noise stays. Its share of the softmax is known from `lse`,
    so it is put right afterwards: with share s and weights 1 (had) and w (wanted),

        out = s v_i + (1 - s) others    ->    (out - c v_i) / (1 - c)    with c = s (1 - w).

    As s <= 1, the divisor is w at least, and no rounding error grows by more than 1 / w. The mask
    must let each token see itself.
    """
    q, k, v, out = (x.float() for x in (problem.q, problem.k, problem.v, out))
    share = torch.exp(problem.scale * (q * k).sum(-1) - lse.float()).clamp(max=1)
    excess = (share * (1 - problem.self_weight))[..., None]
    return (out - excess * v) / (1 - excess)


def finish(problem: Problem, grid: Grid, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The denoised video, on the CPU: the self-match put right, patches joined.

    `out` is softmax(scale q k^T) v, `lse` the logarithm of the sum that this softmax divides by,
    [1, 1, tokens].
    """
    estimates = reweigh_self(problem, out, lse)[0, 0, :, : 3 * PATCH * PATCH].cpu()
    raster = torch.empty_like(estimates)
    raster[grid.order()] = estimates
    return join_patches(raster, grid) + problem.mean

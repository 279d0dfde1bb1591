"""Attention over the tiles of a video, written out over places. In: tensors, sizes, a mask of
tiles.
Out: the output, in float64, differentiable. Shares no code with the package.
"""

import itertools
import math

import torch
from torch import Tensor


def places(thw, tile, text_len: int, padding: str) -> list[tuple[int | None, int, bool]]:
    """For each place of each block: the token there, or None for zeros; its block; whether it is a
    copy. Of "exact" padding, tokens alone."""
    counts = [-(-n // side) for n, side in zip(thw, tile, strict=True)]
    found = []
    for block, corner in enumerate(itertools.product(*map(range, counts))):
        for inner in itertools.product(*map(range, tile)):
            t, h, w = (c * side + i for c, side, i in zip(corner, tile, inner, strict=True))
            if t < thw[0] and h < thw[1] and w < thw[2]:
                found.append(((t * thw[1] + h) * thw[2] + w, block, False))
            elif padding == "zero":
                found.append((None, block, False))
    video, blocks, size = math.prod(thw), math.prod(counts), math.prod(tile)
    text = -(-text_len // size) * size if padding == "zero" else text_len
    for i in range(text):
        found.append((video + min(i, text_len - 1), blocks + i // size, i >= text_len))
    return found


def video_attention(
    q: Tensor, k: Tensor, v: Tensor, thw, tile, mask: Tensor, text_len: int, padding: str, scale
) -> Tensor:
    """``mask`` is (batch or 1, heads or 1, blocks, blocks)."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    all_places = places(thw, tile, text_len, padding)
    tokens = torch.tensor([-1 if token is None else token for token, _, _ in all_places])
    blocks = torch.tensor([block for _, block, _ in all_places])
    own = torch.zeros(q.shape[2], dtype=torch.long)
    for token, block, is_copy in all_places:
        if token is not None and not is_copy:
            own[token] = block
    zeros = (tokens >= 0)[:, None]
    k, v = (x[:, :, tokens.clamp(min=0)] * zeros for x in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seen = mask[:, :, own][..., blocks]
    scores = (scale * q @ k.mT).masked_fill(~seen, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v

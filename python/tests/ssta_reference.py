"""Tiles, masks and attention of video models, written out from the formulas, one number at a time.

In: numpy float64 arrays and sizes. Out: the same. What ``test_ssta.py`` compares the package with;
shares no code with it. Sources are those of ``flex_block_attn.ssta_attention``.
"""

import itertools
import math

import numpy as np
import torch


def padded(thw, tile):
    """The canvas in whole tiles."""
    return [-(-n // side) * side for n, side in zip(thw, tile, strict=True)]


def tile_tokens(thw, tile):
    """For each tile its tokens' places (t, h, w), in order; places may lie outside of thw."""
    counts = [n // side for n, side in zip(padded(thw, tile), tile, strict=True)]
    for corner in itertools.product(*map(range, counts)):
        inner = itertools.product(*map(range, tile))
        yield [
            tuple(c * side + i for c, side, i in zip(corner, tile, place, strict=True))
            for place in inner
        ]


def to_tiles(x, thw, tile, text_len, pad_type):
    """One head's tokens (sequence, head_dim) in tile order, padded, text behind."""
    rows = []
    for places in tile_tokens(thw, tile):
        for place in places:
            inside = all(at < n for at, n in zip(place, thw, strict=True))
            t, h, w = (min(at, n - 1) for at, n in zip(place, thw, strict=True))
            row = x[(t * thw[1] + h) * thw[2] + w]
            rows.append(row if inside or pad_type == "repeat" else np.zeros_like(row))
    text = list(x[math.prod(thw) : math.prod(thw) + text_len])
    while len(text) % math.prod(tile):
        text.append(text[-1])
    return np.array(rows + text).reshape(-1, x.shape[1])


def from_tiles(x, thw, tile, text_len):
    """What undoes ``to_tiles``."""
    rows = {}
    order = [place for places in tile_tokens(thw, tile) for place in places]
    for place, row in zip(order, x, strict=False):
        rows[place] = row
    video = [rows[place] for place in itertools.product(*map(range, thw))]
    return np.array(video + list(x[len(order) : len(order) + text_len]))


def round_to(x, dtype):
    """Rounded to a torch dtype."""
    return torch.from_numpy(np.asarray(x)).to(dtype).double().numpy()


def pooled(x, thw, tile, dtype, cells, padding="zero"):
    """One head's tiled tokens: for each tile its cells' means side by side, rounded to dtype. With
    "exact" padding the means are of places in the video."""
    block = math.prod(tile)
    result = []
    for number, places in enumerate(tile_tokens(thw, tile)):
        tokens = x[number * block : (number + 1) * block].reshape(*tile, -1)
        seen = [padding == "zero" or all(at < n for at, n in zip(p, thw)) for p in places]
        seen = np.array(seen).reshape(tile)
        features = []
        for cell in itertools.product(*map(range, cells)):
            t, h, w = (
                slice(math.floor(i * n / p), math.ceil((i + 1) * n / p))
                for i, n, p in zip(cell, tile, cells, strict=True)
            )
            features.append(tokens[t, h, w][seen[t, h, w]].mean(0))
        result.append(np.concatenate(features))
    return round_to(np.array(result), dtype)


def sta_mask(thw, tile, window, text_blocks):
    """Sliding tiles, and text that sees and is seen by all."""
    counts = [n // side for n, side in zip(padded(thw, tile), tile, strict=True)]
    tiles = list(itertools.product(*map(range, counts)))
    total = len(tiles) + text_blocks
    mask = np.ones((total, total), dtype=bool)
    for (row, i), (column, j) in itertools.product(enumerate(tiles), repeat=2):
        for axis, n in enumerate(counts):
            half = window[axis] // 2
            centre = min(max(i[axis], half), n - 1 - half)
            if abs(centre - j[axis]) > half:
                mask[row, column] = False
    return mask


def cosine(a, b):
    """0 where one of them is 0."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 0 else 0.0


def scores_of(q, k, lambda_):
    """Scores of one head's pooled tiles: similarity, or importance where lambda_ is given."""
    n = len(q)
    if lambda_ is None:
        return np.array([[float(a @ b) for b in k] for a in q])
    redundancy = [
        np.mean([(cosine(k[other], k[j]) + 1) / 2 for other in range(n) if other != j] or [0.0])
        for j in range(n)
    ]
    return np.array(
        [
            [
                lambda_ * (cosine(q[i], k[j]) + 1) / 2 - (1 - lambda_) * redundancy[j]
                for j in range(n)
            ]
            for i in range(n)
        ]
    )


def counts_of(scores, topk, threshold):
    """How many tiles each row keeps."""
    n = len(scores)
    topk = min(topk, n)
    if threshold == 0:
        return [topk] * n
    counts = []
    for row in scores:
        p = np.exp((row - row.max()) / 0.01)
        mass = np.cumsum(np.sort(p / p.sum())[::-1])
        reached = np.flatnonzero(mass >= threshold)
        count = int(reached[0]) + 1 if len(reached) else topk
        counts.append(min(max(count, 8), topk))
    return counts


def chosen(scores, counts):
    """The best of each row."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row, (values, count) in enumerate(zip(scores, counts, strict=True)):
        for column in sorted(range(len(values)), key=lambda j: -values[j])[:count]:
            mask[row, column] = True
    return mask


def with_text(mask, text_blocks):
    """The mask of tiles, and text that sees and is seen by all."""
    n = len(mask)
    result = np.ones((n + text_blocks, n + text_blocks), dtype=bool)
    result[:n, :n] = mask
    return result


def without_padded_text(mask, video_blocks, valid, block):
    """Blocks behind the last valid text see themselves, and are seen by nobody else."""
    first = video_blocks + max(1, math.ceil(valid / block))
    mask = mask.copy()
    for row, column in itertools.product(range(len(mask)), repeat=2):
        if row >= first or column >= first:
            mask[row, column] = row == column
    return mask


def attention(q, k, v, mask, block):
    """One head's softmax attention over the mask of blocks."""
    tokens = mask.repeat(block, axis=0).repeat(block, axis=1)
    scores = np.where(tokens, q @ k.T / math.sqrt(q.shape[1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ v / weights.sum(axis=1, keepdims=True)

"""Masks of chosen tiles beside the formulas of ``ssta_reference.py``. In: sizes and how tiles are
chosen. Out: near-ties, counted; anything else that differs raises.

Used by ``test_ssta.py`` and, on GPUs, by ``test_cuda.py`` and ``test_cuda_choices.py``. Where two
tiles' scores differ by less than rounding leaves certain, either may be taken: such near-ties are
counted, and must be few.
"""

import math

import numpy as np
import ssta_reference as reference
import torch

from flex_block_attn.ssta_attention import (
    create_moba_3d_mask,
    create_ssta_3d_mask,
    create_sta_3d_mask,
)

TILES = [(1, 4, 4), (2, 2, 4), (2, 4, 4), (1, 1, 16), (4, 4, 3), (2, 8, 1)]
# Score differences, relative to the row's largest score, that sums in another order may make: a
# mean may be rounded to the next number of its dtype.
TIE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def in_order(sizes):
    """thw, tile_thw, kernel_thw and text_len."""
    return tuple(sizes[name] for name in ("thw", "tile_thw", "kernel_thw", "text_len"))


def without_topk(choice):
    return {name: value for name, value in choice.items() if name != "topk"}


def random_tokens(sizes, batch, heads, head_dim, dtype):
    """q, k and v in (t, h, w) order with text behind; scaled so that choices by mass differ."""
    tokens = math.prod(sizes["thw"]) + sizes["text_len"]
    return [torch.randn(batch, heads, tokens, head_dim).mul(0.5).to(dtype) for _ in "qkv"]


def tiled(x, sizes, pad_type="zero"):
    """Each head of a tensor as the reference tiles it: float64 (batch, heads, places, head_dim)."""
    names = "thw", "tile_thw", "text_len"
    settings = [*(sizes[name] for name in names), pad_type]
    return np.array(
        [[reference.to_tiles(head, *settings) for head in one] for one in x.double().numpy()]
    )


def reference_choice(q, k, sizes, choice, dtype, padding="zero"):
    """Tiles chosen for tiled q and k: mask, scores and counts of each batch and head. With "exact"
    padding a tile's mean is that of its tokens."""
    cells = choice["adaptive_pool"] or (1, 1, 1)
    if choice.get("threshold", 0) > 0:
        cells = (2, 2, 2)
    result = []
    for one_q, one_k in zip(q, k, strict=True):
        pools = [
            [reference.pooled(x, sizes["thw"], sizes["tile_thw"], dtype, cells, padding) for x in y]
            for y in (one_q, one_k)
        ]
        if choice["mask_share_within_head"]:
            pools = [[np.mean(x, axis=0)] for x in pools]
        for head_q, head_k in zip(*pools, strict=True):
            scores = reference.scores_of(head_q, head_k, choice.get("lambda_"))
            counts = reference.counts_of(scores, choice["topk"], choice.get("threshold", 0))
            result.append((reference.chosen(scores, counts), scores, counts))
    return result


def near_ties(got, expected, scores, counts, tie):
    """Blocks that differ; each must be within `tie` of the last that is kept, or, where the number
    of kept blocks depends on scores, be the last."""
    differing = got != expected
    for row in np.flatnonzero(differing.any(1)):
        order = np.sort(scores[row])[::-1]
        scale = max(np.abs(scores[row]).max(), 1e-30)
        last, count = order[counts[row] - 1], int(got[row].sum())
        assert abs(count - counts[row]) <= 1, f"row {row} keeps {count}, not {counts[row]}"
        gaps = np.abs(scores[row][differing[row]] - last) / scale
        assert count != counts[row] or gaps.max() < tie, f"row {row}: {gaps.max()} apart"
    return int(differing.sum())


def compare_choice(got, expected, tie):
    """Sum of near-ties over the video part of masks (batch, heads, tiles, tiles)."""
    flat = got.flatten(0, 1).numpy()
    assert len(flat) == len(expected)
    return sum(near_ties(one, *other, tie) for one, other in zip(flat, expected, strict=True))


def compare_masks(q, k, sizes, choice, device, paddings=(None, "zero", "exact")):
    """Near-ties and chosen blocks of the masks of q and k, in (t, h, w) order on the host: made on
    the device of tiles and of tokens as they lie."""
    thw, tile_thw, window, text_len = in_order(sizes)
    places = [tiled(x, sizes) for x in (q, k)]
    text_blocks = -(-text_len // math.prod(tile_thw))
    sliding = torch.from_numpy(reference.sta_mask(thw, tile_thw, window, text_blocks))
    assert torch.equal(create_sta_3d_mask(*in_order(sizes), device=device).cpu(), sliding)
    ties = blocks = 0
    for padding in paddings:
        expected = reference_choice(*places, sizes, choice, q.dtype, padding or "zero")
        given = [torch.from_numpy(x).to(q.dtype) for x in places] if padding is None else [q, k]
        given = [x.to(device) for x in given]
        settings = {**without_topk(choice), "padding": padding}
        chosen = create_moba_3d_mask(*given, thw, choice["topk"], tile_thw, text_len, **settings)
        both = create_ssta_3d_mask(
            *given, thw, choice["topk"], tile_thw, window, text_len, **settings
        )
        assert chosen.device.type == both.device.type == torch.device(device).type
        chosen, both = chosen.cpu(), both.cpu()
        n = len(expected[0][0])
        ties += compare_choice(chosen[:, :, :n, :n], expected, TIE[q.dtype])
        blocks += sum(int(mask.sum()) for mask, _, _ in expected)
        assert chosen[:, :, n:].all() and chosen[..., n:].all()
        assert torch.equal(both, chosen | sliding)
    return ties, blocks


def random_settings(seed):
    """Sizes and a choice as models have them."""
    numbers = np.random.default_rng(seed)
    sizes = {
        "thw": tuple(int(n) for n in numbers.integers(3, 9, 3)),
        "tile_thw": TILES[numbers.integers(len(TILES))],
        "kernel_thw": tuple(int(n) for n in numbers.integers(1, 4, 3)),
        "text_len": int(numbers.integers(0, 40)),
    }
    kinds = [
        {"sampling_type": "similarity"},
        {"sampling_type": "importance", "lambda_": 0.7},
        {"sampling_type": "similarity", "threshold": 0.9},
        {"sampling_type": "importance", "lambda_": 0.7, "adaptive_pool": (2, 2, 1)},
    ]
    choice = {
        "topk": int(numbers.integers(1, 20)),
        "mask_share_within_head": bool(numbers.integers(2)),
        "adaptive_pool": None,
        **kinds[seed % len(kinds)],
    }
    return sizes, choice


def near_ties_of_settings(count, device, head_dim=16):
    """Of all blocks that are chosen in so many random settings, how many are near-ties, and how
    many there are."""
    ties = blocks = 0
    for seed in range(count):
        torch.manual_seed(seed)
        sizes, choice = random_settings(seed)
        q, k, _ = random_tokens(sizes, 1, 2, head_dim, torch.bfloat16)
        # Cells count padding as zeros either way.
        has_cells = choice["adaptive_pool"] or "threshold" in choice
        paddings = (None, "zero") if has_cells else (None, "zero", "exact")
        more = compare_masks(q, k, sizes, choice, device, paddings)
        ties, blocks = ties + more[0], blocks + more[1]
    print(f"{ties} near-ties in {blocks} chosen blocks of {count} settings, {device}")
    return ties, blocks

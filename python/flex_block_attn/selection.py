"""Choosing blocks by what tokens hold: pooling, scores, and keeping the best. In: tensors of
tokens. Out: pooled tensors, scores, mask tensors for :func:`flex_block_attn_func`.

Called by :mod:`.ssta_attention` and :mod:`.moba`, and by users who build a selection of their own
(``examples/`` has two). Everything is torch over all batches and heads at once, runs wherever the
tensors are and waits for nothing, so that it can be captured in a CUDA graph. Nothing is
differentiable: a choice of blocks has no gradient.

Cost on a GPU: :func:`block_means` reads its tensor once and is all that matters; scores and masks
are a thousandth of the tokens. Where our kernels take a choice of a video's tiles, nothing of this
is called for it: see ``launch.select``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.01
"""Divisor of scores before the softmax of :func:`keep_mass`, as released checkpoints have it."""

LEAST_BLOCKS = 8
"""Blocks that :func:`keep_mass` keeps at least, as released checkpoints have it."""


@torch.no_grad()
def block_means(x: Tensor, block_size: int) -> Tensor:
    """The mean token of each block.

    Args:
        x: tokens, (batch, heads, sequence, head_dim).
        block_size: tokens of a block; the last block's mean is over the tokens that there are.

    Returns:
        float32 (batch, heads, blocks, head_dim). Sums are of x's own accumulator (float32 for
        16-bit types), and the mean is rounded to x's dtype before it becomes float32: models were
        trained so, and a choice among close scores depends on it.
    """
    whole = x.shape[2] // block_size
    end = whole * block_size
    means = x[:, :, :end].unflatten(2, (whole, block_size)).mean(3)
    if end < x.shape[2]:
        means = torch.cat([means, x[:, :, end:].mean(2, keepdim=True)], dim=2)
    return means.float()


@torch.no_grad()
def tile_means(
    x: Tensor, tile_thw: tuple[int, int, int], cells_thw: tuple[int, int, int]
) -> Tensor:
    """Several means of each tile, one for each of its cells, side by side.

    Args:
        x: tokens in tile order, (batch, heads, tiles * tokens of a tile, head_dim).
        tile_thw: the tile's tokens along (time, height, width).
        cells_thw: cells of a tile along each axis. As in adaptive pooling, cell i of p on an axis
            of n tokens covers tokens ``floor(i n / p)`` to ``ceil((i + 1) n / p)``.

    Returns:
        float32 (batch, heads, tiles, cells * head_dim), rounded to x's dtype before.
    """
    x = x.unflatten(2, (-1, *tile_thw))
    if all(tokens % cells == 0 for tokens, cells in zip(tile_thw, cells_thw, strict=True)):
        # Cells that part a tile evenly: one pass. From the last axis, for dimensions stay put.
        for axis in (5, 4, 3):
            x = x.unflatten(axis, (cells_thw[axis - 3], -1))
        return x.mean((4, 6, 8)).flatten(3).float()
    # A cell's mean is the mean along one axis of the means along the others. Only the last of
    # them is rounded.
    means = x
    for axis, cells in enumerate(cells_thw, start=3):
        tokens = x.shape[axis]
        edges = [(i * tokens // cells, -(-(i + 1) * tokens // cells)) for i in range(cells)]
        parts = [
            means.narrow(axis, first, last - first).mean(axis, dtype=torch.float32)
            for first, last in edges
        ]
        means = torch.stack(parts, dim=axis)
    return means.to(x.dtype).flatten(3).float()


@torch.no_grad()
def similarity(q: Tensor, k: Tensor) -> Tensor:
    """Products of pooled queries and keys, neither scaled nor normalised.

    Args:
        q: pooled queries, float32 (batch, q_heads, q_blocks, features).
        k: pooled keys, float32 (batch, kv_heads, kv_blocks, features); kv_heads divides q_heads.

    Returns:
        float32 (batch, q_heads, q_blocks, kv_blocks).
    """
    return q @ _for_heads_of(q, k).mT


@torch.no_grad()
def importance(q: Tensor, k: Tensor, lambda_: float) -> Tensor:
    """``lambda_ * relevance - (1 - lambda_) * redundancy``: blocks like the query rank high, blocks
    like all other blocks rank low.

    Relevance is the cosine of pooled query and key, redundancy the mean cosine of a key and all
    other keys. The latter needs no keys x keys matrix: the sum of a key's cosines is its product
    with the sum of the normalised keys. (The method's own scores map cosines from -1..1 to 0..1;
    it shifts a row by a constant and halves it, which ranks alike and is left out.) A block whose
    mean is 0 has cosine 0 with everything.

    Args:
        q, k: as for :func:`similarity`.
        lambda_: weight of the relevance, from 0 to 1.

    Returns:
        float32 (batch, q_heads, q_blocks, kv_blocks).
    """
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    others = k.sum(-2, keepdim=True) - k
    redundancy = (k * others).sum(-1) / max(k.shape[2] - 1, 1)
    k, redundancy = _for_heads_of(q, k), _for_heads_of(q, redundancy)
    scores = torch.baddbmm(
        redundancy.flatten(0, 1).unsqueeze(1),
        q.flatten(0, 1),
        k.flatten(0, 1).mT,
        beta=lambda_ - 1,
        alpha=lambda_,
    )
    return scores.unflatten(0, q.shape[:2])


@torch.no_grad()
def keep_top(scores: Tensor, count: int, into: Tensor | None = None) -> Tensor:
    """In each row the ``count`` blocks of the highest scores; all if there are no more.

    Args:
        scores: (..., q_blocks, kv_blocks).
        count: blocks that a row keeps, at least 1. Of equal scores, any may be taken.
        into: a bool tensor of scores' shape to add them to, in place; a new one if not given.

    Returns:
        bool, of scores' shape.
    """
    best = scores.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).indices
    return _new_or(into, scores).scatter_(-1, best, True)


@torch.no_grad()
def keep_mass(scores: Tensor, mass: float, most: int, into: Tensor | None = None) -> Tensor:
    """In each row the fewest best blocks whose softmax adds up to ``mass``.

    Args:
        scores: (..., q_blocks, kv_blocks); their softmax is of ``scores / TEMPERATURE``.
        mass: what the kept blocks' probabilities reach together.
        most: blocks that a row keeps at most, at least 1. It keeps LEAST_BLOCKS at least, except
            where that is more than ``most``, or than there are.
        into: as for :func:`keep_top`.

    Returns:
        bool, of scores' shape.
    """
    scores = scores / TEMPERATURE
    best, order = scores.topk(min(most, scores.shape[-1]), dim=-1, sorted=True)
    reached = (best - scores.logsumexp(-1, keepdim=True)).exp().cumsum(-1) >= mass
    # The block that reaches the mass is kept, those behind it are not.
    enough = reached[..., :-1]
    kept = torch.cat([torch.zeros_like(reached[..., :1]), enough], dim=-1).logical_not()
    kept[..., :LEAST_BLOCKS] = True
    # A row's number of indices is the same for all: what is not kept repeats the best.
    return _new_or(into, scores).scatter_(-1, torch.where(kept, order, order[..., :1]), True)


def _new_or(into: Tensor | None, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool) if into is None else into


def _for_heads_of(q: Tensor, x: Tensor) -> Tensor:
    """Something of k's heads, each repeated for the heads of q that share it."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)

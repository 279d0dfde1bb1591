"""Ulysses: each rank has a part of the sequence, and computes all of it for a part of the heads.

In: q, k and v of this rank's tokens. Out: the output of the same tokens. Called by users and, with
another attention inside, by :mod:`.grid`.

Two all-to-alls, DeepSpeed-Ulysses (arXiv 2309.14509): before the attention heads go to the rank
that computes them, after it tokens go back to the rank that holds them. Heads need not divide by
the ranks, nor tokens; no more ranks than heads have something to compute.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ..api import as_inputs, default_scale, flex_block_attn
from ..masks import BlockMask, as_size
from .cut import check_extents, mask_of_heads
from .exchange import exchanged, place_in

# (q, k, v, heads) to (out, lse): attention of these query heads over the whole sequence.
Attend = Callable[[Tensor, Tensor, Tensor, range], tuple[Tensor, Tensor]]
# Makes the mask of some heads of their q and k: (q, k, heads) to BlockMask.
MaskOf = Callable[[Tensor, Tensor, range], BlockMask]


def head_parts(heads: int, ranks: int) -> list[range]:
    """The heads of each rank: neighbours, as evenly divided as it goes."""
    cuts = [heads * rank // ranks for rank in range(ranks + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def chunk_lengths(tokens: int, ranks: int) -> list[int]:
    """Tokens of each rank as ``torch.chunk`` divides them: the last ranks may have fewer."""
    size = -(-tokens // ranks)
    return [max(0, min(size, tokens - rank * size)) for rank in range(ranks)]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | MaskOf,
    *,
    group: dist.ProcessGroup | None = None,
    text: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over the tokens of all ranks, divided between them by heads.

    The sequence is that of rank 0, then of rank 1, and so on, and then the text. Every rank of the
    group must call this, with the same mask.

    Gradients are those of the sum of all ranks' losses. Text is the same on every rank, so each
    has a part of its gradient, and their sum is the whole: it is what DDP and FSDP make of the
    gradients of parameters.

    Args:
        q, k, v: of this rank's tokens, (batch, heads, tokens, head_dim), as for
            :func:`flex_block_attn.flex_block_attn`. (batch, tokens, heads, head_dim) tensors go in
            as ``x.transpose(1, 2)``.
        mask: over the whole sequence, the same on each rank, shared by all heads or one for each;
            or a function of (q, k, heads) that makes the mask of some heads of their queries and
            keys, whole sequences with text; ``heads`` is the range of query heads. A mask of some
            heads that depends on all: :func:`gather_heads`.
        group: the ranks; all if not given.
        text: q, k and v of tokens that every rank has, each (batch, heads, tokens, head_dim).
        lengths: tokens of each rank, without text; as ``torch.chunk`` divides them if not given.
        kv_lengths: of k and v, if they differ from those of q.
        scale, return_lse: as for :func:`flex_block_attn.flex_block_attn`.

    Returns:
        ``out``, of q's shape; ``out, lse`` with ``return_lse``; with text ``out, text_out``, or
        ``out, text_out, lse, text_lse``. The text's are the same on every rank.
    """
    q, k, v = as_inputs(q, k, v)
    if not isinstance(mask, BlockMask) and not callable(mask):
        raise TypeError(
            f"mask must be a BlockMask or a function that makes one, got {type(mask).__name__}"
        )
    if text is not None:
        text = _text(text, q, k)
    if isinstance(mask, BlockMask):
        check_extents(mask.blocks, q.shape[0], q.shape[1])
        q_total, kv_total = mask.q_len, mask.kv_len
        if text is not None:
            q_total, kv_total = q_total - text[0].shape[2], kv_total - text[1].shape[2]
        _, ranks = place_in(group)
        if lengths is None:
            lengths = chunk_lengths(q_total, ranks)
        if kv_lengths is None:
            kv_lengths = lengths if q_total == kv_total else chunk_lengths(kv_total, ranks)
    elif lengths is None:
        raise ValueError(
            "lengths must be given where mask is a function: nothing else says how many tokens "
            "the other ranks have"
        )
    scale = default_scale(q) if scale is None else float(scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        made = mask_of_heads(mask, heads) if isinstance(mask, BlockMask) else mask(q, k, heads)
        return flex_block_attn(q, k, v, made, scale=scale, return_lse=True)

    results = by_heads(q, k, v, attend, group, text, lengths, kv_lengths or lengths, return_lse)
    return results[0] if len(results) == 1 else results


def by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Attend,
    group: dist.ProcessGroup | None,
    text: tuple[Tensor, Tensor, Tensor] | None,
    lengths: Sequence[int],
    kv_lengths: Sequence[int],
    return_lse: bool,
    name: str = "group",
) -> tuple[Tensor, ...]:
    """What :func:`ulysses_attention` returns, always as a tuple; ``attend`` is the attention."""
    rank, ranks = place_in(group, name)
    lengths = _lengths("lengths", lengths, ranks, rank, "q", q)
    kv_lengths = _lengths("kv_lengths", kv_lengths, ranks, rank, "k", k)
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads, which do not divide the {q_heads} of q")

    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, but k has {tuple(k.shape)}")

    parts = head_parts(q_heads, ranks)
    kv_parts = [_kv_heads(heads, q_heads // kv_heads) for heads in parts]
    mine = parts[rank]
    sent, counts = [], []
    for x, of_rank, tokens in (
        (q, parts, lengths),
        (k, kv_parts, kv_lengths),
        (v, kv_parts, kv_lengths),
    ):
        # Tokens come first on the way: what comes from all ranks is then one tensor as it lies.
        sent.append(_pieces(x.permute(2, 0, 1, 3), 2, of_rank))
        head = x.shape[0] * x.shape[3]
        row = len(of_rank[rank]) * head
        own = tokens[rank] * head
        counts.append(([len(part) * own for part in of_rank], [n * row for n in tokens]))
    came = exchanged(sent, counts, group)
    batch, _, _, head_dim = q.shape
    q_, k_, v_ = (
        flat.view(sum(tokens), batch, len(heads), head_dim).permute(1, 2, 0, 3)
        for flat, tokens, heads in zip(
            came,
            (lengths, kv_lengths, kv_lengths),
            (mine, kv_parts[rank], kv_parts[rank]),
            strict=True,
        )
    )
    text_tokens = 0
    if text is not None:
        text_tokens = text[0].shape[2]
        q_, k_, v_ = (
            torch.cat((x, t[:, heads.start : heads.stop]), dim=2)
            for x, t, heads in zip(
                (q_, k_, v_), text, (mine, kv_parts[rank], kv_parts[rank]), strict=True
            )
        )
    if len(mine):
        k_, v_ = (_spread(x, mine, q_heads // kv_heads) for x in (k_, v_))
        out, lse = attend(q_, k_, v_, mine)
    else:
        # More ranks than heads: nothing to compute, but all take part in the exchanges, forward
        # and backward, and text gets a gradient of 0. The sums are those of no elements.
        out = q_ + k_.sum() + v_.sum()
        lse = out[..., 0].to(torch.promote_types(q.dtype, torch.float32))

    sent, counts, widths = [], [], []
    own = lengths[rank] + text_tokens
    for x in (out, lse.unsqueeze(3)) if return_lse else (out,):
        # Heads come first on the way back, for the same reason.
        by_head = x.permute(1, 2, 0, 3)
        if text_tokens:
            *images, text_part = by_head.split([*lengths, text_tokens], dim=1)
            pieces = [torch.cat((image, text_part), dim=1).reshape(-1) for image in images]
            sent.append(torch.cat(pieces))
        else:
            ends = list(accumulate(lengths))
            places = [range(end - n, end) for n, end in zip(lengths, ends, strict=True)]
            sent.append(_pieces(by_head, 1, places))
        token = x.shape[0] * x.shape[3]
        here = [len(mine) * (n + text_tokens) * token for n in lengths]
        counts.append((here, [len(part) * own * token for part in parts]))
        widths.append(x.shape[3])
    results = []
    for flat, width in zip(exchanged(sent, counts, group), widths, strict=True):
        whole = flat.view(q_heads, own, batch, width).permute(2, 0, 1, 3)
        results.append(whole.split([lengths[rank], text_tokens], dim=2))
    out, *lse = results
    lse = [x.squeeze(3) for x in lse[0]] if lse else []
    if text is None:
        return out[0], *lse[:1]
    return *out, *lse


def _pieces(x: Tensor, dim: int, parts: Sequence[range]) -> Tensor:
    """The numbers of some stretches of a dimension, one stretch after the other."""
    size, count = len(parts[0]), len(parts)
    if x.shape[dim] == size * count and all(
        part == range(i * size, (i + 1) * size) for i, part in enumerate(parts)
    ):
        # Copied once, where putting pieces together copies twice.
        return x.unflatten(dim, (count, size)).movedim(dim, 0).reshape(-1)
    return torch.cat([x.narrow(dim, part.start, len(part)).reshape(-1) for part in parts])


def _kv_heads(heads: range, group: int) -> range:
    """The key heads of some query heads, of which ``group`` share one."""
    return range(heads.start // group, -(-heads.stop // group) if len(heads) else 0)


def _spread(x: Tensor, heads: range, group: int) -> Tensor:
    """k or v of the heads that ``heads`` read: repeated where not all are shared by as many."""
    own = [head // group - heads.start // group for head in heads]
    each, rest = divmod(len(own), x.shape[1])
    if not rest and own == [i // each for i in range(len(own))]:
        return x
    return x.index_select(1, torch.tensor(own, device=x.device))


def _text(text: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    if not isinstance(text, (tuple, list)) or len(text) != 3:
        raise TypeError("text must be three tensors: q, k and v of the text's tokens")
    text = as_inputs(*text)
    for name, tensor, of, like in (("q", text[0], "q", q), ("k", text[1], "k", k)):
        expected = like.shape[0], like.shape[1], like.shape[3]
        if (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != expected:
            raise ValueError(
                f"text's {name} has shape {tuple(tensor.shape)}, but must agree with {of}, "
                f"{tuple(like.shape)}, in all but tokens"
            )
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise TypeError(
                f"text's {name} is {tensor.dtype} on {tensor.device}, "
                f"but {of} is {like.dtype} on {like.device}"
            )
    if text[2].shape != text[1].shape:
        raise ValueError(
            f"text's v has shape {tuple(text[2].shape)}, but its k has {tuple(text[1].shape)}"
        )
    return text


def _lengths(
    name: str, lengths: Sequence[int], ranks: int, rank: int, of: str, tensor: Tensor
) -> list[int]:
    lengths = [as_size(name, n) for n in lengths]
    if len(lengths) != ranks:
        raise ValueError(f"{name} must be {ranks} numbers, one for each rank, got {len(lengths)}")
    if lengths[rank] != tensor.shape[2]:
        raise ValueError(
            f"{of} has {tensor.shape[2]} tokens, but rank {rank} should have {lengths[rank]} of "
            f"{name} {lengths}"
        )
    return lengths

"""A case as tensors: q, k, v, the output's gradient, and a mask of blocks.

In: a :class:`~.suites.Case`. Out: a :class:`Problem`, and the same attention in float64 of some
rows, by formulas that share no code with anything that is timed. Used by :mod:`.attention`,
:mod:`.peers` and :mod:`.measure`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .suites import Case

# Of the float64 check: all rows of a head where there are no more pairs than this, else some.
PAIRS_CHECKED = 2**22
ROWS_CHECKED = 128


class Absent(Exception):
    """What is not installed, or does not do what is asked. Found before any work is done."""


@dataclass
class Problem:
    """Random numbers, the same for every implementation and in every run of a case."""

    case: Case
    # (batch, heads, tokens, head_dim). Of a video: in its own order, without padding.
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    # (1, heads or 1, q blocks, kv blocks), bool; None where all are kept, where a rule says which
    # pairs are, and where the mask depends on q and k.
    blocks: Tensor | None

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Problem":
        # By the name, so that a case has the same numbers whatever else runs.
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
        tokens = (case.q_len, case.kv_len)
        if case.video is not None:
            (time, height, width), text = case.video.thw, case.video.text
            tokens = (time * height * width + text,) * 2

        def numbers(length: int) -> Tensor:
            shape = case.batch, case.heads, length, case.head_dim
            dtype = getattr(torch, case.dtype)
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        q, k, v, dout = (numbers(tokens[i]) for i in (0, 1, 1, 0))
        return cls(case, q, k, v, dout, _blocks(case, device, generator))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def rule(self) -> str | None:
        """By which pairs of tokens are kept, where that is not by blocks."""
        return self.case.mask if self.case.mask in ("causal", "local") else None

    @property
    def reach(self) -> int:
        """Of a sliding window: tokens that a query sees to each side."""
        return int(self.case.rate)

    @property
    def mask_mod(self) -> Callable[..., Any]:
        """The rule as a function, of FlexAttention's kind."""
        if self.rule == "causal":
            return lambda b, h, q, kv: q >= kv
        reach = self.reach
        return lambda b, h, q, kv: (q - kv).abs() <= reach

    @property
    def is_dense(self) -> bool:
        return self.case.mask == "dense"

    @cached_property
    def density(self) -> float:
        """Share of the pairs of tokens that is kept."""
        case = self.case
        if self.rule:
            query = torch.arange(case.q_len, dtype=torch.float64)
            first, end = torch.zeros_like(query), query + 1
            if self.rule == "local":
                first, end = (query - self.reach).clamp(min=0), end + self.reach
            pairs = (end.clamp(max=case.kv_len) - first).clamp(min=0).sum()
            return pairs.item() / (case.q_len * case.kv_len)
        blocks = self.choose(*self.tiled(self.q, self.k)) if case.video else self.blocks
        if blocks is None:
            return 1.0
        sizes = (
            _sizes(length, block, blocks.device)
            for length, block in ((case.q_len, case.q_block), (case.kv_len, case.kv_block))
        )
        pairs = torch.einsum("bhij,i,j->bh", blocks.double(), *sizes).mean().item()
        return pairs / (case.q_len * case.kv_len)

    def operations(self, backward: bool) -> float:
        """Of the products of the pairs that are kept: the backward pass makes five where the
        forward makes two."""
        case = self.case
        pairs = self.density * case.q_len * case.kv_len * case.batch * case.heads
        return 4.0 * pairs * case.head_dim * (2.5 if backward else 1.0)

    def keep(self, blocks: Tensor | None, rows: Tensor, head: int) -> Tensor:
        """For some queries of a head, which keys are kept: bool (rows, keys)."""
        case = self.case
        keys = torch.arange(case.kv_len, device=rows.device)
        if self.rule == "local":
            return (keys - rows[:, None]).abs() <= self.reach
        if self.rule:
            return keys <= rows[:, None]
        if blocks is None:
            return torch.ones(len(rows), case.kv_len, dtype=torch.bool, device=rows.device)
        of_head = blocks[-1, min(head, blocks.shape[1] - 1)]
        return of_head[rows // case.q_block][:, keys // case.kv_block]

    # --- video -----------------------------------------------------------------------------------

    @cached_property
    def _places(self):
        from flex_block_attn.tiles import Canvas, places_of

        of = self.case.video
        assert of is not None
        canvas = Canvas.new(of.thw, of.tile, of.window, of.text)
        return places_of(canvas, "zero", self.device)

    def tiled(self, *tensors: Tensor) -> list[Tensor]:
        """Tokens put tile by tile and padded, as our own SSTA does it."""
        from flex_block_attn.tiles import ToTiles

        return [ToTiles.apply(x, *self._places) for x in tensors]

    def untiled(self, x: Tensor) -> Tensor:
        from flex_block_attn.tiles import FromTiles

        return FromTiles.apply(x, *self._places)

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        """The mask of blocks of a video, of tiled queries and keys."""
        from flex_block_attn.ssta_attention import create_ssta_3d_mask

        of = self.case.video
        assert of is not None
        return create_ssta_3d_mask(
            q.detach(),
            k.detach(),
            of.thw,
            of.topk,
            of.tile,
            of.window,
            of.text,
            lambda_=of.lambda_,
            mask_share_within_head=False,
            sampling_type="importance",
        )

    # --- float64 ---------------------------------------------------------------------------------

    def exact(self) -> "Exact":
        """Attention of rows of the last head, and gradients. All rows if that is little work."""
        case, head = self.case, self.case.heads - 1
        q, k, v, dout, blocks = self.q, self.k, self.v, self.dout, self.blocks
        if case.video:
            q, k, v, dout = self.tiled(q, k, v, dout)
            blocks = self.choose(q, k)
        tokens = torch.arange(self.q.shape[2], device=self.device)
        whole = case.q_len * case.kv_len <= PAIRS_CHECKED
        if not whole:
            tokens = tokens[torch.linspace(0, len(tokens) - 1, ROWS_CHECKED).long()]
        rows = self._places.from_tiles[tokens] if case.video else tokens
        q, dout = (x[-1, head, rows].double() for x in (q, dout))
        k, v = (x[-1, head].double() for x in (k, v))
        scale = case.head_dim**-0.5
        scores = scale * q @ k.T
        weights = scores.masked_fill(~self.keep(blocks, rows, head), -torch.inf).softmax(-1)
        out, dweights = weights @ v, dout @ v.T
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        gradients = [dscores @ k]
        # Keys' gradients are sums over all rows; a video's padding has rows, too.
        if whole and case.video is None:
            gradients += [dscores.T @ q, weights.T @ dout]
        return Exact(head, tokens, out, gradients)


@dataclass
class Exact:
    """What an attention should give, of one head."""

    head: int
    # Whose output and gradient of q are here.
    tokens: Tensor
    out: Tensor
    # Of q, and perhaps of k and v.
    gradients: list[Tensor]

    def error(self, results: list[Tensor]) -> float:
        """The largest relative error of an output, or of an output and gradients."""
        expected = [self.out, *self.gradients][: len(results)]
        got = [x[-1, self.head] for x in results]
        got = [x[self.tokens] if i < 2 else x for i, x in enumerate(got)]
        return max(relative(a, b) for a, b in zip(got, expected, strict=False))


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = got.to(expected.dtype).sub(expected).float().norm()
    return (difference / expected.float().norm()).item()


def _sizes(length: int, block: int, device: torch.device) -> Tensor:
    """Tokens of each block."""
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block).double()


def _blocks(case: Case, device: torch.device, generator: torch.Generator) -> Tensor | None:
    rows, columns = -(-case.q_len // case.q_block), -(-case.kv_len // case.kv_block)
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    if case.mask == "window":
        # As the reference counts: a rate r reaches to both sides by r of all blocks, less one.
        width = max(1, int(case.rate * columns))
        return ((row - column).abs() < width)[None, None]
    if case.mask == "causal blocks":
        return (column * case.kv_block < (row + 1) * case.q_block)[None, None]
    if case.mask == "random":
        shape = 1, case.heads, rows, columns
        kept = max(1, round(case.rate * columns))
        order = torch.rand(shape, device=device, generator=generator).argsort(-1)
        blocks = torch.zeros(shape, device=device, dtype=torch.bool)
        blocks.scatter_(-1, order[..., :kept], True)
        if case.text_blocks:
            blocks[..., -case.text_blocks :] = True
            blocks[..., -case.text_blocks :, :] = True
        return blocks
    return None

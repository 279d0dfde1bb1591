"""Keys on their way: k and v from their owners, their gradients back. In: a rank's k and v, and its
plan. Out: those of others, step by step.

Called by :mod:`.context`. A row is a token of one group of heads, with its k and v side by side.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..masks import BlockMask
from .exchange import Exchange
from .plan import RankPlan
from .steps import Moves

# Steps on their way at once: one to compute with, and one that comes meanwhile.
_AHEAD = 2


class Keys:
    """k and v as steps bring them: the next are on their way while these are computed with."""

    def __init__(self, k: Tensor, v: Tensor, plan: RankPlan, group: Any):
        self._k, self._v, self._plan, self._group = k, v, plan, group
        self._moves: Moves | None = None
        # What is known can leave before anything else happens.
        self._coming = [self._leave(moves) for moves, _ in plan.known()[:_AHEAD]]

    def _leave(self, moves: Moves) -> Exchange:
        # (groups, tokens, batch, heads of a group, head_dim)
        parts = [
            x.unflatten(1, (self._plan.groups, -1)).permute(1, 3, 0, 2, 4)
            for x in (self._k, self._v)
        ]
        rows = [part[moves.groups, moves.tokens] for part in parts]
        return Exchange(torch.stack(rows, dim=1), moves.step.send, moves.step.receive, self._group)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], BlockMask | None]]:
        steps = self._plan.steps()
        coming, self._coming = self._coming, []
        for number, (moves, mask) in enumerate(steps):
            coming += [self._leave(m) for m, _ in steps[number + len(coming) : number + _AHEAD]]
            self._moves = moves
            rows = coming.pop(0).wait()
            if moves.sources is not None and len(rows):
                rows = rows.index_select(0, moves.sources)
            yield _heads_of(rows, self._plan.groups), mask

    def send_back(self, dk: Tensor, dv: Tensor) -> tuple[Moves, Exchange]:
        """Gradients of the keys that came last, on their way to their owners."""
        moves = self._moves
        rows = _rows_of(dk, dv, self._plan.groups)
        if moves.places is not None:
            rows = rows.index_select(0, moves.places)
        return moves, Exchange(rows, moves.step.receive, moves.step.send, self._group)

    def gradients(self, dtype: torch.dtype) -> "KeyGradients":
        """Nothing yet, for the rank's own keys."""
        return KeyGradients(self._k, self._plan.groups, dtype)


def _rows_of(k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Rows as they travel, (groups * tokens, 2, batch, heads of a group, head_dim)."""
    both = torch.stack((k, v)).unflatten(2, (groups, -1))
    return both.permute(2, 4, 0, 1, 3, 5).flatten(0, 1).contiguous()


def _heads_of(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """k and v, (batch, heads, tokens, head_dim), of rows as they travel."""
    # Either groups or the heads of one are 1, so nothing is copied.
    both = rows.unflatten(0, (groups, -1)).permute(2, 3, 0, 4, 1, 5)
    k, v = both.flatten(2, 3).unbind(0)
    return k, v


class KeyGradients:
    """Sums of gradients of a rank's keys and values, from all ranks that had them."""

    def __init__(self, k: Tensor, groups: int, dtype: torch.dtype):
        batch, heads, self._tokens, head_dim = k.shape
        shape = groups * self._tokens, 2, batch, heads // groups, head_dim
        self._groups = groups
        self._rows = torch.zeros(shape, dtype=dtype, device=k.device)

    def add(self, dk: Tensor, dv: Tensor) -> None:
        """Those of all keys."""
        for total, gradient in zip(_heads_of(self._rows, self._groups), (dk, dv), strict=True):
            total.add_(gradient)

    def add_returned(self, moves: Moves, coming: Exchange) -> None:
        """Those that others send back: one rank's after the other, so that a token that several
        had is summed in the same order each time."""
        rows = coming.wait().to(self._rows.dtype)
        numbers, send = moves.groups * self._tokens + moves.tokens, moves.step.send
        for places, part in zip(numbers.split(send), rows.split(send), strict=True):
            if len(places):
                self._rows.index_add_(0, places, part)

    def result(self) -> tuple[Tensor, Tensor]:
        """dk and dv, (batch, heads, tokens, head_dim)."""
        return _heads_of(self._rows, self._groups)

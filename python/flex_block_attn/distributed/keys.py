"""Keys on their way: k and v from their owners, their gradients back. In: a rank's k and v, and its
plan. Out: those of others, step by step.

Called by :mod:`.context`. Where a step is of some keys, a row that travels is a token of one group
of heads, with its k and v side by side; where it is of all, k and v travel as they lie. While keys
are copied nothing else runs: they are copied once, and 16 bytes at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..masks import BlockMask
from .exchange import Exchange, Swap, copy_wide, let_pass, wide
from .plan import RankPlan
from .steps import Moves

# Steps on their way at once: one to compute with, and one that comes meanwhile.
_AHEAD = 2


class _Coming(Protocol):
    def wait(self) -> tuple[Tensor, Tensor]: ...


class Keys:
    """k and v as steps bring them: the next are on their way while these are computed with."""

    def __init__(self, k: Tensor, v: Tensor, plan: RankPlan, group: Any):
        self._k, self._v, self._plan, self._group = k, v, plan, group
        self._moves: Moves | None = None
        # What is known can leave before anything else happens.
        self._coming = [self._leave(moves) for moves, _ in plan.known()[:_AHEAD]]

    def let_pass(self) -> None:
        """Attention comes next: what is on its way begins before."""
        if self._coming:
            let_pass(self._k.device)

    def _leave(self, moves: Moves) -> _Coming:
        if moves.step.is_whole:
            return _Whole(self._k, self._v, moves.step.send, moves.step.receive, self._group)
        return _Some(self._k, self._v, moves, self._plan.groups, self._group)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], BlockMask | None]]:
        steps, coming = self._plan.steps(), self._coming
        for number, (moves, mask) in enumerate(steps):
            coming += [self._leave(m) for m, _ in steps[number + len(coming) : number + _AHEAD]]
            self._moves = moves
            yield coming.pop(0).wait(), mask

    def send_back(self, dk: Tensor, dv: Tensor) -> "Returning":
        """Gradients of the keys that came last, on their way to their owners."""
        moves = self._moves
        if moves.step.is_whole:
            return _Whole(dk, dv, moves.step.receive, moves.step.send, self._group)
        rows = _rows_of(dk, dv, self._plan.groups)
        if moves.places is not None:
            rows = rows.index_select(0, moves.places)
        exchange = Exchange(rows, moves.step.receive, moves.step.send, self._group)
        return moves, exchange, dk.dtype

    def gradients(self, dtype: torch.dtype) -> "KeyGradients":
        """Nothing yet, for the rank's own keys."""
        return KeyGradients(self._k, self._plan.groups, dtype)


class _Some:
    """Those keys of a step that others want, on their way."""

    def __init__(self, k: Tensor, v: Tensor, moves: Moves, groups: int, group: Any):
        self._moves, self._groups, self._dtype = moves, groups, k.dtype
        # (groups, tokens, batch, heads of a group, head_dim)
        parts = [wide(x).unflatten(1, (groups, -1)).permute(1, 3, 0, 2, 4) for x in (k, v)]
        rows = parts[0].new_empty((sum(moves.step.send), 2, *parts[0].shape[2:]))
        for i, part in enumerate(parts):
            torch.ops.aten.index.Tensor_out(part, [moves.groups, moves.tokens], out=rows[:, i])
        self._exchange = Exchange(rows, moves.step.send, moves.step.receive, group)

    def wait(self) -> tuple[Tensor, Tensor]:
        rows, sources = self._exchange.wait(), self._moves.sources
        if sources is not None and len(rows):
            rows = rows.index_select(0, sources)
        return _heads_of(rows.view(self._dtype), self._groups)


class _Whole:
    """All tokens of two tensors, (batch, heads, tokens, head_dim), from one rank to the other and
    back; both ways, what comes is as long as what it is added to or computed with. It comes into
    tensors that are given, at once if they are contiguous, or into new ones."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        send: list[int],
        receive: list[int],
        group: Any,
        into: tuple[Tensor, Tensor] | None = None,
    ):
        batch, heads, _, head_dim = k.shape
        numbers = batch * heads * head_dim
        counts = [[tokens * numbers for tokens in each] for each in (send, receive)]
        self._shape = batch, heads, sum(receive), head_dim
        self._into = into
        places = self._at_once()
        into = None if places is None else [x.view(-1) for x in places]
        self._swap = Swap([x.reshape(-1) for x in (k, v)], *counts, group, into)

    def _at_once(self) -> tuple[Tensor, Tensor] | None:
        return self._into if self._into and self._into[0].is_contiguous() else None

    def wait(self) -> tuple[Tensor, Tensor]:
        k, v = (x.view(self._shape) for x in self._swap.wait())
        if self._into is not None and self._at_once() is None:
            for place, came in zip(self._into, (k, v), strict=True):
                copy_wide(place, came)
        return k, v


class Together:
    """All keys of two ranks, one's after the other's, and all their gradients."""

    def __init__(self, k: Tensor, v: Tensor, plan: RankPlan, group: Any):
        ((moves, _),) = plan.steps()
        self._step, self._group, self._own = moves.step, group, (k, v)
        own, other = k.shape[2], moves.step.tokens
        parts = [slice(0, own), slice(own, None)] if plan.rank == 0 else None
        self._mine, self._others = parts or [slice(other, None), slice(0, other)]
        shape = *k.shape[:2], own + other, k.shape[3]
        self._all = k.new_empty(shape), v.new_empty(shape)
        theirs = tuple(x[:, :, self._others] for x in self._all)
        self._coming = _Whole(k, v, self._step.send, self._step.receive, group, theirs)
        for x, part in zip(self._all, (k, v), strict=True):
            # While those of the other travel.
            copy_wide(x[:, :, self._mine], part)

    def wait(self) -> tuple[Tensor, Tensor]:
        """k and v."""
        self._coming.wait()
        return self._all

    def gradients(self, dk: Tensor, dv: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Gradients of the rank's own, from those of all that it had; the other's leave at once,
        and one's own are waited for when the result is called."""
        theirs = (x[:, :, self._others] for x in (dk, dv))
        coming = _Whole(*theirs, self._step.receive, self._step.send, self._group)

        def arrived() -> tuple[Tensor, Tensor]:
            sums = coming.wait()
            for total, x in zip(sums, (dk, dv), strict=True):
                total.add_(x[:, :, self._mine])
            return sums

        return arrived


# Gradients on their way to a rank: of all of its keys, or of rows.
Returning = _Whole | tuple[Moves, Exchange, torch.dtype]


def _rows_of(k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Rows as they travel, (groups * tokens, 2, batch, heads of a group, head_dim)."""
    parts = [wide(x).unflatten(1, (groups, -1)).permute(1, 3, 0, 2, 4) for x in (k, v)]
    return torch.stack(parts, dim=2).flatten(0, 1)


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
        self._shape = groups * self._tokens, 2, batch, heads // groups, head_dim
        self._groups, self._dtype, self._device = groups, dtype, k.device
        self._own: list[tuple[slice, Tensor, Tensor]] = []
        self._rows: Tensor | None = None
        self._whole: tuple[Tensor, Tensor] | None = None

    def add(self, heads: slice, dk: Tensor, dv: Tensor) -> None:
        """The rank's own, of some heads: in the end, of all."""
        self._own.append((heads, dk, dv))

    def add_returned(self, coming: Returning) -> None:
        """Those that others send back: one rank's after the other, so that a token that several
        had is summed in the same order each time."""
        if isinstance(coming, _Whole):
            self._whole = coming.wait()
            return
        moves, exchange, dtype = coming
        if self._rows is None:
            self._rows = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        rows = exchange.wait().view(dtype).to(self._dtype)
        numbers, send = moves.groups * self._tokens + moves.tokens, moves.step.send
        for places, part in zip(numbers.split(send), rows.split(send), strict=True):
            if len(places):
                self._rows.index_add_(0, places, part)

    def result(self) -> tuple[Tensor, Tensor]:
        """dk and dv, (batch, heads, tokens, head_dim)."""
        if self._whole is not None:
            # Two parts: their sum is rounded once, as if it were kept in another dtype.
            total = self._whole
        elif self._rows is not None:
            total = _heads_of(self._rows, self._groups)
        else:
            ((_, dk, dv),) = self._own
            return dk, dv
        for heads, *own in self._own:
            for x, part in zip(total, own, strict=True):
                x[:, heads].add_(part)
        return total

"""Long rows of a rank in pieces, each over some of the keys. In: queries of a rank's rows. Out:
those that launches compute, and of their results the rank's.

Called by :mod:`.context`. Nothing here travels. A row of queries is computed by one multiprocessor,
from the first of its keys to the last; where rows are few, one that sees everything would keep it
when all others are done. So such rows are there several times.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .exchange import wide
from .merge import Merged
from .plan import Pieces


class RowPieces:
    """A rank's rows, the long ones in pieces; called as :class:`.shared.SharedRows`."""

    def __init__(self, pieces: Pieces):
        self._long = pieces.long
        # Rows that come before all rows.
        self._more = (pieces.most - 1) * len(pieces.long)

    def join(self, q: Tensor) -> Callable[[], Tensor]:
        """Queries of pieces, then of all rows; made when the result is called."""

        def joined() -> Tensor:
            if not self._more:
                return q
            x = wide(q)
            long = self._long.of(x)
            pieces = [long] * (self._more // len(self._long))
            return torch.cat([*pieces, x], dim=2).view(q.dtype)

        return joined

    def part(self, merged: Merged, q: Tensor, _: int) -> tuple[Tensor, Tensor]:
        """Output and lse of the rank's rows, from those of launches; ``q`` are of all that they
        compute."""
        length, long = q.shape[2] - self._more, len(self._long)
        whole, pieces = [], []
        for part in merged.parts():
            more = part[0].shape[2] - length
            whole.append(tuple(x.narrow(2, more, length) for x in part) if more else part)
            for first in range(0, more, max(1, long)):
                pieces.append(tuple(x.narrow(2, first, long) for x in part))
        out = q.new_empty((*q.shape[:2], length, *q.shape[3:]))
        lse = out.new_empty(out.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        rows = Merged(whole)
        # Long rows are not right yet, and are written again: to leave them out here would take
        # views of all these, or, where they lie between others, copies.
        rows.into(out, lse)
        if pieces:
            of_long = Merged(pieces + rows.of(self._long.of).parts())
            self._long.fill(of_long.into, out, lse)
        return out, lse

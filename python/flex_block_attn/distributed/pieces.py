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
        self._own, self._long, self._most = pieces.own, pieces.long, pieces.most

    def join(self, q: Tensor) -> Callable[[], Tensor]:
        """Queries of pieces, then of all rows."""

        def joined() -> Tensor:
            more = self._most - 1
            if not more or not len(self._long):
                return q
            x = wide(q)
            return torch.cat([*[self._long.of(x)] * more, x], dim=2).view(q.dtype)

        return joined

    def part(self, merged: Merged, q: Tensor, _: int) -> tuple[Tensor, Tensor]:
        """Output and lse of the rank's rows, from those of launches; ``q`` are of all that they
        compute."""
        length, long = len(self._own) + len(self._long), len(self._long)
        whole, pieces = [], []
        for part in merged.parts():
            more = part[0].shape[2] - length
            whole.append(tuple(x.narrow(2, more, length) for x in part))
            for first in range(0, more, max(1, long)):
                pieces.append(tuple(x.narrow(2, first, long) for x in part))
        out = q.new_empty((*q.shape[:2], length, *q.shape[3:]))
        lse = out.new_empty(out.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        rows = Merged(whole)
        self._own.fill(rows.of(self._own.of).into, out, lse)
        of_long = Merged(pieces + rows.of(self._long.of).parts())
        self._long.fill(of_long.into, out, lse)
        return out, lse

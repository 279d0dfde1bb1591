"""Attention over parts of the keys, put together. In: outputs and lses. Out: those over all keys.

Called by :mod:`.context`. As in FlashAttention and flash-decoding: an output over some keys counts
with the share that they have in the sum of exponentials, which is what lses are logarithms of.
"""

import torch
from torch import Tensor


class Merged:
    """Attention of some rows over the keys so far; none, at first: output 0, lse -inf.

    Sums are kept in lse's dtype: float32, or float64 for float64 tensors.
    """

    def __init__(self) -> None:
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """The same rows over other keys.

        Args:
            out: (..., rows, head_dim).
            lse: (..., rows), float32 or float64; -inf for rows without any key.
        """
        if self._out is None:
            self._out, self._lse = out.to(lse.dtype), lse
            return
        total = torch.logaddexp(self._lse, lse)
        # Rows without any key yet: exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN.
        base = total.masked_fill(total == -torch.inf, 0.0)
        before, now = ((x - base).exp().unsqueeze(-1) for x in (self._lse, lse))
        self._out, self._lse = self._out * before + out * now, total

    def result(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output, and lse of this dtype, for rows of the shape of ``like``; both in ``dtype``."""
        if self._out is None:
            return like.new_zeros(like.shape, dtype=dtype), like.new_full(
                like.shape[:-1], -torch.inf, dtype=dtype
            )
        return self._out, self._lse

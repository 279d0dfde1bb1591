"""Attention over parts of the keys, put together. In: outputs and lses. Out: those over all keys.

Called by :mod:`.context`. As in FlashAttention and flash-decoding: an output over some keys counts
with the share that they have in the sum of exponentials, which is what lses are logarithms of.
"""

import torch
from torch import Tensor


class Merged:
    """Attention of some rows over several parts of the keys; of none, output 0 and lse -inf.

    Parts are kept as they come and summed at the end, once, in lse's dtype: float32, or float64
    for float64 tensors. Outputs are large, and a sum kept up to date would be read and written
    again for each part.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, out: Tensor, lse: Tensor) -> None:
        """The same rows over other keys.

        Args:
            out: (..., rows, head_dim).
            lse: (..., rows), float32 or float64; -inf for rows without any key.
        """
        self._parts.append((out, lse))

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Output and lse, for rows of the shape of ``like``; both in lse's dtype, but the output of
        a single part is as it came."""
        if not self._parts:
            dtype = torch.promote_types(like.dtype, torch.float32)
            lse = like.new_full(like.shape[:-1], -torch.inf, dtype=dtype)
            return torch.zeros_like(like), lse
        if len(self._parts) == 1:
            return self._parts[0]
        lse = torch.stack([lse for _, lse in self._parts]).logsumexp(dim=0)
        # Rows without any key: exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN.
        base = lse.masked_fill(lse == -torch.inf, 0.0)
        out = 0.0
        for part, part_lse in self._parts:
            share = (part_lse - base).exp().unsqueeze(-1)
            out = part * share if isinstance(out, float) else out.addcmul_(part, share)
        return out, lse

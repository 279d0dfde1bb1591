"""Parts of an attention, put together. In: outputs and lses over parts of the keys, or gradients of
queries. Out: those over all keys.

Called by :mod:`.context` and :mod:`.shared`. As in FlashAttention and flash-decoding: an output
over some keys counts with the share that they have in the sum of exponentials, which is what lses
are logarithms of. Tensors are as large as q, and nothing runs meanwhile: a kernel reads and writes
each once; what it does not take is read and written as few times as torch allows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _native, launch

# Some rows of a tensor, or all.
Select = Callable[[Tensor], Tensor]
# Parts that one kernel puts together.
FEW = _native.MOST_PARTS


class Merged:
    """Attention of some rows over several parts of the keys; of none, output 0 and lse -inf.

    Parts are kept as they come and summed at the end, once, in lse's dtype: float32, or float64
    for float64 tensors. Outputs are large, and a sum kept up to date would be read and written
    again for each part.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self._parts = list(parts)

    def add(self, out: Tensor, lse: Tensor) -> None:
        """The same rows over other keys.

        Args:
            out: (..., rows, head_dim).
            lse: (..., rows), float32 or float64; -inf for rows without any key.
        """
        self._parts.append((out, lse))

    def of(self, select: Select) -> "Merged":
        """Some of the rows."""
        return Merged([(select(out), select(lse)) for out, lse in self._parts])

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Outputs and lses."""
        return list(self._parts)

    def fill(self, count: int, like: Tensor) -> None:
        """Makes it so many parts, the missing ones of no keys; rows are of the shape and dtype of
        ``like``."""
        while len(self._parts) < count:
            self._parts.append((torch.zeros_like(like), _no_lse(like)))

    def into(self, out: Tensor, lse: Tensor | None = None) -> Tensor:
        """Writes the output into a tensor of any dtype, and returns the lse, written into a tensor
        if it is given."""
        if len(self._parts) > 1:
            combined = launch.combine(self._parts, out, lse)
            if combined is not None:
                return combined
        result = self._into(out)
        return result if lse is None else lse.copy_(result)

    def _into(self, out: Tensor) -> Tensor:
        if not self._parts:
            out.zero_()
            return _no_lse(out)
        if len(self._parts) == 1:
            part, lse = self._parts[0]
            out.copy_(part)
            return lse
        lse = torch.stack([lse for _, lse in self._parts]).logsumexp(dim=0)
        # Rows without any key: exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN.
        base = lse.masked_fill(lse == -torch.inf, 0.0)
        shares = [(part_lse - base).exp().unsqueeze(-1) for _, part_lse in self._parts]
        (first, _), *between, (last, _) = self._parts
        total = first * shares[0]
        for (part, _), share in zip(between, shares[1:], strict=False):
            total.addcmul_(part, share)
        # The last addition rounds to the output's dtype as well.
        torch.addcmul(total, last, shares[-1], out=out)
        return lse

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Output and lse, for rows of the shape and dtype of ``like``."""
        if len(self._parts) == 1:
            out, lse = self._parts[0]
            return out.to(like.dtype), lse
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        return out, self.into(out)


def _no_lse(out: Tensor) -> Tensor:
    """Of rows without any key, whose output this is."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    return out.new_full(out.shape[:-1], -torch.inf, dtype=dtype)


class Sums:
    """A tensor as the sum of parts, each of all heads or of one of the stretches of heads that it
    is made for. Two parts are added as they are, in one go and with one rounding; a sum of more is
    kept in a dtype of its own.

    Args:
        stretches: which together are all heads, dimension 1.
        dtype: of sums.
    """

    def __init__(self, stretches: Sequence[slice], dtype: torch.dtype):
        self._parts: list[tuple[slice, list[Tensor]]] = [(heads, []) for heads in stretches]
        self._dtype = dtype

    def add(self, part: Tensor, stretch: int | None = None) -> None:
        """A part, of all heads or of the stretch of this number."""
        for number, (heads, parts) in enumerate(self._parts):
            if stretch is not None and number != stretch:
                continue
            if len(parts) == 2:
                parts[:] = [parts[0].to(self._dtype).add_(parts[1])]
            parts.append(part[:, heads] if stretch is None else part)

    def result(self, like: Tensor) -> Tensor:
        """The sum, of the shape and dtype of ``like``: the part itself where there is but one."""
        (_, parts), *others = self._parts
        if not others and len(parts) == 1 and parts[0].dtype == like.dtype:
            return parts[0]
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.into(out)
        return out

    def into(self, out: Tensor, select: Select = lambda x: x) -> None:
        """Writes the sum of some rows into a tensor of any dtype; 0 if there are no parts."""
        for heads, parts in self._parts:
            target, selected = out[:, heads], [select(part) for part in parts]
            if not selected:
                target.zero_()
            elif len(selected) == 1:
                target.copy_(selected[0])
            else:
                torch.add(*selected, out=target)

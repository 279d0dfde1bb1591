"""An implementation of attention, ours or a peer's, as the benchmark calls it.

In: functions of :mod:`.peers`. Out: :class:`Attention`, of which calls are made to be timed.
Called by :mod:`.measure`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import Absent, Problem

Call = Callable[[], object]


@dataclass
class Attention:
    """How an implementation is called for a problem."""

    # Of q, k, v and what `make_mask` made, the output.
    run: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    # Of the mask of blocks (None if the problem has a rule instead), and whether there will be a
    # backward pass, what `run` takes. None if it takes nothing.
    make_mask: Callable[[Tensor | None, bool], Any] | None = None
    # Whether tensors are (batch, sequence, heads, head_dim).
    tokens_first: bool = False


class Prepared:
    """An implementation with a problem's tensors, in its own layout, and its mask."""

    def __init__(self, attention: Attention, problem: Problem, backward: bool):
        self._run, self._make_mask = attention.run, attention.make_mask
        self._problem, self._backward, self._turned = problem, backward, attention.tokens_first
        if problem.case.video is not None:
            # Tokens are put into tiles in any case, and turned there.
            self._turned = False
        tensors = (self._own(x) for x in (problem.q, problem.k, problem.v))
        self._inputs = [x.detach().requires_grad_(backward) for x in tensors]
        self._dout = self._own(problem.dout)

    def _own(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if self._turned else x

    def mask(self) -> Any:
        """Made anew, of blocks that lie on the device."""
        if self._make_mask is None:
            return None
        return self._make_mask(self._problem.blocks, self._backward)

    def mask_call(self) -> Call | None:
        """To be timed: the making of a mask, for a video with the choice of its blocks."""
        problem = self._problem
        if problem.case.video is None:
            return self.mask if self._make_mask is not None else None
        q, k = problem.tiled(problem.q, problem.k)
        make = self._make_mask
        assert make is not None
        return lambda: make(problem.choose(q, k), self._backward)

    def once(self) -> list[Tensor]:
        """Everything from the mask on: the output, (batch, heads, sequence, head_dim), or output
        and gradients."""
        mask = self.mask() if self._problem.case.video is None else None
        if not self._backward:
            with torch.no_grad():
                results = [self._run(*self._inputs, mask)]
        else:
            out = self._differentiable(mask)
            results = [out.detach(), *torch.autograd.grad(out, self._inputs, self._dout)]
        return [x.transpose(1, 2) for x in results] if self._turned else results

    def call(self) -> Call:
        """To be timed: one pass, the mask being made."""
        mask = self.mask() if self._problem.case.video is None else None
        run, inputs, dout = self._run, self._inputs, self._dout
        if self._backward:
            out = self._differentiable(mask)
            return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

        def forward() -> None:
            with torch.no_grad():
                run(*inputs, mask)

        return forward

    def _differentiable(self, mask: Any) -> Tensor:
        out = self._run(*self._inputs, mask)
        if not out.requires_grad:
            raise Absent("has no backward pass")
        return out


def end_to_end(attention: Attention, problem: Problem) -> Attention:
    """SSTA of a video with another library's attention inside: tiling and the choice of blocks are
    ours, lists of them and the attention its own."""
    make, inner = attention.make_mask, attention.run
    if make is None:
        raise Absent("is dense")

    def run(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        q, k, v = problem.tiled(q, k, v)
        mask = make(problem.choose(q, k), q.requires_grad)
        if attention.tokens_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = inner(q, k, v, mask)
        return problem.untiled(out.transpose(1, 2) if attention.tokens_first else out)

    return Attention(run, make)

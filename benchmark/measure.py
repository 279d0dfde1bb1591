"""One pass of one case: everybody who is there, in turns, once results agree.

In: a :class:`~.problem.Problem` and names of :mod:`.peers`. Out: :class:`Measured`. Called by the
programs of this folder.

Wrong results are not timed: ours are compared with float64, of all rows where the case is small and
of some where it is not; the peers' with ours.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from .attention import Prepared
from .clock import peak_mib, timed, turn
from .peers import attention
from .problem import Absent, Problem, relative

PASSES = ("forward", "backward")

# Relative errors, by norm, that rounding to the type explains, in outputs and gradients.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 1e-2,
}


@dataclass
class Figures:
    """Of an implementation."""

    # Milliseconds of a call: the median of each turn.
    turns: list[float] = field(default_factory=list)
    # Milliseconds until a mask is made; None where there is nothing to make.
    mask_ms: float | None = None
    # From the mask to the last result, beyond q, k, v and the output's gradient.
    peak_mib: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.turns)


@dataclass
class Measured:
    """Figures by name, ours first, and why others have none."""

    figures: dict[str, Figures] = field(default_factory=dict)
    # Not installed, not for this mask.
    absent: dict[str, str] = field(default_factory=dict)
    # It failed, or computed something else.
    failed: dict[str, str] = field(default_factory=dict)


class Broken(Exception):
    """An implementation failed so that the GPU answers nobody in this process any more."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} {reason}; nothing runs on the GPU in this process after that")
        self.name, self.reason = name, reason


def _unwatched(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def measure(
    problem: Problem,
    names: Sequence[str],
    backward: bool,
    rounds: int,
    milliseconds: float,
    watch: Callable[[str], AbstractContextManager[None]] = _unwatched,
    warm_up: float = 0,
) -> Measured:
    """Ours beside the peers of these names: ``rounds`` turns each of about ``milliseconds``, behind
    rounds that do not count, for about ``warm_up`` milliseconds. If there is none of ours, there is
    nothing. What is done of an implementation is done in what ``watch`` gives."""
    if problem.device.type == "cuda":
        # Nothing of earlier cases is freed while memory is counted.
        gc.collect()
        torch.cuda.empty_cache()
    measured, calls = Measured(), {}
    expected: list[torch.Tensor] = []
    for name in ("ours", *names):
        try:
            with watch(name):
                one = Prepared(attention(name, problem), problem, backward)
                results = one.once()
                _check(problem, name, results, expected)
                if name == "ours":
                    expected = results
                del results
                figures = Figures()
                mask = one.mask_call()
                if mask is not None:
                    figures.mask_ms = timed(mask, problem.device, repeats=7)
                figures.peak_mib = peak_mib(one.once, problem.device)
                calls[name] = one.call()
                measured.figures[name] = figures
        except Absent as reason:
            measured.absent[name] = str(reason)
        except NotImplementedError as error:
            measured.absent[name] = f"says: {str(error).split('.')[0].strip()}"
        except Exception as error:  # an implementation's own failure is a line of the table
            measured.failed[name] = _failure(name, error, problem.device)
        if "ours" not in calls:
            return measured
    expected.clear()
    warm = time.monotonic() + warm_up / 1e3
    counted = 0
    while counted < rounds:
        counts = time.monotonic() >= warm
        counted += counts
        for name, call in list(calls.items()):
            try:
                with watch(name):
                    taken = turn(call, milliseconds, problem.device)
            except Exception as error:  # as above
                measured.failed[name] = _failure(name, error, problem.device)
                del calls[name], measured.figures[name]
                continue
            if counts:
                measured.figures[name].turns.append(taken)
        if "ours" not in calls:
            return Measured(failed=measured.failed)
    return measured


class Wrong(Exception):
    """Results are not what they should be."""


def _check(problem: Problem, name: str, results: list[torch.Tensor], of_ours: list) -> None:
    if name == "ours":
        error, what = problem.exact().error(results), "float64"
    else:
        pairs = zip(results, of_ours, strict=True)
        error, what = max(relative(a, b) for a, b in pairs), "ours"
    if not error < TOLERANCE[problem.q.dtype]:
        raise Wrong(f"differs from {what} by {error:.1e}")


def _failure(name: str, error: Exception, device: torch.device) -> str:
    """The reason in words; an exception of its own if nothing more can be done here."""
    if isinstance(error, Wrong):
        return f"is wrong: {error}"
    text = " ".join(f"fails: {type(error).__name__}: {error}".split())[:200]
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            raise Broken(name, text) from error
    return text

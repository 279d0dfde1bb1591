"""How long calls take, and how much memory: on GPUs and CPUs.

In: calls without arguments. Out: milliseconds, MiB. Used by everything here that measures.
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

Call = Callable[[], object]


def turn(call: Call, milliseconds: float, device: torch.device) -> float:
    """Median milliseconds of a call, over about so many of them. On a GPU they are issued ahead of
    it, so that it need not wait for the host, and timed by events."""
    if device.type != "cuda":
        return _turn_on_host(call, milliseconds)
    first = _between_events(call)
    if first >= milliseconds:
        # Before long calls the GPU waits for no host: one is enough behind the first.
        return _between_events(call)
    count = max(2, min(300, math.ceil(milliseconds / first)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    # The first runs while the host is not ahead yet.
    taken = [a.elapsed_time(b) for a, b in pairwise(marks)][1:]
    return statistics.median(taken)


def _turn_on_host(call: Call, milliseconds: float) -> float:
    # The first warms up: caches hold another implementation's numbers.
    first = _seconds(call) * 1e3
    count = max(1, min(300, math.ceil(milliseconds / max(first, 1e-3)) - 1))
    return statistics.median(_seconds(call) * 1e3 for _ in range(count))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _between_events(call: Call, calls: int = 1) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def timed(call: Call, device: torch.device, calls: int = 1, repeats: int = 30) -> float:
    """Median milliseconds of a call that finds the device idle, of ``calls`` in a row; the host's
    share counts. The first two warm up."""
    taken = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            taken.append(_between_events(call, calls))
        else:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            taken.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(taken[2:])


def peak_mib(call: Call, device: torch.device) -> float | None:
    """The most memory that was in use at once during a call, beyond what was before it: on a GPU
    what torch allocated, on a CPU what the process had from Linux. None if nobody knows."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What was freed goes back first, so that it counts when it is taken again.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return (_resident("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    """KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"no {field}")

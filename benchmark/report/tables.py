"""Tables in Markdown. In: a :class:`~.load.Device`. Out: lines. Called by :mod:`.page`."""

import math
from collections.abc import Sequence

from .load import PASSES, Device, Entry


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column is text, all others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def number(x: float | None) -> str:
    """Three digits, or all of those before the point."""
    if x is None:
        return ""
    if abs(x) >= 999.5:
        return f"{x:.0f}"
    return f"{x:#.3g}".rstrip(".") if abs(x) >= 1e-4 else "0"


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(math.fsum(math.log(x) for x in values) / len(values))


def unit(device: Device) -> tuple[str, float]:
    """In which speeds are told, and how many of it are a TFLOP/s."""
    most = max((row.tflops for entry in device.all() for row in entry.rows.values()), default=0)
    return ("TFLOP/s", 1.0) if most >= 10 else ("GFLOP/s", 1e3)


def impls(entries: Sequence[Entry]) -> list[str]:
    """The peers in a table."""
    return list(dict.fromkeys(name for entry in entries for name in entry.peers))


def speed(device: Device, suite: str, passed: str) -> list[str]:
    """Of kept blocks, ours beside the peers; the best of them in bold."""
    entries = device.entries[suite, passed]
    _, factor = unit(device)
    names = impls(entries)
    rows = []
    for entry in entries:
        cells = [entry.ours.case, number(entry.ours.density), number(entry.ours.ms)]
        cells.append(number(entry.ours.tflops * factor))
        for name in names:
            cell = number(entry.peers[name].tflops * factor) if name in entry.peers else ""
            cells.append(f"**{cell}**" if name == entry.best else cell)
        ratio = entry.ratios[entry.best] if entry.best else None
        rows.append([*cells, number(ratio)])
    return table(["case", "density", "our ms", "ours", *names, "ours / best"], rows)


def costs(device: Device, suite: str, passed: str, column: str) -> list[str]:
    """Of `peak_mib` or `mask_ms`; nothing if nobody has it."""
    entries = device.entries[suite, passed]
    rows, names = [], ["ours", *impls(entries)]
    for entry in entries:
        values = [
            getattr(entry.rows[name], column) if name in entry.rows else None for name in names
        ]
        if any(value is not None for value in values):
            rows.append([entry.ours.case, *map(number, values)])
    used = [i for i in range(len(names)) if any(row[i + 1] for row in rows)]
    if not rows:
        return []
    return table(
        ["case", *(names[i] for i in used)], [[row[0], *(row[i + 1] for i in used)] for row in rows]
    )


def summary(device: Device) -> list[str]:
    """A line for each suite and pass: our speed over that of each case's best peer."""
    rows = []
    for suite in device.suites:
        for passed in PASSES:
            entries = device.entries.get((suite, passed), [])
            ratios = [entry.ratios[entry.best] for entry in entries if entry.best]
            if ratios:
                best = sorted({entry.best for entry in entries if entry.best})
                cells = [mean(ratios), min(ratios), max(ratios)]
                faster = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
                rows.append([f"{suite}, {passed}", *map(number, cells), faster, ", ".join(best)])
    return table(
        ["suite", "ours / best peer, mean", "least", "most", "faster in", "best peers"], rows
    )

"""Plots as PNG files. In: a :class:`~.load.Device`. Out: :class:`Plot`, drawn when it is asked for.

Called by :mod:`.page`. A file carries a digest of what it shows, so that it can be told whether it
is up to date without drawing it: matplotlib's releases differ by a pixel here and there.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .load import IMPLS, PASSES, Device, Entry
from .tables import mean, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Grows when the same numbers shall be drawn in another way.
STYLE = 1
COLOURS = ("#d62728", "#1f77b4", "#17becf", "#2ca02c", "#8c564b", "#9467bd", "#e8a100", "#7f7f7f")
MARKERS = "osD^v<>P"
FEWEST_POINTS = 3
# Of a row.
MOST_PANELS = 4
# Marks of the axis of ratios.
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)
KEYWORD = "Shows"


@dataclass
class Plot:
    """A picture to be, and what it shows."""

    name: str
    caption: str
    data: Any
    draw: Callable[["Figure", Any], None]
    size: tuple[float, float]

    @property
    def digest(self) -> str:
        text = json.dumps([STYLE, self.name, self.caption, self.size, self.data])
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ModuleNotFoundError(
                f"plots need matplotlib ({error}): pip install matplotlib, or `make bench`"
            ) from error
        figure = Figure(figsize=self.size, dpi=110, layout="constrained")
        self.draw(figure, self.data)
        figure.suptitle(self.caption, fontsize=10)
        figure.savefig(path, metadata={"Software": None, KEYWORD: self.digest})

    def is_current(self, path: Path) -> bool:
        """Whether the file shows this."""
        return path.exists() and text_of_png(path.read_bytes()).get(KEYWORD) == self.digest


def text_of_png(data: bytes) -> dict[str, str]:
    """Its words: chunks of type tEXt (PNG specification, 11.3.3.2)."""
    found, at = {}, 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (check,) = struct.unpack_from(">I", data, at + 8 + length)
        if kind == b"tEXt" and zlib.crc32(kind + body) == check:
            keyword, _, text = body.partition(b"\0")
            found[keyword.decode("latin-1")] = text.decode("latin-1")
        at += 12 + length
    return found


def plots(device: Device) -> Iterator[Plot]:
    """All that the results are enough for."""
    if any(entry.ratios for entry in device.all()):
        yield _ratios(device)
    for suite in device.suites:
        for column in ("tflops", "peak_mib"):
            yield from _against_length(device, suite, column)
    yield from _against_density(device)


# --- bars ----------------------------------------------------------------------------------------


def _ratios(device: Device) -> Plot:
    """For each pass and suite, each peer's time over ours: mean, least and most."""
    rows = []
    for passed in PASSES:
        groups = []
        for suite in device.suites:
            entries, bars = device.entries.get((suite, passed), []), {}
            for name in IMPLS[1:]:
                ratios = [entry.ratios[name] for entry in entries if name in entry.ratios]
                if ratios:
                    bars[name] = [round(x, 4) for x in (mean(ratios), min(ratios), max(ratios))]
            if bars:
                groups.append([suite, bars])
        if groups:
            rows.append([passed, groups])
    longest = max(sum(0.8 + _room(bars) for _, bars in groups) for _, groups in rows)
    return Plot(
        "speed-up.png",
        f"{device.name}: how much faster ours is than each peer",
        rows,
        _draw_ratios,
        (max(5.4, 1.5 + 0.28 * longest), 2.6 * len(rows) + 0.7),
    )


def _room(bars: dict[str, Any]) -> int:
    """Places of a suite's bars: at least as many as its name takes."""
    return max(2, len(bars))


def _draw_ratios(figure: "Figure", rows: Any) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    names: dict[str, Any] = {}
    grid = figure.subplots(len(rows), 1, squeeze=False)
    for (axes,), (passed, groups) in zip(grid, rows, strict=True):
        at, ticks = 0.0, []
        for suite, bars in groups:
            start, at = at, at + (_room(bars) - len(bars)) / 2
            for name, (middle, least, most) in bars.items():
                names[name] = axes.bar(at, middle - 1, 0.8, bottom=1, color=_colour(name))
                axes.plot([at, at], [least, most], color="black", linewidth=1)
                axes.annotate(f"{middle:.2f}", (at, most), ha="center", va="bottom", fontsize=6)
                at += 1
            ticks.append((start + (_room(bars) - 1) / 2, suite))
            at = start + _room(bars) + 0.8
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(RATIOS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=7)
        axes.set_ylabel(f"{passed}: their time / our time", fontsize=8)
        axes.set_xticks([x for x, _ in ticks], [suite for _, suite in ticks], fontsize=8)
        axes.margins(y=0.12)
    _legend(figure, names)


# --- lines ---------------------------------------------------------------------------------------

# Panels of lines: a title, and by implementation pairs of x and y.
Lines = dict[str, list[list[float]]]


def _against_length(device: Device, suite: str, column: str) -> Iterator[Plot]:
    """A row of panels for each pass, one for each series of lengths."""
    rows: list[list[Any]] = []
    for passed in PASSES:
        series: dict[str, list[Entry]] = {}
        for entry in device.entries.get((suite, passed), []):
            series.setdefault(entry.ours.series, []).append(entry)
        panels = []
        for label, entries in series.items():
            lines = _lines(entries, "q_len", column, device)
            if max((len(line) for line in lines.values()), default=0) >= FEWEST_POINTS:
                panels.append([f"{label}, {passed}", lines])
        rows += _broken(panels)
    if not rows:
        return
    kind, title = {"tflops": ("speed", "speed"), "peak_mib": ("memory", "peak memory")}[column]
    across = max(map(len, rows))
    yield Plot(
        f"{kind}-{suite}.png",
        f"{device.name}, {suite}: {title} against length",
        ["tokens", _axis(device, column), rows],
        _draw_lines,
        (max(5.4, 3.6 * across), 3.0 * len(rows) + 0.7),
    )


def _against_density(device: Device) -> Iterator[Plot]:
    """Of each suite the longest case that has several densities."""
    rows = []
    for passed in PASSES:
        panels = []
        dense = [
            entry
            for (_, each), entries in device.entries.items()
            for entry in entries
            if each == passed and entry.ours.density == 1
        ]
        for suite in device.suites:
            panels += _density_panels(device, suite, passed, dense)
        rows += _broken(panels)
    if rows:
        across = max(map(len, rows))
        yield Plot(
            "density.png",
            f"{device.name}: speed of kept blocks against density",
            ["density", _axis(device, "tflops"), rows],
            _draw_lines,
            (max(5.4, 3.6 * across), 3.0 * len(rows) + 0.7),
        )


def _density_panels(
    device: Device, suite: str, passed: str, dense: list[Entry]
) -> Iterator[list[Any]]:
    groups: dict[tuple, list[Entry]] = {}
    for entry in device.entries.get((suite, passed), []):
        ours = entry.ours
        shape = ours.heads, ours.head_dim, ours.dtype, ours.q_block, ours.kv_block
        if ours.density < 1:
            groups.setdefault((*shape, ours.q_len, ours.series.split()[0]), []).append(entry)
    longest: dict[tuple, tuple] = {}
    for key, entries in groups.items():
        if len({entry.ours.density for entry in entries}) >= FEWEST_POINTS:
            longest[(*key[:5], key[6])] = max(key, longest.get((*key[:5], key[6]), key))
    for key in longest.values():
        heads, head_dim, dtype, block, _, tokens, kind = key
        entries = groups[key]
        entries += [
            each
            for each in dense
            if (each.ours.heads, each.ours.head_dim, each.ours.dtype) == (heads, head_dim, dtype)
            and each.ours.q_len == tokens
        ][:1]
        lines = _lines(entries, "density", "tflops", device)
        many = f"{heads} head{'s' * (heads > 1)}"
        title = f"{kind}, {many}, {tokens} tokens,\nblocks of {block}, {passed}"
        yield [title, lines]


def _broken(panels: list[Any]) -> list[list[Any]]:
    """Into rows."""
    return [panels[i : i + MOST_PANELS] for i in range(0, len(panels), MOST_PANELS)]


def _lines(entries: list[Entry], x: str, y: str, device: Device) -> Lines:
    factor = unit(device)[1] if y == "tflops" else 1.0
    lines: Lines = {}
    for entry in entries:
        for name, row in entry.rows.items():
            value = getattr(row, y)
            if value is not None:
                point = [getattr(row, x), round(value * factor, 4)]
                lines.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


def _axis(device: Device, column: str) -> str:
    return f"{unit(device)[0]} of kept blocks" if column == "tflops" else "MiB beyond the inputs"


def _draw_lines(figure: "Figure", data: Any) -> None:
    x, y, rows = data
    across = max(map(len, rows))
    grid = figure.subplots(len(rows), across, squeeze=False)
    names: dict[str, Any] = {}
    for row, panels in zip(grid, rows, strict=True):
        for axes in row[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, lines) in zip(row, panels, strict=False):
            names |= _draw_panel(axes, title, lines)
            axes.set_xlabel(x, fontsize=8)
        row[0].set_ylabel(y, fontsize=8)
    _legend(figure, names)


def _legend(figure: "Figure", names: dict[str, Any]) -> None:
    order = sorted(names, key=lambda name: (_index(name), name))
    figure.legend(
        [names[name] for name in order],
        order,
        loc="outside lower center",
        ncols=len(order),
        fontsize=8,
    )


def _draw_panel(axes: "Axes", title: str, lines: Lines) -> dict[str, Any]:
    drawn = {}
    for name, points in lines.items():
        (drawn[name],) = axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            color=_colour(name),
            marker=MARKERS[_index(name)],
            markersize=4,
            linewidth=2 if name == "ours" else 1.2,
        )
    axes.set_title(title, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    return drawn


def _index(name: str) -> int:
    return IMPLS.index(name) if name in IMPLS else len(IMPLS) - 1


def _colour(name: str) -> str:
    return COLOURS[_index(name)]

"""A device's page, and blocks of figures for other pages.

In: :class:`~.load.Device`. Out: Markdown. Called by :mod:`.__main__`.
"""

import os
import re
from pathlib import Path

from ..suites import SUITES
from .load import PASSES, Device
from .plots import Plot
from .tables import costs, speed, summary, unit

NAME = "README.md"
_BLOCK = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", flags=re.DOTALL)


class Unknown(Exception):
    """A block of figures that there are no results for."""


def page(device: Device, plots: list[Plot]) -> str:
    """All there is to say of a device."""
    how = os.path.relpath(Path(__file__).parents[2] / "docs" / "benchmarks.md", device.folder)
    lines = [f"# {device.name}", ""]
    lines += [device.note, ""] if device.note else []
    lines += [
        "Made by `python -m benchmark.report` from [results.csv](results.csv); what columns and "
        f"suites mean: [benchmarks]({how}).",
        "",
        *_measured(device),
        "",
        "Speeds are those of kept blocks. The best peer of a case is bold; `ours / best` above 1 "
        "says that ours is faster, in the same run.",
        "",
        *summary(device),
        "",
        *_pictures(plots, "speed-up", "density"),
    ]
    for suite in device.suites:
        lines += _suite(device, suite, plots)
    if device.absent:
        lines += ["## Absent", ""]
        lines += [
            f"- {impl} {reason} ({count} {'passes' if count > 1 else 'pass'} of cases)"
            for (impl, reason), count in device.absent.items()
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _measured(device: Device) -> list[str]:
    texts = {name: ", ".join(device.values(name)) for name in ("torch", "driver", "commit")}
    kind = "driver" if device.name.startswith("NVIDIA") else "CPU"
    return [f"torch {texts['torch']}; {kind}: {texts['driver']}; commit {texts['commit']}."]


def _suite(device: Device, suite: str, plots: list[Plot]) -> list[str]:
    title = SUITES[suite].title if suite in SUITES else suite
    lines = [f"## {title} (`{suite}`)", ""]
    lines += _pictures(plots, f"speed-{suite}", f"memory-{suite}")
    passes = [passed for passed in PASSES if (suite, passed) in device.entries]
    for passed in passes:
        lines += [f"{passed.capitalize()}, {unit(device)[0]}:", "", *speed(device, suite, passed)]
        lines += [""]
    for column, what in (("mask_ms", "milliseconds to make a mask"), ("peak_mib", "peak MiB")):
        for passed in passes:
            cells = costs(device, suite, passed, column)
            if cells:
                lines += [f"{passed.capitalize()}, {what}:", "", *cells, ""]
    return lines


def _pictures(plots: list[Plot], *names: str) -> list[str]:
    lines = []
    for plot in plots:
        if plot.name.removesuffix(".png") in names:
            lines += [f"![{plot.caption}]({plot.name})", ""]
    return lines


# --- blocks of other pages -----------------------------------------------------------------------


def filled(text: str, of: Path, found: list[tuple[Device, list[Plot]]]) -> str:
    """A page's text, what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` being made
    anew. NAME is "summary" for all devices, or a device's folder, a slash, and "summary" or a
    suite."""

    def made(match: re.Match) -> str:
        return match[1] + "\n".join(_block(match[2], of, found)) + "\n" + match[3]

    return _BLOCK.sub(made, text)


def _block(name: str, of: Path, found: list[tuple[Device, list[Plot]]]) -> list[str]:
    if name == "summary" and found:
        return "\n\n".join(_device_summary(*each, of) for each in found).split("\n")
    folder, _, what = name.partition("/")
    for device, plots in found:
        if device.folder.name == folder and what == "summary":
            return _device_summary(device, plots, of).split("\n")
        if device.folder.name == folder and what in device.suites:
            return _tables(device, what)
    known = [f"{each.folder.name}/{suite}" for each, _ in found for suite in each.suites]
    raise Unknown(f"bench:{name}: there are results of {', '.join(known) or 'nothing'}")


def _tables(device: Device, suite: str) -> list[str]:
    lines = []
    for passed in PASSES:
        if (suite, passed) in device.entries:
            lines += [f"{passed.capitalize()}, {unit(device)[0]}:", ""]
            lines += [*speed(device, suite, passed), ""]
    return lines[:-1]


def _device_summary(device: Device, plots: list[Plot], of: Path) -> str:
    folder = os.path.relpath(device.folder, of.parent)
    lines = [f"**{device.name}** ([all figures]({folder}/{NAME})):", "", *summary(device)]
    shown = [plot for plot in plots if plot.name == "speed-up.png"]
    others = [plot for plot in plots if plot not in shown]
    for plot in shown:
        lines += ["", f"![{plot.caption}]({folder}/{plot.name})"]
    if others:
        links = (f"[{plot.name.removesuffix('.png')}]({folder}/{plot.name})" for plot in others)
        lines += ["", f"More plots: {', '.join(links)}."]
    return "\n".join(lines)

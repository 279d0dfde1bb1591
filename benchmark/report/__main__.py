"""``python -m benchmark.report``: pages and plots of all results; ``--check`` writes nothing.

In: options. Out: files, or with ``--check`` status 1 and the names of those that are not what the
results say. Called by ``make bench``; ``--check`` by the tests.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..machine import REPOSITORY
from ..results import DEFAULT_FOLDER, Damaged
from .load import devices
from .page import NAME, Unknown, filled, page
from .plots import Plot, plots

README = REPOSITORY / "README.md"


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.report", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--results", type=Path, default=DEFAULT_FOLDER, help="folder of results")
    add(
        "--readme",
        type=Path,
        nargs="?",
        const=README,
        metavar="FILE",
        help="also fill in the figures of this page, the README if none is named",
    )
    add("--check", action="store_true", help="write nothing; say what is out of date")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    readme = args.readme or (README if args.check else None)
    try:
        found = [(device, list(plots(device))) for device in devices(args.results)]
        texts = {device.folder / NAME: page(device, drawn) for device, drawn in found}
        if readme:
            texts[readme] = filled(readme.read_text(), readme, found)
    except (Damaged, Unknown, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    pictures = {device.folder / plot.name: plot for device, drawn in found for plot in drawn}
    left = [
        path
        for device, _ in found
        for path in sorted(device.folder.glob("*.png"))
        if path not in pictures
    ]
    if args.check:
        return check(texts, pictures, left)
    for path, text in texts.items():
        path.write_text(text)
    for path, plot in pictures.items():
        plot.write(path)
    for path in left:
        path.unlink()
    print(f"{len(texts)} pages, {len(pictures)} plots")
    return 0


def check(texts: dict[Path, str], pictures: dict[Path, Plot], left: list[Path]) -> int:
    """Says which files are not what they would be if they were made now."""
    old = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    old += [path for path, plot in pictures.items() if not plot.is_current(path)]
    for path in old + left:
        print(f"{path} is not what the results say")
    if old or left:
        print("`python -m benchmark.report --readme` makes it so")
    return 1 if old or left else 0


if __name__ == "__main__":
    sys.exit(main())

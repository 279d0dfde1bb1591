"""The files that figures are kept in: ``results.csv`` and ``absent.csv`` of a device's folder.

In: figures, as they come. Out: rows; which are there already. Written by
:mod:`benchmark.__main__`, read by :mod:`benchmark.report`.

A run of a case is some rows in a row, ours first: a peer's row belongs to the last row of ours
before it. Rows are appended, never changed; where there are several of one key, the last counts.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .machine import Machine
from .measure import Figures
from .problem import Problem

COLUMNS = (
    "suite",
    "case",
    "impl",
    "pass",
    "batch",
    "heads",
    "q_len",
    "kv_len",
    "head_dim",
    "dtype",
    "q_block",
    "kv_block",
    "density",
    "ms_median",
    "ms_min",
    "ms_max",
    "tflops",
    "peak_mib",
    "mask_ms",
    "device",
    "driver",
    "torch",
    "commit",
)
# Why somebody has no row.
ABSENT_COLUMNS = (
    "suite",
    "case",
    "impl",
    "pass",
    "reason",
    "device",
    "driver",
    "torch",
    "commit",
)

# Why nobody has a row where ours has none.
WAITS = "waits for ours"
# Why somebody has none, nor in any further case of that pass.
GIVEN_UP = "does not end, or ends the process"

DEFAULT_FOLDER = Path(__file__).parent / "results"


class Damaged(Exception):
    """A file that is no table of results."""


@dataclass(frozen=True)
class Unit:
    """What is measured at once: a pass of a case, by an implementation."""

    suite: str
    case: str
    passed: str
    impl: str


class Results:
    """Those of one device, of all commits."""

    def __init__(self, folder: Path):
        self.table = Table(folder / "results.csv", COLUMNS)
        self.absent = Table(folder / "absent.csv", ABSENT_COLUMNS)

    def finished(self, machine: Machine, retry: bool) -> set[Unit]:
        """What need not be tried again for this commit; with ``retry``, what was absent or failed
        is."""
        rows = self.table.rows() + ([] if retry else self.absent.rows())
        return set(_units(rows, machine))

    def given_up(self, machine: Machine, retry: bool) -> set[tuple[str, str]]:
        """Peers who did not end in some case of this commit, and in which pass."""
        rows = [] if retry else self.absent.rows()
        units = _units((each for each in rows if each["reason"] == GIVEN_UP), machine)
        return {(unit.impl, unit.passed) for unit in units if unit.impl != "ours"}

    def add(
        self,
        suite: str,
        passed: str,
        problem: Problem,
        figures: dict[str, Figures],
        machine: Machine,
    ) -> None:
        """The rows of a run, ours first."""
        self.table.append(
            row(suite, passed, problem, impl, each, machine) for impl, each in figures.items()
        )

    def add_absent(self, unit: Unit, reason: str, machine: Machine) -> None:
        """Why there is nothing, unless that is known."""
        one = {
            "suite": unit.suite,
            "case": unit.case,
            "impl": unit.impl,
            "pass": unit.passed,
            "reason": reason,
            **asdict(machine),
        }
        if one not in self.absent.rows():
            self.absent.append([one])


def _units(rows: Iterable[dict[str, str]], machine: Machine) -> Iterator[Unit]:
    for each in rows:
        if (each["device"], each["commit"]) == (machine.device, machine.commit):
            yield Unit(each["suite"], each["case"], each["pass"], each["impl"])


def row(
    suite: str, passed: str, problem: Problem, impl: str, figures: Figures, machine: Machine
) -> dict[str, str]:
    """All columns, as text."""
    case = problem.case
    tflops = problem.operations(passed == "backward") / figures.ms / 1e9
    return {
        "suite": suite,
        "case": case.name,
        "impl": impl,
        "pass": passed,
        **{name: str(getattr(case, name)) for name in ("batch", "heads", "q_len", "kv_len")},
        **{name: str(getattr(case, name)) for name in ("head_dim", "dtype")},
        **{name: str(getattr(case, name)) for name in ("q_block", "kv_block")},
        "density": f"{problem.density:.4f}",
        "ms_median": f"{figures.ms:.5f}",
        "ms_min": f"{min(figures.turns):.5f}",
        "ms_max": f"{max(figures.turns):.5f}",
        "tflops": f"{tflops:.6f}",
        "peak_mib": "" if figures.peak_mib is None else f"{figures.peak_mib:.2f}",
        "mask_ms": "" if figures.mask_ms is None else f"{figures.mask_ms:.5f}",
        **asdict(machine),
    }


class Table:
    """A CSV file with a header, made when the first row comes."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.path, self.columns = path, columns

    def rows(self) -> list[dict[str, str]]:
        """All whole rows: the last may have been cut off."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            found = list(reader)
        if tuple(reader.fieldnames or ()) != self.columns:
            raise Damaged(f"{self.path} has other columns than {', '.join(self.columns)}")
        return [each for each in found if None not in each and None not in each.values()]

    def append(self, rows: Iterable[dict[str, str]]) -> None:
        """In one write, so that a run of a case is there or not."""
        self._mend()
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(rows)

    def _mend(self) -> None:
        """Leaves out a row whose end was cut off."""
        if not self.path.exists():
            return
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole)
        if not whole:
            self.path.unlink()

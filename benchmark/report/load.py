"""Rows of results as a report needs them: the newest of each, beside ours of the same run.

In: a folder of results. Out: :class:`Device`. Called by :mod:`.__main__`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..peers import PEERS
from ..results import WAITS, Results
from ..suites import SUITES

IMPLS = ("ours", *PEERS)
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Row:
    """A row of results.csv, as numbers."""

    suite: str
    case: str
    impl: str
    passed: str
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    q_block: int
    kv_block: int
    density: float
    ms: float
    tflops: float
    peak_mib: float | None
    mask_ms: float | None
    driver: str
    torch: str
    commit: str

    @classmethod
    def of(cls, text: dict[str, str]) -> "Row":
        def number(name: str) -> float | None:
            return float(text[name]) if text[name] else None

        return cls(
            **{name: text[name] for name in ("suite", "case", "impl", "dtype", "driver", "torch")},
            **{name: int(text[name]) for name in ("heads", "q_len", "kv_len", "head_dim")},
            **{name: int(text[name]) for name in ("q_block", "kv_block")},
            passed=text["pass"],
            density=float(text["density"]),
            ms=float(text["ms_median"]),
            tflops=float(text["tflops"]),
            peak_mib=number("peak_mib"),
            mask_ms=number("mask_ms"),
            commit=text["commit"],
        )

    @property
    def series(self) -> str:
        """What the case is but for its length."""
        return re.sub(r" s\d+\b", "", self.case)


@dataclass
class Entry:
    """A pass of a case: everybody's newest figures."""

    ours: Row
    # In the order of `IMPLS`.
    peers: dict[str, Row] = field(default_factory=dict)
    # Of each peer: its time over ours in the same run.
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, Row]:
        return {"ours": self.ours, **self.peers}

    @property
    def best(self) -> str | None:
        """The peer that was fastest beside us."""
        return min(self.ratios, key=lambda name: self.ratios[name], default=None)


@dataclass
class Device:
    """All that was measured on a device."""

    folder: Path
    name: str
    # By suite and pass, in the order of the suites and their cases.
    entries: dict[tuple[str, str], list[Entry]]
    # Implementation and reason: for how many passes of cases.
    absent: dict[tuple[str, str], int]
    # What somebody has to say about these results.
    note: str

    def all(self) -> Iterable[Entry]:
        for entries in self.entries.values():
            yield from entries

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(suite for suite, _ in self.entries))

    def values(self, name: str) -> list[str]:
        """Of a field, in order: "driver", "torch" or "commit"."""
        return sorted({getattr(row, name) for entry in self.all() for row in entry.rows.values()})


def devices(results: Path) -> list[Device]:
    """Those that have results, GPUs first."""
    folders = sorted(path.parent for path in results.glob("*/results.csv"))
    found = [_device(folder) for folder in folders]
    return sorted(found, key=lambda device: (not device.name.startswith("NVIDIA"), device.name))


def _device(folder: Path) -> Device:
    files = Results(folder)
    texts = files.table.rows()
    runs: dict[tuple[str, str, str], list[list[Row]]] = {}
    for text in texts:
        row = Row.of(text)
        runs_of_case = runs.setdefault((row.suite, row.case, row.passed), [])
        # Ours begins a run.
        if row.impl == "ours":
            runs_of_case.append([])
        if runs_of_case:
            runs_of_case[-1].append(row)

    entries: dict[tuple[str, str], list[Entry]] = {}
    for key in sorted(runs, key=_place):
        suite, _, passed = key
        entries.setdefault((suite, passed), []).append(_entry(runs[key]))
    newest = {key: each[-1][0].commit for key, each in runs.items()}
    measured = {(*key, row.impl) for key, each in runs.items() for run in each for row in run}
    # Who was tried again has the reason of the last time.
    reasons: dict[tuple[str, str, str, str], str] = {}
    for text in files.absent.rows():
        key = text["suite"], text["case"], text["pass"]
        is_old = text["commit"] != newest.get(key, text["commit"])
        is_here = (*key, text["impl"]) in measured
        if not (is_old or is_here or text["reason"] == WAITS):
            reasons[(*key, text["impl"])] = text["reason"]
    absent = Counter((impl, reason) for (*_, impl), reason in reasons.items())
    note = folder / "note.md"
    return Device(
        folder,
        texts[0]["device"] if texts else folder.name,
        entries,
        dict(sorted(absent.items())),
        note.read_text().strip() if note.exists() else "",
    )


def _entry(runs: list[list[Row]]) -> Entry:
    """The newest figures of the newest commit."""
    entry = Entry(runs[-1][0])
    for run in runs:
        if run[0].commit != entry.ours.commit:
            continue
        for row in run[1:]:
            entry.peers[row.impl] = row
            entry.ratios[row.impl] = row.ms / run[0].ms
    order = sorted(entry.peers, key=lambda name: (_index(IMPLS, name), name))
    entry.peers = {name: entry.peers[name] for name in order}
    return entry


def _place(key: tuple[str, str, str]) -> tuple:
    """As suites and their cases are written down; what is not, behind."""
    suite, case, passed = key
    cases = [each.name for each in SUITES[suite].cases] if suite in SUITES else []
    return (
        _index(list(SUITES), suite),
        suite,
        _index(PASSES, passed),
        _index(cases, case),
        case,
    )


def _index(order: tuple[str, ...] | list[str], name: str) -> int:
    return list(order).index(name) if name in order else len(order)

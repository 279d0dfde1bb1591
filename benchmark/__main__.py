"""Measures suites of cases, ours beside the peers, into CSV files: ``python -m benchmark``.

In: options (``--help``). Out: rows of ``results/<device>/results.csv`` as they come, a line for
each case. Called by ``make bench``. :mod:`benchmark.report` makes pages and plots of the files.

A restart goes on where the last run of the same commit ended. Statuses: 0, 1 if ours was wrong or
failed somewhere, 2 for options that make no sense. Where an implementation leaves the GPU unusable
for the process, or does not end, another process goes on.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from .cost import seconds
from .machine import Machine, describe
from .measure import PASSES, Broken, Measured, measure
from .peers import PEERS
from .problem import Problem
from .results import DEFAULT_FOLDER, GIVEN_UP, WAITS, Damaged, Results, Unit
from .suites import SUITES, Case
from .underway import Underway

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


# (rounds, milliseconds of a turn), if not given: the best figures, or the most within a budget.
TURNS, TURNS_OF_BUDGET = (5, 100.0), (3, 50.0)
# Whose time goes into compiling for each shape of tensors.
COMPILED = ("Flex",)
# Whose blocks are of so many tokens: of larger ones, each many of its own, a pass takes longest.
OWN_BLOCKS = {"VSA": 64}
# Who takes longest of those that are there for dense attention, and up to how many tokens it is
# asked within a budget.
LONGEST = {"FA2": 30720}
# What `main` returns where another process is to go on.
AGAIN = 3
# What ends by a user's interrupt returns, as shells have it.
INTERRUPTED = 130
# What a process does, and by which signals who is measured ends it.
PROCESS = "from benchmark.__main__ import process; process()"
ENDS = (signal.SIGALRM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class Job(NamedTuple):
    """A pass of a case, and the peers whose figures are wanted."""

    suite: str
    case: Case
    passed: str
    peers: list[str]

    def unit(self, name: str) -> Unit:
        """An implementation's."""
        return Unit(self.suite, self.case.name, self.passed, name)

    def seconds(self, args: argparse.Namespace) -> float:
        """About how long it takes."""
        backward = self.passed == "backward"
        return seconds(self.case, self.peers, backward, args.device, args.rounds, args.turn)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default=_default_device(), help="where to compute")
    add("--suite", nargs="+", choices=list(SUITES), help="all that are for the device, if none")
    add("--case", nargs="+", help="names or patterns, as 'random 0.2*'; all, if none")
    add(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        help="beside ours; all, if not given, but with a budget on a GPU without "
        f"{', '.join(COMPILED)}, which compiles for each shape, with {', '.join(OWN_BLOCKS)} "
        "only for blocks of its own size, and with "
        f"{', '.join(f'{name} up to {tokens} tokens' for name, tokens in LONGEST.items())}",
    )
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="of each case")
    often, long = (f"{a:g}, with a budget {b:g}" for a, b in zip(TURNS, TURNS_OF_BUDGET))
    add("--rounds", type=int, help=f"how often implementations take turns; {often}")
    add("--turn", type=float, help=f"milliseconds of a turn; {long}")
    add(
        "--patience",
        type=float,
        metavar="SECONDS",
        default=120.0,
        help="who needs longer, at anything, is given up for all cases of that pass",
    )
    add("--budget", type=float, metavar="SECONDS", help="no case begins that would end after it")
    add("--results", type=Path, default=DEFAULT_FOLDER, help="folder of results")
    add("--commit", help="what is measured, where git does not know")
    add("--given-up", action="store_true", help=argparse.SUPPRESS)
    add("--retry", action="store_true", help="who was absent or failed before, once more")
    add("--list", action="store_true", help="print what would be measured, and end")
    args = parser.parse_args(arguments)
    rounds, milliseconds = TURNS if args.budget is None else TURNS_OF_BUDGET
    args.rounds = rounds if args.rounds is None else args.rounds
    args.turn = milliseconds if args.turn is None else args.turn
    args.short = args.peers is None and args.budget is not None and args.device == "cuda"
    if args.peers is None:
        args.peers = [name for name in PEERS if not (args.short and name in COMPILED)]
    if not args.patience > 0:
        parser.error(f"--patience must be positive, got {args.patience:g}")
    if args.rounds < 1:
        parser.error(f"--rounds must be positive, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for suite in args.suite or ():
        if args.device not in SUITES[suite].devices:
            parser.error(f"--suite {suite} is for {' and '.join(SUITES[suite].devices)}")
    if not chosen(args):
        parser.error(f"--case {' '.join(args.case)}: there is none in these suites")
    return args


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen(args: argparse.Namespace) -> list[Job]:
    """What is asked for, the most important first; of these one of each suite after the other."""
    suites = args.suite or [
        name
        for name, suite in SUITES.items()
        if args.device in suite.devices and not suite.on_request
    ]
    cases = [
        (name, each)
        for name in suites
        for each in SUITES[name].cases
        if not args.case or any(fnmatchcase(each.name, pattern) for pattern in args.case)
    ]
    before: Counter[tuple[str, int]] = Counter()
    places = {}
    for name, each in cases:
        kind = name, each.importance
        places[name, each.name] = each.importance, before[kind]
        before[kind] += 1
    cases.sort(key=lambda pair: places[pair[0], pair[1].name])
    return [Job(*pair, passed, peers(pair[1], args)) for pair in cases for passed in args.passes]


def peers(case: Case, args: argparse.Namespace) -> list[str]:
    """Those of a case."""
    if not args.short:
        return args.peers
    fits = {name: case.q_block <= block for name, block in OWN_BLOCKS.items()}
    fits |= {name: case.q_len <= tokens for name, tokens in LONGEST.items()}
    return [name for name in args.peers if fits.get(name, True)]


def remaining(
    jobs: list[Job], done: set[Unit], given_up: Set[tuple[str, str]] = frozenset()
) -> list[Job]:
    """Without what is there, and who is given up. Ours is measured again beside a peer that is
    not there."""
    left = []
    for job in jobs:
        who = (name for name in job.peers if (name, job.passed) not in given_up)
        units = {name: job.unit(name) for name in ("ours", *who)}
        missing = [name for name, unit in units.items() if unit not in done]
        if missing:
            left.append(job._replace(peers=[name for name in missing if name != "ours"]))
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    try:
        machine = describe(torch.device(args.device), args.commit)
        folder = args.results / machine.folder
        results, underway = Results(folder), Underway(folder / "underway.json", args.patience)
        if args.given_up:
            results.add_absent(underway.left(), GIVEN_UP, machine)
        done = results.finished(machine, args.retry)
        left = remaining(chosen(args), done, results.given_up(machine, args.retry))
    except (ValueError, Damaged) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if args.list:
        for job in left:
            who = " ".join(["ours", *job.peers])
            print(f"{job.suite}: {job.case.name}, {job.passed}: {who}, {job.seconds(args):.1f} s")
        print(f"{len(left)} passes, about {sum(job.seconds(args) for job in left):.0f} s")
        return 0
    print(f"{machine.device} ({machine.driver}), torch {machine.torch}, {machine.commit}")
    return run(left, results, machine, args, underway)


def run(
    jobs: list[Job],
    results: Results,
    machine: Machine,
    args: argparse.Namespace,
    underway: Underway,
) -> int:
    """Measures all, or what the budget allows."""
    start, status = time.monotonic(), 0
    missing: set[str] = set()
    bar = tqdm(total=len(jobs), unit="pass", disable=None) if tqdm else None
    say = bar.write if bar is not None else print
    # Seconds as they were told, of what is finished, and of all that is left.
    told, left = 0.0, sum(job.seconds(args) for job in jobs)
    finished = 0
    for job in jobs:
        elapsed = time.monotonic() - start
        own = job.seconds(args)
        # What is told errs by the machine, as it did before.
        scale = elapsed / told if told else 1.0
        left = max(0.0, left - own)
        if args.budget and finished and elapsed + scale * own > args.budget:
            # A smaller one may still fit.
            continue
        name = f"{job.suite}: {job.case.name}, {job.passed}"
        try:
            problem = Problem.of(job.case, torch.device(args.device))
            measured = measure(
                problem,
                job.peers,
                job.passed == "backward",
                args.rounds,
                args.turn,
                lambda name, job=job: underway.measuring(job.unit(name)),
            )
        except Broken as broken:
            results.add_absent(job.unit(broken.name), broken.reason, machine)
            say(f"{name}: {broken}. Start again: it goes on behind.")
            return AGAIN
        keep(job, problem, measured, results, machine)
        finished, told = finished + 1, told + own
        # For those who see no bar.
        elapsed = time.monotonic() - start
        ahead = elapsed / told * left
        if args.budget:
            ahead = min(ahead, max(0.0, args.budget - elapsed))
        say(f"{name}: {in_words(measured)} [{finished}/{len(jobs)}, {ahead:.0f} s left]")
        status |= "ours" in measured.failed
        missing |= {f"{each} {reason}" for each, reason in measured.absent.items()}
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    if finished < len(jobs):
        print(f"the budget ends here: {finished} of {len(jobs)} measured")
    for each in sorted(missing):
        print(f"absent: {each}")
    return status


def keep(
    job: Job, problem: Problem, measured: Measured, results: Results, machine: Machine
) -> None:
    """Into the files."""
    if measured.figures:
        results.add(job.suite, job.passed, problem, measured.figures, machine)
    for name, reason in (measured.absent | measured.failed).items():
        results.add_absent(job.unit(name), reason, machine)
    if not measured.figures:
        # Without ours, nobody was tried.
        for name in job.peers:
            results.add_absent(job.unit(name), WAITS, machine)


def in_words(measured: Measured) -> str:
    """For the terminal: milliseconds, and our speed beside each peer's."""
    if "ours" in measured.absent:
        return f"absent: flex_block_attn {measured.absent['ours']}"
    parts = []
    for name, figures in measured.figures.items():
        ratio = figures.ms / measured.figures["ours"].ms
        parts.append(f"{name} {figures.ms:.3f} ms" + f" ({ratio:.2f}x)" * (name != "ours"))
    return ", ".join(parts + [f"{name} {reason}" for name, reason in measured.failed.items()])


def goes_on(arguments: Sequence[str], elapsed: float) -> list[str]:
    """Arguments of the process that goes on: the budget is what is left of it."""
    budget = options(arguments).budget
    rest = [] if budget is None else ["--budget", f"{max(1.0, budget - elapsed):.0f}"]
    return [*arguments, *rest]


def process() -> None:
    """Ends this process with the status of :func:`main`."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def processes(arguments: Sequence[str]) -> int:
    """Has processes do :func:`main`, another one while one is to go on. The last status."""
    # The process is ended with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, more = time.monotonic(), list(arguments)
    while True:
        ended = subprocess.run([sys.executable, "-c", PROCESS, *more]).returncode
        if ended >= 0 and ended != AGAIN:
            return ended
        more = goes_on(arguments, time.monotonic() - began)
        if -ended in ENDS:
            name = signal.Signals(-ended).name
            print(f"benchmark: who was measured ended it by {name} and is given up", flush=True)
            more.append("--given-up")
        elif ended < 0:
            print(f"benchmark: ended by signal {-ended}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    try:
        sys.exit(processes(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("benchmark: stopped; what is finished is kept")

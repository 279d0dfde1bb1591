"""Our attention on a GPU beside every peer that is present, in one run.

In: nothing (options below). Out: a table of TFLOP/s of the kept blocks and ratios; with ``--csv``
every figure. Run as ``python -m benchmark.gpu --help``.

Outputs are compared first. Then ours and the peers take turns, ``--rounds`` times; a turn is the
median of some calls between events, a figure the median of turns. The card lowers its clock under
load: only figures of one run go together.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise

import torch

from .peers import PEERS, Absent, Attention, Problem, ours

# Name: heads, tokens, head dimension, tokens of a block, density.
CASES: dict[str, tuple[int, int, int, int, float]] = {
    "dense h24 s15360": (24, 15360, 128, 128, 1.0),
    "dense h24 s30720": (24, 30720, 128, 128, 1.0),
    "384 0.6 h24 s30720": (24, 30720, 128, 384, 0.6),
    "384 0.2 h24 s30720": (24, 30720, 128, 384, 0.2),
    "128 0.2 h24 s30720": (24, 30720, 128, 128, 0.2),
    "64 0.2 h24 s30720": (24, 30720, 128, 64, 0.2),
    "64 0.1 h24 s30720": (24, 30720, 128, 64, 0.1),
    "dense h1 s11520": (1, 11520, 128, 128, 1.0),
    "dense h1 s30720": (1, 30720, 128, 128, 1.0),
    "dense h1 s61440": (1, 61440, 128, 128, 1.0),
    "384 0.6 h1 s11520": (1, 11520, 128, 384, 0.6),
    "384 0.6 h1 s30720": (1, 30720, 128, 384, 0.6),
    "384 0.6 h1 s61440": (1, 61440, 128, 384, 0.6),
    "dense h24 s15360 d64": (24, 15360, 64, 128, 1.0),
}


def turn(call: Callable[[], object], milliseconds: float) -> float:
    """Median milliseconds of a call on the GPU, over about so many of them, issued ahead of
    it, so that it need not wait for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    count = max(5, min(300, math.ceil(milliseconds / start.elapsed_time(end))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    # The first runs while the host is not ahead yet.
    taken = [a.elapsed_time(b) for a, b in pairwise(marks)][1:]
    return statistics.median(taken)


def measure(
    problem: Problem, names: list[str], backward: bool, rounds: int, milliseconds: float
) -> dict:
    """TFLOP/s by name, ours first; or why a peer has none."""
    dout = torch.randn_like(problem.q)

    def prepare(attention: Attention) -> Callable[[], object]:
        return attention.backward(dout) if backward else attention.forward()

    mine = ours(problem)
    expected = mine.output()
    calls, absent = {"ours": prepare(mine)}, {}
    for name in names:
        try:
            attention = PEERS[name](problem)
            error = (attention.output() - expected).float().norm() / expected.float().norm()
            if not error < 2e-2:
                raise Absent(f"computes something else (relative difference {error:.1e})")
            call = prepare(attention)
            call()
            calls[name] = call
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # a peer's own failure is a line of the table
            absent[name] = f"fails: {type(error).__name__}: {error}".split("\n")[0][:200]
    del expected
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            turns[name].append(turn(call, milliseconds))
    # The backward pass makes five products where the forward makes two.
    work = problem.operations / 1e9 * (2.5 if backward else 1)
    return {name: work / statistics.median(ms) for name, ms in turns.items()} | absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backward", action="store_true", help="the backward pass alone")
    parser.add_argument("--rounds", type=int, default=5, help="how often they take turns")
    parser.add_argument("--turn", type=float, default=60, help="milliseconds of a turn")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--csv", help="a file for every figure")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)}")
    args = parser.parse_args()
    torch.manual_seed(0)
    direction = "backward" if args.backward else "forward"
    device = torch.cuda.get_device_name()
    print(f"{direction}, {device}, torch {torch.__version__}, {args.rounds} rounds")
    print(f"{'case':24} {'ours':>6} " + " ".join(f"{name:>6}" for name in args.peers) + "  best")
    rows, reasons = [], set()
    for case in args.cases or CASES:
        problem = Problem.random(*CASES[case])
        figures = measure(problem, args.peers, args.backward, args.rounds, args.turn)
        rates = {name: x for name, x in figures.items() if isinstance(x, float)}
        reasons |= {f"{name} {x}" for name, x in figures.items() if isinstance(x, str)}
        best = max((rates[name] for name in args.peers if name in rates), default=float("nan"))
        cells = " ".join(f"{rates.get(name, float('nan')):6.0f}" for name in args.peers)
        print(f"{case:24} {rates['ours']:6.0f} {cells}  {rates['ours'] / best:.2f}", flush=True)
        rows += [
            {"case": case, "pass": direction, "impl": name, "tflops": rate}
            for name, rate in rates.items()
        ]
        torch.cuda.empty_cache()
    for reason in sorted(reasons):
        print(reason, file=sys.stderr)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ["case", "pass", "impl", "tflops"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

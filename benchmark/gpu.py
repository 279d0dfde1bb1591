"""Our attention on a GPU beside every peer that is present, in one run: a quick look.

In: nothing (options below). Out: a table of TFLOP/s of the kept blocks and ratios; with ``--csv``
every figure. Run as ``python -m benchmark.gpu --help``. (``python -m benchmark`` measures suites,
with memory and masks, and keeps what it measured.)

Outputs are compared first. Then ours and the peers take turns, ``--rounds`` times; a turn is the
median of some calls between events, a figure the median of turns. The card lowers its clock under
load: only figures of one run go together. It does so by swings, the first of them in the first
two seconds: turns are short and many, and the first do not count.
"""

import argparse
import csv
import sys

import torch

from .measure import measure
from .peers import PEERS
from .problem import Problem
from .suites import SUITES

CASES = {case.name: case for case in SUITES["bars"].cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backward", action="store_true", help="the backward pass alone")
    parser.add_argument("--rounds", type=int, default=24, help="how often they take turns")
    parser.add_argument("--turn", type=float, default=50, help="milliseconds of a turn")
    parser.add_argument("--warm-up", type=float, default=2000, help="milliseconds of turns before")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--csv", help="a file for every figure")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)}")
    args = parser.parse_args()
    direction = "backward" if args.backward else "forward"
    device = torch.cuda.get_device_name()
    print(f"{direction}, {device}, torch {torch.__version__}, {args.rounds} rounds")
    print(f"{'case':24} {'ours':>6} " + " ".join(f"{name:>6}" for name in args.peers) + "  best")
    rows, reasons = [], set()
    for case in args.cases or CASES:
        problem = Problem.of(CASES[case], torch.device("cuda"))
        measured = measure(
            problem, args.peers, args.backward, args.rounds, args.turn, warm_up=args.warm_up
        )
        work = problem.operations(args.backward) / 1e9
        rates = {name: work / figures.ms for name, figures in measured.figures.items()}
        reasons |= {f"{name} {x}" for name, x in (measured.absent | measured.failed).items()}
        none = float("nan")
        own, best = rates.get("ours", none), max((rates.get(x, 0) for x in args.peers), default=0)
        cells = " ".join(f"{rates.get(name, none):6.0f}" for name in args.peers)
        print(f"{case:24} {own:6.0f} {cells}  {own / (best or none):.2f}", flush=True)
        rows += [
            {"case": case, "pass": direction, "impl": name, "tflops": rate}
            for name, rate in rates.items()
        ]
    for reason in sorted(reasons):
        print(reason, file=sys.stderr)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ["case", "pass", "impl", "tflops"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Single kernels on a GPU beside torch's own, in one run. (Attention: :mod:`benchmark.gpu`.)

In: the developers' tool, built (``cargo build --release -p flex-block-attn-lab``). Out: a table of
milliseconds, rates and ratios. Run as ``python -m benchmark.kernels --help``.

Ours and torch's take turns, ``--rounds`` times, each round a process of the tool and then torch;
a round's figure is the median of its calls by events, the table's the median of rounds. Matrix
products are compared in TFLOP/s; plans with the same lists made by torch's sums and sorts; what
only moves memory with torch's copy, in TB/s read and written.
"""

import argparse
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .clock import timed

CUDA = torch.device("cuda")


@dataclass
class Figure:
    """A call's milliseconds, and its operations or bytes."""

    ms: float
    work: float


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def product(size: int) -> Figure:
    a, b = numbers(size, size), numbers(size, size)
    out = torch.empty_like(a)
    return Figure(timed(lambda: torch.matmul(a, b, out=out), CUDA), 2.0 * size**3)


def lists(mask: torch.Tensor) -> list[torch.Tensor]:
    """Counts, order and lists of a mask's rows, by torch's own sums and sorts."""
    counts = mask.sum(-1, dtype=torch.int32)
    order = torch.argsort(counts, dim=-1, descending=True, stable=True)
    entries = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
    return [counts, order.to(torch.int32), entries.to(torch.int32)]


def plan(heads: int, rows: int, columns: int) -> Figure:
    mask = torch.rand(1, heads, rows, columns, device="cuda") < 0.3
    ms = timed(lambda: (lists(mask), lists(mask.mT)), CUDA, calls=20)
    return Figure(ms, mask.numel())


def copy(mebibytes: int) -> Figure:
    source = torch.randint(0, 255, (mebibytes << 20,), device="cuda", dtype=torch.uint8)
    to = torch.empty_like(source)
    return Figure(timed(lambda: to.copy_(source), CUDA), 2.0 * source.numel())


# A case of ours, and what stands beside it: its name and how it is measured.
PEERS: dict[str, tuple[str, Callable[[], Figure]]] = {
    "gemm 8192": ("matmul", lambda: product(8192)),
    "plan h24 240x240": ("sums and sorts", lambda: plan(24, 240, 240)),
    "plan h16 361x361": ("sums and sorts", lambda: plan(16, 361, 361)),
    "delta h24 s30720": ("copy", lambda: copy(256)),
    "pool h24 s30720 b64": ("copy", lambda: copy(256)),
    "pool h24 s30720 b384": ("copy", lambda: copy(256)),
}


def ours(tool: str, case: str) -> Figure:
    output = subprocess.run([tool, "time", case], stdout=subprocess.PIPE, text=True, check=True)
    name, median, _, _, work = output.stdout.strip().split("\t")
    if name != case:
        raise ValueError(f"the tool measured {name!r}, not {case!r}")
    return Figure(float(median), float(work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", default="target/release/lab", help="the built tool")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two take turns")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(PEERS)}")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.rounds} rounds")
    print(f"{'case':26} {'ours ms':>9} {'T/s':>7}  {'peer ms':>9} {'T/s':>7}  {'ratio':>6}  peer")
    for case in args.cases or PEERS:
        peer, measure = PEERS[case]
        rounds = [(ours(args.tool, case), measure()) for _ in range(args.rounds)]
        mine, theirs = (
            Figure(statistics.median(f.ms for f in side), side[0].work)
            for side in zip(*rounds, strict=True)
        )
        rates = [figure.work / figure.ms / 1e9 for figure in (mine, theirs)]
        print(
            f"{case:26} {mine.ms:9.4f} {rates[0]:7.3f}  {theirs.ms:9.4f} {rates[1]:7.3f}"
            f"  {rates[0] / rates[1]:6.2f}  {peer}",
            flush=True,
        )


if __name__ == "__main__":
    main()

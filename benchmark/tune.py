"""Which kernel is the fastest for which mask: how the choice in ``crates/kernels`` was found.

In: the built tool ``lab``, which times every kernel that takes a mask. Out: for each mask a table
of kernels, the fastest first, with speeds relative to it; one is marked as chosen. Run as
``python -m benchmark.tune`` on a machine with a Hopper GPU, after
``cargo build --release -p flex-block-attn-lab``.

Kernels take turns, twice. A kernel's figure is its shortest time: the card lowers its clock under
load, and by how much differs from one call to the next; what a kernel needs at the highest clock
does not.
"""

import argparse
import subprocess
from collections import defaultdict


def times(tool: str, mask: str) -> dict[str, dict[str, float]]:
    """Shortest milliseconds by mask and kernel, of one run of all."""
    output = subprocess.run(
        [tool, "time", mask], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for line in output.splitlines():
        name, _, shortest, *_ = line.split("\t")
        name, before, kernel = name.rpartition(" forward_")
        if before:
            kernels = found[name]
            kernels[kernel] = min(float(shortest), kernels.get(kernel, float("inf")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", default="target/release/lab", help="the built tool")
    parser.add_argument(
        "masks",
        nargs="*",
        metavar="MASK",
        default=["dense", "random"],
        help="the start of masks' names, as `lab time` has them",
    )
    args = parser.parse_args()
    for start in args.masks:
        for mask, kernels in times(args.tool, start).items():
            print(mask)
            fastest = min(kernels.values())
            for kernel, ms in sorted(kernels.items(), key=lambda item: item[1]):
                print(f"  {ms:9.4f} ms  {fastest / ms:5.3f}  {kernel}", flush=True)


if __name__ == "__main__":
    main()

"""Our CPU backend beside torch's scaled_dot_product_attention, in one run: a quick look.

In: nothing (options below). Out: a table of milliseconds, GFLOP/s of the computed blocks and
ratios. Run as ``python -m benchmark.cpu --help``. (``python -m benchmark --device cpu`` measures a
suite, and keeps what it measured.)

Each figure is the median of alternating calls (ours, torch's, ours, ...), after a check that both
agree; forward counts 4 S^2 D operations for a head of a dense mask, backward 2.5 times that.
"""

import argparse

import torch

from .measure import Figures, measure
from .problem import Problem
from .suites import Case, case


def measured(of: Case, peers: list[str], backward: bool, repeats: int) -> dict[str, Figures]:
    """Figures by name; the run ends if ours is wrong."""
    problem = Problem.of(of, torch.device("cpu"))
    # Turns of one call behind one that warms up.
    found = measure(problem, peers, backward, repeats, milliseconds=0)
    if found.failed:
        raise SystemExit("; ".join(f"{name} {reason}" for name, reason in found.failed.items()))
    return found.figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.cpu",
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("--threads", torch.get_num_threads(), "threads for both"),
        ("--heads", 4, "heads of q, k and v"),
        ("--tokens", 4096, "length of q, k and v"),
        ("--head-dim", 128, "elements of a head"),
        ("--block", 128, "tokens of a block"),
        ("--repeats", 7, "timed calls of each, the median counts"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument("--density", type=float, default=0.25, help="of the sparse mask")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],
        help="of q, k and v",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    heads, tokens, dim = options.heads, options.tokens, options.head_dim
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{options.threads} threads; batch 1, {heads} heads, {tokens} tokens, head_dim {dim}"
    )
    blocks = -(-tokens // options.block)
    density = max(1, round(options.density * blocks)) / blocks
    print(f"{'':28}{'torch dense':>22}{'ours dense':>22}{f'ours, density {density:.2f}':>22}")
    for dtype in options.dtypes:
        shape = {"head_dim": dim, "block": options.block, "dtype": dtype}
        dense = case(heads, tokens, **shape)
        sparse = case(heads, tokens, "random", options.density, **shape)
        for what, factor in (("forward", 1.0), ("backward", 2.5)):
            backward = what == "backward"
            both = measured(dense, ["SDPA"], backward, options.repeats)
            kept = measured(sparse, [], backward, options.repeats)
            ms = both["SDPA"].ms, both["ours"].ms, kept["ours"].ms
            operations = factor * 4 * heads * tokens**2 * dim
            cells = "".join(
                f"{t:9.1f} ms {operations * share / t / 1e6:5.0f} G/s"
                for t, share in zip(ms, (1.0, 1.0, density), strict=True)
            )
            print(f"{dtype:10}{what:18}{cells}")
            print(
                f"{'':10}{'':18}dense: {ms[0] / ms[1]:.2f}x torch's speed; "
                f"sparse: {ms[2] / ms[1]:.3f} of our dense time"
            )


if __name__ == "__main__":
    main()

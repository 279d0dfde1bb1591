"""Our CPU backend beside torch's scaled_dot_product_attention, in one run.

In: nothing (options below). Out: a table of milliseconds, GFLOP/s of the computed blocks and
ratios. Run by ``make bench``, or ``python -m benchmark.cpu --help``.

Each figure is the median of alternating calls (ours, torch's, ours, ...), after a check that both
agree; forward counts 4 S^2 D operations for a head of a dense mask, backward 2.5 times that.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flex_block_attn import BlockMask, flex_block_attn

Call = Callable[[], object]


@dataclass
class Problem:
    """Random q, k, v and output gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def random(cls, shape: Sequence[int], dtype: torch.dtype) -> "Problem":
        torch.manual_seed(0)
        return cls(*(torch.randn(*shape).to(dtype) for _ in range(4)))

    def forward(self, attention: Callable[..., Tensor]) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return attention(self.q, self.k, self.v)

        return call

    def backward(self, attention: Callable[..., Tensor]) -> Call:
        inputs = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        out = attention(*inputs)
        return lambda: torch.autograd.grad(out, inputs, self.dout, retain_graph=True)


def alternate(calls: Sequence[Call], repeats: int) -> list[float]:
    """Median seconds of each call; they take turns, so that a change of clock hits all."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def check(ours: object, torchs: object, tolerance: float) -> None:
    """Both give the same, or the run ends."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, torchs)), strict=True)
    for a, b in pairs:
        error = (a.double() - b.double()).norm() / b.double().norm()
        if not error <= tolerance:
            raise SystemExit(f"wrong results are not timed: ours are off by {error:.2e}")


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

    heads, tokens, dim, block = options.heads, options.tokens, options.head_dim, options.block
    sizes = tokens, tokens, block, block
    full = BlockMask.full(*sizes)
    sparse = BlockMask.random(*sizes, density=options.density, seed=0, heads=heads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{options.threads} threads; batch 1, {heads} heads, {tokens} tokens, head_dim {dim}"
    )
    density = f"ours, density {sparse.density():.2f}"
    print(f"{'':28}{'torch dense':>22}{'ours dense':>22}{density:>22}")
    for name in options.dtypes:
        dtype = getattr(torch, name)
        problem = Problem.random((1, heads, tokens, dim), dtype)
        implementations = (
            scaled_dot_product_attention,
            lambda q, k, v: flex_block_attn(q, k, v, full),
            lambda q, k, v: flex_block_attn(q, k, v, sparse),
        )
        for what, prepare, factor in (
            ("forward", problem.forward, 1.0),
            ("backward", problem.backward, 2.5),
        ):
            calls = [prepare(implementation) for implementation in implementations]
            check(calls[1](), calls[0](), 1e-4 if dtype == torch.float32 else 2e-2)
            seconds = alternate(calls, options.repeats)
            operations = factor * 4 * heads * tokens**2 * dim
            cells = "".join(
                f"{t * 1e3:9.1f} ms {operations * share / t / 1e9:5.0f} G/s"
                for t, share in zip(seconds, (1.0, 1.0, sparse.density()), strict=True)
            )
            print(f"{name:10}{what:18}{cells}")
            print(
                f"{'':10}{'':18}dense: {seconds[0] / seconds[1]:.2f}x torch's speed; "
                f"sparse: {seconds[2] / seconds[1]:.3f} of our dense time"
            )


if __name__ == "__main__":
    main()

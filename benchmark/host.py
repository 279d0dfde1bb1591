"""What a call costs the host: the microseconds until it returns, the GPU's work being small.

In: nothing. Out: a table. Run as ``python -m benchmark.host`` on a machine with a Hopper GPU.

Each figure is the median of repeats, of each of which the calls are counted and divided by; the
GPU is waited for between repeats only, and never has more to do than the calls take to issue.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from flex_block_attn import BlockMask, flex_block_attn, flex_block_attn_func


def microseconds(call: Callable[[], object], calls: int, repeats: int) -> float:
    """Of a call, once warm."""
    for _ in range(calls):
        call()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=500, help="of a repeat")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    q, k, v = (torch.randn(1, 2, 256, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    kept = BlockMask(torch.ones(2, 2, dtype=torch.bool, device="cuda"), 256, 256, 128, 128)
    blocks = torch.ones(2, 2, dtype=torch.bool, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "flex_block_attn, plan kept": lambda: flex_block_attn(q, k, v, kept),
        "flex_block_attn_func, planned anew": lambda: flex_block_attn_func(
            q, k, v, 128, 128, blocks
        ),
        "torch scaled_dot_product_attention": lambda: scaled_dot_product_attention(q, k, v),
        "torch empty_like, three times": lambda: [torch.empty_like(q) for _ in range(3)],
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'call':38} {'no_grad us':>10} {'inference_mode us':>18}")
    for name, call in calls.items():
        figures = []
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                figures.append(microseconds(call, args.calls, args.repeats))
        print(f"{name:38} {figures[0]:10.1f} {figures[1]:18.1f}", flush=True)


if __name__ == "__main__":
    main()

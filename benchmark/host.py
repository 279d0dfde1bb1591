"""What a call costs the host: the microseconds until it returns, the GPU's work being small.

In: nothing. Out: a table. Run as ``python -m benchmark.host`` on a machine with a Hopper GPU.

Each figure is the median of repeats, of each of which the calls are counted and divided by; the
GPU is waited for between repeats only, and never has more to do than the calls take to issue.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from flex_block_attn import BlockMask, flex_block_attn, flex_block_attn_func

# Of q, k and v.
Attention = Callable[..., Any]


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
    calls: dict[str, Attention] = {
        "flex_block_attn, plan kept": lambda q, k, v: flex_block_attn(q, k, v, kept),
        "flex_block_attn_func, planned anew": lambda q, k, v: flex_block_attn_func(
            q, k, v, 128, 128, blocks
        ),
        "torch scaled_dot_product_attention": scaled_dot_product_attention,
        "torch empty_like, three times": lambda *inputs: [torch.empty_like(x) for x in inputs],
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds")
    columns = "no_grad", "inference_mode", "with gradients", "backward"
    print(f"{'call':38}" + "".join(f"{column:>16}" for column in columns))

    def timed(call: Callable[[], object]) -> str:
        return f"{microseconds(call, args.calls, args.repeats):16.1f}"

    for name, attention in calls.items():
        cells = []
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                cells.append(timed(lambda: attention(q, k, v)))
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs)
        if isinstance(out, torch.Tensor):
            cells.append(timed(lambda: attention(*inputs)))
            backward = partial(torch.autograd.grad, out, inputs, out.detach(), retain_graph=True)
            cells.append(timed(backward))
        print(f"{name:38}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()

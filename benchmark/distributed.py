"""Attention divided between GPUs: what each has to compute and is sent, and what that gains.

In: nothing (options below). Out: tables. Two ways to run it:

    python -m benchmark.distributed --simulate                     # plans alone; needs no GPU
    torchrun --nproc-per-node 2 -m benchmark.distributed           # times, beside one GPU

Simulated bytes are those of a forward pass in bfloat16, and count what comes to a rank; a grid of
``8 x 8`` has plans of 8 ranks for the heads of each of 8. Times are medians of calls that all ranks
begin together, of the slowest rank; one GPU computes the same attention, and outputs and gradients
are compared with its. Without GPUs (gloo) only the comparison means anything: say ``--small``.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flex_block_attn import BlockMask, flex_block_attn
from flex_block_attn.distributed import ContextPlan, Layout, context_attention, ulysses_attention
from flex_block_attn.distributed.balance import balance
from flex_block_attn.distributed.ulysses import chunk_lengths, head_parts

Tiles = tuple[int, int, int]


def ssta(
    tiles: Tiles, tile_tokens: int, heads: int, chosen: int, text: int, near: bool
) -> BlockMask:
    """A mask as SSTA makes them: a window of 3 x 3 x 3 tiles, the tiles that scores choose in each
    head, and text. Scores are random; ``near`` lowers them with the distance of tiles, as the
    likeness of tiles in a video falls."""
    window = BlockMask.sta(
        tiles, (3, 3, 3), tile_tokens=tile_tokens, text_tokens=text * tile_tokens
    )
    count = tiles[0] * tiles[1] * tiles[2]
    scores = torch.randn(heads, count, count, generator=torch.Generator().manual_seed(0))
    if near:
        places = torch.cartesian_prod(*map(torch.arange, tiles)).float()
        scores -= torch.cdist(places, places)
    blocks = window.blocks.repeat(1, heads, 1, 1)
    choice = torch.zeros(heads, count, count, dtype=torch.bool)
    blocks[0, :, :count, :count] |= choice.scatter_(2, scores.topk(chosen).indices, True)
    return BlockMask(blocks, window.q_len, window.kv_len, tile_tokens, tile_tokens)


@dataclass
class Case:
    """An attention."""

    mask: BlockMask
    heads: int
    head_dim: int


def cases(small: bool) -> dict[str, Case]:
    """720p of 121 frames (31 x 45 x 80 tokens in tiles of 6 x 8 x 8) with 6 blocks of text, and
    dense attention; or the same in small."""
    if small:
        tiles, size, heads, dim, dense = (2, 3, 4), 16, 4, 32, 960
    else:
        tiles, size, heads, dim, dense = (6, 6, 10), 384, 24, 128, 61440
    chosen = max(1, tiles[0] * tiles[1] * tiles[2] * 32 // 360)
    window = BlockMask.sta(tiles, (3, 3, 3), tile_tokens=size, text_tokens=6 * size)
    block = size // 3 if size == 384 else size
    full = BlockMask.full(dense, dense, block, block)
    return {
        "SSTA, near tiles": Case(ssta(tiles, size, heads, chosen, 6, near=True), heads, dim),
        "SSTA, any tiles": Case(ssta(tiles, size, heads, chosen, 6, near=False), heads, dim),
        "STA": Case(window, heads, dim),
        "SSTA, 1 head": Case(ssta(tiles, size, 1, chosen, 6, near=True), 1, dim),
        "dense": Case(full, heads, dim),
        "dense, 1 head": Case(full, 1, dim),
    }


# --- plans ---------------------------------------------------------------------------------------


def simulate(of: dict[str, Case], sizes: Sequence[int]) -> None:
    """Prints a line for each case and division."""
    print(
        f"{'case':18} {'ranks':>5} {'tokens x heads':>14} {'balance':>7} {'MB in':>8} "
        f"{'MB in, most':>11} {'MB in a ring':>12} {'share':>6}"
    )
    for name, case in of.items():
        for ranks in sizes:
            for parts in (1, 2, 4, 8):
                if ranks % parts or parts > case.heads or ranks // parts < 2:
                    continue
                print_division(name, case, ranks // parts, parts)


def print_division(name: str, case: Case, contexts: int, parts: int) -> None:
    layout = Layout.balanced(case.mask, contexts)
    plan = ContextPlan(case.mask, layout=layout)
    loads, received, ring = [], [], []
    for heads in head_parts(case.heads, parts):
        of_heads = plan.of_heads(heads)
        report = of_heads.report(heads=len(heads), head_dim=case.head_dim)
        for number, rank in enumerate(report.ranks):
            # q, k, v and the output change ranks by heads: all but a rank's own part of each.
            tokens = layout.count(number) * case.head_dim * 2
            by_heads = 4 * tokens * len(heads) * (parts - 1) // parts
            loads.append(rank.blocks * len(heads))
            received.append(rank.bytes_in + by_heads)
            ring.append(rank.ring_bytes + by_heads)
    mean = statistics.mean(received)
    print(
        f"{name:18} {contexts * parts:5} {f'{contexts} x {parts}':>14} "
        f"{balance(torch.tensor(loads)):7.3f} {mean / 1e6:8.1f} {max(received) / 1e6:11.1f} "
        f"{statistics.mean(ring) / 1e6:12.1f} {100 * mean / statistics.mean(ring):5.1f}%",
        flush=True,
    )


# --- times ---------------------------------------------------------------------------------------


def measure(of: dict[str, Case], repeats: int) -> None:
    """Prints a line for each case and division, on rank 0."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    say(f"{ranks} ranks on {torch.cuda.get_device_name() if on_gpu else 'CPUs'}")
    say(
        f"{'case':18} {'divided by':>10} {'forward ms':>20} {'gain':>5} {'with backward ms':>20} "
        f"{'gain':>5} {'error':>8} {'MB in':>7} {'in a ring':>9}"
    )
    for name, case in of.items():
        mask = case.mask.to(device)
        torch.manual_seed(0)
        shape = 1, case.heads, mask.q_len, case.head_dim
        dtype = torch.bfloat16 if on_gpu else torch.float32
        q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        one = [x.requires_grad_() for x in (q, k, v)]
        alone = timed(lambda *x: flex_block_attn(*x, mask), one, dout, repeats, device)
        expected = results(lambda *x: flex_block_attn(*x, mask), one, dout)

        plan = ContextPlan(case.mask, ranks)
        report = plan.report(
            heads=case.heads, head_dim=case.head_dim, itemsize=q.element_size()
        ).ranks[rank]
        by_tokens = plan.layout.q_tokens(rank).to(device)
        lengths = chunk_lengths(mask.q_len, ranks)
        start = sum(lengths[:rank])
        by_heads = torch.arange(start, start + lengths[rank], device=device)
        divisions: list[tuple[str, Tensor, Callable[..., Tensor], tuple[int, int]]] = [
            (
                "tokens",
                by_tokens,
                lambda *x, plan=plan: context_attention(*x, plan),
                (report.bytes_in, report.ring_bytes),
            )
        ]
        if case.heads >= ranks:
            moved = 4 * q.numel() * q.element_size() * (ranks - 1) // ranks**2
            divisions.append(
                (
                    "heads",
                    by_heads,
                    lambda *x, mask=mask: ulysses_attention(*x, mask),
                    (moved, report.ring_bytes),
                )
            )
        for kind, tokens, attention, (moved, ring) in divisions:
            local = [x.detach().index_select(2, tokens).requires_grad_() for x in one]
            local_dout = dout.index_select(2, tokens)
            got = results(attention, local, local_dout)
            wanted = [x.index_select(2, tokens) for x in expected]
            error = max(
                ((a.float() - b.float()).norm() / b.float().norm()).item()
                for a, b in zip(got, wanted, strict=True)
            )
            error = slowest(error, device)
            both = timed(attention, local, local_dout, repeats, device)
            figures = [
                f"{before:9.2f} -> {after:7.2f} {before / after:5.2f}"
                for before, after in zip(alone, both, strict=True)
            ]
            say(
                f"{name:18} {kind:>10} {figures[0]:>26} {figures[1]:>26} {error:8.1e} "
                f"{moved / 1e6:7.1f} {ring / 1e6:9.1f}"
            )
    dist.destroy_process_group()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def slowest(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    most = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def results(attention: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def timed(
    attention: Callable[..., Tensor],
    inputs: list[Tensor],
    dout: Tensor,
    repeats: int,
    device: torch.device,
) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of one with its backward pass, of the slowest rank."""

    def forward() -> None:
        with torch.no_grad():
            attention(*inputs)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    figures = []
    for call in (forward, lambda: results(attention, inputs, dout)):
        taken = []
        for number in range(repeats + 2):
            wait()
            dist.barrier()
            start = time.perf_counter()
            call()
            wait()
            # The first two calls warm up.
            if number >= 2:
                taken.append(slowest(1e3 * (time.perf_counter() - start), device))
        figures.append(statistics.median(taken))
    return figures[0], figures[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.distributed", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--simulate", action="store_true", help="plans alone, without processes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64], help="to simulate")
    parser.add_argument("--case", action="append", help="its name; all if not given")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each kind")
    parser.add_argument("--small", action="store_true", help="small cases, to check on CPUs")
    args = parser.parse_args()
    of = cases(args.small)
    unknown = set(args.case or ()) - set(of)
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are: {', '.join(of)}")
    of = {name: case for name, case in of.items() if not args.case or name in args.case}
    if args.simulate:
        simulate(of, args.ranks)
    else:
        if "RANK" not in os.environ:
            parser.error("times are measured under torchrun; --simulate needs none")
        measure(of, args.repeats)


if __name__ == "__main__":
    main()

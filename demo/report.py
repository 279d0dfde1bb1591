"""What the demo shows at the end: a table, frames side by side, pictures of the masks.

In: the measurements of each run, videos [frames, height, width, 3] and block masks as bool
matrices. Out: lines to print, and PNG files. Called by `denoise.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .nlm import STRIDE, Grid

WHITE, GREY, DARK, AMBER = (255, 255, 255), (90, 94, 102), (24, 26, 30), (255, 176, 32)
MARGIN, CAPTION = 8, 22


@dataclass
class Run:
    """One mask's result."""

    name: str
    density: float
    tokens: int
    seconds: float
    gflops: float
    """Of computed blocks alone, per second: 4 * head_dim for each pair of tokens."""
    noisy_psnr: float
    psnr: float
    video: torch.Tensor


def table(runs: list[Run]) -> str:
    """One line a run, the first being what the others are compared with."""
    head = ("mask", "density", "tokens", "seconds", "speed-up", "GFLOP/s", "PSNR, dB")
    rows = [
        (
            run.name,
            f"{run.density:.1%}",
            f"{run.tokens}",
            f"{run.seconds:.2f}",
            f"{runs[0].seconds / run.seconds:.1f}x",
            f"{run.gflops:.0f}",
            f"{run.noisy_psnr:.2f} -> {run.psnr:.2f}",
        )
        for run in runs
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths)] for row in [head, *rows]]
    for line in lines:
        line[0] = line[0].strip().ljust(widths[0])
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line) for line in lines)


def picture(frame: torch.Tensor, zoom: int) -> Image.Image:
    """A frame as an image, each pixel `zoom` wide."""
    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Captioned images in rows, on one dark sheet."""
    width = max(sum(image.width + MARGIN for _, image in row) for row in rows) + MARGIN
    heights = [max(image.height for _, image in row) + CAPTION + MARGIN for row in rows]
    page = Image.new("RGB", (width, sum(heights) + MARGIN), DARK)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    y = MARGIN
    for row, height in zip(rows, heights):
        x = MARGIN
        for caption, image in row:
            pen.text((x, y), caption, font=font, fill=WHITE)
            page.paste(image, (x, y + CAPTION))
            x += image.width + MARGIN
        y += height
    return page


def busiest(frame: torch.Tensor, side: int) -> tuple[int, int]:
    """The top left corner of the square of `side` pixels in which neighbours differ most."""
    grey = frame.mean(-1)
    steps = grey.diff(dim=0)[:, 1:].abs() + grey.diff(dim=1)[1:].abs()
    squares = steps.unfold(0, side - 1, 4).unfold(1, side - 1, 4)
    best = int(squares.sum((-1, -2)).argmax())
    return 4 * (best // squares.shape[1]), 4 * (best % squares.shape[1])


def save_frames(out: Path, clean: torch.Tensor, noisy: torch.Tensor, runs: list[Run]) -> None:
    """First, middle and last frame: clean, noisy and each run's, whole above, a detail below."""
    videos = [
        ("clean", clean),
        (f"noisy, {runs[0].noisy_psnr:.1f} dB", noisy),
        *((f"{run.name}, {run.psnr:.1f} dB", run.video) for run in runs),
    ]
    side = min(64, clean.shape[1], clean.shape[2])
    whole = max(1, 512 // clean.shape[2])
    detail = max(1, whole * clean.shape[2] // side)
    for index in sorted({0, len(clean) // 2, len(clean) - 1}):
        top, left = busiest(clean[index], side)
        rows = [[], []]
        for caption, video in videos:
            frame = video[index]
            rows[0].append((caption, picture(frame, whole)))
            rows[1].append(("detail", picture(frame[top : top + side, left : left + side], detail)))
        sheet(rows).save(out / f"frame-{index:02}.png")


def save_mask(out: Path, name: str, blocks: torch.Tensor, video: torch.Tensor, grid: Grid) -> None:
    """The mask as a matrix, and what one tile in the middle of the video sees.

    For the latter, a frame of each slab of tiles is shown: tiles that are seen are bright, others
    dark, the tile itself is framed.
    """
    matrix = torch.tensor([GREY, AMBER], dtype=torch.uint8)[blocks.long()].float() / 255
    zoom = max(1, 480 // len(blocks))
    density = float(blocks.float().mean())
    whole = (f"{name}: {density:.1%} of {len(blocks)}x{len(blocks)} blocks", picture(matrix, zoom))

    slabs, rows, columns = grid.tiles
    place = (slabs // 2, rows // 2, columns // 2)
    seen = blocks[(place[0] * rows + place[1]) * columns + place[2]].reshape(grid.tiles)
    shown = []
    depth, tall, wide = grid.tile[0], grid.tile[1] * STRIDE, grid.tile[2] * STRIDE
    for slab in range(slabs):
        light = seen[slab].repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        frame = video[slab * depth] * torch.where(light, 1.0, 0.25)[..., None]
        image = picture(frame, 2)
        if slab == place[0]:
            x, y = place[2] * wide * 2, place[1] * tall * 2
            box = (x, y, x + wide * 2 - 1, y + tall * 2 - 1)
            ImageDraw.Draw(image).rectangle(box, outline=AMBER, width=3)
        shown.append((f"frames {slab * depth} to {(slab + 1) * depth - 1}", image))
    path = out / f"mask-{name}.png"
    # The matrix, and beside it the slabs, two a row.
    left, right = sheet([[whole]]), sheet([shown[i : i + 2] for i in range(0, len(shown), 2)])
    page = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), DARK)
    page.paste(left, (0, 0))
    page.paste(right, (left.width, 0))
    page.save(path)

"""Pictures of masks, as files. In: a :class:`BlockMask`. Out: bytes of a PNG, an SVG or an HTML
file.

Called by ``BlockMask.save``. Blue blocks are computed whole, orange ones in part. Nothing but the
standard library is needed to write them, and nothing at all to look at them.
"""

import base64
import importlib.resources
import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .masks import BlockMask

# Not computed, in part, whole.
_COLOURS = ((0xF4, 0xF4, 0xF4), (0xF2, 0xA3, 0x3A), (0x1F, 0x4E, 0x79))
# Batches and heads in one HTML file, at most.
_MOST_LINES = 64
# Cells of an SVG along each side, at most.
_MOST_CELLS = 512


def save(mask: "BlockMask", path: str | Path, batch: int, head: int) -> None:
    """Writes a picture of the kind that the path's end says."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".png", ".svg", ".html"):
        raise ValueError(f"path must end in .png, .svg or .html, got {path.name!r}")
    for name, place, extent in (("batch", batch, mask.shape[0]), ("head", head, mask.shape[1])):
        if place >= extent:
            raise ValueError(f"{name} {place} must be below {extent}")
    if kind == ".html":
        path.write_text(html(mask), encoding="utf-8")
    elif kind == ".svg":
        path.write_text(svg(_kinds(mask)[batch, head]), encoding="utf-8")
    else:
        path.write_bytes(png(_kinds(mask)[batch, head]))


def _kinds(mask: "BlockMask") -> Tensor:
    """Of each block 0, 1 (partial) or 2: uint8 (batch, heads, rows, columns)."""
    blocks, partial = mask.blocks.cpu(), mask.partial_blocks.cpu()
    return (2 * blocks.to(torch.uint8)) - (blocks & partial).to(torch.uint8)


def png(kinds: Tensor) -> bytes:
    """A pixel a block, or more if there are few."""
    rows, columns = kinds.shape
    scale = max(1, 512 // max(rows, columns, 1))
    colours = torch.tensor(_COLOURS, dtype=torch.uint8)
    pixels = colours[kinds.long()].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    if pixels.numel() == 0:
        # There is no picture without pixels.
        pixels = colours[:1].reshape(1, 1, 3)
    height, width, _ = pixels.shape
    # Each line starts with how it is filtered: not at all.
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], dim=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(lines.numpy().tobytes(), 9)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def svg(kinds: Tensor) -> str:
    """A rectangle for each run of equal blocks of a row. Of a large mask a cell stands for several
    blocks: whole if all are, not computed if none is."""
    rows, columns = kinds.shape
    step = max(1, -(-max(rows, columns) // _MOST_CELLS))
    if step > 1:
        padding = (0, -columns % step, 0, -rows % step)
        least = torch.nn.functional.pad(kinds, padding, value=2).unfold(0, step, step)
        most = torch.nn.functional.pad(kinds, padding, value=0).unfold(0, step, step)
        least = least.unfold(1, step, step).amin((2, 3))
        most = most.unfold(1, step, step).amax((2, 3))
        kinds = torch.where(least == 2, least, most.clamp(max=1))
        rows, columns = kinds.shape
    rectangles = []
    for y, row in enumerate(kinds.tolist()):
        start = 0
        for x in range(1, columns + 1):
            if x == columns or row[x] != row[start]:
                if row[start]:
                    colour = _name(row[start])
                    place = f'x="{start}" y="{y}" width="{x - start}" height="1"'
                    rectangles.append(f'<rect {place} fill="{colour}"/>')
                start = x
    background = f'<rect width="100%" height="100%" fill="{_name(0)}"/>'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(columns, 1)} '
            f'{max(rows, 1)}" width="512" shape-rendering="crispEdges">',
            background,
            *rectangles,
            "</svg>\n",
        )
    )


def _name(kind: int) -> str:
    return "#" + bytes(_COLOURS[kind]).hex()


def html(mask: "BlockMask") -> str:
    """A page to zoom into, with all batches and heads, the first 64 of them."""
    kinds = _kinds(mask)
    batch, heads, rows, columns = kinds.shape
    lines = [(b, h) for b in range(batch) for h in range(heads)][:_MOST_LINES]
    expression = mask.expression
    told = repr(mask) if expression is None else repr(mask).replace(f": {expression}", "")
    known = {
        "about": told,
        "expression": None if expression is None else expression.text,
        "shape": (rows, columns),
        "block": (mask.q_block_size, mask.kv_block_size),
        "lengths": (mask.q_len, mask.kv_len),
        "lines": [{"name": f"{b}, {h}", "blocks": _packed(kinds[b, h])} for b, h in lines],
    }
    page = importlib.resources.files(__package__).joinpath("picture.html")
    # A script ends with its tag wherever it stands.
    data = json.dumps(known).replace("<", "\\u003c")
    return page.read_text(encoding="utf-8").replace("/*MASK*/null", data)


def _packed(kinds: Tensor) -> str:
    """Four blocks a byte, as text."""
    flat = kinds.flatten()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).reshape(-1, 4)
    shifts = torch.tensor([1, 4, 16, 64], dtype=torch.uint8)
    return base64.b64encode((flat * shifts).sum(1, dtype=torch.uint8).numpy().tobytes()).decode()

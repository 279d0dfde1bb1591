"""Pictures of masks: what other programs read of the files are the mask's blocks."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import pytest
import torch

from flex_block_attn import BlockMask, create_block_mask

COLOURS = {0: (0xF4, 0xF4, 0xF4), 1: (0xF2, 0xA3, 0x3A), 2: (0x1F, 0x4E, 0x79)}


def mask_of_heads():
    width = torch.tensor([100, 300])
    return create_block_mask(
        lambda b, h, q, kv: (q >= kv) & (q - kv < width[h]), None, 2, 1000, 900, BLOCK_SIZE=(64, 48)
    )


def kinds_of(mask):
    return 2 * mask.blocks.int() - mask.partial_blocks.int()


def test_png(tmp_path):
    mask = mask_of_heads()
    mask.save(tmp_path / "mask.png", head=1)
    pixels = torch.tensor(matplotlib.image.imread(tmp_path / "mask.png") * 255).round().int()
    kinds = kinds_of(mask)[0, 1]
    scale = 512 // 19
    assert pixels.shape == (16 * scale, 19 * scale, 3)
    expected = torch.tensor([COLOURS[i] for i in range(3)])[kinds]
    assert torch.equal(pixels[scale // 2 :: scale, scale // 2 :: scale], expected.int())


@pytest.mark.parametrize("large", [False, True])
def test_svg(tmp_path, large):
    mask = mask_of_heads()
    if large:
        mask = create_block_mask(
            lambda b, h, q, kv: q >= kv, None, None, 20000, 9000, BLOCK_SIZE=16
        )
    mask.save(str(tmp_path / "mask.svg"))
    root = ElementTree.parse(tmp_path / "mask.svg").getroot()
    _, _, columns, rows = map(int, root.get("viewBox").split())
    found = torch.zeros(rows, columns, dtype=torch.int32)
    names = {"#" + bytes(colour).hex(): kind for kind, colour in COLOURS.items()}
    for rectangle in list(root)[1:]:
        x, y, width = (int(rectangle.get(name)) for name in ("x", "y", "width"))
        found[y, x : x + width] = names[rectangle.get("fill")]
    kinds = kinds_of(mask)[0, 0]
    if not large:
        assert torch.equal(found, kinds)
        return
    # 1250 x 563 blocks, three along each side to a cell.
    assert (rows, columns) == (417, 188)
    for row, column in ((0, 0), (0, 5), (100, 3), (187, 187), (416, 187)):
        cell = kinds[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        expected = 2 if (cell == 2).all() else 1 if cell.any() else 0
        assert found[row, column] == expected


def test_html(tmp_path):
    mask = mask_of_heads()
    mask.save(tmp_path / "mask.html")
    page = (tmp_path / "mask.html").read_text()
    assert not re.search(r"(src|href)=|https?://|@import", page)
    known = json.loads(re.search(r"const mask = (.*);", page)[1])
    assert known["expression"] == mask.expression.text and known["shape"] == [16, 19]
    assert [line["name"] for line in known["lines"]] == ["0, 0", "0, 1"]
    for head, line in enumerate(known["lines"]):
        data = torch.frombuffer(bytearray(base64.b64decode(line["blocks"])), dtype=torch.uint8)
        kinds = torch.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()
        assert torch.equal(kinds[: 16 * 19].reshape(16, 19).int(), kinds_of(mask)[0, head])


def test_plain_and_empty_masks(tmp_path):
    for mask in (
        BlockMask.causal(64, 64, 16, 16),
        BlockMask.full(0, 64, 16, 16),
        create_block_mask(lambda b, h, q, kv: q < 0, None, None, 64, 64),
    ):
        for kind in ("png", "svg", "html"):
            mask.save(tmp_path / f"mask.{kind}")
            assert (tmp_path / f"mask.{kind}").stat().st_size > 50


def test_a_terminal(capsys):
    mask = BlockMask.causal(64, 64, 16, 16)
    mask.show()
    assert capsys.readouterr().out == f"{mask!r}\n{mask.picture()}\n"


def test_refused(tmp_path):
    mask = mask_of_heads()
    with pytest.raises(ValueError, match=r"path must end in .png, .svg or .html, got 'mask.gif'"):
        mask.save(tmp_path / "mask.gif")
    with pytest.raises(ValueError, match="head 2 must be below 2"):
        mask.save(tmp_path / "mask.png", head=2)

"""Masks: all forms that callers send; builders, against definitions of their own; helpers."""

import copy
import pickle

import matplotlib
import numpy as np
import pytest
import torch
from reference import attention, random_qkv, relative_error, token_mask

from flex_block_attn import (
    BlockMask,
    create_sparse_mask,
    flex_block_attn,
    flex_block_attn_func,
    visualize_attn_mask,
)

matplotlib.use("Agg")

# --- forms of the mask tensor --------------------------------------------------------------------

B, H, N = 2, 3, 4


def stripes(n: int) -> torch.Tensor:
    """A mask that differs from its transpose."""
    return torch.tensor([[(2 * row + column) % 3 < 2 for column in range(n)] for row in range(n)])


ONE = stripes(N)
PER_HEAD = torch.stack([ONE, ONE.T, ~ONE])
PER_BATCH = torch.stack([ONE, ~ONE.T])
STRIDED = torch.zeros(2 * N, 3 * N, dtype=torch.bool)
STRIDED[::2, 1::3] = ONE

FORMS = {
    "2-D": (ONE, ONE),
    "[1, N, N]": (ONE[None], ONE),
    "[1, 1, N, N]": (ONE[None, None], ONE),
    "[H, N, N]": (PER_HEAD, PER_HEAD),
    "[1, H, N, N]": (PER_HEAD[None], PER_HEAD),
    "[B, 1, N, N]": (PER_BATCH[:, None], PER_BATCH[:, None]),
    "[B, H, N, N]": (torch.stack([PER_HEAD, ~PER_HEAD]), torch.stack([PER_HEAD, ~PER_HEAD])),
    "expanded over all": (ONE.expand(B, H, N, N), ONE),
    "expanded over heads": (PER_BATCH[:, None].expand(B, H, N, N), PER_BATCH[:, None]),
    "expanded over batches": (PER_HEAD.expand(B, H, N, N), PER_HEAD),
    "transposed view": (ONE.T.contiguous().T, ONE),
    "heads last in memory": (PER_HEAD.permute(1, 2, 0).contiguous().permute(2, 0, 1), PER_HEAD),
    "every other element": (STRIDED[::2, 1::3], ONE),
    "a row for all rows": (ONE[1].expand(N, N), ONE[1].repeat(N, 1)),
    "uint8": (ONE.to(torch.uint8) * 255, ONE),
    "int8": (-ONE.to(torch.int8), ONE),
    "int32": (ONE.int() * 256, ONE),
    "int64": (ONE.long() << 40, ONE),
}


def dense_blocks(mask: torch.Tensor) -> torch.Tensor:
    return mask.expand(B, H, N, N)


@pytest.mark.parametrize("mask, meaning", FORMS.values(), ids=FORMS.keys())
def test_forms(mask, meaning):
    """Whatever form a mask has, it acts as the plain (batch, heads, N, N) tensor does."""
    q, k, v = random_qkv(B, H, 64, 60, 16)
    plain = dense_blocks(meaning).contiguous()
    expected = flex_block_attn_func(q, k, v, 16, 16, plain)
    assert relative_error(expected, attention(q, k, v, plain, 16, 16)[0]) < 1e-5
    assert torch.equal(flex_block_attn_func(q, k, v, 16, 16, mask), expected)
    assert torch.equal(flex_block_attn(q, k, v, BlockMask(mask, 64, 60, 16, 16)), expected)


@pytest.mark.parametrize(
    "shape, dropped", [((B, 1, 1, N, N), 1), ((1, 1, H, N, N), 1), ((B, H, 1, N, N), 2),
                       ((1, B, H, N, N), 0)],
)  # fmt: skip
def test_five_dimensions(shape, dropped):
    """One client stacks masks that had a dimension for the heads already."""
    q, k, v = random_qkv(B, H, 64, 64, 16)
    mask = torch.rand(shape) < 0.5
    expected = flex_block_attn_func(q, k, v, 16, 16, mask.squeeze(dropped))
    text = rf"^block_mask has shape .*: its dimension {dropped}, of 1, is dropped$"
    with pytest.warns(UserWarning, match=text) as caught:
        out = flex_block_attn_func(q, k, v, 16, 16, mask)
    assert torch.equal(out, expected)
    assert caught[0].filename == __file__, "the warning does not point at its caller"
    with pytest.warns(UserWarning, match=text) as caught:
        BlockMask(mask, 64, 64, 16, 16)
    assert caught[0].filename == __file__, "the warning does not point at its caller"


def test_block_sizes_from_numpy():
    """Clients compute a tile's tokens by ``np.prod``, which gives an int64 of numpy."""
    q, k, v = random_qkv(1, 1, 64, 64, 16)
    size = np.prod([1, 4, 4])
    assert isinstance(size, np.int64)
    expected = flex_block_attn_func(q, k, v, 16, 16, ONE)
    assert torch.equal(flex_block_attn_func(q, k, v, size, size, ONE), expected)
    mask = BlockMask(ONE, np.int32(64), np.uint16(64), size, size)
    assert torch.equal(flex_block_attn(q, k, v, mask), expected)


# --- BlockMask -----------------------------------------------------------------------------------


def test_sizes_and_dense_mask():
    mask = BlockMask(PER_HEAD, 60, 100, 16, 32)
    assert (mask.q_len, mask.kv_len) == (60, 100)
    assert (mask.q_block_size, mask.kv_block_size) == (16, 32)
    assert mask.device == torch.device("cpu")
    dense = mask.to_dense()
    assert dense.shape == (1, H, 60, 100) and dense.dtype == torch.bool
    assert torch.equal(dense, token_mask(PER_HEAD, 60, 100, 16, 32))
    assert mask.density() == pytest.approx(dense.double().mean().item(), abs=1e-12)


def test_a_mask_keeps_its_blocks():
    blocks = ONE.clone()
    mask = BlockMask(blocks, 64, 64, 16, 16)
    blocks.zero_()
    assert torch.equal(mask.blocks[0, 0], ONE)


def test_repr_and_picture():
    mask = BlockMask(PER_HEAD.repeat(2, 1, 1, 1), 64, 60, 16, 16)
    density = mask.to_dense().double().mean().item()
    assert repr(mask) == (
        f"BlockMask(2 x 3 x 4 x 4 blocks of 16 x 16, 64 x 60 tokens, density {density:.3f})"
    )
    for head in range(H):
        lines = ["".join("█" if block else "·" for block in row) for row in PER_HEAD[head]]
        assert mask.picture(1, head) == "\n".join(lines)
    wide = BlockMask.causal(1600, 1600, 16, 16).picture(columns=10).split("\n")
    assert [len(line) for line in wide] == [10] * 5
    assert wide[0][0] in "░▒▓" and wide[4][0] == "█" and wide[0][9] == "·"


def test_no_tokens():
    mask = BlockMask.full(0, 64, 16, 16)
    assert mask.density() == 0 and mask.picture() == ""
    assert mask.to_dense().shape == (1, 1, 0, 64)


def test_to_another_device():
    mask = BlockMask(ONE, 64, 64, 16, 16)
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.plan.is_meta and mask.device.type == "cpu"
    assert repr(moved) == "BlockMask(1 x 1 x 4 x 4 blocks of 16 x 16, 64 x 64 tokens, on meta)"
    tensors = [x.to("meta") for x in random_qkv(2, 2, 64, 64, 16)]
    assert flex_block_attn(*tensors, moved).shape == (2, 2, 64, 16)
    assert torch.equal(mask.to("cpu").plan, mask.plan)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))])
def test_copies(copied):
    mask = BlockMask(PER_HEAD, 64, 60, 16, 16)
    q, k, v = random_qkv(1, H, 64, 60, 16)
    other = copied(mask)
    assert repr(other) == repr(mask)
    assert torch.equal(flex_block_attn(q, k, v, other), flex_block_attn(q, k, v, mask))


# --- builders ------------------------------------------------------------------------------------

SIZES = [
    (64, 64, 16, 16),
    (100, 100, 16, 32),
    (200, 90, 48, 16),
    (90, 200, 16, 64),
    (16, 16, 128, 128),
    (33, 0, 16, 16),
]


def blocks_with_a_pair(tokens: torch.Tensor, q_block: int, kv_block: int) -> torch.Tensor:
    """The blocks in which some pair of tokens is true."""
    rows = [part.any(dim=0) for part in tokens.split(q_block)]
    columns = [torch.stack(rows)[:, at : at + kv_block].any(dim=1)
               for at in range(0, tokens.shape[1], kv_block)]  # fmt: skip
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(rows), 0).bool()


@pytest.mark.parametrize("sizes", SIZES)
def test_full_and_causal(sizes):
    q_len, kv_len, q_block, kv_block = sizes
    allowed = torch.arange(kv_len)[None, :] <= torch.arange(q_len)[:, None]
    expected = blocks_with_a_pair(allowed, q_block, kv_block)
    assert torch.equal(BlockMask.causal(*sizes).blocks, expected[None, None])
    full = BlockMask.full(*sizes)
    assert torch.equal(full.blocks, torch.ones_like(expected)[None, None])
    assert full.density() == (1.0 if kv_len else 0.0)


@pytest.mark.parametrize("left, right", [(0, 0), (16, 16), (1, 0), (0, 17), (40, 100), (500, 500)])
@pytest.mark.parametrize("sizes", SIZES)
def test_sliding_window(sizes, left, right):
    """A key is near a block of queries if it is near some token of the block."""
    q_len, kv_len, q_block, kv_block = sizes
    distance = torch.arange(kv_len)[None, :] - torch.arange(q_len)[:, None]
    near = (-left <= distance) & (distance <= right)
    expected = blocks_with_a_pair(near, q_block, kv_block)
    mask = BlockMask.sliding_window(*sizes, left=left, right=right)
    assert torch.equal(mask.blocks, expected[None, None])


@pytest.mark.parametrize("text_tokens", [0, 16, 50])
@pytest.mark.parametrize(
    "tiles, window",
    [((3, 4, 5), (3, 3, 3)), ((1, 6, 6), (1, 3, 5)), ((6, 2, 3), (2, 2, 2)),
     ((4, 4, 4), (1, 1, 1)), ((2, 3, 1), (9, 9, 9)), ((5, 5, 2), (4, 3, 3))],
)  # fmt: skip
def test_sliding_tiles(tiles, window, text_tokens):
    """By the formula: the window's centre is clipped to k // 2 .. n - 1 - k // 2 (the upper end
    wins), and a tile is seen if it is at most k // 2 away from it along each axis."""
    expected = torch.ones(1, 1, dtype=torch.bool)
    for n, k in zip(tiles, window, strict=True):
        place = torch.arange(n)
        centre = place.clip(min=k // 2).clip(max=n - 1 - k // 2)
        axis = (centre[:, None] - place[None, :]).abs() <= k // 2
        # The next axis varies faster than all before.
        expected = torch.kron(expected.int(), axis.int()).bool()
    video, text = len(expected), -(-text_tokens // 16)
    blocks = torch.ones(video + text, video + text, dtype=torch.bool)
    blocks[:video, :video] = expected

    mask = BlockMask.sta(tiles, window, tile_tokens=16, text_tokens=text_tokens)
    assert torch.equal(mask.blocks, blocks[None, None])
    assert mask.q_len == mask.kv_len == 16 * video + text_tokens
    assert mask.q_block_size == mask.kv_block_size == 16


@pytest.mark.parametrize("density", [0.0, 0.01, 0.25, 0.5, 0.6, 1.0])
def test_random(density):
    sizes = (320, 300, 32, 16)  # 19 key blocks
    mask = BlockMask.random(*sizes, density=density, seed=7, batch=2, heads=3)
    assert mask.blocks.shape == (2, 3, 10, 19)
    assert (mask.blocks.sum(dim=3) == max(1, round(density * 19))).all()
    again = BlockMask.random(*sizes, density=density, seed=7, batch=2, heads=3)
    assert torch.equal(again.blocks, mask.blocks)


def test_random_differs_by_seed_batch_head_and_row():
    masks = [BlockMask.random(320, 640, 16, 16, density=0.5, seed=seed, batch=2, heads=2).blocks
             for seed in (0, 1)]  # fmt: skip
    rows = torch.stack(masks).flatten(0, 3)
    assert len(rows.unique(dim=0)) == len(rows)


# --- helpers -------------------------------------------------------------------------------------

PAIRS = [(0, 1), (2, 0), (2, 0), (3, 3)]


@pytest.mark.parametrize(
    "selected",
    [PAIRS, tuple(PAIRS), [list(pair) for pair in PAIRS], dict.fromkeys(PAIRS).keys(),
     np.array(PAIRS), torch.tensor(PAIRS), torch.tensor(PAIRS, dtype=torch.int32)],
    ids=["list", "tuple", "lists", "iterable", "numpy", "tensor", "int32"],
)  # fmt: skip
@pytest.mark.parametrize("length", [49, 64])
def test_create_sparse_mask(selected, length):
    """Also for a length that is no multiple of the block."""
    q = torch.empty(1, 2, length, 8)
    mask = create_sparse_mask(q, 16, selected)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for row, column in PAIRS:
        expected[row, column] = True
    assert torch.equal(mask, expected)
    assert mask.dtype == torch.bool and mask.device == q.device


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 2), int), torch.zeros(0, 2)])
def test_create_sparse_mask_of_nothing(nothing):
    mask = create_sparse_mask(torch.empty(1, 1, 40, 8), 16, nothing)
    assert torch.equal(mask, torch.zeros(3, 3, dtype=torch.bool))


def test_create_sparse_mask_follows_its_queries():
    assert create_sparse_mask(torch.empty(1, 1, 64, 8, device="meta"), 16, PAIRS).is_meta
    assert create_sparse_mask(torch.empty(1, 1, 64, 8), np.int64(16), PAIRS).shape == (4, 4)


PICTURES = {
    "bool": ONE,
    "float": torch.rand(4, 6),
    "bfloat16": torch.rand(4, 6).bfloat16(),
    "beyond 0..1": 5 * torch.randn(4, 6),
    "constant": torch.full((3, 3), 7),
    "with gradient": torch.rand(3, 3, requires_grad=True),
    "list": [[0, 1], [1, 0]],
    "numpy": np.eye(5),
    "BlockMask": BlockMask(PER_HEAD, 64, 64, 16, 16),
}


@pytest.mark.parametrize("mask", PICTURES.values(), ids=PICTURES.keys())
def test_visualize_attn_mask(mask, tmp_path, monkeypatch):
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    shown = []
    imshow = Axes.imshow

    def recorded(axes, values, **options):
        shown.append(values)
        return imshow(axes, values, **options)

    monkeypatch.setattr(Axes, "imshow", recorded)
    file = tmp_path / "mask.png"
    visualize_attn_mask(mask, title="a title", cmap="viridis", save_path=str(file))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums(), "the figure is left open"
    (values,) = shown
    assert 0 <= values.min() <= values.max() <= 1
    if isinstance(mask, BlockMask):
        assert (values == PER_HEAD[0].numpy()).all()


def test_visualize_attn_mask_writes_where_the_reference_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    visualize_attn_mask(ONE)
    assert (tmp_path / "attention_mask.png").exists()

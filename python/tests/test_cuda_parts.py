"""Attention in parts on GPUs: parts of the keys put together, and divisions between GPUs. Against:
one attention, on one GPU.

The first needs a Hopper GPU, the second two; without them the tests are skipped and say why.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import test_cuda
import torch
from reference import relative_error

from flex_block_attn import BlockMask, flex_block_attn, launch

pytestmark = test_cuda.pytestmark


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_parts_of_an_attention_are_put_together(count, head_dim, dtype):
    """Of some of the rows, of which some have no keys at all, others none in a part."""
    lengths = [128, 64, 192, 320, 64, 64, 128, 64][:count]
    shape, kv_len = (2, 3, 300, head_dim), sum(lengths)
    q = torch.randn(shape, device="cuda").to(dtype)
    k, v = (torch.randn(2, 3, kv_len, head_dim, device="cuda").to(dtype) for _ in range(2))
    blocks = torch.rand(1, 3, 5, kv_len // 64, device="cuda") < 0.5
    blocks[:, :, 1] = False
    blocks[:, :, 2, 2:] = False
    parts, first = [], 0
    for length in lengths:
        keys = slice(first, first + length)
        part = BlockMask(blocks[..., first // 64 : (first + length) // 64], 300, length, 64, 64)
        out, lse = flex_block_attn(q, k[:, :, keys], v[:, :, keys], part, return_lse=True)
        parts.append((out[:, :, 30:], lse[:, :, 30:]))
        first += length
    expected, lses = flex_block_attn(
        q, k, v, BlockMask(blocks, 300, kv_len, 64, 64), return_lse=True
    )
    out = torch.full_like(q, torch.nan)
    lse = launch.combine(parts, out[:, :, 30:])
    assert relative_error(out[:, :, 30:], expected[:, :, 30:]) < 1e-2
    torch.testing.assert_close(lse, lses[:, :, 30:], rtol=1e-4, atol=1e-4)
    assert out[:, :, :30].isnan().all()
    # The lse goes where it is told to.
    rows = torch.full(q.shape[:3], torch.nan, device="cuda")
    assert launch.combine(parts, out[:, :, 30:], rows[:, :, 30:]) is not None
    assert torch.equal(rows[:, :, 30:], lse) and rows[:, :, :30].isnan().all()
    # Sums of another dtype, and more parts, are left to others.
    assert launch.combine(parts, out[:, :, 30:].float()) is None
    assert launch.combine(parts * 5, out[:, :, 30:]) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("chunks", [[], ["--chunks", "2"]], ids=["all keys", "in parts"])
def test_divisions_are_compared_with_one_gpu(chunks):
    """On all GPUs; the program fails where outputs or gradients differ. A kept plan never has the
    host wait."""
    command = [sys.executable, "-m", "benchmark.distributed", "--small", "--rounds", "1", *chunks]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--turn", "1"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    waits = {(line[0], line[1]): line[-1] for line in cells[4:] if line}
    assert {case for case, _ in waits} >= {"SSTA, near tiles", "dense", "dense, 1 head", "STA"}
    assert {number for (_, by), number in waits.items() if by != "tokens, new mask"} == {"0"}

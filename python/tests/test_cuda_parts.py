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
import torch.distributed as dist
from reference import relative_error
from test_context import choice_and_text

from flex_block_attn import BlockMask, flex_block_attn, launch
from flex_block_attn.distributed import ContextPlan, Layout, context_attention
from flex_block_attn.distributed import plan as planning

pytestmark = test_cuda.pytestmark
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")


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


@NEEDS_TWO
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


def replayed(rank, store):
    """On each of two ranks: calls captured as graphs, against calls with what inputs are later."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    dist.init_process_group("nccl", device_id=device, **place)
    # So few rows are not balanced by chance.
    planning._AS_GOOD = 0.8
    try:
        for heads, text, chunks in [(1, 32, None), (1, 25, None), (2, 32, 2), (4, 32, None)]:
            torch.manual_seed(0)
            mask = choice_and_text(heads, text)
            layout = Layout.balanced(mask, 2, shared_rows=[24, 25])
            plan = ContextPlan(mask, layout=layout, chunks=chunks)
            of_rank = plan.of_rank(rank, device, heads)
            # Long rows in pieces, or shared.
            cut, shared = of_rank.pieces is not None, any(of_rank.rows.shared_counts)
            assert (cut, shared) == (
                (True, False) if chunks is None and text == 32 else (False, True)
            )
            compare_replays(plan, heads, layout.count(rank))
    finally:
        dist.destroy_process_group()


def compare_replays(plan, heads, tokens):
    """Graphs are gone when this returns: communicators wait for them."""
    shape = 1, heads, tokens, 64
    *inputs, dout = (torch.randn(shape, device="cuda").bfloat16() for _ in range(4))
    for x in inputs:
        x.requires_grad_()

    def call():
        out = context_attention(*inputs, plan)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Threads of torch.distributed look after earlier exchanges meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = call()
    for _ in range(2):
        with torch.no_grad():
            for x in (*inputs, dout):
                x.copy_(torch.randn(shape, device="cuda"))
        expected = call()
        graph.replay()
        # The gradient of q is summed in any order.
        assert torch.equal(captured[0], expected[0])
        errors = [relative_error(*pair) for pair in zip(captured, expected, strict=True)]
        assert max(errors) < 1e-2, errors


@NEEDS_TWO
def test_divided_calls_are_replayed_with_graphs(tmp_path):
    """With exchanges, forward and backward."""
    torch.multiprocessing.spawn(replayed, (str(tmp_path / "store"),), nprocs=2)

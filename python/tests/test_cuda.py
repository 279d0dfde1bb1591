"""CUDA tensors: the same results as on the CPU, on streams, in graphs, in threads.

All of it needs a Hopper GPU; without one the tests are skipped and say why.
"""

import csv
import math
import random
import threading

import pytest
import torch
from gpu import NEEDS_HOPPER, tensor
from reference import attention, relative_error, token_mask
from ssta_choices import compare_masks, near_ties_of_settings, random_tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from training import TOKENS, denoising
from watching import Named, Watched

from benchmark.__main__ import main as benchmark
from benchmark.clock import peak_mib, turn
from flex_block_attn import (
    BlockMask,
    _native,
    create_block_mask,
    flex_block_attn,
    flex_block_attn_func,
    ops,
    video_attention,
)
from flex_block_attn.moba import moba_attention, moba_attention_varlen
from flex_block_attn.ssta_attention import ssta_3d_attention
from flex_block_attn.tiles import Canvas

pytestmark = NEEDS_HOPPER


class Random:
    """A problem by chance: sizes, layouts, blocks, scale."""

    def __init__(self, seed: int, longest: int, keys: int | None = None):
        chance = random.Random(seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        dtype = chance.choice([torch.bfloat16, torch.float16])
        dim = chance.choice([64, 128])
        self.q_block = chance.choice([16, 48, 64, 96, 128, 192, 256, 384])
        self.kv_block = chance.choice([16, 32, 48, 64, 96, 128, 192, 320, 384])
        q_len = chance.randint(1, longest)
        kv_len = chance.randint(keys // 2, keys) if keys else chance.randint(1, longest)
        batch = chance.choice([1, 1, 2])
        kv_heads = chance.choice([1, 2, 3])
        heads = kv_heads * chance.choice([1, 1, 2, 4])
        rows, columns = -(-q_len // self.q_block), -(-kv_len // self.kv_block)
        masks = chance.choice([1, batch]), chance.choice([1, heads])
        density = chance.choice([0.1, 0.3, 0.7, 1.0])
        self.blocks = torch.rand(*masks, rows, columns, device="cuda", generator=generator)
        self.blocks = self.blocks < density
        layout = chance.choice(["heads first", "tokens first", "together"])
        self.q = tensor((batch, heads, q_len, dim), layout, dtype, generator)
        self.k, self.v = (
            tensor((batch, kv_heads, kv_len, dim), layout, dtype, generator) for _ in range(2)
        )
        self.dout = tensor((batch, heads, q_len, dim), "heads first", dtype, generator)
        self.dlse = torch.randn(batch, heads, q_len, device="cuda", generator=generator)
        self.scale = chance.choice([dim**-0.5, 0.05, -0.1, 0.0])
        self.mask = BlockMask(self.blocks, q_len, kv_len, self.q_block, self.kv_block)

    def reference(self, q, k, v):
        return attention(q, k, v, self.blocks, self.q_block, self.kv_block, self.scale)


def right_forward(x: Random) -> Tensor:
    """The output, which is that of float64, as is the lse."""
    with torch.no_grad():
        out, lse = flex_block_attn(x.q, x.k, x.v, x.mask, scale=x.scale, return_lse=True)
    expected, expected_lse = x.reference(x.q, x.k, x.v)
    assert relative_error(out, expected) < 5e-3
    empty = expected_lse.isinf()
    assert torch.equal(lse.isinf(), empty)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], atol=2e-3, rtol=0)
    return out


@pytest.mark.parametrize("seed", range(320))
def test_random_problems(seed: int):
    right_forward(Random(seed, 1500))


@pytest.mark.parametrize("seed", range(3000, 3040))
def test_few_queries_and_many_keys(seed: int):
    """Tiles are computed in parts, most of them."""
    x = Random(seed, 700, 9000)
    out = right_forward(x)
    with torch.no_grad():
        again = flex_block_attn(x.q, x.k, x.v, x.mask, scale=x.scale)
    assert torch.equal(out, again)


@pytest.mark.parametrize("seed", [*range(1000, 1320), *range(3000, 3040)])
def test_random_gradients(seed: int):
    x = Random(seed, 700, 9000) if seed >= 3000 else Random(seed, 1000)
    gradients = []
    for of in (
        lambda q, k, v: flex_block_attn(q, k, v, x.mask, scale=x.scale, return_lse=True),
        x.reference,
    ):
        inputs = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
        out, lse = of(*inputs)
        # A lse of -inf has no gradient.
        dlse = x.dlse.masked_fill(lse.isinf(), 0).to(lse.dtype) if seed % 2 else None
        outputs = [(out, x.dout.to(out.dtype))] + ([(lse, dlse)] if seed % 2 else [])
        gradients.append(
            torch.autograd.grad([y for y, _ in outputs], inputs, [dy for _, dy in outputs])
        )
    for got, expected in zip(*gradients, strict=True):
        assert got.dtype == x.q.dtype
        assert relative_error(got, expected) < 1e-2


@pytest.mark.parametrize("seed", range(2000, 2080))
def test_deterministic_gradients(seed: int):
    """The same bits each time, and up to rounding those of sums in any order."""
    x = Random(seed, 1500)
    inputs = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]

    def gradients(deterministic):
        out = flex_block_attn(*inputs, x.mask, scale=x.scale, deterministic=deterministic)
        return torch.autograd.grad(out, inputs, x.dout)

    first = gradients(True)
    for _ in range(3):
        again = gradients(True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    for got, default in zip(first, gradients(False), strict=True):
        assert relative_error(got, default) < 5e-3


def test_deterministic_gradients_of_more_blocks_than_run_at_once():
    q, k, v = (torch.randn(1, 6, 6000, 128, device="cuda").bfloat16() for _ in "qkv")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    for mask in (
        BlockMask.full(6000, 6000, 128, 128),
        BlockMask.causal(6000, 6000, 64, 64),
        BlockMask.sliding_window(6000, 6000, 64, 128, left=512, right=512),
        BlockMask.random(6000, 6000, 384, 384, density=0.3, seed=2),
    ):
        out = flex_block_attn(*inputs, mask.to("cuda"), deterministic=True)
        runs = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(4)]
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


SMALL_CALLS = {
    "full": lambda n: BlockMask.full(n, n, 128, 128),
    "random": lambda n: BlockMask.random(n, n, 128, 128, density=0.5, seed=4),
    "small blocks": lambda n: BlockMask.random(n, n, 64, 64, density=0.4, seed=5),
    "causal": lambda n: create_block_mask(lambda b, h, q, kv: q >= kv, None, None, n, n),
}


@pytest.mark.parametrize("kind", SMALL_CALLS)
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, head_dim, dtype",
    [
        (2000, 1, 1, 64, torch.bfloat16),
        (3300, 2, 1, 128, torch.float16),
        (5000, 1, 1, 128, torch.bfloat16),
        (6000, 3, 3, 128, torch.bfloat16),
    ],
)
def test_gradients_of_small_calls(kind, tokens, heads, kv_heads, head_dim, dtype):
    """Those of keys and values are computed in parts: there are fewer tiles of keys than
    multiprocessors, or in the last case a few more. They repeat to the last bit all the same."""
    mask = SMALL_CALLS[kind](tokens).to("cuda")
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v, dout = (
        tensor((1, h, tokens, head_dim), "tokens first", dtype, generator)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    keys = k.shape, mask.q_block_size, mask.kv_block_size, torch.cuda.current_device()
    in_parts, whole = (_native.backward_workspace(q.shape, False, given) for given in (keys, None))
    assert in_parts > whole
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = scaled_dot_product_attention(
        exact[0],
        *(x.repeat_interleave(heads // kv_heads, dim=1) for x in exact[1:]),
        attn_mask=mask.to_dense(),
    )
    wanted = torch.autograd.grad(expected, exact, dout.double())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for deterministic in (False, True):
        out = flex_block_attn(*inputs, mask, deterministic=deterministic)
        runs = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(2)]
        for got, right in zip(runs[0], wanted, strict=True):
            assert relative_error(got, right) < 1e-2
        # Sums of the gradient of q are made in any order, unless told otherwise.
        repeated = runs if deterministic else [run[1:] for run in runs]
        assert all(torch.equal(a, b) for a, b in zip(*repeated, strict=True))


def test_deterministic_gradients_of_outliers():
    """Integers are as fine as a query's largest possible gradient allows: keys and values ten times
    as large as the others, and gradients of the output that differ by a million, leave rows as good
    as sums of floats do."""
    torch.manual_seed(3)
    q, k, v, dout = torch.randn(4, 1, 2, 2000, 128, device="cuda").unbind()
    k[:, :, ::501] *= 10
    v[:, :, 7::601] *= 10
    k[..., 5] *= 10
    dout *= torch.logspace(-3, 3, 2000, device="cuda")[:, None]
    q, k, v, dout = (x.bfloat16() for x in (q * 0.3, k, v, dout))
    mask = BlockMask.random(2000, 2000, 128, 128, density=0.5, seed=1).to("cuda")
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    seen = mask.blocks.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :2000, :2000]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=seen)
    wanted = torch.autograd.grad(expected, exact, dout.double())[0]

    def errors_of_rows(deterministic):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = flex_block_attn(*inputs, mask, deterministic=deterministic)
        dq = torch.autograd.grad(out, inputs, dout)[0].double()
        errors = (dq - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        return errors.quantile(torch.tensor([0.5, 0.99], device="cuda", dtype=errors.dtype))

    assert (errors_of_rows(True) < 1.1 * errors_of_rows(False)).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_deterministic_gradients_show_what_is_not_a_number(name, value):
    """Integers know neither; rows that see one get what sums of floats give: no number."""
    tensors = {x: torch.randn(1, 1, 256, 64, device="cuda").bfloat16() for x in "qkv"}
    tensors["dout"] = torch.randn_like(tensors["q"])
    tensors[name][0, 0, 40, 3] = value
    inputs = [tensors[x].requires_grad_() for x in "qkv"]
    mask = BlockMask.full(256, 256, 128, 128).to("cuda")
    dq = torch.autograd.grad(
        flex_block_attn(*inputs, mask, deterministic=True), inputs, tensors["dout"]
    )[0]
    rows = slice(40, 41) if name in ("q", "dout") else slice(None)
    assert not dq[:, :, rows].isfinite().any()


def test_torch_can_ask_for_deterministic_gradients():
    q, k, v, mask = problem()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    asked = torch.autograd.grad(flex_block_attn(*inputs, mask, deterministic=True).sum(), inputs)
    torch.use_deterministic_algorithms(True)
    try:
        out = flex_block_attn(*inputs, mask)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(torch.autograd.grad(out.sum(), inputs), asked, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_some_inputs():
    q, k, v, mask = problem()
    wanted = torch.autograd.grad(flex_block_attn(q, k.requires_grad_(), v, mask).sum(), k)[0]
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    every = torch.autograd.grad(flex_block_attn(*inputs, mask).sum(), inputs)
    assert relative_error(wanted, every[1]) < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_on_the_cpu(seed: int):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 700, 64).bfloat16() for _ in range(3))
    blocks = torch.rand(2, 6, 11) < 0.5
    on_cpu = flex_block_attn_func(q, k, v, 128, 64, blocks)
    on_gpu = flex_block_attn_func(*(x.cuda() for x in (q, k, v)), 128, 64, blocks.cuda())
    assert relative_error(on_gpu.cpu(), on_cpu) < 5e-3


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 24, 240, 240), (2, 3, 361, 361), (1, 2, 7, 500)]
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_plans_are_the_cpus(shape, density):
    blocks = torch.rand(shape) < density
    lengths = shape[2] * 64, shape[3] * 64
    on_cpu = BlockMask(blocks, *lengths, 64, 64).plan
    on_gpu = BlockMask(blocks.cuda(), *lengths, 64, 64).plan
    assert torch.equal(on_gpu.cpu(), on_cpu)
    transposed = BlockMask(blocks.cuda().mT.contiguous().mT, *lengths, 64, 64).plan
    assert torch.equal(transposed.cpu(), on_cpu)


def test_outliers():
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (tensor((1, 2, 1024, 128), "heads first", torch.float32, generator) for _ in "qkv")
    q[..., ::17] *= 8
    k[..., ::17] *= 8
    q, k, v = (x.clamp(-30, 30).bfloat16() for x in (q, k, v))
    blocks = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="cuda")
    out = flex_block_attn_func(q, k, v, 128, 128, blocks)
    expected, _ = attention(q, k, v, blocks, 128, 128)
    flash = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative_error(out, expected) <= 1.1 * relative_error(flash, expected) + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_block", [64, 128, 384])
@pytest.mark.parametrize("steps", ["rise", "fall", "jump"])
def test_scores_that_rise(steps, kv_block, head_dim, dtype):
    """From tile to tile by more than weights may be apart: in some rows or in others, at once or
    not."""
    generator = torch.Generator("cuda").manual_seed(4)
    shape = 1, 2, 1536, head_dim
    q, k, v = (tensor(shape, "heads first", torch.float32, generator) for _ in "qkv")
    # By a key's place, 0 to 1; rows of another sign see the same from the other end.
    place = torch.linspace(0, 1, shape[2], device="cuda")[:, None]
    height = {"rise": place, "fall": 1 - place, "jump": (place < 0.4).float()}[steps]
    k[..., :1] = 60 * height
    q[..., :1] = torch.where(torch.arange(shape[2], device="cuda") % 5 > 0, 8.0, -8.0)[:, None]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    columns = -(-shape[2] // kv_block)
    blocks = torch.rand(1, 2, 4, columns, device="cuda", generator=generator) < 0.8
    blocks[..., 0] = True
    out, lse = flex_block_attn(
        q, k, v, BlockMask(blocks, 1536, 1536, 384, kv_block), scale=0.5, return_lse=True
    )
    expected, expected_lse = attention(q, k, v, blocks, 384, kv_block, 0.5)
    assert relative_error(out, expected) < 5e-3
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-6)


def problem():
    q, k, v = (torch.randn(1, 4, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    return q, k, v, BlockMask.random(2048, 2048, 128, 128, density=0.5, seed=1).to("cuda")


def test_repeats_exactly():
    q, k, v, mask = problem()
    first = flex_block_attn(q, k, v, mask)
    assert all(torch.equal(flex_block_attn(q, k, v, mask), first) for _ in range(5))


def test_streams_and_threads():
    q, k, v, mask = problem()
    expected = flex_block_attn(q, k, v, mask)
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs = [flex_block_attn(q, k, v, mask) for _ in range(20)]
        stream.synchronize()
        results.extend(outs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(torch.equal(out, expected) for out in results)


def test_graphs():
    q, k, v, mask = problem()
    flex_block_attn(q, k, v, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flex_block_attn(q, k, v, mask)
        planned = flex_block_attn_func(q, k, v, 128, 128, mask.blocks)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        expected = flex_block_attn(q, k, v, mask)
        assert torch.equal(out, expected) and torch.equal(planned, expected)


def test_graphs_of_training():
    q, k, v, mask = problem()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def gradients():
        return torch.autograd.grad(flex_block_attn(*inputs, mask), inputs, dout)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        gradients()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    for _ in range(3):
        with torch.no_grad():
            for x in (*inputs, dout):
                x.normal_()
        graph.replay()
        dq, *of_keys = gradients()
        # Sums for q are made in any order.
        torch.testing.assert_close(captured[0], dq, rtol=2e-2, atol=2e-2)
        assert all(torch.equal(a, b) for a, b in zip(captured[1:], of_keys, strict=True))


def test_compiles():
    q, k, v, mask = problem()
    compiled = torch.compile(lambda q, k, v: flex_block_attn(q, k, v, mask), fullgraph=True)
    assert torch.equal(compiled(q, k, v), flex_block_attn(q, k, v, mask))


def test_odd_slices_and_expanded_tensors_are_copied():
    q, k, v, mask = problem()
    expected = flex_block_attn(q, k, v, mask)
    odd = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert odd.data_ptr() % 16 != 0
    assert torch.equal(flex_block_attn(odd, k, v, mask), expected)
    shared = k[:, :1].expand_as(k)
    same = flex_block_attn(q, shared.contiguous(), v, mask)
    assert torch.equal(flex_block_attn(q, shared, v, mask), same)


@pytest.fixture
def operators(monkeypatch):
    """The names of the operators that are called: the long ways."""
    called = []
    for name in ("plan", "forward"):

        def call(*arguments, name=name, original=getattr(ops, name)):
            called.append(name)
            return original(*arguments)

        monkeypatch.setattr(ops, name, call)
    return called


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "together"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_short_way_gives_what_the_operators_give(layout, dtype, operators):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (tensor((2, 4, 200, 64), layout, dtype, generator) for _ in "qkv")
    blocks = torch.rand(2, 4, 4, 7, device="cuda", generator=generator) < 0.5
    for given in (blocks, blocks[0], blocks[0, 0], blocks.mT.contiguous().mT, blocks[:, :1]):
        four = given[(None,) * (4 - given.dim())]
        plan = torch.ops.flex_block_attn.plan(four, 200, 200, 64, 32)
        settings = plan, 64, 32, 64**-0.5, False
        expected, expected_lse = torch.ops.flex_block_attn.forward(q, k, v, *settings)
        mask = BlockMask(given, 200, 200, 64, 32)
        assert torch.equal(mask.plan, plan)
        out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        assert lse.shape == (2, 4, 200) and out.stride() == expected.stride()
        assert torch.equal(flex_block_attn(q, k, v, mask, scale=0.125), expected)
        assert torch.equal(flex_block_attn_func(q, k, v, 64, 32, given), expected)
    assert not operators


def test_calls_that_need_an_operator_get_it(operators):
    q, k, v, mask = problem()
    operators.clear()
    expected = flex_block_attn(q, k, v, mask)
    assert not operators
    odd = torch.cat([q[..., :1], q], -1)[..., 1:]
    for other in (
        torch.nn.Parameter(q, requires_grad=False),
        q.detach().requires_grad_(),
        odd,
    ):
        assert torch.equal(flex_block_attn(other, k, v, mask).detach(), expected)
    with torch.no_grad():
        assert torch.equal(flex_block_attn(q.detach().requires_grad_(), k, v, mask), expected)
    scale = 128**-0.5
    assert torch.equal(flex_block_attn(-q, k, v, mask, scale=-scale), expected)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(flex_block_attn(q.float(), k.float(), v.float(), mask), expected)
    assert not operators
    # The second one's memory holds -q.
    for other in (q.as_subclass(Named), torch._neg_view(-q)):
        assert torch.equal(flex_block_attn(other, k, v, mask).detach(), expected)
        assert operators == ["forward"]
        operators.clear()
    with Watched():
        assert torch.equal(flex_block_attn(q, k, v, mask), expected)
    assert operators == ["forward"]


def test_a_tensor_of_another_stream_waits_for_nothing_else():
    """The launch goes to the stream that is current, which here has the tensors' values first."""
    q, k, v, mask = problem()
    expected = flex_block_attn(q, k, v, mask)
    for _ in range(20):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            late = q.clone()
            out = flex_block_attn(late, k, v, mask)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(out, expected)


def test_no_keys_and_no_queries():
    q = torch.randn(1, 2, 32, 64, device="cuda", dtype=torch.bfloat16)
    mask = BlockMask.full(32, 0, 16, 16).to("cuda")
    out, lse = flex_block_attn(q, q[:, :, :0], q[:, :, :0], mask, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    with pytest.raises(ValueError, match="^v has shape"):
        flex_block_attn(q, q[:, :, :0], q, mask)
    mask = BlockMask.full(0, 32, 16, 16).to("cuda")
    assert flex_block_attn(q[:, :, :0], q, q, mask).shape == (1, 2, 0, 64)


def test_what_is_refused_is_named():
    q, k, v, mask = problem()
    with pytest.raises(TypeError, match="q is float32, but on a GPU only float16 and bfloat16"):
        flex_block_attn(q.float(), k.float(), v.float(), mask)
    with pytest.raises(ValueError, match="on a GPU, head_dim must be 64 or 128, got 96"):
        flex_block_attn(q[..., :96], k[..., :96], v[..., :96], mask)
    with pytest.raises(ValueError, match="mask is on cpu, but q is on cuda"):
        flex_block_attn(q, k, v, mask.to("cpu"))
    with pytest.raises(ValueError, match="block_mask has 3 x 16 blocks"):
        flex_block_attn_func(q, k, v, 128, 128, mask.blocks[..., :3, :])


VIDEO = {"thw": (5, 12, 20), "tile_thw": (2, 8, 8), "kernel_thw": (3, 1, 3), "text_len": 50}
CHOICES = [
    {"sampling_type": "similarity"},
    {"sampling_type": "similarity", "threshold": 0.9},
    {"sampling_type": "importance", "lambda_": 0.7},
]


def video(batch=2):
    tokens = math.prod(VIDEO["thw"]) + VIDEO["text_len"]
    generator = torch.Generator("cuda").manual_seed(3)
    shape = 3, batch, 4, tokens, 128
    return torch.randn(shape, device="cuda", generator=generator).bfloat16().unbind()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("sparse_type", ["sta", "block_attn", "ssta"])
def test_video_attention_is_that_of_the_cpu_and_waits_for_nothing(sparse_type, choice):
    options = {**VIDEO, **choice, "sparse_type": sparse_type, "topk": 9}
    options["mask_share_within_head"] = False
    q, k, v = video()
    text_mask = torch.arange(50, device="cuda") < torch.tensor([[20], [50]], device="cuda")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ssta_3d_attention(*leaves, **options, text_mask=text_mask)  # compiles kernels, keeps indices
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, density = ssta_3d_attention(*leaves, **options, text_mask=text_mask)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    expected, expected_density = ssta_3d_attention(*host, **options, text_mask=text_mask.cpu())
    wanted = torch.autograd.grad(expected, host, torch.ones_like(expected))
    assert density.is_cuda and abs(float(density) - float(expected_density)) < 1e-3
    # A near-tie may be chosen otherwise, and changes its rows.
    assert relative_error(out.cpu(), expected) < (0.01 if sparse_type == "sta" else 0.05)
    for one, other in zip(gradients, wanted, strict=True):
        assert relative_error(one.cpu(), other) < (0.02 if sparse_type == "sta" else 0.05)


@pytest.mark.parametrize("padding", ["exact", "zero"])
@pytest.mark.parametrize(
    "thw, tile, text_len, head_dim, dtype",
    [
        ((7, 13, 20), (6, 8, 8), 100, 128, torch.bfloat16),
        ((3, 9, 8), (2, 8, 8), 0, 64, torch.float16),
        ((5, 6, 31), (2, 4, 16), 130, 128, torch.float16),
        ((1, 33, 50), (1, 16, 24), 20, 64, torch.bfloat16),
        ((6, 16, 16), (6, 8, 8), 384, 128, torch.bfloat16),
        # Tiles that kernels do not take as they lie, with zeros.
        ((3, 5, 9), (2, 4, 8), 20, 64, torch.bfloat16),
    ],
)
def test_videos(thw, tile, text_len, head_dim, dtype, padding):
    """Output and gradients, of several layouts, as on the CPU, where they are tested in float64."""
    canvas = Canvas.of_tiles(thw, tile, text_len)
    generator = torch.Generator("cuda").manual_seed(1)
    mask = torch.rand(2, 4, canvas.blocks, canvas.blocks, device="cuda", generator=generator) < 0.6
    mask[:, :, 0] = False
    settings = {"text_len": text_len, "padding": padding}
    if padding == "exact" and canvas.block % 128:
        q, k, v = (tensor((1, 4, canvas.tokens, 64), "heads first", dtype, generator),) * 3
        with pytest.raises(ValueError, match="multiple of 128 tokens"):
            video_attention(q, k, v, thw, tile, mask[:1], **settings)
        return
    for layout in ("heads first", "tokens first", "together"):
        q, k, v, dout = (
            tensor((2, heads, canvas.tokens, head_dim), layout, dtype, generator)
            for heads in (4, 2, 2, 4)
        )
        for scale, deterministic in ((None, False), (-0.1, True)):
            results = []
            for device, to in (("cuda", dtype), ("cpu", torch.float32)):
                leaves = [x.detach().to(device, to).requires_grad_() for x in (q, k, v)]
                options = {**settings, "scale": scale, "deterministic": deterministic}
                out = video_attention(*leaves, thw, tile, mask.to(device), **options)
                gradients = torch.autograd.grad(out, leaves, dout.to(device, to))
                results.append((out.detach(), *gradients))
            for got, expected in zip(*results, strict=True):
                assert relative_error(got.cpu(), expected) < 1e-2


def test_videos_repeat_wait_for_nothing_and_replay():
    thw, tile, text_len = (7, 13, 20), (6, 8, 8), 100
    canvas = Canvas.of_tiles(thw, tile, text_len)
    mask = torch.rand(canvas.blocks, canvas.blocks, device="cuda") < 0.7
    shape = 4, 1, 4, canvas.tokens, 128
    q, k, v, dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run():
        out = video_attention(*leaves, thw, tile, mask, text_len=text_len, deterministic=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("sparse_type", ["sta", "block_attn", "ssta"])
def test_videos_without_padding(sparse_type):
    options = {**VIDEO, **CHOICES[2], "sparse_type": sparse_type, "topk": 9, "pad_type": "exact"}
    q, k, v = video()
    out, density = ssta_3d_attention(q, k, v, **options)
    expected, wanted = ssta_3d_attention(*(x.cpu().float() for x in (q, k, v)), **options)
    assert abs(float(density) - float(wanted)) < 1e-3
    assert relative_error(out.cpu(), expected) < (0.01 if sparse_type == "sta" else 0.05)


def test_masks_are_those_of_the_formulas():
    """In 200 random settings, up to near-ties, which are counted: of tiles, and of tokens as they
    lie."""
    ties, blocks = near_ties_of_settings(200, "cuda")
    assert ties <= blocks / 1000


@pytest.mark.parametrize("thw, topk", [((31, 30, 52), 32), ((31, 45, 80), 64)])
def test_masks_of_released_models_are_those_of_the_formulas(thw, topk):
    sizes = {"thw": thw, "tile_thw": (6, 8, 8), "kernel_thw": (3, 3, 3), "text_len": 256}
    choice = {"topk": topk, "mask_share_within_head": False, "adaptive_pool": None}
    choice |= {"sampling_type": "importance", "lambda_": 0.7}
    q, k, _ = random_tokens(sizes, 1, 1, 128, torch.bfloat16)
    ties, blocks = compare_masks(q, k, sizes, choice, "cuda")
    print(f"{ties} near-ties in {blocks} chosen blocks")
    assert ties <= blocks / 1000


def test_a_choice_is_replayed_with_a_graph():
    q, k, v = video(1)
    options = {**VIDEO, **CHOICES[2], "topk": 3, "mask_share_within_head": False}
    ssta_3d_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, density = ssta_3d_attention(q, k, v, **options)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        expected, expected_density = ssta_3d_attention(q, k, v, **options)
        assert torch.equal(out, expected) and torch.equal(density, expected_density)


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_moba_is_that_of_the_cpu(block_size):
    """Output and gradients, of one sequence and of several. A near-tie may be chosen otherwise."""
    q, k, v = (x[0, :, :500] for x in video(1))
    q, k, v = (x.detach().transpose(0, 1) for x in (q, k[:2], v[:2]))
    for cu_seqlens in ([0, 500], [0, 130, 131, 400, 500], [0, 128, 384, 500]):
        results = []
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
            leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
            out = moba_attention_varlen(*leaves, cu_seqlens, 128, 2, block_size=block_size)
            if len(cu_seqlens) == 2:
                first = [x.transpose(0, 1)[None] for x in leaves]
                one = moba_attention(*first, 128, 2, block_size=block_size)
                assert torch.equal(one[0].transpose(0, 1), out)
            gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
            results.append((out.detach(), *gradients))
        for got, expected in zip(*results, strict=True):
            assert relative_error(got.cpu(), expected) < 0.05


def test_moba_is_replayed_with_a_graph():
    q, k, v = (x[:, :, :500].contiguous() for x in video(1))
    moba_attention(q, k, v, 128, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moba_attention(q, k, v, 128, 2)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert torch.equal(out, moba_attention(q, k, v, 128, 2))


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_on_video(deterministic: bool):
    """The losses over patches of a clip are those with torch's own attention, densely masked."""
    mask = BlockMask.sliding_window(TOKENS, TOKENS, 32, 16, left=48, right=32)
    tokens = token_mask(mask.blocks, TOKENS, TOKENS, 32, 16).cuda()
    mask = mask.to("cuda")

    def losses(attend):
        def rounded(q, k, v):
            return attend(*(x.bfloat16() for x in (q, k, v))).float()

        return list(denoising(rounded, 128, 2, 40, "cuda"))

    sparse = losses(lambda q, k, v: flex_block_attn(q, k, v, mask, deterministic=deterministic))
    dense = losses(lambda q, k, v: scaled_dot_product_attention(q, k, v, tokens))
    assert sparse[-1] < 0.3 * sparse[0]
    assert sparse == pytest.approx(dense, rel=2e-2)


# --- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_measures_one_case_of_each_kind(tmp_path):
    arguments = ["--suite", "smoke", "--rounds", "2", "--turn", "1", "--commit", "none"]
    assert benchmark([*arguments, "--peers", "cuDNN", "SDPA", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/results.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["device"] == torch.cuda.get_device_name()
    assert rows[0]["driver"].split(".")[0].isdigit()
    measured = {(row["case"].split()[0], row["impl"], row["pass"]) for row in rows}
    for which in ("forward", "backward"):
        assert ("dense", "cuDNN", which) in measured
        for mask in ("window", "random", "causal", "ssta"):
            assert {(mask, "ours", which), (mask, "SDPA", which)} <= measured
    for row in rows:
        assert 0 < float(row["ms_min"]) <= float(row["ms_max"])
        # The output at least.
        outputs = int(row["heads"]) * int(row["head_dim"]) * 2 / 2**20
        assert float(row["peak_mib"]) >= 0.5 * outputs * int(row["q_len"])


def test_memory_and_time_are_those_of_the_call():
    device = torch.device("cuda")
    assert peak_mib(lambda: torch.ones(2**23, device="cuda"), device) == pytest.approx(32, abs=2)
    cycles = 10_000_000
    ms = turn(lambda: torch.cuda._sleep(cycles), 20, device)
    # A clock of 1 to 2 GHz.
    assert 4 < ms < 11

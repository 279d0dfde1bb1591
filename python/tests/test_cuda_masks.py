"""Masks of functions on GPUs: as on the CPU, as torch's FlexAttention, in graphs, without waiting.

All of it needs a Hopper GPU; without one the tests are skipped and say why.
"""

import mask_functions
import pytest
import torch
from gpu import NEEDS_HOPPER, tensor
from reference import relative_error
from torch.nn.attention import flex_attention

from flex_block_attn import (
    and_masks,
    create_block_mask,
    flex_block_attn,
    forget_masks,
)

pytestmark = NEEDS_HOPPER


def _functions(tokens: int, heads: int):
    """Functions of masks, which look up tensors on the GPU, and how many heads they tell apart."""
    document = torch.arange(tokens, device="cuda") // 150
    prefix = torch.tensor([[70], [300]], device="cuda")
    width = torch.arange(heads, device="cuda", dtype=torch.int32) * 40 + 20

    def causal(b, h, q, kv):
        return q >= kv

    def near(b, h, q, kv):
        return (q - kv).abs() < width[h]

    def in_space(b, h, q, kv):
        row, column = q // 17 - kv // 17, q % 17 - kv % 17
        return (row.abs() <= 6) & (column.abs() <= 4)

    return [
        causal,
        and_masks(causal, lambda b, h, q, kv: document[q] == document[kv]),
        lambda b, h, q, kv: (q >= kv) | (kv < prefix[b, 0]),
        near,
        in_space,
        and_masks(near, lambda b, h, q, kv: (q - kv) % 3 == 0),
    ]


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("head_dim, block", [(64, 128), (128, 128), (128, (256, 64)), (64, 48)])
def test_masks_of_functions(which: int, head_dim: int, block):
    """Forward and backward as on the CPU, where they are tested against float64."""
    tokens, heads = 700, 4
    mask_mod = _functions(tokens, heads)[which]
    mask = create_block_mask(mask_mod, 2, heads, tokens, tokens, device="cuda", BLOCK_SIZE=block)
    assert mask.device.type == "cuda"
    generator = torch.Generator("cuda").manual_seed(which)
    q, k, v, dout = (
        tensor((2, h, tokens, head_dim), "tokens first", torch.bfloat16, generator)
        for h in (heads, 2, 2, heads)
    )
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        out, lse = flex_block_attn(*leaves, mask.to(device), return_lse=True)
        gradients = torch.autograd.grad(out, leaves, dout.to(device, dtype))
        results.append((out, *gradients, lse))
    for got, expected in zip(*(r[:4] for r in results), strict=True):
        assert relative_error(got.cpu(), expected) < 1e-2
    got, expected = (r[4].detach().cpu().double() for r in results)
    assert torch.equal(got.isneginf(), expected.isneginf())
    assert (got - expected).nan_to_num(0).abs().max() < 2e-3


def _numbers(*shape, below: int):
    generator = torch.Generator("cuda").manual_seed(below)
    return torch.randint(below, shape, device="cuda", generator=generator)


def _documents(below: int):
    return _numbers(700, below=below).sort().values


# Of FlexAttention's documentation and examples: for 2 batches, 4 heads and 700 tokens.
GALLERY = {
    "everything": lambda: mask_functions.everything,
    "causal": lambda: mask_functions.causal,
    "window": lambda: mask_functions.window(90),
    "causal window": lambda: mask_functions.left_window(150),
    "prefix": lambda: mask_functions.prefix(_numbers(2, below=300)),
    "document": lambda: mask_functions.document(_documents(6)),
    "document of each batch": lambda: mask_functions.per_batch_document(
        torch.stack([_documents(4), _documents(6) - 1])
    ),
    "causal document": lambda: mask_functions.offset_document(
        _documents(6), torch.searchsorted(_documents(6), torch.arange(6, device="cuda"))
    ),
    "dilated": lambda: mask_functions.dilated(200, 3),
    "window of each head": lambda: mask_functions.per_head_window(_numbers(4, below=500)),
    "neighbourhood": lambda: mask_functions.natten(25, 28, 7),
    "tiled neighbourhood": lambda: mask_functions.tiled_natten(28, 28, 7, 4),
    "stand-alone": lambda: mask_functions.stand_alone(28, 9),
    "with an offset": lambda: mask_functions.with_offset(mask_functions.left_window(99), 30),
    "pictures in text": lambda: mask_functions.transfusion(
        _numbers(2, below=200), 300 + _numbers(2, below=300)
    ),
    "sliding tiles": lambda: mask_functions.sliding_tiles((5, 10, 14), (2, 4, 4), (1, 1, 1)),
    "flamingo": lambda: mask_functions.flamingo(_numbers(2, 700, below=40)),
    "strided": lambda: mask_functions.strided(37),
    "odd": lambda: mask_functions.odd_functions(_numbers(700, below=2).bool()),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", GALLERY)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_masks_of_functions_as_flex_attention_has_them(name: str, head_dim: int):
    """The same function and numbers: torch's own output, in float32, and gradients."""
    sizes = 2, 4, 700, 700
    mask_mod = GALLERY[name]()
    mask = create_block_mask(mask_mod, *sizes, device="cuda")
    theirs = flex_attention.create_block_mask(mask_mod, *sizes, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        tensor((2, 4, 700, head_dim), "heads first", torch.bfloat16, generator) for _ in range(4)
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flex_block_attn(*leaves, mask)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = flex_attention.flex_attention(*exact, block_mask=theirs)
    assert relative_error(out, expected) < 1e-2
    gradients = torch.autograd.grad(out, leaves, dout)
    for got, wanted in zip(
        gradients, torch.autograd.grad(expected, exact, dout.float()), strict=True
    ):
        assert relative_error(got, wanted) < 1e-2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_masks_of_functions_wait_for_nothing():
    """Once made, a mask is used without the host waiting for the GPU, also from a graph."""
    mask_mod = _functions(512, 2)[1]
    mask = create_block_mask(mask_mod, None, None, 512, 512, device="cuda")
    q, k, v = (torch.randn(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = flex_block_attn(q, k, v, mask)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert mask.to("cuda:0") is mask
        flex_block_attn(q, k, v, mask)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flex_block_attn(q, k, v, mask)
    graph.replay()
    assert torch.equal(out, expected)


def test_masks_of_functions_in_compiled_graphs():
    mask_mod = _functions(512, 2)[1]
    mask = create_block_mask(mask_mod, None, None, 512, 512, device="cuda")
    q, k, v = (
        torch.randn(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    out = flex_block_attn(q, k, v, mask)
    compiled = torch.compile(lambda *x: flex_block_attn(*x, mask), fullgraph=True)
    assert torch.equal(compiled(q, k, v), out)


@pytest.mark.parametrize("is_dense", [True, False])
def test_tensors_are_read_after_what_was_done_to_them(is_dense: bool):
    """By the stream that is current, however busy it is; what is done to them later is not seen."""
    tokens = 6000
    places = torch.arange(tokens)
    for expected in (
        (places // 700).int(),
        places // 700,
        (places // 700).byte(),
        places % 900 < 400,
        torch.stack([places // 500, places // 700]),
    ):

        def function(ids):
            if ids.dim() == 2:
                return lambda b, h, q, kv: (ids[0, q] == ids[0][kv]) & (ids[1, q] == ids[1, kv])
            return lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv])

        on_host = create_block_mask(function(expected), None, None, tokens, tokens, device="cpu")
        source = expected.cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        forget_masks()
        with torch.cuda.stream(stream):
            ids = torch.zeros(*source.shape, 2, device="cuda", dtype=source.dtype)[..., 0]
            ids = ids.contiguous() if is_dense else ids
            torch.cuda._sleep(10_000_000)
            ids.copy_(source)
            mask = create_block_mask(function(ids), None, None, tokens, tokens)
            ids.zero_()
        stream.synchronize()
        assert mask.device.type == "cuda"
        assert torch.equal(mask.blocks.cpu(), on_host.blocks)
        assert torch.equal(mask.partial_blocks.cpu(), on_host.partial_blocks)
        tables = zip(mask.expression.tables, on_host.expression.tables, strict=True)
        assert all(torch.equal(table.cpu(), other) for table, other in tables)


def test_masks_of_batches_and_heads_are_sent_as_bits():
    batch, heads, tokens = 2, 3, 2000
    width = torch.tensor([[100, 900, 1500], [5, 50, 500]], device="cuda")

    def near(b, h, q, kv):
        return (q - kv).abs() < width[b, h]

    mask = create_block_mask(near, batch, heads, tokens, tokens, BLOCK_SIZE=(64, 128))
    q, k, v = (torch.randn(batch, heads, tokens, 64, device="cuda").bfloat16() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask.to_dense()
    )
    assert relative_error(flex_block_attn(q, k, v, mask), expected) < 1e-2


def test_masks_of_functions_are_not_made_in_graphs():
    """A graph would send what has long gone."""
    forget_masks()
    expected = "a new mask's stream must be one that is not captured"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        with pytest.raises(ValueError, match=expected):
            create_block_mask(mask_functions.causal, None, None, 300, 300, device="cuda")


def test_masks_of_functions_go_between_devices_once():
    on_host = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 300, 300)
    on_device = on_host.to("cuda")
    assert on_host.to("cuda") is on_device and on_device.to("cpu") is on_host
    assert torch.equal(on_device.to_dense().cpu(), on_host.to_dense())
    assert torch.equal(on_device[0, 0, 1].to_dense().cpu(), on_host.to_dense()[:, :, 128:256])

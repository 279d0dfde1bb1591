"""The examples, with stand-ins for the models that they patch, against plain torch."""

import sys
import types

import pytest
import torch

from examples import fastvideo_sta, hunyuan_video, vmoba, vsa, wan_diffusers
from flex_block_attn import ssta_attention

dense = torch.nn.functional.scaled_dot_product_attention


def masked(q, k, v, blocks, block):
    mask = blocks.repeat_interleave(block, -1).repeat_interleave(block, -2)
    return dense(q, k, v, attn_mask=mask[..., : q.shape[2], : k.shape[2]])


def test_hunyuan_video(monkeypatch):
    with pytest.raises(RuntimeError, match="import the model before"):
        hunyuan_video.patch()
    module = types.ModuleType("model_with_ssta")
    module.ssta_3d_attention = print
    monkeypatch.setitem(sys.modules, "model_with_ssta", module)
    assert hunyuan_video.patch() == ["model_with_ssta"]
    assert module.ssta_3d_attention is ssta_attention.ssta_3d_attention


class WanAttention(torch.nn.Module):
    """What the processor uses of diffusers' module of that name."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(dim, dim) for _ in "qkv")
        self.norm_q, self.norm_k = torch.nn.RMSNorm(dim), torch.nn.RMSNorm(dim)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(dim, dim), torch.nn.Dropout(0.0)])

    def set_processor(self, processor):
        self.processor = processor


class WanTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(patch_size=(1, 2, 2))
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].attn1 = WanAttention(32, 2)

    def forward(self, hidden_states, rotary_emb):
        tokens = hidden_states.unfold(3, 2, 2).unfold(4, 2, 2).sum((-1, -2)).flatten(2).mT
        attn = self.blocks[0].attn1
        return attn.processor(attn, tokens, rotary_emb=rotary_emb)


def test_wan_diffusers():
    transformer = WanTransformer()
    options = {"tile_thw": (2, 2, 4), "sparse_type": "sta"}
    latents = torch.randn(1, 32, 4, 8, 16)  # (4, 4, 8) tokens, 2 x 2 x 2 tiles
    angles = torch.rand(1, 128, 1, 8).repeat_interleave(2, dim=-1)
    rotary_emb = angles.cos(), angles.sin()
    # A window of everything is dense attention.
    processor = wan_diffusers.SparseAttention(kernel_thw=(3, 3, 3), **options)
    wan_diffusers.patch(transformer, processor)
    sparse = transformer(latents, rotary_emb)
    assert processor.thw == (4, 4, 8)
    processor.enabled = False
    torch.testing.assert_close(sparse, transformer(hidden_states=latents, rotary_emb=rotary_emb))
    narrow = wan_diffusers.SparseAttention(kernel_thw=(1, 1, 1), **options)
    wan_diffusers.patch(transformer, narrow)
    assert not torch.allclose(transformer(latents, rotary_emb), sparse, atol=1e-3)
    with pytest.raises(NotImplementedError, match="self-attention"):
        narrow(transformer.blocks[0].attn1, sparse, encoder_hidden_states=sparse)


def test_rotation_is_a_product_of_complex_numbers():
    x, angles = torch.randn(2, 5, 3, 8), torch.rand(1, 5, 1, 4)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    twice = (f(angles).repeat_interleave(2, dim=-1) for f in (torch.cos, torch.sin))
    torch.testing.assert_close(wan_diffusers.rotate(x, *twice), expected)


def test_fastvideo_sta(monkeypatch):
    monkeypatch.setitem(sys.modules, "st_attn", None)
    fastvideo_sta.install()
    from st_attn import sliding_tile_attention

    canvas, text, counted = (6, 8, 24), 40, 25
    q, k, v = torch.randn(3, 1, 2, 6 * 8 * 24 + text, 16)
    windows = [(1, 1, 1), (3, 3, 3)]
    out = sliding_tile_attention(q, k, v, windows, counted, True, "6x8x24")
    for head, window in enumerate(windows):
        blocks = ssta_attention.create_sta_3d_mask(canvas, (6, 8, 8), window, text)
        one = (x[:, head : head + 1] for x in (q, k[:, :, :-15], v[:, :, :-15]))
        expected = masked(*one, blocks, 384)
        torch.testing.assert_close(out[:, head : head + 1], expected, atol=1e-5, rtol=1e-4)
    video = [x[:, :, : 6 * 8 * 24] for x in (q, k, v)]
    assert sliding_tile_attention(*video, windows, 0, False, "6x8x24").shape == video[0].shape


def test_vsa():
    thw, tile_thw = (4, 8, 8), (4, 4, 4)
    q, k, v = torch.randn(3, 2, 2, 256, 16, dtype=torch.float64).requires_grad_().unbind()
    tiles = [ssta_attention.tile(x, thw, tile_thw) for x in (q, k, v)]
    means = [x.unflatten(2, (4, 64)).mean(3) for x in tiles]
    coarse = dense(*means).repeat_interleave(64, dim=2)
    scores = means[0] @ means[1].mT
    best = scores.argsort(-1, descending=True)[..., :2]
    blocks = (torch.arange(4) == best[..., None]).any(-2)
    expected = ssta_attention.untile(0.3 * coarse + masked(*tiles, blocks, 64), thw, tile_thw)
    out = vsa.video_sparse_attention(q, k, v, thw, sparsity=0.5, gate=0.3)
    torch.testing.assert_close(out, expected)
    for one, other in zip(
        torch.autograd.grad(out.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_vmoba():
    thw = (4, 8, 8)
    q, k, v = torch.randn(3, 1, 2, 256, 16, dtype=torch.float64)
    for layer in range(6):
        chunk = vmoba.chunk_of_layer(layer, thw, 2, (4, 4), (2, 4, 4))
        assert chunk == [(2, 8, 8), (4, 4, 4), (2, 4, 4)][layer % 3]
        everything = vmoba.vmoba_attention(q, k, v, thw, chunk, topk=99)
        torch.testing.assert_close(everything, dense(q, k, v))
        most = vmoba.vmoba_attention(q, k, v, thw, chunk, mass=0.6)
        assert not torch.allclose(most, everything)
    # Itself alone.
    own = vmoba.vmoba_attention(q, k, v, thw, (1, 8, 8), topk=1)
    frames = (x.unflatten(2, (4, 64)) for x in (q, k, v))
    torch.testing.assert_close(own, dense(*frames).flatten(2, 3))
    with pytest.raises(ValueError, match="one of topk and mass"):
        vmoba.vmoba_attention(q, k, v, thw, (1, 8, 8))


def test_chunks_until_their_scores_add_up():
    own = torch.eye(4, dtype=torch.bool)
    scores = torch.tensor([4.0, 3.0, 2.0, 0.0]).repeat(4, 1)
    # Shares of the sum: 4/9, 3/9, 2/9 and 0.
    for row, mass, expected in [
        (0, 0.4, [0]), (0, 0.5, [0, 1]), (0, 0.8, [0, 1, 2]), (2, 0.2, [2]), (2, 0.3, [0, 2]),
        (3, 0.1, [0, 3]),
    ]:  # fmt: skip
        seen = vmoba.until_mass(scores, own, mass)
        assert seen[row].nonzero().flatten().tolist() == expected

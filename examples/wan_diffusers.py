"""Wan (2.1, 2.2) in diffusers with sparse self-attention, by an attention processor.

    from diffusers import WanPipeline
    from examples.wan_diffusers import SparseAttention, patch

    name = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    pipe = WanPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
    patch(pipe.transformer, SparseAttention(
        topk=32, tile_thw=(3, 9, 16), kernel_thw=(3, 3, 3), sampling_type="importance",
        lambda_=0.7, mask_share_within_head=False,
    ))

Wan was not trained with padding: take a tile that divides the tokens, which are (21, 45, 80) for 81
frames of 720 x 1280; (3, 9, 16) does. Where none does, as for (21, 30, 52), `pad_type="repeat"` is
the lesser evil. Quality is the model's: sparse attention is usually left out of the first steps and
of the first layers, which `SparseAttention.enabled` allows.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from flex_block_attn.ssta_attention import ssta_3d_attention


class SparseAttention:
    """The processor: what diffusers' does for self-attention, over chosen and sliding tiles.

    Options are those of `ssta_3d_attention`. While `enabled` is false, attention is torch's own.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.enabled = True
        # Tokens along (time, height, width) of what is denoised now: `patch` sees to it.
        self.thw = (0, 0, 0)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise NotImplementedError("SparseAttention is for self-attention without a mask")
        q = attn.norm_q(attn.to_q(hidden_states))
        k = attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.enabled and q.shape[2] == prod(self.thw):
            out, _ = ssta_3d_attention(q, k, v, self.thw, **self.options)
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: neighbouring pairs of numbers, turned by the angles of their token. Every
    angle's cosine and sine come twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


def patch(transformer: nn.Module, processor: SparseAttention) -> None:
    """Puts the processor into every block's self-attention, and tells it the size of each video."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        patches = transformer.config.patch_size
        processor.thw = tuple(n // p for n, p in zip(latents.shape[2:], patches, strict=True))

    transformer.register_forward_pre_hook(before, with_kwargs=True)
    for block in transformer.blocks:
        block.attn1.set_processor(processor)

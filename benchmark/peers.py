"""Attention of other libraries over block masks, each behind the same call.

In: a :class:`Problem`. Out: a function without arguments that computes the output, (batch, heads,
sequence, head_dim), or why there is none. Used by :mod:`benchmark.gpu`; every library but torch is
optional.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]


class Absent(Exception):
    """A peer that is not installed, or does not do what is asked."""


@dataclass
class Problem:
    """q, k and v, (batch, heads, sequence, head_dim), bfloat16, and a block mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    # (batch or 1, heads or 1, blocks, blocks), bool; None for dense.
    blocks: Tensor | None
    # Tokens of a block.
    block: int

    @classmethod
    def random(
        cls, heads: int, tokens: int, head_dim: int, block: int, density: float
    ) -> "Problem":
        """Numbers by chance; in each row of blocks the same number of them is kept."""
        q, k, v = (
            torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
            for _ in range(3)
        )
        if density >= 1:
            return cls(q, k, v, None, block)
        count = -(-tokens // block)
        kept = max(1, round(count * density))
        chosen = torch.rand(1, heads, count, count, device="cuda").argsort(-1)[..., :kept]
        blocks = torch.zeros(1, heads, count, count, device="cuda", dtype=torch.bool)
        return cls(q, k, v, blocks.scatter_(-1, chosen, True), block)

    @property
    def operations(self) -> float:
        """Of the products of the blocks that are kept, forward."""
        pairs = self.q.shape[2] * self.k.shape[2]
        density = 1.0 if self.blocks is None else self.blocks.float().mean().item()
        return 4.0 * pairs * density * self.q.shape[1] * self.q.shape[3]

    def finer(self, block: int) -> Tensor:
        """The mask in smaller blocks."""
        assert self.blocks is not None
        if self.block % block:
            raise Absent(f"has blocks of {block}")
        times = self.block // block
        finer = self.blocks.repeat_interleave(times, -1).repeat_interleave(times, -2)
        count = -(-self.q.shape[2] // block)
        return finer[..., :count, :count]


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and columns of each row, int32."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(-1, descending=True, stable=True)
    return counts, columns.to(torch.int32).contiguous()


def ours(problem: Problem) -> Call:
    """flex_block_attn, over a kept plan."""
    from flex_block_attn import BlockMask, flex_block_attn

    q, k, v = problem.q, problem.k, problem.v
    lengths = q.shape[2], k.shape[2]
    if problem.blocks is None:
        # Blocks that all tiles divide, as a dense mask has none of its own.
        mask = BlockMask.full(*lengths, 384, 384).to(q.device)
    else:
        mask = BlockMask(problem.blocks, *lengths, problem.block, problem.block)
    return lambda: flex_block_attn(q, k, v, mask)


def cudnn(problem: Problem) -> Call:
    """cuDNN, through torch; dense only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if problem.blocks is not None:
        raise Absent("is dense")

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(problem.q, problem.k, problem.v)

    return call


def flash3(problem: Problem) -> Call:
    """FlashAttention-3, the wheel ``fa3_fwd``; dense only."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    if problem.blocks is not None:
        raise Absent("is dense")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))

    def call() -> Tensor:
        out = flash_attn_func(q, k, v)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def flash4(problem: Problem) -> Call:
    """FlashAttention-4, the wheel ``flash-attn-4``, over lists of blocks of 128."""
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))
    sparse = None
    if problem.blocks is not None:
        counts, columns = _lists(problem.finer(128))
        sparse = BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=torch.zeros_like(columns),
            full_block_cnt=counts,
            full_block_idx=columns,
            block_size=(128, 128),
        )

    def call() -> Tensor:
        out = flash_attn_func(q, k, v, block_sparse_tensors=sparse)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def flex(problem: Problem) -> Call:
    """FlexAttention, compiled, over blocks of 128 that are all whole."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    if problem.blocks is None:
        return lambda: compiled(problem.q, problem.k, problem.v)
    counts, columns = _lists(problem.finer(128))
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(columns),
        counts,
        columns,
        BLOCK_SIZE=128,
        seq_lengths=(problem.q.shape[2], problem.k.shape[2]),
    )
    return lambda: compiled(problem.q, problem.k, problem.v, block_mask=mask)


def vsa(problem: Problem) -> Call:
    """FastVideo's kernel for blocks of 64, the wheel ``fastvideo_kernel``."""
    try:
        from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    if problem.blocks is None:
        raise Absent("is sparse")
    q, k, v = problem.q, problem.k, problem.v
    counts, columns = _lists(problem.finer(64))
    sizes = torch.full((columns.shape[-1],), 64, device=q.device, dtype=torch.int32)
    return lambda: block_sparse_attn_from_indices(q, k, v, columns, counts, sizes)[0]


PEERS: dict[str, Callable[[Problem], Call]] = {
    "FA3": flash3,
    "FA4": flash4,
    "cuDNN": cudnn,
    "Flex": flex,
    "VSA": vsa,
}

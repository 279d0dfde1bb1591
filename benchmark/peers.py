"""Attention of other libraries over block masks, each behind the same interface.

In: a :class:`Problem`. Out: an :class:`Attention`, inputs and a function of them, or why there is
none. Used by :mod:`benchmark.gpu`; every library but torch is optional.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Attention:
    """A library's attention over a problem."""

    # q, k and v as the library takes them.
    inputs: tuple[Tensor, Tensor, Tensor]
    # Of inputs the output.
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    # Whether tensors are (batch, sequence, heads, head_dim).
    tokens_first: bool = False

    def output(self) -> Tensor:
        """(batch, heads, sequence, head_dim)"""
        with torch.no_grad():
            out = self.run(*self.inputs)
        return out.transpose(1, 2) if self.tokens_first else out

    def forward(self) -> Callable[[], object]:
        """A call to be timed."""

        def call() -> None:
            with torch.no_grad():
                self.run(*self.inputs)

        return call

    def backward(self, dout: Tensor) -> Callable[[], object]:
        """A call to be timed: the gradients of all inputs, given that of the output, (batch, heads,
        sequence, head_dim)."""
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        out = self.run(*inputs)
        if not out.requires_grad:
            raise Absent("has no backward pass")
        if self.tokens_first:
            dout = dout.transpose(1, 2).contiguous()
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


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

    def tokens_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (batch, sequence, heads, head_dim)."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))
        return q, k, v

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
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts, columns.to(torch.int32).contiguous()


def ours(problem: Problem) -> Attention:
    """flex_block_attn, over a kept plan."""
    from flex_block_attn import BlockMask, flex_block_attn

    q, k, v = problem.q, problem.k, problem.v
    lengths = q.shape[2], k.shape[2]
    if problem.blocks is None:
        # Blocks that all tiles divide, as a dense mask has none of its own.
        mask = BlockMask.full(*lengths, 384, 384).to(q.device)
    else:
        mask = BlockMask(problem.blocks, *lengths, problem.block, problem.block)
    return Attention((q, k, v), lambda q, k, v: flex_block_attn(q, k, v, mask))


def cudnn(problem: Problem) -> Attention:
    """cuDNN, through torch; dense only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if problem.blocks is not None:
        raise Absent("is dense")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    return Attention((problem.q, problem.k, problem.v), run)


def flash3(problem: Problem) -> Attention:
    """FlashAttention-3, the wheel ``fa3_fwd``; dense only."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    if problem.blocks is not None:
        raise Absent("is dense")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return Attention(problem.tokens_first(), run, tokens_first=True)


def flash4(problem: Problem) -> Attention:
    """FlashAttention-4, the wheel ``flash-attn-4``, over lists of blocks of 128."""
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error

    def sparse(blocks: Tensor) -> BlockSparseTensorsTorch:
        counts, columns = _lists(blocks)
        return BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=torch.zeros_like(columns),
            full_block_cnt=counts,
            full_block_idx=columns,
            block_size=(128, 128),
        )

    masks = {}
    if problem.blocks is not None:
        blocks = problem.finer(128)
        masks = {
            "block_sparse_tensors": sparse(blocks),
            "block_sparse_tensors_bwd": sparse(blocks.mT),
        }

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, **masks)
        return out[0] if isinstance(out, tuple) else out

    return Attention(problem.tokens_first(), run, tokens_first=True)


def flex(problem: Problem) -> Attention:
    """FlexAttention, compiled, over blocks of 128 that are all whole."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    inputs = problem.q, problem.k, problem.v
    if problem.blocks is None:
        return Attention(inputs, compiled)
    counts, columns = _lists(problem.finer(128))
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(columns),
        counts,
        columns,
        BLOCK_SIZE=128,
        seq_lengths=(problem.q.shape[2], problem.k.shape[2]),
    )
    return Attention(inputs, lambda q, k, v: compiled(q, k, v, block_mask=mask))


def vsa(problem: Problem) -> Attention:
    """FastVideo's kernel for blocks of 64, the wheel ``fastvideo_kernel``."""
    try:
        from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    if problem.blocks is None:
        raise Absent("is sparse")
    counts, columns = _lists(problem.finer(64))
    sizes = torch.full((columns.shape[-1],), 64, device=columns.device, dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attn_from_indices(q, k, v, columns, counts, sizes)[0]

    return Attention((problem.q, problem.k, problem.v), run)


PEERS: dict[str, Callable[[Problem], Attention]] = {
    "FA3": flash3,
    "FA4": flash4,
    "cuDNN": cudnn,
    "Flex": flex,
    "VSA": vsa,
}

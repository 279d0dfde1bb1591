"""Attention of ours and of other libraries, each behind the same interface.

In: a :class:`~.problem.Problem`. Out: an :class:`~.attention.Attention`, or why there is none.
Called by :mod:`.measure`; every library but torch is optional. Each is given the form of mask that
suits it best; lists are made of the mask of blocks on its device. docs/benchmarks.md says how to
add one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import Attention, end_to_end
from .problem import Absent, Problem
from .suites import Video

# Elements of the largest mask of tokens that is made.
MOST_OF_A_TOKEN_MASK = 2**29


def ours(problem: Problem) -> Attention:
    """flex_block_attn, over a kept plan."""
    import flex_block_attn as package
    from flex_block_attn import BlockMask, flex_block_attn

    case = problem.case
    lengths, blocks = (case.q_len, case.kv_len), (case.q_block, case.kv_block)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return flex_block_attn(q, k, v, mask)

    if problem.is_dense:
        # Blocks that all tiles divide, as a dense mask has none of its own.
        mask = BlockMask.full(*lengths, 384, 384).to(problem.device)
        return Attention(lambda q, k, v, _: flex_block_attn(q, k, v, mask))
    if problem.rule:
        if not hasattr(package, "create_block_mask"):
            raise Absent("has no create_block_mask")

        def make(_: Any, backward: bool) -> BlockMask:
            # Masks made last are kept, but what is asked is how long one takes to make.
            package.forget_masks()
            rule, device = problem.mask_mod, problem.device
            return package.create_block_mask(
                rule, None, None, *lengths, device=device, BLOCK_SIZE=blocks
            )

        return Attention(run, make)
    return Attention(run, lambda chosen, backward: BlockMask(chosen, *lengths, *blocks))


def _our_ssta(problem: Problem) -> Attention:
    """A call of ssta_3d_attention; what its mask costs is timed apart."""
    assert problem.case.video is not None
    attend = ssta_of(problem.case.video)
    return Attention(lambda q, k, v, _: attend(q, k, v), ours(problem).make_mask)


def ssta_of(of: Video, pad_type: str = "zero") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Calls of ssta_3d_attention for a video."""
    from flex_block_attn.ssta_attention import ssta_3d_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ssta_3d_attention(
            q,
            k,
            v,
            of.thw,
            of.topk,
            of.tile,
            of.window,
            of.text,
            lambda_=of.lambda_,
            pad_type=pad_type,
            mask_share_within_head=False,
            sampling_type="importance",
        )[0]

    return attend


# --- torch ---------------------------------------------------------------------------------------


def _through_torch(problem: Problem, backend: str) -> Attention:
    """One of the backends behind torch's scaled_dot_product_attention; dense or causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _only_on_gpus(problem)
    _no_blocks(problem)
    if problem.rule == "local":
        raise Absent("has no window")
    chosen, causal = getattr(SDPBackend, backend), problem.rule == "causal"

    def run(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        with sdpa_kernel(chosen):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Attention(run)


def cudnn(problem: Problem) -> Attention:
    """cuDNN, through torch."""
    return _through_torch(problem, "CUDNN_ATTENTION")


def flash2(problem: Problem) -> Attention:
    """FlashAttention-2, torch's own copy."""
    return _through_torch(problem, "FLASH_ATTENTION")


def sdpa(problem: Problem) -> Attention:
    """torch's scaled_dot_product_attention as it chooses itself; blocks become a mask of tokens."""
    case = problem.case
    if problem.is_dense or problem.rule == "causal":
        if problem.device.type == "cuda":
            raise Absent("is cuDNN or FA2 here")
        causal = problem.rule == "causal"
        return Attention(lambda q, k, v, _: scaled_dot_product_attention(q, k, v, is_causal=causal))
    heads = case.heads if case.mask in ("random", "ssta") else 1
    if case.q_len * case.kv_len * heads > MOST_OF_A_TOKEN_MASK:
        raise Absent(f"needs a mask of {case.q_len} x {case.kv_len} tokens")

    def tokens(blocks: Tensor | None, backward: bool) -> Tensor:
        if blocks is None:
            return problem.keep(None, torch.arange(case.q_len, device=problem.device), 0)
        rows = blocks.repeat_interleave(case.q_block, 2)[:, :, : case.q_len]
        return rows.repeat_interleave(case.kv_block, 3)[..., : case.kv_len]

    return Attention(
        lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, attn_mask=mask), tokens
    )


def flex(problem: Problem) -> Attention:
    """FlexAttention, compiled: a list of blocks that are all whole, or a compiled rule."""
    from torch._functorch import config as functorch
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    case = problem.case
    shape = case.batch, case.heads, case.q_len, case.kv_len, case.head_dim, case.dtype
    heads_of_mask = None if problem.blocks is None else problem.blocks.shape[1]
    _compile_for((problem.rule or case.mask == "ssta", *shape, heads_of_mask))
    compiled = torch.compile(flex_attention, dynamic=False)
    # Compiled code would write gradients into what a backward pass needs that is called again.
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False
    if problem.is_dense:
        return Attention(lambda q, k, v, _: compiled(q, k, v))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return compiled(q, k, v, block_mask=mask)

    lengths = case.q_len, case.kv_len
    if problem.rule:
        make = torch.compile(create_block_mask)
        device, rule = problem.device.type, problem.mask_mod
        return Attention(run, lambda _, backward: make(rule, None, None, *lengths, device))
    # On GPUs its tiles have 128 tokens.
    size = (128, 128) if problem.device.type == "cuda" else (case.q_block, case.kv_block)
    _divide(problem, size)

    def lists(blocks: Tensor, backward: bool) -> BlockMask:
        counts, columns = _lists(_finer(problem, blocks, size))
        return BlockMask.from_kv_blocks(
            torch.zeros_like(counts),
            torch.zeros_like(columns),
            counts,
            columns,
            BLOCK_SIZE=size,
            seq_lengths=lengths,
            compute_q_blocks=backward,
        )

    return Attention(run, lists)


# Shapes that something is compiled for. Cases of one shape share what is compiled; but of too many
# shapes, each with and without gradients, torch would quietly stop to compile.
_compiled_for: set[tuple[Any, ...]] = set()
_MOST_SHAPES = 3


def _compile_for(shape: tuple[Any, ...]) -> None:
    """Forgets others where there would be too many."""
    if shape not in _compiled_for and len(_compiled_for) == _MOST_SHAPES:
        torch.compiler.reset()
        _compiled_for.clear()
    _compiled_for.add(shape)


# --- other libraries -----------------------------------------------------------------------------


def flash3(problem: Problem) -> Attention:
    """FlashAttention-3, the wheel ``fa3_fwd``; dense or causal."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    _only_on_gpus(problem)
    _no_blocks(problem)
    options = _options(problem, (-1, -1))

    def run(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return _first(flash_attn_func(q, k, v, **options))

    return Attention(run, tokens_first=True)


def flash4(problem: Problem) -> Attention:
    """FlashAttention-4, the wheel ``flash-attn-4``, over lists of blocks of 128."""
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    _only_on_gpus(problem)
    if problem.is_dense or problem.rule:
        options = _options(problem, (None, None))
        return Attention(
            lambda q, k, v, _: _first(flash_attn_func(q, k, v, **options)), tokens_first=True
        )
    _divide(problem, (128, 128))

    def sparse(blocks: Tensor) -> BlockSparseTensorsTorch:
        counts, columns = _lists(blocks)
        return BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=torch.zeros_like(columns),
            full_block_cnt=counts,
            full_block_idx=columns,
            block_size=(128, 128),
        )

    def lists(blocks: Tensor, backward: bool) -> dict[str, BlockSparseTensorsTorch]:
        blocks = _finer(problem, blocks, (128, 128))
        masks = {"block_sparse_tensors": sparse(blocks)}
        return masks | ({"block_sparse_tensors_bwd": sparse(blocks.mT)} if backward else {})

    def run(q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Any]) -> Tensor:
        return _first(flash_attn_func(q, k, v, **masks))

    return Attention(run, lists, tokens_first=True)


def vsa(problem: Problem) -> Attention:
    """FastVideo's kernel for blocks of 64, the wheel ``fastvideo_kernel``."""
    try:
        from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices
    except ImportError as error:
        raise Absent(f"is not installed ({error})") from error
    _only_on_gpus(problem)
    if problem.is_dense or problem.rule:
        raise Absent("is sparse")
    _divide(problem, (64, 64))
    if problem.case.q_len % 64 or problem.case.kv_len % 64:
        raise Absent("has whole blocks of 64 only")

    def lists(blocks: Tensor, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        counts, columns = _lists(_finer(problem, blocks, (64, 64)))
        heads = problem.case.heads
        counts, columns = (x.expand(1, heads, *x.shape[2:]) for x in (counts, columns))
        sizes = torch.full((columns.shape[-1],), 64, device=columns.device, dtype=torch.int32)
        return columns.contiguous(), counts.contiguous(), sizes

    def run(q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return block_sparse_attn_from_indices(q, k, v, *mask)[0]

    return Attention(run, lists)


# --- what they share -----------------------------------------------------------------------------


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _options(problem: Problem, everywhere: tuple) -> dict[str, Any]:
    """Of FlashAttention's functions, for a rule; ``everywhere`` is their window without bounds."""
    window = (problem.reach, problem.reach) if problem.rule == "local" else everywhere
    return {"causal": problem.rule == "causal", "window_size": window}


def _only_on_gpus(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Absent("is for GPUs")


def _no_blocks(problem: Problem) -> None:
    if not (problem.is_dense or problem.rule):
        raise Absent("is dense")


def _divide(problem: Problem, size: tuple[int, int]) -> None:
    """The problem's blocks must be made of blocks of this size."""
    own = problem.case.q_block, problem.case.kv_block
    if any(block % part for block, part in zip(own, size, strict=True)):
        raise Absent(f"has blocks of {size[0]}, here they are of {own[0]} x {own[1]}")


def _finer(problem: Problem, blocks: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask in smaller blocks."""
    case = problem.case
    for dim, (block, part, length) in enumerate(
        ((case.q_block, size[0], case.q_len), (case.kv_block, size[1], case.kv_len)), 2
    ):
        blocks = blocks.repeat_interleave(block // part, dim).narrow(dim, 0, -(-length // part))
    return blocks


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and columns of each row, int32."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts, columns.to(torch.int32).contiguous()


PEERS: dict[str, Callable[[Problem], Attention]] = {
    "FA3": flash3,
    "FA4": flash4,
    "cuDNN": cudnn,
    "FA2": flash2,
    "Flex": flex,
    "VSA": vsa,
    "SDPA": sdpa,
}


def attention(name: str, problem: Problem) -> Attention:
    """Of a name in :data:`PEERS`, or "ours"."""
    is_video = problem.case.video is not None
    if name == "ours":
        return _our_ssta(problem) if is_video else ours(problem)
    return end_to_end(PEERS[name](problem), problem) if is_video else PEERS[name](problem)

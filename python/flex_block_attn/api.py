"""The public functions. In: tensors as users have them. Out: attention, differentiable.

Called by users. Says what is wrong with arguments as far as only torch can know it (devices,
ranks, types); shapes and sizes are checked by the library underneath, once, before anything is
computed. Hands over to :mod:`.direct`, and to :mod:`.ops` what that does not do.
"""

import torch
from torch import Tensor

from . import _native, direct, ops
from .masks import BlockMask, as_blocks, as_size

_CAST = (torch.float16, torch.bfloat16, torch.float32)
_DTYPES = (*_CAST, torch.float64)
# "meta" tensors have shapes only: torch.compile works out a program's shapes with them.
_DEVICES = ("cpu", "cuda", "meta")
_CUDA_DTYPES = (torch.float16, torch.bfloat16)


def flex_block_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_block_size: int,
    kv_block_size: int,
    block_mask: Tensor,
    *,
    deterministic: bool = False,
) -> Tensor:
    """Attention over the selected blocks, scaled by ``1 / sqrt(head_dim)``.

    Args:
        q: queries, (batch, q_heads, q_len, head_dim); float16, bfloat16, float32 or float64.
        k: keys, (batch, kv_heads, kv_len, head_dim); kv_heads divides q_heads.
        v: values, of k's shape.
        q_block_size: queries of a block, a multiple of 16. The last block may be shorter. On a
            GPU multiples of 384 are fastest, next to them those of 256, then of 128; with a
            head_dim of 64 those of 192.
        kv_block_size: keys of a block, a multiple of 16, whatever q's.
        block_mask: true (or not 0) where a block is computed; (q_blocks, kv_blocks),
            (heads, q_blocks, kv_blocks) or (batch, heads, q_blocks, kv_blocks), in which heads
            and batch may be 1. A needless fifth dimension of 1 is dropped with a warning.
        deterministic: on a GPU, have the gradient of q repeat to the last bit, as the output and
            the other gradients always do; the backward pass takes longer.
            ``torch.use_deterministic_algorithms(True)`` asks for it, too. CPUs always do so, for
            the same number of threads.

    Returns:
        The output, of q's shape and dtype. A query without any key gets 0.

    >>> q = k = v = torch.randn(1, 2, 256, 64)
    >>> block_mask = torch.eye(4, dtype=torch.bool)  # each block of 64 sees itself
    >>> flex_block_attn_func(q, k, v, 64, 64, block_mask).shape
    torch.Size([1, 2, 256, 64])
    """
    q, k, v = as_inputs(q, k, v)
    q_block = as_size("q_block_size", q_block_size)
    kv_block = as_size("kv_block_size", kv_block_size)
    sizes = q.shape[2], k.shape[2], q_block, kv_block
    plan = direct.plan(block_mask, sizes)
    if plan is None:
        blocks = as_blocks(block_mask)
        same_device("block_mask", blocks, q)
        plan = ops.plan(blocks, *sizes)
    done = direct.attention(q, k, v, plan, sizes)
    if done is None:
        same_device("block_mask", plan, q)
        scale, deterministic = default_scale(q), is_deterministic(deterministic)
        done = direct.differentiable(q, k, v, plan, (q_block, kv_block, scale, deterministic))
    return done[0]


def flex_block_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks of a :class:`BlockMask`, which keeps its plan from call to call.

    Args:
        q, k, v: as for :func:`flex_block_attn_func`.
        mask: which blocks, and, if it has an expression, which pairs of the partial ones; its
            lengths are those of q and k.
        scale: factor of ``q k^T``; ``1 / sqrt(head_dim)`` if not given.
        return_lse: also return the natural logarithm of the sum of ``exp(scale * q k^T)`` of each
            query, (batch, q_heads, q_len), in float32 (float64 for float64 tensors); -inf for a
            query without any key. It is differentiable, too.
        deterministic: as for :func:`flex_block_attn_func`.

    >>> q = k = v = torch.randn(1, 2, 300, 64)
    >>> mask = BlockMask.sliding_window(300, 300, 64, 64, left=64, right=64)
    >>> out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 2, 300, 64]), torch.Size([1, 2, 300]))
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"mask must be a BlockMask, got {type(mask).__name__}: "
            "BlockMask(tensor, q_len, kv_len, q_block_size, kv_block_size) makes one of a tensor"
        )
    sizes = mask.q_len, mask.kv_len, mask.q_block_size, mask.kv_block_size
    scale = None if scale is None else float(scale)
    # Of a mask that is full all pairs count, whatever its expression says in words.
    exact = None
    if mask.expression is not None and not mask.alike:
        exact = mask.expression.text, mask.expression.tables
    done = direct.attention(q, k, v, mask.plan, sizes, scale, return_lse, exact, mask.alike)
    if done is None:
        q, k, v = as_inputs(q, k, v)
        if mask.device != q.device:
            raise ValueError(f"mask is on {mask.device}, but q is on {q.device}")
        if sizes[:2] != (q.shape[2], k.shape[2]):
            raise ValueError(
                f"mask is made for q_len {mask.q_len} and kv_len {mask.kv_len}, "
                f"but the tensors have {q.shape[2]} and {k.shape[2]}"
            )
        scale = default_scale(q) if scale is None else scale
        deterministic = is_deterministic(deterministic)
        settings = *sizes[2:], scale, deterministic
        done = direct.differentiable(q, k, v, mask.plan, settings, exact, mask.alike)
    return done if return_lse else done[0]


def as_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors, cast where autocast asks for it; raises where they cannot be used together."""
    if _are_ready(q, k, v):
        return q, k, v
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, sequence, head_dim), "
                f"got shape {tuple(tensor.shape)}"
            )
        same_device(name, tensor, q)
    device = q.device.type
    if device not in _DEVICES:
        raise NotImplementedError(
            f"q is on {q.device}, but only CPUs and NVIDIA GPUs (cuda) are supported: "
            "move q, k, v and the mask with .cpu()"
        )
    if device != "meta" and torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        # As autocast does for torch's own attention: float64 stays, and so does what is no float.
        q, k, v = (x.to(to) if x.dtype in _CAST else x for x in (q, k, v))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} is {_name(tensor.dtype)}, "
                "but only float16, bfloat16, float32 and float64 are supported"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {_name(tensor.dtype)}, but q is {_name(q.dtype)}")
    if device == "cuda" and q.dtype not in _CUDA_DTYPES:
        raise TypeError(
            f"q is {_name(q.dtype)}, but on a GPU only float16 and bfloat16 are supported"
        )
    return q, k, v


def _are_ready(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is nothing to do for :func:`as_inputs`: most calls on a GPU, in little time."""
    return (
        not torch.compiler.is_compiling()
        and _native.are_ready(q, k, v)
        and not torch.is_autocast_enabled("cuda")
    )


def is_deterministic(asked: bool) -> bool:
    return bool(asked) or torch.are_deterministic_algorithms_enabled()


def default_scale(q: Tensor) -> float:
    head_dim = q.shape[3]
    return head_dim**-0.5 if head_dim else 1.0  # a head_dim of 0 is refused underneath


def same_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, but q is on {q.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

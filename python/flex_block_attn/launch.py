"""CUDA tensors to the library's kernels. In: tensors that kernels take as they are. Out: new
tensors, which torch allocates here and the kernels fill, on the current stream of their device.

Called by the operators of :mod:`.ops`; :func:`plan` and :func:`select` by :mod:`.direct`,
:func:`plan_of_mask` by :mod:`.masks`, :func:`combine` by ``distributed``.
"""

import torch
from torch import Tensor

from . import _native

# A mask's expression: its text, and its tables.
Exact = tuple[str, list[Tensor]]

# Canvas and tile along (t, h, w), tokens of text, and whether padding counts as zeros.
Video = tuple[tuple[int, int, int], tuple[int, int, int], int, bool]
# Of tiles: canvas and tile along (t, h, w), tokens of text, and whether padding counts as zeros, or
# None of tokens in tile order.
Order = tuple[tuple[int, int, int], tuple[int, int, int], int, bool | None]
# Tiles that a row keeps, the weight of relevance if by importance, whether heads share a mask.
Choice = tuple[int, float | None, bool]


def plan(
    blocks: Tensor,
    sizes: tuple[int, int, int, int],
    shape: tuple[int, int, int],
    video: Video | None = None,
) -> Tensor:
    """Of a bool mask of 2 to 4 dimensions, of the tiles of a video, if there is one; ``sizes`` are
    q_len, kv_len, q_block and kv_block, ``shape`` is the plan's."""
    result = blocks.new_empty(shape, dtype=torch.int32)
    _native.plan_cuda(blocks, sizes, result, video)
    return result


def plan_of_mask(mask: "_native.BlockMask", device: torch.device) -> Tensor:
    """Of a mask that the host has made, which is not empty: its bits are sent, a fiftieth of its
    plan."""
    lines = mask.shape[:2]
    result = torch.empty(
        (*lines, _native.plan_words(mask.extents)), dtype=torch.int32, device=device
    )
    bits = torch.empty(mask.bit_words(), dtype=torch.int64, device=device)
    _native.plan_mask_cuda(mask, bits, result)
    return result


def forward(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: tuple[Tensor, int, int],
    scale: float,
    exact: Exact | None,
    alike: bool,
) -> tuple[Tensor, Tensor]:
    """The output and the lse. A plan comes with its q_block and kv_block; the scale is not
    negative; ``alike`` says whether all rows of the mask are known to have one list."""
    q = inputs[0]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _native.forward_cuda(inputs, plan, scale, out, lse, exact, alike=alike)
    return out, lse


def select(
    inputs: tuple[Tensor, Tensor],
    order: Order,
    choice: Choice,
    numbers: int,
    base: Tensor,
    text_mask: Tensor | None = None,
) -> Tensor:
    """The mask of chosen tiles and of what ``base``, contiguous, keeps: bool (batch, heads or 1,
    blocks, blocks). ``numbers`` are those of the kernels' workspace; ``text_mask`` says which
    tokens of text count, (batch, tokens)."""
    q = inputs[0]
    text_lengths = None if text_mask is None else (text_mask != 0).sum(1)
    heads = 1 if choice[2] else q.shape[1]
    mask = base.new_empty((q.shape[0], heads, *base.shape[-2:]))
    workspace = q.new_empty(numbers, dtype=torch.float32)
    _native.select_cuda(inputs, order, choice, base, text_lengths, mask, workspace)
    return mask


def combine(
    parts: list[tuple[Tensor, Tensor]], out: Tensor, lse: Tensor | None = None
) -> Tensor | None:
    """Writes attention over parts of the keys, outputs and lses, put together, and returns its lse,
    a new tensor if none is given; None if the kernel does not take them as they are: its callers
    have another way."""
    shape = out.shape
    if not (
        out.is_cuda
        and out.dtype in (torch.bfloat16, torch.float16)
        and 2 <= len(parts) <= _native.MOST_PARTS
        and shape[3] in (64, 128)
        and shape.numel()
        and all(part.dtype == out.dtype and not _is_odd(part) for part, _ in parts)
        and all(lse.dtype == torch.float32 and lse.stride(2) == 1 for _, lse in parts)
        and not _is_odd(out)
        and (lse is None or lse.stride(2) == 1)
    ):
        return None
    if lse is None:
        lse = out.new_empty(shape[:3], dtype=torch.float32)
    _native.combine_cuda(parts, out, lse)
    return lse


def _is_odd(tensor: Tensor) -> bool:
    return tensor.stride(3) != 1 or _native.must_be_copied(tensor)

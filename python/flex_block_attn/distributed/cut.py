"""Parts of a block mask. In: a :class:`BlockMask`. Out: its matrix, or the mask of some heads.

Called by all that divides an attention between ranks. By tokens a mask is divided by the matrix of
its blocks alone; by heads with all that it has.
"""

import weakref

from torch import Tensor

from ..masks import BlockMask

# A static mask is cut once, however often it is used.
_of_heads: "weakref.WeakKeyDictionary[BlockMask, dict[range, BlockMask]]" = (
    weakref.WeakKeyDictionary()
)


def whole_blocks(mask: BlockMask) -> Tensor:
    """The matrix of a mask: bool (batch or 1, heads or 1, q_blocks, kv_blocks).

    Raises:
        TypeError: it is no BlockMask.
        NotImplementedError: the mask also chooses tokens within blocks, by an expression: the
            tokens of a rank lie anywhere in the sequence, and its blocks do not know where.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    if mask.expression is not None:
        raise NotImplementedError(
            "mask chooses tokens within blocks by an expression, which cannot be divided by "
            "tokens: divide it by heads (ulysses_attention), or give a mask of whole blocks, "
            "BlockMask(mask.blocks, q_len, kv_len, ...)"
        )
    return mask.blocks


def check_extents(blocks: Tensor, batch: int, heads: int) -> None:
    """Raises unless a mask's batch and heads are 1 or those of the tensors."""
    for name, dim, extent in (("batch", 0, batch), ("heads", 1, heads)):
        if blocks.shape[dim] not in (1, extent):
            raise ValueError(
                f"mask has a {name} extent of {blocks.shape[dim]}, "
                f"but must have 1 or that of q, {extent}"
            )


def mask_of_heads(mask: BlockMask, heads: range) -> BlockMask:
    """The mask of some query heads, with its expression if there is one: itself if all share it."""
    if mask.shape[1] in (1, len(heads)):
        return mask
    parts = _of_heads.setdefault(mask, {})
    if heads not in parts:
        parts[heads] = mask[:, heads.start : heads.stop]
    return parts[heads]

"""Block masks. In: tensors, lists or patterns. Out: :class:`BlockMask`, or plain mask tensors.

Called by users and by :mod:`.api`. The patterns themselves live in the library; here their blocks
become tensors.
"""

import operator
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _native, direct, ops


def as_size(name: str, value: Any, limit: int = 2**63) -> int:
    """An int from whatever is integral (numpy's included), but not from a bool or a float. Only
    what cannot cross to the library is refused here: negative numbers, and ``limit`` or more."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not isinstance(value, int):
        value = operator.index(value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    if value >= limit:
        raise ValueError(f"{name} is too large: got {value}")
    return value


def _as_sizes(
    q_len: Any, kv_len: Any, q_block_size: Any, kv_block_size: Any
) -> tuple[int, int, int, int]:
    return (
        as_size("q_len", q_len),
        as_size("kv_len", kv_len),
        as_size("q_block_size", q_block_size),
        as_size("kv_block_size", kv_block_size),
    )


def as_triple(name: str, values: Iterable[Any]) -> tuple[int, int, int]:
    """Three positive ints along (time, height, width)."""
    needed = f"{name} must be three positive numbers (time, height, width)"
    if not isinstance(values, Iterable):
        raise TypeError(f"{needed}, got {type(values).__name__}")
    values = tuple(values)
    if len(values) != 3:
        raise ValueError(f"{needed}, got {len(values)}")
    time, height, width = (as_size(name, value) for value in values)
    if 0 in (time, height, width):
        raise ValueError(f"{needed}, got {[time, height, width]}")
    return time, height, width


def as_blocks(block_mask: Any) -> Tensor:
    """A mask tensor of 2 to 5 dimensions as bool (batch, heads, q_blocks, kv_blocks), no copy of
    a bool mask being made."""
    if not isinstance(block_mask, Tensor):
        raise TypeError(f"block_mask must be a torch.Tensor, got {type(block_mask).__name__}")
    if block_mask.is_floating_point() or block_mask.is_complex():
        dtype = str(block_mask.dtype).removeprefix("torch.")
        raise TypeError(
            f"block_mask is {dtype}, but must be bool or integer: "
            "say which values count, as in block_mask > 0"
        )
    if block_mask.dim() == 5 and 1 in block_mask.shape[:3]:
        # A client stacks masks that already have a dimension of 1 for the heads.
        needless = next(dim for dim in (1, 2, 0) if block_mask.shape[dim] == 1)
        warnings.warn(
            f"block_mask has shape {tuple(block_mask.shape)}: "
            f"its dimension {needless}, of 1, is dropped",
            stacklevel=3,
        )
        block_mask = block_mask.squeeze(needless)
    if not 2 <= block_mask.dim() <= 4:
        raise ValueError(
            "block_mask must be (q_blocks, kv_blocks), (heads, q_blocks, kv_blocks) or "
            f"(batch, heads, q_blocks, kv_blocks), got shape {tuple(block_mask.shape)}"
        )
    while block_mask.dim() < 4:
        block_mask = block_mask.unsqueeze(0)
    return block_mask.to(torch.bool)


class BlockMask:
    """Which blocks of an attention are computed, and the plan that kernels read.

    The plan is made once, here. Making a mask is cheap (proportional to its blocks), and using
    one again is free.

    Args:
        blocks: as ``block_mask`` of :func:`flex_block_attn_func`, 2 to 5 dimensions.
        q_len, kv_len: number of queries and keys; need not be multiples of the blocks.
        q_block_size, kv_block_size: tokens of a block; multiples of 16.

    >>> mask = BlockMask.causal(512, 512, 128, 128)
    >>> mask
    BlockMask(1 x 1 x 4 x 4 blocks of 128 x 128, 512 x 512 tokens, density 0.625)
    >>> print(mask.picture())
    █···
    ██··
    ███·
    ████
    """

    def __init__(
        self, blocks: Tensor, q_len: int, kv_len: int, q_block_size: int, kv_block_size: int
    ):
        # A copy: blocks changed in place later must not part from the plan.
        self.blocks = as_blocks(blocks).clone()
        sizes = _as_sizes(q_len, kv_len, q_block_size, kv_block_size)
        self.q_len, self.kv_len, self.q_block_size, self.kv_block_size = sizes
        plan = direct.plan(self.blocks, self._sizes)
        self.plan = ops.plan(self.blocks, *self._sizes) if plan is None else plan

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.q_len, self.kv_len, self.q_block_size, self.kv_block_size

    @classmethod
    def full(cls, q_len: int, kv_len: int, q_block_size: int, kv_block_size: int) -> "BlockMask":
        """Every block."""
        sizes = _as_sizes(q_len, kv_len, q_block_size, kv_block_size)
        return cls._from_native(_native.BlockMask.full(sizes))

    @classmethod
    def causal(cls, q_len: int, kv_len: int, q_block_size: int, kv_block_size: int) -> "BlockMask":
        """Every block with a pair of ``kv <= q``, both counted from the start. Blocks on the
        diagonal are computed whole."""
        sizes = _as_sizes(q_len, kv_len, q_block_size, kv_block_size)
        return cls._from_native(_native.BlockMask.causal(sizes))

    @classmethod
    def sliding_window(
        cls,
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int,
        *,
        left: int,
        right: int,
    ) -> "BlockMask":
        """For each query block the key blocks that overlap its own tokens, widened by ``left``
        tokens before and ``right`` after."""
        sizes = _as_sizes(q_len, kv_len, q_block_size, kv_block_size)
        left, right = as_size("left", left), as_size("right", right)
        return cls._from_native(_native.BlockMask.sliding_window(sizes, left, right))

    @classmethod
    def random(
        cls,
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int,
        *,
        density: float,
        seed: int,
        batch: int = 1,
        heads: int = 1,
    ) -> "BlockMask":
        """In each row ``round(density * kv_blocks)`` random key blocks, one at least."""
        sizes = _as_sizes(q_len, kv_len, q_block_size, kv_block_size)
        batch, heads = as_size("batch", batch), as_size("heads", heads)
        seed = as_size("seed", seed, limit=2**64)
        return cls._from_native(_native.BlockMask.random(sizes, batch, heads, density, seed))

    @classmethod
    def sta(
        cls,
        tiles: tuple[int, int, int],
        window: tuple[int, int, int],
        *,
        tile_tokens: int,
        text_tokens: int = 0,
    ) -> "BlockMask":
        """Sliding Tile Attention (arXiv 2502.04507): a block is a tile of video tokens, and sees
        the tiles of a window around it, whose centre is clamped at the borders. Text tokens
        follow the video's; they see everything and are seen by all.

        Args:
            tiles: tiles along (time, height, width); tokens are in this order, tile by tile.
            window: in tiles, along (time, height, width).
            tile_tokens: tokens of a tile, a multiple of 16.
            text_tokens: tokens of text.
        """
        mask = _native.BlockMask.sta(
            as_triple("tiles", tiles),
            as_triple("window", window),
            as_size("tile_tokens", tile_tokens),
            as_size("text_tokens", text_tokens),
        )
        return cls._from_native(mask)

    @classmethod
    def _from_native(cls, native: "_native.BlockMask") -> "BlockMask":
        data = bytearray(native.to_bytes())
        blocks = torch.frombuffer(data, dtype=torch.bool) if data else torch.empty(0).bool()
        return cls(blocks.reshape(native.shape), *native.extents)

    def _to_native(self) -> "_native.BlockMask":
        data = self.blocks.contiguous().cpu().numpy().tobytes()
        return _native.BlockMask.from_bytes(self._sizes, *self.blocks.shape[:2], data)

    @property
    def device(self) -> torch.device:
        """Where blocks and plan lie."""
        return self.blocks.device

    def to(self, device: torch.device | str) -> "BlockMask":
        """The mask on another device."""
        moved = object.__new__(BlockMask)
        moved.__dict__.update(self.__dict__)
        moved.blocks, moved.plan = self.blocks.to(device), self.plan.to(device)
        return moved

    def density(self) -> float:
        """Share of (query, key) token pairs that is computed: 1 for a full mask."""
        return self._to_native().density()

    def to_dense(self) -> Tensor:
        """The mask over tokens, bool (batch, heads, q_len, kv_len). It has q_len * kv_len
        elements: for looking at small masks, and for tests."""
        rows = self.blocks.repeat_interleave(self.q_block_size, dim=2)[:, :, : self.q_len]
        return rows.repeat_interleave(self.kv_block_size, dim=3)[..., : self.kv_len]

    def picture(self, batch: int = 0, head: int = 0, columns: int = 64) -> str:
        """The blocks as text, at most ``columns`` characters wide: ``·`` none of a cell's blocks
        is computed, ``░▒▓`` some are, ``█`` all are."""
        place = as_size("batch", batch), as_size("head", head), as_size("columns", columns)
        return self._to_native().picture(*place).rstrip("\n")

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.blocks.shape))
        known = "on meta" if self.blocks.is_meta else f"density {self.density():.3f}"
        return (
            f"BlockMask({shape} blocks of {self.q_block_size} x {self.kv_block_size}, "
            f"{self.q_len} x {self.kv_len} tokens, {known})"
        )


def create_sparse_mask(
    q: Tensor, block_size: int, selected_blocks: Iterable[tuple[int, int]] | Tensor
) -> Tensor:
    """A mask tensor for :func:`flex_block_attn_func` with equal blocks of queries and keys.

    Args:
        q: the queries, (batch, heads, sequence, head_dim), for their length and device.
        block_size: tokens of a block.
        selected_blocks: (row, column) of each block to compute; a list, or an array or tensor of
            two columns.

    Returns:
        bool (blocks, blocks), on q's device.

    >>> create_sparse_mask(torch.empty(1, 1, 128, 8), 64, [[0, 1], [1, 0]])
    tensor([[False,  True],
            [ True, False]])
    """
    block_size = as_size("block_size", block_size)
    if block_size == 0:
        raise ValueError(f"block_size must be positive, got {block_size}")
    blocks = -(-q.shape[2] // block_size)
    if not hasattr(selected_blocks, "shape"):
        selected_blocks = list(selected_blocks)
    pairs = torch.as_tensor(selected_blocks, device="cpu")
    if pairs.numel() == 0:
        pairs = pairs.to(torch.long).reshape(0, 2)
    if pairs.is_floating_point() or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError("selected_blocks must be pairs of integers (row, column)")
    outside = ((pairs < 0) | (pairs >= blocks)).any(dim=1)
    if outside.any():
        row, column = pairs[outside][0].tolist()
        raise IndexError(
            f"selected block ({row}, {column}) lies outside of the {blocks} x {blocks} blocks"
        )
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    mask[pairs[:, 0].long(), pairs[:, 1].long()] = True
    return mask.to(q.device)

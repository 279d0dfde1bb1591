"""Block masks. In: tensors, lists, patterns or functions. Out: :class:`BlockMask`, or plain mask
tensors.

Called by users and by :mod:`.api`. The patterns themselves live in the library, and so does the
search for the blocks of a function; here their blocks become tensors.
"""

import math
import operator
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _native, direct, launch, ops, pictures
from .trace import Expression, MaskMod, trace


def as_size(name: str, value: Any, limit: int = 2**63) -> int:
    """An int from whatever is integral (numpy's included), but not from a bool or a float. Only
    what cannot cross to the library is refused here: negative numbers, and ``limit`` or more."""
    if type(value) is int and 0 <= value < limit:
        return value
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


def _as_device(device: torch.device | str) -> torch.device:
    """As tensors tell theirs: with its number."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.empty(0, device=device).device
    # Without a tensor, which takes a GPU's allocator.
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", number)


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
    one again is free. A mask of a function, by :func:`create_block_mask`, has partial blocks, in
    which single pairs count: by its ``expression``.

    Args:
        blocks: as ``block_mask`` of :func:`flex_block_attn_func`, 2 to 5 dimensions.
        q_len, kv_len: number of queries and keys; need not be multiples of the blocks.
        q_block_size, kv_block_size: tokens of a block; multiples of 16.

    Attributes:
        alike: whether the mask is known to be dense, as that of :meth:`full` or of a function that
            is always true: attention forward is faster then. A tensor is not looked into.

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
        self._blocks: Tensor | None = as_blocks(blocks).clone()
        sizes = _as_sizes(q_len, kv_len, q_block_size, kv_block_size)
        self.q_len, self.kv_len, self.q_block_size, self.kv_block_size = sizes
        plan = direct.plan(self._blocks, self._sizes)
        self.plan = ops.plan(self._blocks, *self._sizes) if plan is None else plan
        self.expression: Expression | None = None
        self.mask_mod: MaskMod | None = None
        self.alike = False
        self._native: _native.BlockMask | None = None
        self._elsewhere: dict[torch.device, BlockMask] = {}

    @classmethod
    def _exact(
        cls,
        native: "_native.BlockMask",
        expression: Expression,
        device: torch.device,
        mask_mod: MaskMod | None,
    ) -> "BlockMask":
        """A mask with an expression, as the library has found its blocks."""
        mask = object.__new__(cls)
        sizes, shape = native.extents, native.shape
        mask.q_len, mask.kv_len, mask.q_block_size, mask.kv_block_size = sizes
        if device.type == "cuda" and 0 not in shape:
            mask.plan = launch.plan_of_mask(native, device)
        else:
            plan = torch.empty((*shape[:2], _native.plan_words(sizes)), dtype=torch.int32)
            native.write_plan((plan.data_ptr(), plan.numel()))
            mask.plan = plan.to(device)
        mask.expression, mask.mask_mod = expression.ready(), mask_mod
        mask._blocks, mask._native, mask._elsewhere = None, native, {}
        mask.alike = native.is_full
        return mask

    def _of_the_same(self, mask_mod: MaskMod | None) -> "BlockMask":
        """Another object, with the plan of this one."""
        mask = object.__new__(BlockMask)
        mask.__dict__.update(self.__dict__)
        mask.mask_mod, mask._elsewhere = mask_mod, {}
        return mask

    @classmethod
    def _of_parts(
        cls,
        sizes: tuple[int, int, int, int],
        blocks: Tensor,
        partial: Tensor,
        expression: Expression,
        device: torch.device,
        mask_mod: MaskMod | None,
    ) -> "BlockMask":
        """A mask with an expression, of blocks that somebody else has chosen."""
        wanted, partly = (_as_bytes(x) for x in (blocks, partial))
        exact = expression.text, expression.on_host
        native = _native.BlockMask.from_parts(sizes, *blocks.shape[:2], wanted, partly, exact)
        return cls._exact(native, expression, device, mask_mod)

    @property
    def blocks(self) -> Tensor:
        """Which blocks are computed, whole or in part: bool (batch, heads, q_blocks, kv_blocks)."""
        if self._blocks is None:
            self._blocks = self._tensor(self._native.to_bytes())
        return self._blocks

    @property
    def partial_blocks(self) -> Tensor:
        """Those of which only single pairs count, likewise."""
        if self.expression is None:
            return torch.zeros_like(self.blocks)
        return self._tensor(self._to_native().partial_bytes())

    def _tensor(self, data: bytes) -> Tensor:
        blocks = torch.frombuffer(bytearray(data), dtype=torch.bool) if data else torch.zeros(0)
        return blocks.bool().reshape(self._to_native().shape).to(self.device)

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
        mask = cls(blocks.reshape(native.shape), *native.extents)
        mask.alike = native.is_full
        return mask

    def _to_native(self) -> "_native.BlockMask":
        if self._native is not None:
            return self._native
        return _native.BlockMask.from_bytes(
            self._sizes, *self.blocks.shape[:2], _as_bytes(self.blocks)
        )

    def __getstate__(self) -> dict[str, Any]:
        # The library's own mask and functions do not travel: the former is made again.
        parts = {"_blocks": self.blocks, "_native": None, "_elsewhere": {}, "mask_mod": None}
        if self.expression is not None:
            parts["_partial"] = self.partial_blocks
        return {**self.__dict__, **parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        partial = state.pop("_partial", None)
        self.__dict__.update(state)
        if partial is not None:
            exact = self.expression.text, self.expression.on_host
            self._native = _native.BlockMask.from_parts(
                self._sizes,
                *self._blocks.shape[:2],
                _as_bytes(self._blocks),
                _as_bytes(partial),
                exact,
            )

    @property
    def device(self) -> torch.device:
        """Where blocks, plan and tables lie."""
        return self.plan.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len); batch and heads are 1 where all share a mask."""
        return (*self.plan.shape[:2], self.q_len, self.kv_len)

    def to(self, device: torch.device | str) -> "BlockMask":
        """The mask on another device. It is copied there once, and kept with the mask."""
        device = _as_device(device)
        if device == self.device:
            return self
        moved = self._elsewhere.get(device)
        if moved is None:
            moved = object.__new__(BlockMask)
            moved.__dict__.update(self.__dict__)
            moved.plan = self.plan.to(device)
            if self._blocks is not None:
                moved._blocks = self._blocks.to(device)
            if self.expression is not None:
                moved.expression = self.expression.to(device).ready()
            # Either finds the other.
            moved._elsewhere = {self.device: self}
            self._elsewhere[device] = moved
        return moved

    def density(self) -> float:
        """Share of (query, key) token pairs that is computed: 1 for a full mask. Partial blocks are
        computed whole."""
        return self._to_native().density()

    def sparsity(self) -> float:
        """The percentage of blocks that is not computed, as FlexAttention counts it."""
        computed, _ = self._to_native().counts()
        return 100.0 * (1.0 - computed / (math.prod(self._to_native().shape) or 1))

    def __getitem__(self, index: Any) -> "BlockMask":
        """The mask of some batches, heads and rows of query blocks: integers, which leave a
        dimension of 1, and slices. A dimension of 1 that all share stays as it is. The rows taken
        are the queries of the new mask, from 0 on; they still see what they saw."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 3:
            raise IndexError(
                f"mask has batches, heads and query blocks, but got {len(index)} indices"
            )
        index = (*index, *(slice(None),) * (3 - len(index)))
        shape = self._to_native().shape
        ranges = [
            range(1) if extent == 1 and dim < 2 else _as_range(i, extent)
            for dim, (i, extent) in enumerate(zip(index, shape))
        ]
        rows = ranges[2]
        if rows.step != 1:
            raise IndexError("rows of query blocks must follow each other")
        first = rows.start * self.q_block_size
        q_len = max(0, min(rows.stop * self.q_block_size, self.q_len) - first)
        sizes = q_len, self.kv_len, self.q_block_size, self.kv_block_size
        b, h, r = (torch.tensor(list(x), dtype=torch.long, device=self.device) for x in ranges)

        def part(blocks: Tensor) -> Tensor:
            return blocks.index_select(0, b).index_select(1, h).index_select(2, r)

        if self.expression is None:
            return BlockMask(part(self.blocks), *sizes)
        lines = [(x.step, x.start) if n > 1 else (1, 0) for x, n in zip(ranges, shape[:2])]
        # One batch or head is a number, lest the mask tell apart what it has one of.
        lines = [
            (0, x.start) if n > 1 and len(x) == 1 else line
            for line, x, n in zip(lines, ranges, shape[:2])
        ]
        expression = self.expression.moved(*lines, (1, first), (1, 0))
        partial = part(self.partial_blocks)
        return BlockMask._of_parts(sizes, part(self.blocks), partial, expression, self.device, None)

    def to_dense(self) -> Tensor:
        """The mask over tokens, bool (batch, heads, q_len, kv_len). It has q_len * kv_len
        elements: for looking at small masks, and for tests."""
        if self.expression is not None:
            native = self._to_native()
            batch, heads = native.shape[:2]
            dense = torch.zeros(self.shape, dtype=torch.bool)
            for b in range(batch):
                for h in range(heads):
                    data = bytearray(native.tokens(b, h))
                    if data:
                        tokens = torch.frombuffer(data, dtype=torch.bool)
                        dense[b, h] = tokens.reshape(self.q_len, self.kv_len)
            return dense.to(self.device)
        rows = self.blocks.repeat_interleave(self.q_block_size, dim=2)[:, :, : self.q_len]
        return rows.repeat_interleave(self.kv_block_size, dim=3)[..., : self.kv_len]

    def picture(self, batch: int = 0, head: int = 0, columns: int = 64) -> str:
        """The blocks as text, at most ``columns`` characters wide: ``·`` none of a cell's blocks
        is computed, ``░▒▓`` some are, ``█`` all are."""
        place = as_size("batch", batch), as_size("head", head), as_size("columns", columns)
        return self._to_native().picture(*place).rstrip("\n")

    def show(self, batch: int = 0, head: int = 0, columns: int = 64) -> None:
        """Prints what :meth:`picture` gives, and the mask's sizes."""
        print(self, self.picture(batch, head, columns), sep="\n")

    def save(self, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
        """Writes a picture: ``.png``, a pixel a block; ``.svg``; or ``.html``, a page of all
        batches and heads to zoom into, which needs no other file. Blocks computed whole are blue,
        those computed in part orange."""
        pictures.save(self, path, as_size("batch", batch), as_size("head", head))

    def to_string(self, grid_size: int | tuple[int, int] = 64, limit: int = 4) -> str:
        """Pictures of the first ``limit`` batches and heads, ``grid_size`` characters wide."""
        columns = grid_size if isinstance(grid_size, int) else max(grid_size)
        batch, heads = self.shape[:2]
        places = [(b, h) for b in range(batch) for h in range(heads)]
        pictures = [
            f"batch {b}, head {h}\n{self.picture(b, h, columns if columns > 0 else 400)}"
            for b, h in places[:limit]
        ]
        more = [f"and {len(places) - limit} more"] if len(places) > limit else []
        return "\n\n".join((repr(self), *pictures, *more))

    @classmethod
    def from_torch(cls, mask: Any) -> "BlockMask":
        """A mask of torch's ``torch.nn.attention.flex_attention``: the same blocks, of which the
        same are partial, and its function."""
        from torch.nn.attention import flex_attention

        if not isinstance(mask, flex_attention.BlockMask):
            raise TypeError(f"mask must be a BlockMask of torch's, got {type(mask).__name__}")
        q_len, kv_len = mask.seq_lengths
        sizes = _as_sizes(q_len, kv_len, *mask.BLOCK_SIZE)
        rows, columns = -(-q_len // sizes[2]), -(-kv_len // sizes[3])
        batch, heads = mask.kv_num_blocks.shape[:2]
        device = mask.kv_num_blocks.device

        def matrix(counts: Tensor | None, indices: Tensor | None) -> Tensor:
            blocks = torch.zeros(batch, heads, rows, columns + 1, dtype=torch.bool, device=device)
            if counts is not None:
                listed = torch.arange(indices.shape[-1], device=device) < counts[..., None]
                # What is not listed goes to a column that is cut off.
                places = torch.where(listed, indices.long(), columns)
                blocks.scatter_(3, places, True)
            return blocks[..., :columns]

        partial = matrix(mask.kv_num_blocks, mask.kv_indices)
        full = matrix(mask.full_kv_num_blocks, mask.full_kv_indices)
        expression = trace(mask.mask_mod, device)
        if expression.text == "true":
            return cls(partial | full, *sizes)
        _check_lines(expression, batch, heads)
        partial &= ~full
        return cls._of_parts(sizes, partial | full, partial, expression, device, mask.mask_mod)

    def to_torch(self) -> Any:
        """The mask as torch's ``flex_attention`` takes it. Of a mask with an expression the
        function that it was made of is needed, which a part of a mask, or one from a file, does not
        have."""
        from torch.nn.attention import flex_attention

        if self.expression is not None and self.mask_mod is None:
            raise ValueError(
                "mask is a part of another, or was loaded: torch needs the function of a mask, "
                "as create_block_mask is given it"
            )

        def by_block(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row, column = q_idx // self.q_block_size, kv_idx // self.kv_block_size
            batch, heads = self.shape[:2]
            return self.blocks[b if batch > 1 else b * 0, h if heads > 1 else h * 0, row, column]

        def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
            counts = blocks.sum(dim=3, dtype=torch.int32)
            order = (~blocks).to(torch.int8).argsort(dim=3, stable=True).to(torch.int32)
            return counts, order

        partial = self.partial_blocks
        return flex_attention.BlockMask.from_kv_blocks(
            *lists(partial),
            *lists(self.blocks & ~partial),
            BLOCK_SIZE=(self.q_block_size, self.kv_block_size),
            mask_mod=by_block if self.expression is None else self.mask_mod,
            seq_lengths=(self.q_len, self.kv_len),
        )

    def __repr__(self) -> str:
        batch, heads = self.plan.shape[:2]
        rows = -(-self.q_len // (self.q_block_size or 1))
        columns = -(-self.kv_len // (self.kv_block_size or 1))
        shape = " x ".join(map(str, (batch, heads, rows, columns)))
        known = "on meta" if self.plan.is_meta else f"density {self.density():.3f}"
        if self.expression is not None:
            known += f", {self._to_native().counts()[1]} partial: {self.expression}"
        return (
            f"BlockMask({shape} blocks of {self.q_block_size} x {self.kv_block_size}, "
            f"{self.q_len} x {self.kv_len} tokens, {known})"
        )


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,  # noqa: N803
    H: int | None,  # noqa: N803
    Q_LEN: int,  # noqa: N803
    KV_LEN: int,  # noqa: N803
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] | None = None,  # noqa: N803
    _compile: bool = False,
) -> BlockMask:
    """The mask of a function, exact to the token: arguments and meaning are those of torch's
    ``torch.nn.attention.flex_attention.create_block_mask``.

    The function is called once, with stand-ins for its arguments that write down what it does: it
    may compute with whole numbers (``+ - * // %``, abs, minimum, maximum, clamp, where), compare,
    join conditions by ``& | ~ ^``, and index bool and integer tensors of up to four dimensions,
    which are copied. Which blocks it wants is then found by ranges of numbers, in time proportional
    to the blocks at the mask's edges.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, true where a pair counts.
        B: batches, if the function tells them apart; None if not.
        H: query heads, likewise.
        Q_LEN, KV_LEN: number of queries and keys; need not be multiples of the blocks.
        device: where it will be used; by default where the tensors are that the function looks up,
            or the CPU. The host looks for the blocks, and reads tensors that lie on a GPU once for
            it; the plan is made on the device. Masks for a GPU are made before a graph is
            captured: an error tells where one is made anew in it.
        BLOCK_SIZE: tokens of a block, or of a block of queries and one of keys: multiples of 16. By
            default 128, doubled until no side has more than 2048 blocks.
        _compile: as torch has it; there is nothing to compile.

    >>> document = torch.tensor([0] * 150 + [1] * 106)
    >>> def causal_document(b, h, q_idx, kv_idx):
    ...     return (q_idx >= kv_idx) & (document[q_idx] == document[kv_idx])
    >>> mask = create_block_mask(causal_document, None, None, 256, 256, BLOCK_SIZE=64)
    >>> print(mask.expression)
    q >= kv and t0[q] == t0[kv]
    >>> print(mask.picture())
    █···
    ██··
    ███·
    ··██
    """
    q_len, kv_len = as_size("Q_LEN", Q_LEN), as_size("KV_LEN", KV_LEN)
    batch = 1 if B is None else as_size("B", B)
    heads = 1 if H is None else as_size("H", H)
    if BLOCK_SIZE is None:
        BLOCK_SIZE = _native.default_block(q_len, kv_len)  # noqa: N806
    if not isinstance(BLOCK_SIZE, (tuple, list)):
        BLOCK_SIZE = (BLOCK_SIZE, BLOCK_SIZE)  # noqa: N806
    if len(BLOCK_SIZE) != 2:
        raise ValueError(f"BLOCK_SIZE must be one number or two, got {len(BLOCK_SIZE)}")
    q_block, kv_block = BLOCK_SIZE
    sizes = q_len, kv_len, as_size("q_block_size", q_block), as_size("kv_block_size", kv_block)
    device = None if device is None else _as_device(device)
    expression = trace(mask_mod, device)
    if device is None:
        device = expression.device
    for name, given, apart in (("B", B, 0), ("H", H, 1)):
        if given is None and expression.tells_apart[apart]:
            what = ("batches", "heads")[apart]
            raise ValueError(f"mask_mod tells {what} apart: give their number, {name}")
    key = expression.text, sizes, batch, heads, device
    exact = expression.text, expression.on_host
    known = _KNOWN.find(key, exact)
    if known is not None:
        return known._of_the_same(mask_mod)
    native = _native.BlockMask.from_expression(sizes, batch, heads, exact)
    mask = BlockMask._exact(native, expression, device, mask_mod)
    _KNOWN.keep(key, mask._of_the_same(None))
    return mask


class _Known:
    """The masks of functions that were made last: models make the same one in every step.

    One is found again by its text and by the numbers that it looks up, which are compared: whoever
    changes a tensor gets another mask.
    """

    # Enough for one of a million tokens.
    MASKS, BYTES = 8, 2**26

    def __init__(self) -> None:
        self._masks: OrderedDict[tuple, BlockMask] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: tuple, exact: tuple[str, list[Tensor]]) -> BlockMask | None:
        with self._lock:
            mask = self._masks.get(key)
            if mask is None or not mask._native.looks_up_as(exact):
                return None
            self._masks.move_to_end(key)
            return mask

    def keep(self, key: tuple, mask: BlockMask) -> None:
        with self._lock:
            self._masks[key] = mask
            self._masks.move_to_end(key)
            sizes = [mask.plan.nbytes for mask in self._masks.values()]
            while len(sizes) > self.MASKS or sum(sizes) > self.BYTES:
                self._masks.popitem(last=False)
                sizes.pop(0)

    def clear(self) -> None:
        with self._lock:
            self._masks.clear()


_KNOWN = _Known()


def forget_masks() -> None:
    """Frees what :func:`create_block_mask` keeps: plans of up to 64 MiB, of 8 masks at most."""
    _KNOWN.clear()


def _check_lines(expression: Expression, batch: int, heads: int) -> None:
    """Raises if an expression tells apart what a mask has one of."""
    for what, extent, apart in zip(("batches", "heads"), (batch, heads), expression.tells_apart):
        if apart and extent == 1:
            raise ValueError(f"mask_mod tells {what} apart, but the mask is that of one")


def _as_bytes(blocks: Tensor) -> bytes:
    return blocks.contiguous().cpu().numpy().tobytes()


def _as_range(index: Any, extent: int) -> range:
    """What an index or a slice takes of a dimension."""
    if isinstance(index, slice):
        return range(extent)[index]
    place = operator.index(index)
    if not -extent <= place < extent:
        raise IndexError(f"index {place} is outside of a dimension of {extent}")
    return range(place % extent, place % extent + 1)


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

"""Every mistake a caller can make: the exception's type and its whole message, in one table.

Beside it what looks like a mistake and is none.
"""

import re

import numpy as np
import pytest
import torch

from flex_block_attn import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_sparse_mask,
    flex_block_attn,
    flex_block_attn_func,
    visualize_attn_mask,
)

FOUR = "4 dimensions (batch, heads, sequence, head_dim)"
FORMS = "(q_blocks, kv_blocks), (heads, q_blocks, kv_blocks) or (batch, heads, q_blocks, kv_blocks)"
FLOATS = "only float16, bfloat16, float32 and float64 are supported"
TRIPLE = "three positive numbers (time, height, width)"


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q = zeros(2, 4, 64, 16)
KV = zeros(2, 2, 96, 16)
BLOCKS = torch.ones(4, 3, dtype=torch.bool)
MASK = BlockMask(BLOCKS, 64, 96, 16, 32)


def func(q=Q, k=KV, v=KV, q_block=16, kv_block=32, mask=BLOCKS):
    """A call of the drop-in function; all of it is fine unless something is replaced."""
    return flex_block_attn_func(q, k, v, q_block, kv_block, mask)


def attn(q=Q, k=KV, v=KV, mask=MASK, **options):
    return flex_block_attn(q, k, v, mask, **options)


def autocast(**arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return func(**arguments)


def window(**widths):
    return BlockMask.sliding_window(64, 64, 16, 16, **{"left": 16, "right": 16, **widths})


def random(**parameters):
    return BlockMask.random(64, 64, 16, 16, **{"density": 0.5, "seed": 0, **parameters})


def sta(tiles=(2, 2, 2), sees=(1, 1, 1), tile_tokens=16, **text):
    return BlockMask.sta(tiles, sees, tile_tokens=tile_tokens, **text)


def select(pairs=((0, 1),), block_size=16):
    return create_sparse_mask(Q, block_size, pairs)


TABLE = torch.arange(64)
INSTEAD = "arithmetic, comparisons, &, |, ~, torch.where and indexed tensors"


def made(mask_mod=lambda b, h, q, kv: q >= kv, batch=None, heads=None, lengths=(64, 64), **options):
    return create_block_mask(mask_mod, batch, heads, *lengths, **options)


def untraced(what, instead):
    return f"mask_mod uses {what}, which cannot be traced: write {instead} instead"


def unusable(text, reason):
    return f"the mask's expression {text} cannot be used: {reason}"


BAD = [
    # Types of q, k and v.
    (lambda: func(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    (lambda: func(v=None), TypeError, "v must be a torch.Tensor, got NoneType"),
    (lambda: func(q=Q.int()), TypeError, f"q is int32, but {FLOATS}"),
    (lambda: func(k=KV.to(torch.complex64)), TypeError, f"k is complex64, but {FLOATS}"),
    (lambda: func(v=KV > 0), TypeError, f"v is bool, but {FLOATS}"),
    (lambda: func(k=KV.half()), TypeError, "k is float16, but q is float32"),
    (lambda: func(v=KV.bfloat16()), TypeError, "v is bfloat16, but q is float32"),
    (lambda: func(q=Q.double()), TypeError, "k is float32, but q is float64"),
    (lambda: autocast(q=Q.int()), TypeError, f"q is int32, but {FLOATS}"),
    (lambda: autocast(v=KV.double()), TypeError, "v is float64, but q is bfloat16"),
    # Ranks.
    (lambda: func(q=Q[0]), ValueError, f"q must have {FOUR}, got shape (4, 64, 16)"),
    (lambda: func(k=KV[None]), ValueError, f"k must have {FOUR}, got shape (1, 2, 2, 96, 16)"),
    (lambda: attn(v=zeros(16)), ValueError, f"v must have {FOUR}, got shape (16,)"),
    # Shapes.
    (lambda: func(k=KV[:1]), ValueError,
     "k has shape [1, 2, 96, 16], but q needs [2, 2, 96, 16]"),
    (lambda: func(k=KV[..., :8]), ValueError,
     "k has shape [2, 2, 96, 8], but q needs [2, 2, 96, 16]"),
    (lambda: func(v=KV[:1]), ValueError,
     "v has shape [1, 2, 96, 16], but k needs [2, 2, 96, 16]"),
    (lambda: func(v=KV[:, :1]), ValueError,
     "v has shape [2, 1, 96, 16], but k needs [2, 2, 96, 16]"),
    (lambda: func(v=KV[:, :, 1:]), ValueError,
     "v has shape [2, 2, 95, 16], but k needs [2, 2, 96, 16]"),
    (lambda: func(v=KV[..., :8]), ValueError,
     "v has shape [2, 2, 96, 8], but k needs [2, 2, 96, 16]"),
    (lambda: func(*(zeros(1, 1, 16, 12),) * 3, 16, 16, BLOCKS[:1, :1]), ValueError,
     "head_dim must be a multiple of 8 from 8 to 256, got 12"),
    (lambda: func(*(zeros(1, 1, 16, 264),) * 3, 16, 16, BLOCKS[:1, :1]), ValueError,
     "head_dim must be a multiple of 8 from 8 to 256, got 264"),
    (lambda: func(*(zeros(1, 1, 16, 0),) * 3, 16, 16, BLOCKS[:1, :1]), ValueError,
     "head_dim must be a multiple of 8 from 8 to 256, got 0"),
    (lambda: func(q=zeros(2, 3, 64, 16)), ValueError,
     "q has 3 heads, which is no multiple of the 2 heads of k and v"),
    (lambda: func(q=zeros(2, 1, 64, 16)), ValueError,
     "q has 1 heads, which is no multiple of the 2 heads of k and v"),
    (lambda: func(k=KV[:, :0], v=KV[:, :0]), ValueError,
     "q has 4 heads, which is no multiple of the 0 heads of k and v"),
    # Layouts and devices.
    (lambda: func(q=zeros(2, 4, 64, 32)[..., ::2]), ValueError,
     "the last dimension of q must be contiguous, but its stride is 2"),
    (lambda: func(k=zeros(2, 2, 16, 96).transpose(2, 3)), ValueError,
     "the last dimension of k must be contiguous, but its stride is 96"),
    (lambda: func(v=zeros(2, 2, 96, 1).expand(2, 2, 96, 16)), ValueError,
     "the last dimension of v must be contiguous, but its stride is 0"),
    (lambda: func(k=KV.to("meta")), ValueError, "k is on meta, but q is on cpu"),
    (lambda: func(q=Q.to("meta")), ValueError, "k is on cpu, but q is on meta"),
    (lambda: func(mask=BLOCKS.to("meta")), ValueError, "block_mask is on meta, but q is on cpu"),
    (lambda: attn(mask=MASK.to("meta")), ValueError, "mask is on meta, but q is on cpu"),
    # Block sizes.
    (lambda: func(q_block=24), ValueError,
     "q_block_size must be a positive multiple of 16, got 24"),
    (lambda: func(kv_block=8), ValueError,
     "kv_block_size must be a positive multiple of 16, got 8"),
    (lambda: func(q_block=0), ValueError, "q_block_size must be a positive multiple of 16, got 0"),
    (lambda: func(q_block=-16), ValueError, "q_block_size must not be negative, got -16"),
    (lambda: func(kv_block=np.int64(-64)), ValueError,
     "kv_block_size must not be negative, got -64"),
    (lambda: func(q_block=2**31), ValueError,
     "q_block_size is too large for 32-bit block indices: got 2147483648"),
    (lambda: func(q_block=2**63), ValueError,
     "q_block_size is too large: got 9223372036854775808"),
    (lambda: func(q_block=16.0), TypeError, "q_block_size must be an integer, got float"),
    (lambda: func(kv_block=np.float32(32)), TypeError,
     "kv_block_size must be an integer, got float32"),
    (lambda: func(q_block=True), TypeError, "q_block_size must be an integer, got bool"),
    (lambda: func(kv_block="32"), TypeError, "kv_block_size must be an integer, got str"),
    (lambda: func(kv_block=None), TypeError, "kv_block_size must be an integer, got NoneType"),
    (lambda: func(kv_block=torch.tensor(32)), TypeError,
     "kv_block_size must be an integer, got Tensor"),
    # The reference library once took one block size for both: five arguments.
    (lambda: flex_block_attn_func(Q, KV, KV, 16, BLOCKS), TypeError,
     "flex_block_attn_func() missing 1 required positional argument: 'block_mask'"),
    # Masks as tensors.
    (lambda: func(mask=BLOCKS.tolist()), TypeError, "block_mask must be a torch.Tensor, got list"),
    (lambda: func(mask=MASK), TypeError, "block_mask must be a torch.Tensor, got BlockMask"),
    (lambda: func(mask=BLOCKS.numpy()), TypeError,
     "block_mask must be a torch.Tensor, got ndarray"),
    (lambda: func(mask=BLOCKS.float()), TypeError,
     "block_mask is float32, but must be bool or integer: "
     "say which values count, as in block_mask > 0"),
    (lambda: func(mask=BLOCKS.to(torch.complex64)), TypeError,
     "block_mask is complex64, but must be bool or integer: "
     "say which values count, as in block_mask > 0"),
    (lambda: func(mask=BLOCKS[0]), ValueError, f"block_mask must be {FORMS}, got shape (3,)"),
    (lambda: func(mask=BLOCKS.expand(1, 1, 1, 1, 4, 3)), ValueError,
     f"block_mask must be {FORMS}, got shape (1, 1, 1, 1, 4, 3)"),
    (lambda: func(mask=BLOCKS.expand(2, 2, 2, 4, 3)), ValueError,
     f"block_mask must be {FORMS}, got shape (2, 2, 2, 4, 3)"),
    (lambda: func(mask=BLOCKS.T), ValueError,
     "block_mask has 3 x 4 blocks, but q_len 64 in blocks of 16 and kv_len 96 in blocks of 32 "
     "need 4 x 3"),
    (lambda: func(mask=torch.ones(64, 96) > 0), ValueError,
     "block_mask has 64 x 96 blocks, but q_len 64 in blocks of 16 and kv_len 96 in blocks of 32 "
     "need 4 x 3"),
    (lambda: func(mask=BLOCKS.expand(2, 4, 3)), ValueError,
     "block_mask has 2 heads, but q has 4: allowed are 1 (shared) and 4"),
    (lambda: func(mask=BLOCKS.expand(2, 0, 4, 3)), ValueError,
     "block_mask has 0 heads, but q has 4: allowed are 1 (shared) and 4"),
    (lambda: func(mask=BLOCKS.expand(3, 4, 4, 3)), ValueError,
     "block_mask has 3 batches, but q has 2: allowed are 1 (shared) and 2"),
    # BlockMask as an argument.
    (lambda: attn(mask=BLOCKS), TypeError,
     "mask must be a BlockMask, got Tensor: "
     "BlockMask(tensor, q_len, kv_len, q_block_size, kv_block_size) makes one of a tensor"),
    (lambda: attn(mask=BlockMask(BLOCKS, 63, 96, 16, 32)), ValueError,
     "mask is made for q_len 63 and kv_len 96, but the tensors have 64 and 96"),
    (lambda: attn(q=KV, k=Q[:, :2], v=Q[:, :2]), ValueError,
     "mask is made for q_len 64 and kv_len 96, but the tensors have 96 and 64"),
    (lambda: attn(mask=random(heads=3), k=Q, v=Q), ValueError,
     "block_mask has 3 heads, but q has 4: allowed are 1 (shared) and 4"),
    (lambda: attn(scale=float("nan")), ValueError, "scale must be a finite number, got NaN"),
    (lambda: attn(scale=float("inf")), ValueError, "scale must be a finite number, got inf"),
    (lambda: attn(scale=-float("inf")), ValueError, "scale must be a finite number, got -inf"),
    # BlockMask from a tensor.
    (lambda: BlockMask(BLOCKS, -64, 96, 16, 32), ValueError, "q_len must not be negative, got -64"),
    (lambda: BlockMask(BLOCKS, 64, 96.0, 16, 32), TypeError,
     "kv_len must be an integer, got float"),
    (lambda: BlockMask(BLOCKS, 64, 96, 16, 20), ValueError,
     "kv_block_size must be a positive multiple of 16, got 20"),
    (lambda: BlockMask(BLOCKS, 64, 97, 16, 32), ValueError,
     "block_mask has 4 x 3 blocks, but q_len 64 in blocks of 16 and kv_len 97 in blocks of 32 "
     "need 4 x 4"),
    (lambda: BlockMask([[1]], 16, 16, 16, 16), TypeError,
     "block_mask must be a torch.Tensor, got list"),
    # Builders.
    (lambda: BlockMask.full(2**31, 64, 16, 16), ValueError,
     "q_len is too large for 32-bit block indices: got 2147483648"),
    (lambda: BlockMask.full(64, -1, 16, 16), ValueError, "kv_len must not be negative, got -1"),
    (lambda: BlockMask.causal(64, 64, 40, 16), ValueError,
     "q_block_size must be a positive multiple of 16, got 40"),
    (lambda: BlockMask.causal(64.5, 64, 16, 16), TypeError, "q_len must be an integer, got float"),
    (lambda: window(left=-1), ValueError, "left must not be negative, got -1"),
    (lambda: window(right=-1), ValueError, "right must not be negative, got -1"),
    (lambda: window(right=1.5), TypeError, "right must be an integer, got float"),
    (lambda: random(density=1.5), ValueError, "density must be from 0 to 1, got 1.5"),
    (lambda: random(density=-0.5), ValueError, "density must be from 0 to 1, got -0.5"),
    (lambda: random(density=float("nan")), ValueError, "density must be from 0 to 1, got NaN"),
    (lambda: random(seed=-1), ValueError, "seed must not be negative, got -1"),
    (lambda: random(seed=2**64), ValueError, "seed is too large: got 18446744073709551616"),
    (lambda: random(batch=-1), ValueError, "batch must not be negative, got -1"),
    (lambda: random(heads=2.0), TypeError, "heads must be an integer, got float"),
    (lambda: sta(tile_tokens=24), ValueError,
     "tile_tokens must be a positive multiple of 16, got 24"),
    (lambda: sta(tile_tokens=0), ValueError,
     "tile_tokens must be a positive multiple of 16, got 0"),
    (lambda: sta(tile_tokens=-16), ValueError, "tile_tokens must not be negative, got -16"),
    (lambda: sta(text_tokens=-1), ValueError, "text_tokens must not be negative, got -1"),
    (lambda: sta(sees=(1, 0, 1)), ValueError, f"window must be {TRIPLE}, got [1, 0, 1]"),
    (lambda: sta(tiles=(2, 2, 0)), ValueError, f"tiles must be {TRIPLE}, got [2, 2, 0]"),
    (lambda: sta(tiles=(-2, 2, 2)), ValueError, "tiles must not be negative, got -2"),
    (lambda: sta(tiles=(2, 2)), ValueError, f"tiles must be {TRIPLE}, got 2"),
    (lambda: sta(sees=(1, 1.5, 1)), TypeError, "window must be an integer, got float"),
    (lambda: MASK.picture(1, 2), ValueError, "batch 1 and head 2 must be below 1 and 1"),
    (lambda: MASK.picture(-1), ValueError, "batch must not be negative, got -1"),
    # Masks of functions: what they do.
    (lambda: made(lambda b, h, q, kv: q >= kv and q < 5), TypeError,
     untraced("`and`, `or`, `not`, `if`, min() or max() of a value that depends on the pair",
              "&, |, ~, torch.where, torch.minimum or torch.maximum")),
    (lambda: made(lambda b, h, q, kv: max(q, 3) < kv), TypeError,
     untraced("`and`, `or`, `not`, `if`, min() or max() of a value that depends on the pair",
              "&, |, ~, torch.where, torch.minimum or torch.maximum")),
    (lambda: made(lambda b, h, q, kv: [1, 2][q] == kv), TypeError,
     untraced("a Python list, or a whole number, where a value depends on the pair",
              "a tensor that is indexed, table[q_idx],")),
    (lambda: made(lambda b, h, q, kv: q / 16 == kv / 16), TypeError,
     untraced("/, whose result is a float", "//")),
    (lambda: made(lambda b, h, q, kv: torch.div(q, 2) == kv), TypeError,
     untraced("/, whose result is a float", "//")),
    (lambda: made(lambda b, h, q, kv: q < 3.5), TypeError,
     untraced("the float 3.5", "whole numbers")),
    (lambda: made(lambda b, h, q, kv: torch.tensor(2.0) < kv), TypeError,
     untraced("a float", "whole numbers")),
    (lambda: made(lambda b, h, q, kv: q.float() < kv), TypeError,
     untraced("float", "whole numbers")),
    (lambda: made(lambda b, h, q, kv: q.to(torch.float32) < kv), TypeError,
     untraced("float32", "whole numbers")),
    (lambda: made(lambda b, h, q, kv: torch.sin(q) < kv), TypeError, untraced("sin", INSTEAD)),
    (lambda: made(lambda b, h, q, kv: torch.fmod(q, 3) < kv), TypeError,
     untraced("torch.fmod", "%")),
    (lambda: made(lambda b, h, q, kv: q & 3 == kv), TypeError,
     untraced("& of numbers, bit by bit", "//, % and comparisons, in parentheses,")),
    (lambda: made(lambda b, h, q, kv: q.item() < kv), TypeError,
     untraced("item() of a value that depends on the pair", "the value itself")),
    (lambda: made(lambda b, h, q, kv: q - kv), TypeError,
     "mask_mod must return a condition, but returned a number"),
    (lambda: made(lambda b, h, q, kv: None), TypeError,
     "mask_mod must return a condition, but returned NoneType"),
    (lambda: made(BLOCKS), TypeError,
     "mask_mod must be a function of (b, h, q_idx, kv_idx), got Tensor"),
    (lambda: and_masks(3), TypeError,
     "mask_mods must be functions of (b, h, q_idx, kv_idx), got int"),
    # What they look up.
    (lambda: made(lambda b, h, q, kv: TABLE.float()[q] == 1), TypeError,
     "mask_mod looks up a tensor of float32, but only bool and integers are supported: "
     "compare it before, and look up the result"),
    (lambda: made(lambda b, h, q, kv: q == TABLE), TypeError,
     "mask_mod computes with a tensor of shape (64,): index it first, as in table[q_idx]"),
    (lambda: made(lambda b, h, q, kv: TABLE.view(8, 8)[q] == kv), TypeError,
     "mask_mod looks up a tensor of shape (8, 8) by 1 indices: "
     "it needs one for each dimension"),
    (lambda: made(lambda b, h, q, kv: TABLE[q, kv] == 1), IndexError,
     "mask_mod looks up a tensor of shape (64,) by 2 indices"),
    (lambda: made(lambda b, h, q, kv: TABLE.view(8, 8)[q, 1:] == kv), TypeError,
     untraced("a slice of a tensor by a value that depends on the pair", "single indices")),
    (lambda: made(lambda b, h, q, kv: (TABLE + 2**40)[q] == kv), ValueError,
     "a tensor of shape (64,) that mask_mod looks up has numbers from 1099511627776 to "
     "1099511627839, but only those of int32 are supported"),
    (lambda: made(lambda b, h, q, kv: q < 2**31), ValueError,
     "mask_mod has the number 2147483648, but only those of int32 are supported"),
    (lambda: made(lambda b, h, q, kv: TABLE[q + 1] == kv), ValueError,
     unusable("t0[q + 1] == kv", "index q + 1 of table t0 goes from 1 to 64, but that dimension "
              "has 64 entries: clamp it")),
    (lambda: made(lambda b, h, q, kv: q * kv == 3, lengths=(2**17, 2**17)), ValueError,
     unusable("q * kv == 3", "q * kv goes from 0 to 17179607041, which int32 does not hold")),
    (lambda: made(lambda b, h, q, kv: q // kv == 3), ValueError,
     unusable("q / kv == 3", "q / kv may divide by 0")),
    (lambda: made(lambda b, h, q, kv: h < kv), ValueError,
     "mask_mod tells heads apart: give their number, H"),
    (lambda: made(lambda b, h, q, kv: TABLE[b] < kv), ValueError,
     "mask_mod tells batches apart: give their number, B"),
    # Their sizes.
    (lambda: made(batch=-1), ValueError, "B must not be negative, got -1"),
    (lambda: made(heads=1.5), TypeError, "H must be an integer, got float"),
    (lambda: made(lengths=(64, None)), TypeError, "KV_LEN must be an integer, got NoneType"),
    (lambda: made(BLOCK_SIZE=100), ValueError,
     "q_block_size must be a positive multiple of 16, got 100"),
    (lambda: made(BLOCK_SIZE=(64, 64, 64)), ValueError,
     "BLOCK_SIZE must be one number or two, got 3"),
    (lambda: attn(mask=made()), ValueError,
     "mask is made for q_len 64 and kv_len 64, but the tensors have 64 and 96"),
    (lambda: attn(k=Q, v=Q, mask=made(lambda b, h, q, kv: q + h >= kv, heads=3)), ValueError,
     "block_mask has 3 heads, but q has 4: allowed are 1 (shared) and 4"),
    (lambda: attn(k=Q, v=Q, mask=made(lambda b, h, q, kv: q + h >= kv, heads=1)), ValueError,
     "the mask's expression tells heads apart, but is made for 1, and q has 4"),
    (lambda: made()[0, 0, 0, 0], IndexError,
     "mask has batches, heads and query blocks, but got 4 indices"),
    (lambda: made()[:, :, 4], IndexError, "index 4 is outside of a dimension of 1"),
    (lambda: MASK[:, :, ::2], IndexError, "rows of query blocks must follow each other"),
    (lambda: BlockMask.from_torch(MASK), TypeError,
     "mask must be a BlockMask of torch's, got BlockMask"),
    # Helpers.
    (lambda: select(block_size=0), ValueError, "block_size must be positive, got 0"),
    (lambda: select(block_size=-16), ValueError, "block_size must not be negative, got -16"),
    (lambda: select(block_size=16.0), TypeError, "block_size must be an integer, got float"),
    (lambda: select([(0, 1), (0, 4)]), IndexError,
     "selected block (0, 4) lies outside of the 4 x 4 blocks"),
    (lambda: select([(-1, 0)]), IndexError,
     "selected block (-1, 0) lies outside of the 4 x 4 blocks"),
    (lambda: select([0, 1]), ValueError,
     "selected_blocks must be pairs of integers (row, column)"),
    (lambda: select([(0, 1, 2)]), ValueError,
     "selected_blocks must be pairs of integers (row, column)"),
    (lambda: select([(0.0, 1.0)]), ValueError,
     "selected_blocks must be pairs of integers (row, column)"),
    (lambda: visualize_attn_mask(BLOCKS[None]), ValueError,
     "mask must have 2 dimensions, got shape (1, 4, 3)"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_refused(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert caught.type is error


MANY = BLOCKS.expand(2, 4, 4, 3)
GOOD = {
    "all by the rules": lambda: func(),
    "blocks larger than sequences": lambda: func(q_block=384, kv_block=512, mask=BLOCKS[:1, :1]),
    "block sizes of numpy": lambda: func(q_block=np.int64(16), kv_block=np.prod([4, 8])),
    "masks of integers": lambda: func(mask=BLOCKS.long()),
    "masks that are views": lambda: func(mask=torch.ones(3, 8, dtype=torch.bool).T[::2]),
    "masks expanded over batch and heads": lambda: func(mask=MANY),
    "a query block of one token": lambda: func(q=Q[:, :, :49]),
    "no batch": lambda: func(q=Q[:0], k=KV[:0], v=KV[:0], mask=MANY[:0]),
    "a shared mask over no batch": lambda: func(q=Q[:0], k=KV[:0], v=KV[:0]),
    "no queries": lambda: func(q=Q[:, :, :0], mask=BLOCKS[:0]),
    "no keys": lambda: func(k=KV[:, :, :0], v=KV[:, :, :0], mask=BLOCKS[:, :0]),
    "a mask without blocks": lambda: func(mask=~BLOCKS),
    "scales of any sign": lambda: attn(scale=-1) + attn(scale=0),
    "scales of numpy": lambda: attn(scale=np.float32(0.5)),
    "scales of tensors": lambda: attn(scale=torch.tensor(0.5)),
    "a single head for all": lambda: func(k=KV[:, :1], v=KV[:, :1]),
    "no data": lambda: func(*(x.to("meta") for x in (Q, KV, KV)), mask=BLOCKS.to("meta")),
    "windows wider than everything": lambda: window(left=2**63 - 1, right=2**63 - 1),
    "the largest seed": lambda: random(seed=2**64 - 1),
    "densities of numpy": lambda: random(density=np.float32(1)),
    "sizes of numpy": lambda: BlockMask.full(*np.array([64, 64, 16, 16])),
    "functions that return a Python bool": lambda: made(lambda b, h, q, kv: True),
    "functions of torch's": lambda: made(
        and_masks(lambda b, h, q, kv: torch.ge(q, kv), lambda b, h, q, kv: ~(TABLE[kv] > 50))
    ),
    "numbers as tensors": lambda: made(lambda b, h, q, kv: torch.tensor(3) + q > TABLE[5] + kv),
    "sizes of numpy, of functions": lambda: made(
        lengths=np.array([64, 64]), BLOCK_SIZE=np.int64(32)
    ),
    "tiles of numpy": lambda: sta(np.array([2, 2, 2]), [3, 3, 3], np.prod([4, 2, 2])),
}  # fmt: skip


@pytest.mark.parametrize("call", GOOD.values(), ids=GOOD.keys())
def test_accepted(call):
    result = call()
    if isinstance(result, BlockMask):
        assert result.blocks.any()
    else:
        assert result.dim() == 4
        assert result.is_meta or result.isfinite().all()

"""Functions of masks: those of FlexAttention's documentation and examples, and odd ones."""

import torch

from flex_block_attn import or_masks


def causal(b, h, q, kv):
    return q >= kv


def window(size):
    return lambda b, h, q, kv: (q - kv).abs() <= size


def left_window(size):
    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= size)

    return mask_mod


def prefix(lengths):
    return or_masks(causal, lambda b, h, q, kv: kv < lengths[b])


def document(ids):
    return lambda b, h, q, kv: ids[q] == ids[kv]


def per_batch_document(ids):
    return lambda b, h, q, kv: (ids[b, q] == ids[b][kv]) & (ids[b, kv] >= 0)


def offset_document(ids, offsets):
    """A mask of a document alone becomes one of many, as in attention-gym."""

    def mask_mod(b, h, q, kv):
        inside = causal(b, h, q - offsets[ids[q]], kv - offsets[ids[kv]])
        return torch.logical_and(ids[q] == ids[kv], inside)

    return mask_mod


def dilated(size, step):
    return lambda b, h, q, kv: (torch.abs(q - kv) <= size) & ((q - kv) % step == 0)


def per_head_window(sizes):
    return lambda b, h, q, kv: torch.where(q > kv, q - kv, kv - q) < sizes[h]


def natten(height, width, kernel):
    def place(token):
        return token // width, token % width

    def mask_mod(b, h, q_idx, kv_idx):
        q_row, q_column = place(q_idx)
        kv_row, kv_column = place(kv_idx)
        row = q_row.clamp(kernel // 2, (height - 1) - kernel // 2)
        column = q_column.clamp(kernel // 2, (width - 1) - kernel // 2)
        near = (row - kv_row).abs() <= kernel // 2
        return near & ((column - kv_column).abs() <= kernel // 2)

    return mask_mod


def tiled_natten(height, width, kernel, tile):
    """Tokens in the order of square tiles, row by row inside of each."""

    def place(token):
        number, inside = token // (tile * tile), token % (tile * tile)
        across = width // tile
        return number // across * tile + inside // tile, number % across * tile + inside % tile

    def mask_mod(b, h, q_idx, kv_idx):
        (q_row, q_column), (kv_row, kv_column) = place(q_idx), place(kv_idx)
        row = q_row.clamp(kernel // 2, (height - 1) - kernel // 2)
        column = q_column.clamp(kernel // 2, (width - 1) - kernel // 2)
        near = (row - kv_row).abs() <= kernel // 2
        return near & ((column - kv_column).abs() <= kernel // 2)

    return mask_mod


def stand_alone(width, kernel):
    """Rows and columns of a picture that are near, cut off at its borders."""

    def mask_mod(b, h, q_idx, kv_idx):
        row = abs(q_idx // width - kv_idx // width)
        column = abs(q_idx % width - kv_idx % width)
        return (row <= kernel // 2) & (column <= kernel // 2)

    return mask_mod


def with_offset(mask_mod, offset):
    """Of queries that come after as many tokens, which tensors hold while decoding."""
    return lambda b, h, q, kv: mask_mod(b, h, q + offset, kv)


def transfusion(starts, ends):
    """Causal, and pictures' tokens see the whole picture: a window of tokens for each batch."""

    def picture(b, h, q, kv):
        inside = (q >= starts[b]) & (q < ends[b])
        return inside & (kv >= starts[b]) & (kv < ends[b])

    return or_masks(causal, picture)


def sliding_tiles(canvas, tile, reach):
    """Sliding tile attention, token by token."""
    _, height, width = canvas

    def tiles(token):
        time, rest = token // (height * width), token % (height * width)
        return [p // t for p, t in zip((time, rest // width, rest % width), tile, strict=True)]

    def mask_mod(b, h, q, kv):
        pairs = zip(tiles(q), tiles(kv), reach, strict=True)
        first, second, third = (torch.abs(x - y) <= n for x, y, n in pairs)
        return first & second & third

    return mask_mod


def flamingo(media):
    """Text sees the picture that came last before it."""
    return lambda b, h, q, kv: media[b, q] == kv // 16 + 1


def strided(step):
    return lambda b, h, q, kv: torch.logical_or(q % step == kv % step, q // step == kv // step)


def everything(b, h, q, kv):
    return b.new_ones((), dtype=torch.bool)


def odd_functions(seen):
    """What else can be written down."""

    def mask_mod(b, h, q, kv):
        near = torch.minimum(q + 3, kv * 2) <= torch.maximum(kv, torch.full_like(q, 40))
        far = torch.floor_divide(q, 7) != (kv >> 2)
        twice = (q < kv) ^ (h == 1) ^ seen[kv]
        picked = torch.where(near, far, ~twice)
        count = near.to(torch.int32) + far.long() + (b + 1) * twice
        return picked | torch.logical_not(count > 2) & (-q + 100 != kv) & (q**2 < 5000)

    return mask_mod

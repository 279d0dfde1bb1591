"""Masks of functions: the same pairs as torch's ``create_mask`` finds by calling the function for
each, and attention as over a dense mask in float64.

The functions are those of FlexAttention's documentation and examples, on random sizes.
"""

import copy
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_functions import (
    causal,
    dilated,
    document,
    everything,
    flamingo,
    left_window,
    natten,
    odd_functions,
    offset_document,
    per_batch_document,
    per_head_window,
    prefix,
    sliding_tiles,
    stand_alone,
    strided,
    tiled_natten,
    transfusion,
    window,
    with_offset,
)
from reference import LSE_TOLERANCE, TOLERANCE, random_qkv, relative_error
from torch.nn.attention import flex_attention

from flex_block_attn import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_block_attn,
    flex_block_attn_func,
    forget_masks,
    or_masks,
)
from flex_block_attn.trace import trace

# What torch says of its attention where it is not compiled.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BATCH, HEADS = 2, 3


@st.composite
def functions(draw, tokens):
    """A function for so many queries and keys."""
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape, below):
        return torch.randint(0, below, shape, generator=generator)

    size = draw(st.integers(1, 120))
    sorted_ids = numbers(tokens, below=6).sort().values
    lengths = torch.bincount(sorted_ids, minlength=6)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = draw(st.sampled_from([sorted_ids, sorted_ids * 5 % 7, numbers(tokens, below=4)]))
    batches = torch.stack([ids.int(), sorted_ids.int() - 1])
    width = draw(st.integers(3, 24))
    choices = [
        causal,
        window(size),
        left_window(size),
        prefix(numbers(BATCH, below=tokens + 1)),
        document(ids),
        and_masks(causal, document(ids)),
        per_batch_document(batches),
        offset_document(sorted_ids, offsets),
        dilated(size, draw(st.integers(1, 5))),
        per_head_window(numbers(HEADS, below=150)),
        and_masks(left_window(size), per_head_window(numbers(HEADS, below=150))),
        natten(-(-tokens // width), width, draw(st.sampled_from([3, 5]))),
        sliding_tiles((4, 6, width), (2, 3, 4), draw(st.tuples(*[st.integers(0, 2)] * 3))),
        tiled_natten(-(-tokens // (4 * width)) * 4, 4 * width, draw(st.sampled_from([3, 7])), 4),
        stand_alone(width, draw(st.integers(1, 9))),
        with_offset(left_window(size), numbers(below=200)),
        with_offset(left_window(size), draw(st.integers(0, 200))),
        transfusion(*numbers(2, BATCH, below=tokens + 1).sort(0).values),
        flamingo(numbers(BATCH, tokens, below=5)),
        strided(draw(st.integers(1, 40))),
        everything,
        odd_functions(numbers(tokens, below=2).bool()),
        or_masks(),
    ]
    return draw(st.sampled_from(choices))


@st.composite
def cases(draw):
    q_len, kv_len = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    mask_mod = draw(functions(max(q_len, kv_len)))
    sizes = tuple(16 * draw(st.integers(1, 9)) for _ in range(2))
    return mask_mod, q_len, kv_len, sizes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_the_same_pairs_as_torch(case):
    mask_mod, q_len, kv_len, sizes = case
    dense = flex_attention.create_mask(mask_mod, BATCH, HEADS, q_len, kv_len, "cpu")
    mask = create_block_mask(mask_mod, BATCH, HEADS, q_len, kv_len, BLOCK_SIZE=sizes)
    assert torch.equal(mask.to_dense().expand_as(dense), dense)
    # Blocks have a pair that counts, partial ones another that does not.
    rows = torch.nn.functional.pad(dense, (0, -kv_len % sizes[1], 0, -q_len % sizes[0]))
    inside = torch.nn.functional.pad(
        torch.ones_like(dense), (0, -kv_len % sizes[1], 0, -q_len % sizes[0])
    )
    shape = BATCH, HEADS, rows.shape[2] // sizes[0], sizes[0], rows.shape[3] // sizes[1], sizes[1]
    some = rows.reshape(shape).any(5).any(3)
    all_ = (rows | ~inside).reshape(shape).all(5).all(3)
    assert torch.equal(mask.blocks.expand_as(some), some)
    assert torch.equal(mask.partial_blocks.expand_as(some), some & ~all_)


def dense_attention(q, k, v, dense):
    """In float64; a query without any key has output 0, lse -inf and no gradient."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q.shape[3] ** -0.5 * q @ k.transpose(2, 3)).masked_fill(~dense, -torch.inf)
    has_keys = dense.any(dim=3, keepdim=True).expand_as(scores[..., :1])
    scores = torch.where(has_keys, scores, 0.0)
    out = torch.where(has_keys, scores.softmax(dim=3), 0.0) @ v
    return out, torch.where(has_keys[..., 0], scores.logsumexp(dim=3), -torch.inf)


def assert_matches(q, k, v, mask, dense):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = flex_block_attn(*leaves, mask, return_lse=True)
    exact_out, exact_lse = dense_attention(*exact, dense)
    tolerance = TOLERANCE[q.dtype]
    assert relative_error(out, exact_out) < tolerance
    empty = exact_lse.isinf()
    assert torch.equal(lse.isneginf(), empty)
    assert not out[empty].any()
    if not empty.all():
        assert (lse.double() - exact_lse)[~empty].abs().max() < LSE_TOLERANCE[lse.dtype]
    dout, dlse = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    expected = torch.autograd.grad(
        (exact_out, exact_lse), exact, (dout.double(), dlse.double().masked_fill(empty, 0))
    )
    for name, got, expects in zip("qkv", gradients, expected, strict=True):
        assert relative_error(got, expects) < tolerance, f"d{name}"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**32))
def test_attention_as_over_a_dense_mask(case, dtype, seed):
    mask_mod, q_len, kv_len, sizes = case
    torch.manual_seed(seed)
    mask = create_block_mask(mask_mod, BATCH, HEADS, q_len, kv_len, BLOCK_SIZE=sizes)
    dense = flex_attention.create_mask(mask_mod, BATCH, HEADS, q_len, kv_len, "cpu")
    q, k, v = random_qkv(BATCH, (HEADS, 1), q_len, kv_len, 16, dtype)
    assert_matches(q, k, v, mask, dense)


def test_attention_as_torch_computes_it():
    ids = torch.arange(300) // 70
    mask_mod = and_masks(left_window(100), document(ids))
    q, k, v = random_qkv(1, 2, 300, 300, 16)
    theirs = flex_attention.create_block_mask(mask_mod, None, None, 300, 300, "cpu")
    expected = flex_attention.flex_attention(q, k, v, block_mask=theirs)
    ours = create_block_mask(mask_mod, None, None, 300, 300)
    assert relative_error(flex_block_attn(q, k, v, ours), expected) < 1e-5


def test_masks_of_torch_and_back():
    ids = torch.arange(500) // 130
    mask_mod = and_masks(causal, document(ids))
    theirs = flex_attention.create_block_mask(mask_mod, None, None, 500, 400, "cpu")
    ours = create_block_mask(mask_mod, None, None, 500, 400)
    taken = BlockMask.from_torch(theirs)
    for mask in (taken, BlockMask.from_torch(ours.to_torch())):
        assert torch.equal(mask.blocks, ours.blocks)
        assert torch.equal(mask.to_dense(), ours.to_dense())
    # Blocks of torch's that end behind the sequence are partial for it.
    assert not (ours.partial_blocks & ~taken.partial_blocks).any()
    assert torch.equal(ours.to_torch().to_dense().bool(), ours.blocks)
    assert abs(ours.sparsity() - theirs.sparsity()) < 1e-4
    q, k, v = random_qkv(1, 2, 500, 400, 16)
    out = flex_attention.flex_attention(q, k, v, block_mask=ours.to_torch())
    assert relative_error(flex_block_attn(q, k, v, ours), out) < 1e-5


def test_masks_of_torch_with_blocks_of_their_own():
    """Blocks that torch is told are full count whole, whatever the function says."""
    counts = torch.tensor([[[1, 1]]], dtype=torch.int32)
    partial = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    full = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    theirs = flex_attention.BlockMask.from_kv_blocks(
        counts, partial, counts, full, BLOCK_SIZE=32, mask_mod=causal
    )
    ours = BlockMask.from_torch(theirs)
    expected = torch.ones(64, 64, dtype=torch.bool)
    expected[:32, :32] = expected[32:, 32:] = torch.ones(32, 32, dtype=torch.bool).tril()
    assert torch.equal(ours.to_dense()[0, 0], expected)
    plain = flex_attention.BlockMask.from_kv_blocks(counts, partial, BLOCK_SIZE=32)
    assert BlockMask.from_torch(plain).expression is None
    q, k, v = random_qkv(1, 1, 64, 64, 16)
    assert_matches(q, k, v, ours, expected[None, None])


def test_plain_masks_for_torch():
    ours = BlockMask.random(300, 300, 64, 128, density=0.5, seed=1)
    q, k, v = random_qkv(1, 2, 300, 300, 16)
    out = flex_attention.flex_attention(q, k, v, block_mask=ours.to_torch())
    assert relative_error(flex_block_attn(q, k, v, ours), out) < 1e-5


def test_one_mask_for_all_that_it_does_not_tell_apart():
    mask = create_block_mask(causal, 4, 8, 256, 256)
    assert mask.shape == (1, 1, 256, 256)
    mask = create_block_mask(per_head_window(torch.arange(8)), 4, 8, 256, 256)
    assert mask.shape == (1, 8, 256, 256)


def test_parts_of_a_mask():
    ids = torch.arange(400).reshape(2, 200) // 30
    mask_mod = and_masks(per_batch_document(ids), per_head_window(torch.tensor([10, 60, 200])))
    mask = create_block_mask(mask_mod, 2, 3, 200, 200, BLOCK_SIZE=32)
    dense = mask.to_dense()
    for index in (
        1,
        (slice(None), -1),
        (0, slice(1, 3)),
        (slice(None), slice(None, None, 2)),
        (slice(None), slice(None), slice(2, 5)),
        (1, 2, 6),
    ):
        part = mask[index]
        b, h, r = (*(index if isinstance(index, tuple) else (index,)), *(slice(None),) * 3)[:3]
        expected = dense[b : b + 1] if isinstance(b, int) else dense[b]
        h = slice(h, h + 1 or None) if isinstance(h, int) else h
        expected = expected[:, h]
        rows = range(7)[r] if isinstance(r, slice) else range(r, r + 1)
        expected = expected[:, :, rows.start * 32 : rows.stop * 32]
        assert torch.equal(part.to_dense(), expected), index
        batch, heads, q_len, _ = expected.shape
        q, k, v = random_qkv(batch, heads, q_len, 200, 16)
        assert_matches(q, k, v, part, expected)
    plain = BlockMask.random(100, 100, 16, 16, density=0.4, seed=0, heads=3)
    assert torch.equal(plain[:, 1:, 2].to_dense(), plain.to_dense()[:, 1:, 32:48])
    with pytest.raises(ValueError, match="needs the function of a mask"):
        mask[0].to_torch()


def test_what_a_mask_says_of_itself():
    mask = create_block_mask(left_window(100), None, None, 300, 300, BLOCK_SIZE=(64, 128))
    assert repr(mask) == (
        "BlockMask(1 x 1 x 5 x 3 blocks of 64 x 128, 300 x 300 tokens, density 0.630, 8 partial: "
        "q >= kv and q - kv <= 100)"
    )
    assert mask.to_string().splitlines()[1:] == [
        "",
        "batch 0, head 0",
        *mask.picture().splitlines(),
    ]
    assert mask.sparsity() == pytest.approx(100 * 7 / 15)
    assert repr(mask.expression) == "Expression(q >= kv and q - kv <= 100)"


def test_copies_and_files():
    ids = torch.arange(200) // 30
    mask = create_block_mask(and_masks(causal, document(ids)), None, None, 200, 200, BLOCK_SIZE=32)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(other.to_dense(), mask.to_dense())
        assert torch.equal(other.plan, mask.plan)


OPERATORS = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.floordiv: torch.floor_divide,
    operator.mod: torch.remainder,
    operator.lt: torch.lt,
    operator.le: torch.le,
    operator.gt: torch.gt,
    operator.ge: torch.ge,
    operator.eq: torch.eq,
    operator.ne: torch.ne,
    operator.and_: torch.bitwise_and,
    operator.or_: torch.bitwise_or,
    operator.xor: torch.bitwise_xor,
}


@pytest.mark.parametrize("apply", OPERATORS, ids=lambda apply: apply.__name__)
def test_operators_write_down_what_functions_do(apply):
    """Also those of two numbers, or of two conditions, which have a short way."""
    operands = [
        lambda q, kv: (q, kv),
        lambda q, kv: (q, 3),
        lambda q, kv: (3, q),
        lambda q, kv: (q, True),
        lambda q, kv: (q, 2**31),
        lambda q, kv: (q, kv < 7),
        lambda q, kv: (kv < 7, q),
        lambda q, kv: (q < 5, kv < 7),
        lambda q, kv: (q < 5, True),
        lambda q, kv: (True, q < 5),
        lambda q, kv: (q < 5, 3),
        lambda q, kv: (q, torch.tensor(3)),
        lambda q, kv: (q, 0.5),
    ]

    def text(apply, make):
        def mask_mod(b, h, q, kv):
            result = apply(*make(q, kv))
            return result if result.dtype == torch.bool else result == 11

        try:
            return str(trace(mask_mod, None))
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def function(a, b):
        if isinstance(a, int):
            # torch's take no number first; of Python's, these two are turned round.
            a, b = (b, a) if apply in (operator.eq, operator.ne) else (torch.tensor(a), b)
        return OPERATORS[apply](a, b)

    texts = [text(apply, make) for make in operands]
    assert texts == [text(function, make) for make in operands]
    assert sum("Error: mask_mod" not in text for text in texts) >= 3


def test_traced_values_are_no_plain_objects():
    def mask_mod(b, h, q, kv):
        with pytest.raises(TypeError, match="unhashable"):
            hash(q)
        return (abs(q - kv) < 9) & ((q - kv).abs() < 9) & (torch.abs(q - kv) < 9)

    assert str(trace(mask_mod, None)) == "x0 = q - kv; max(x0, -x0) < 9"


def test_a_tensor_looked_up_twice_is_one_table():
    ids = torch.arange(200) // 30
    views = ids[:], ids.view(200)
    mask = create_block_mask(
        lambda b, h, q, kv: (ids[q] == views[0][kv]) & (views[1][q] < 5), None, None, 200, 200
    )
    assert len(mask.expression.tables) == 1
    other = ids.clone()
    mask = create_block_mask(lambda b, h, q, kv: ids[q] == other[kv], None, None, 200, 200)
    assert len(mask.expression.tables) == 2


def test_tensors_changed_later_change_nothing():
    ids = torch.arange(200, dtype=torch.int32) // 30
    mask = create_block_mask(document(ids), None, None, 200, 200, BLOCK_SIZE=32)
    dense = mask.to_dense()
    ids.zero_()
    assert torch.equal(mask.to_dense(), dense)
    assert mask.expression.tables[0].any()


def test_a_mask_that_is_known_is_not_made_again():
    ids = torch.arange(300) // 70
    own, others = document(ids), document(ids.clone())

    def make(mask_mod, **settings):
        return create_block_mask(mask_mod, None, None, 300, 300, **{"BLOCK_SIZE": 32, **settings})

    forget_masks()
    first, again, equal = make(own), make(own), make(others)
    assert first is not again
    assert first.plan is again.plan is equal.plan
    assert again.mask_mod is own and equal.mask_mod is others
    assert make(own, BLOCK_SIZE=64).plan is not first.plan
    ids[100:] += 7
    changed = make(own)
    assert not torch.equal(changed.plan, first.plan)
    assert torch.equal(changed.to_dense(), (ids[:, None] == ids)[None, None])
    assert not torch.equal(first.to_dense(), changed.to_dense())
    for tokens in range(16, 16 * 12, 16):
        create_block_mask(causal, None, None, tokens, tokens)
    assert make(own).plan is not changed.plan
    kept = make(own)
    assert make(own).plan is kept.plan
    forget_masks()
    assert make(own).plan is not kept.plan


def test_large_plans_are_not_kept():
    def make():
        return create_block_mask(causal, None, None, 48_000, 48_000, BLOCK_SIZE=16)

    assert make().plan.nbytes > 2**26
    assert make().plan is not make().plan


def test_long_sequences_get_larger_blocks():
    for tokens, block in ((100_000, 128), (300_000, 256), (1_048_576, 512)):
        mask = create_block_mask(left_window(1000), None, None, tokens, tokens)
        assert (mask.q_block_size, mask.kv_block_size) == (block, block)
        assert mask.plan.numel() < 1e7
        # It is kept whatever its length.
        again = create_block_mask(left_window(1000), None, None, tokens, tokens)
        assert again.plan is mask.plan


def test_a_mask_that_nobody_wants_anything_of():
    mask = create_block_mask(or_masks(), None, None, 100, 100)
    q, k, v = random_qkv(1, 1, 100, 100, 16)
    out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize("lengths", [(256, 256), (200, 310)])
def test_a_function_that_is_always_true_makes_a_dense_mask(lengths):
    def always(b, h, q, kv):
        return q + kv >= 0

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, lengths[i], 32, generator=generator, requires_grad=True)
        for i in (0, 1, 1)
    )
    made = create_block_mask(always, None, None, *lengths, device="cpu", BLOCK_SIZE=64)
    full = BlockMask.full(*lengths, 64, 64)
    assert made.alike and full.alike and made.to("cpu").alike
    outs = [flex_block_attn(q, k, v, mask) for mask in (made, full)]
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    for other in (
        create_block_mask(lambda b, h, q, kv: q >= kv, None, None, *lengths, device="cpu"),
        create_block_mask(lambda b, h, q, kv: q + kv > 0, None, None, *lengths, device="cpu"),
        BlockMask(full.blocks, *lengths, 64, 64),
    ):
        assert not other.alike


def test_compiled_graphs():
    ids = torch.arange(200) // 30
    mask = create_block_mask(and_masks(causal, document(ids)), None, None, 200, 200, BLOCK_SIZE=32)

    def attention(q, k, v):
        return flex_block_attn(q, k, v, mask).sin()

    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 200, 200, 16))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected = attention(q, k, v)
    got = compiled(q, k, v)
    assert torch.allclose(got, expected)
    wanted = torch.autograd.grad(expected.sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), wanted, strict=True):
        assert torch.allclose(a, b)


# Torch's own check looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_what_torch_asks_of_them():
    ids = torch.arange(64) // 30
    mask = create_block_mask(and_masks(causal, document(ids)), None, None, 64, 64, BLOCK_SIZE=32)
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 64, 64, 16, torch.float64))
    exact = mask.expression
    torch.library.opcheck(
        torch.ops.flex_block_attn.exact_forward,
        (q, k, v, mask.plan, exact.tables, exact.text, 32, 32, 0.25, False),
    )
    assert torch.autograd.gradcheck(lambda *x: flex_block_attn(*x, mask), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: flex_block_attn(*x, mask), q, k, v, use_reentrant=False
    )
    out.sum().backward()
    assert q.grad is not None


def test_plans_with_partial_blocks_are_no_plans_of_whole_blocks():
    mask = create_block_mask(causal, None, None, 64, 64, BLOCK_SIZE=32)
    q, k, v = random_qkv(1, 1, 64, 64, 16)
    with pytest.raises(ValueError, match="not a plan of 2 x 2 blocks"):
        torch.ops.flex_block_attn.forward(q, k, v, mask.plan, 32, 32, 0.25, False)
    # Whole blocks alone are computed by their tensor as before.
    out = flex_block_attn_func(q, k, v, 32, 32, mask.blocks)
    assert not torch.equal(out, flex_block_attn(q, k, v, mask))

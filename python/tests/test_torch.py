"""What torch does with the operators: autograd, compilation, checkpoints, autocast, threads.

Against torch's own checks where it has them, else against the same call without the feature, bit
by bit, or against the dense float64 reference.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from reference import attention, random_qkv, relative_error, token_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from training import TOKENS, Model, denoising
from watching import Named, Watched

from flex_block_attn import (
    BlockMask,
    _native,
    direct,
    flex_block_attn,
    flex_block_attn_func,
    ops,
)

BLOCKS = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 0]]).bool()
MASK = BlockMask(BLOCKS, 60, 40, 16, 16)


def inputs(dtype=torch.float32, heads=(4, 2), head_dim=16, grad=True):
    q, k, v = random_qkv(2, heads, 60, 40, head_dim, dtype)
    return [x.requires_grad_(grad) for x in (q, k, v)]


def bits_equal(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- the operators -------------------------------------------------------------------------------


# Torch's own check looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_forward(grad):
    q, k, v = inputs(grad=grad)
    torch.library.opcheck(ops.forward, (q, k, v, MASK.plan, 16, 16, 0.3, grad))


def test_opcheck_of_transposed_tensors():
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    torch.library.opcheck(ops.forward, (q, k, v, MASK.plan, 16, 16, 0.3, False))


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_of_backward(wanted, with_dlse):
    q, k, v = inputs(grad=False)
    out, lse = ops.forward(q, k, v, MASK.plan, 16, 16, 0.3, False)
    dlse = torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(
        ops.backward,
        (torch.randn_like(out), dlse, q, k, v, out, lse, MASK.plan, 16, 16, 0.3, True, wanted),
    )


def test_opcheck_of_plan():
    torch.library.opcheck(ops.plan, (MASK.blocks, 60, 40, 16, 16))
    per_head = MASK.blocks.expand(2, 3, 4, 3)
    torch.library.opcheck(ops.plan, (per_head, 60, 40, 16, 16))


# --- gradients -----------------------------------------------------------------------------------


def test_gradcheck_of_output_and_lse():
    # A row without keys has an lse of -inf, whose finite differences are NaN: none here.
    q, k, v = random_qkv(1, (2, 1), 20, 36, 8, torch.float64)
    mask = BlockMask(BLOCKS[:2], 20, 36, 16, 16)
    torch.autograd.gradcheck(
        lambda *x: flex_block_attn(*x, mask, scale=-0.7, return_lse=True),
        [x.requires_grad_() for x in (q, k, v)],
    )


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:])
def test_only_needed_gradients(needed):
    """An input that needs no gradient gets none; the others get what they would get with it."""
    tensors = inputs()
    all_gradients = torch.autograd.grad(flex_block_attn(*tensors, MASK).cos().sum(), tensors)
    for tensor, needs in zip(tensors, needed, strict=True):
        tensor.requires_grad_(needs)
    flex_block_attn(*tensors, MASK).cos().sum().backward()
    for tensor, needs, expected in zip(tensors, needed, all_gradients, strict=True):
        assert (tensor.grad is not None) == needs
        assert not needs or torch.equal(tensor.grad, expected)


def test_no_gradients_needed():
    with torch.no_grad():
        assert not flex_block_attn(*inputs(), MASK).requires_grad
    assert not flex_block_attn(*inputs(grad=False), MASK).requires_grad


@pytest.mark.parametrize("of", ["out", "lse", "both"])
def test_losses_of_either_output(of):
    tensors = inputs(torch.float64)
    exact = [x.detach().requires_grad_() for x in tensors]

    def loss(out, lse):
        parts = {"out": out.sin().sum(), "lse": lse.sin().sum()}
        return parts[of] if of in parts else sum(parts.values())

    got = torch.autograd.grad(
        loss(*flex_block_attn(*tensors, MASK, return_lse=True)), tensors, materialize_grads=True
    )
    expected = torch.autograd.grad(
        loss(*attention(*exact, BLOCKS, 16, 16)), exact, materialize_grads=True
    )
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-12
    assert of != "lse" or not got[2].any()


@pytest.mark.parametrize(
    "layout",
    [
        lambda dout: dout[:1, :1, :1, :1].expand(dout.shape),
        lambda dout: dout[..., :1].expand(dout.shape),
        lambda dout: dout[:, :, :1].expand(dout.shape),
        lambda dout: dout.transpose(1, 2).contiguous().transpose(1, 2),
        lambda dout: dout.transpose(2, 3).contiguous().transpose(2, 3),
        lambda dout: dout.repeat_interleave(2, dim=3)[..., ::2],
        lambda dout: torch._neg_view(-dout),
    ],
    ids=[
        "one number",
        "a column",
        "a row",
        "transposed",
        "head_dim outside",
        "every other",
        "negative bit",
    ],
)
def test_gradients_of_any_layout(layout):
    """The incoming gradient is often a view: ``out.sum()`` gives one number, expanded."""
    tensors = inputs()
    out, lse = flex_block_attn(*tensors, MASK, return_lse=True)
    dout = layout(torch.randn_like(out))
    dlse = torch.randn(2, 1, 1).expand(lse.shape)
    got = torch.autograd.grad((out, lse), tensors, (dout, dlse), retain_graph=True)
    simple = dout.contiguous().resolve_neg(), dlse.contiguous()
    plain = torch.autograd.grad((out, lse), tensors, simple)
    assert dout.shape == out.shape and bits_equal(got, plain)


def test_sum_backward():
    tensors = inputs(torch.float64)
    exact = [x.detach().requires_grad_() for x in tensors]
    flex_block_attn_func(*tensors, 16, 16, BLOCKS).sum().backward()
    attention(*exact, BLOCKS, 16, 16)[0].sum().backward()
    # Each query's weights sum to 1, so that q and k get differences of equal numbers: near 0.
    for a, b in zip(tensors, exact, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-12


def test_gradients_accumulate():
    tensors = inputs(torch.float64)
    (once,) = torch.autograd.grad(flex_block_attn(*tensors, MASK).cos().sum(), tensors[:1])
    for _ in range(3):
        flex_block_attn(*tensors, MASK).cos().sum().backward()
    assert relative_error(tensors[0].grad, 3 * once) < 1e-12


def test_one_tensor_for_all():
    x = torch.randn(1, 2, 64, 16, dtype=torch.float64, requires_grad=True)
    exact = x.detach().requires_grad_()
    blocks = BLOCKS[:, [0, 1, 2, 2]]
    flex_block_attn_func(x, x, x, 16, 16, blocks).cos().sum().backward()
    attention(exact, exact, exact, blocks, 16, 16)[0].cos().sum().backward()
    assert relative_error(x.grad, exact.grad) < 1e-12


def test_double_backward_is_refused():
    q, k, v = inputs()
    out = flex_block_attn(q, k, v, MASK)
    (dq,) = torch.autograd.grad(out.cos().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="^flex_block_attn has no second derivative$"):
        torch.autograd.grad(dq.sum(), q)


def test_output_changed_before_backward_is_noticed():
    q, k, v = inputs()
    out = flex_block_attn(q, k, v, MASK)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- deterministic gradients ---------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What the backward pass is told, past torch's dispatcher or by it."""
    told = []

    def backward(*arguments):
        told.append(arguments[-2])
        return original(*arguments)

    def backward_of(device):
        def call(*arguments):
            told.append(arguments[-3])
            return original_of(device)(*arguments)

        return call

    original, original_of = ops.backward, ops.backward_of
    monkeypatch.setattr(ops, "backward", backward)
    monkeypatch.setattr(ops, "backward_of", backward_of)
    return told


def of_both_functions(tensors, **settings):
    outs = (
        flex_block_attn_func(*tensors, 16, 16, BLOCKS, **settings),
        flex_block_attn(*tensors, MASK, **settings),
    )
    return [torch.autograd.grad(out.cos().sum(), tensors) for out in outs]


def test_deterministic_is_a_keyword_of_both_functions(seen):
    tensors = inputs()
    default = of_both_functions(tensors)
    asked = of_both_functions(tensors, deterministic=True)
    assert seen == [False, False, True, True]
    # CPUs always repeat.
    assert all(bits_equal(a, b) for a, b in zip(asked, default, strict=True))
    with pytest.raises(TypeError, match="positional argument"):
        flex_block_attn_func(*tensors, 16, 16, BLOCKS, True)


def test_torch_can_ask_for_deterministic_gradients(seen, fresh_compiler):
    tensors = inputs()
    compiled = torch.compile(by_block_mask, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(by_block_mask, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        of_both_functions(tensors)
        assert bits_equal(value_and_gradients(compiled, tensors), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen[:3] == [False, True, True]


# --- compilation ---------------------------------------------------------------------------------


def by_tensor(q, k, v):
    out = flex_block_attn_func(q.sin(), k, v, 16, 16, BLOCKS)
    return out.transpose(1, 2).flatten(2).cos()


def by_block_mask(q, k, v):
    out, lse = flex_block_attn(q.sin(), k, v, MASK, return_lse=True)
    return out.transpose(1, 2).flatten(2).cos() + lse.mean()


def value_and_gradients(function, tensors):
    result = function(*tensors)
    return result, *torch.autograd.grad(result.sin().sum(), tensors)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("function", [by_tensor, by_block_mask])
def test_compile(function, fresh_compiler):
    tensors = inputs()
    expected = value_and_gradients(function, tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert bits_equal(value_and_gradients(compiled, tensors), expected)


def test_compile_with_dynamic_shapes(fresh_compiler):
    """One graph serves all lengths."""

    def function(q, k, v, blocks):
        return flex_block_attn_func(q, k, v, 16, 16, blocks).cos()

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=True)
    for q_len, kv_len in ((60, 40), (100, 64), (33, 130)):
        tensors = [x.requires_grad_() for x in random_qkv(2, 2, q_len, kv_len, 16)]
        blocks = torch.rand(-(-q_len // 16), -(-kv_len // 16)) < 0.6
        expected = value_and_gradients(lambda *x: function(*x, blocks), tensors)
        got = value_and_gradients(lambda *x: compiled(*x, blocks), tensors)
        assert bits_equal(got, expected)
    assert graphs.frame_count == 1


def has_compiler():
    names = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    return any(shutil.which(name) for name in names if name)


@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler, and there is none")
def test_compile_by_inductor(fresh_compiler):
    tensors = inputs()
    expected = value_and_gradients(by_block_mask, tensors)
    compiled = torch.compile(by_block_mask, fullgraph=True)
    got = value_and_gradients(compiled, tensors)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-5


# --- how tensors are read ------------------------------------------------------------------------

READ = """
import hashlib
import sys
import torch
if sys.argv[1] == "attributes":
    torch.Tensor.__dlpack_c_exchange_api__ = None
from flex_block_attn import BlockMask, flex_block_attn

digest = hashlib.sha256()
mask = BlockMask(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool().T.contiguous().T, 20, 40, 16, 16)
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    torch.manual_seed(1)
    q = torch.randn(2, 20, 3, 32, dtype=dtype).transpose(1, 2)[..., 8:24].requires_grad_()
    k, v = torch.randn(2, 2, 1, 40, 16, dtype=dtype)[:, :, :1].expand(-1, -1, 3, -1, -1)
    out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
    dq = torch.autograd.grad(out.sin().sum() + lse.sum(), q)[0]
    for x in (out, lse, dq):
        digest.update(x.detach().double().numpy().tobytes())
print(digest.hexdigest())
"""


def test_tensors_are_read_alike_with_and_without_dlpacks_table():
    """Versions of torch before 2.10 have no such table; there, attributes are read."""
    runs = [
        subprocess.run([sys.executable, "-c", READ, by], capture_output=True, text=True, check=True)
        for by in ("table", "attributes")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65


@pytest.mark.parametrize(
    "disguise",
    [
        torch.nn.Parameter,
        lambda x: x.as_subclass(Named),
        lambda x: torch._neg_view(-x),
        lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
        lambda x: x.repeat_interleave(2, dim=0)[1::2],
    ],
    ids=["parameter", "subclass", "negative bit", "odd address", "odd start"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_that_are_not_as_simple_as_they_look(disguise, grad):
    tensors = inputs(grad=False)
    expected = flex_block_attn(*tensors, MASK)
    with torch.set_grad_enabled(grad):
        for i in range(3):
            changed = [disguise(x) if i == j else x for j, x in enumerate(tensors)]
            assert torch.equal(flex_block_attn(*changed, MASK).detach(), expected)


def test_calls_that_need_an_operator_get_it(monkeypatch):
    """Others have a node of autograd's own, past torch's dispatcher."""
    called = []

    def forward(*arguments):
        called.append(True)
        return original(*arguments)

    original = ops.forward
    monkeypatch.setattr(ops, "forward", forward)
    q, k, v = inputs()
    expected = flex_block_attn(q, k, v, MASK)
    assert type(expected.grad_fn).__name__ == "_DifferentiableBackward"
    gradients = torch.autograd.grad(expected.cos().sum(), (q, k, v))
    assert torch.equal(flex_block_attn(torch.nn.Parameter(q), k, v, MASK), expected)
    assert not called
    for other in (q.as_subclass(Named), torch._neg_view(-q)):
        assert torch.equal(flex_block_attn(other, k, v, MASK), expected)
        assert called == [True]
        called.clear()
    with Watched():
        out = flex_block_attn(q, k, v, MASK)
    assert called == [True]
    assert bits_equal(torch.autograd.grad(out.cos().sum(), (q, k, v)), gradients)


@pytest.mark.parametrize("i", range(7))
def test_gradients_of_saved_tensors_whose_sign_is_a_note(i):
    """As ranks ask for them, whose saved tensors are what users gave."""
    q, k, v = inputs(grad=False)
    out, lse = flex_block_attn(q, k, v, MASK, return_lse=True)
    tensors = [torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse]
    settings = MASK.plan, 16, 16, 0.3, False, [True] * 3
    with torch.no_grad():
        expected = direct.gradients(*tensors, *settings)
        tensors[i] = torch._neg_view(-tensors[i])
        assert bits_equal(direct.gradients(*tensors, *settings), expected)


def test_what_is_no_plain_tensor_of_a_gpu_goes_the_long_way():
    """To look whether the short way is open fails for nothing; what is wrong is said later."""
    x = torch.randn(1, 2, 16, 64, dtype=torch.bfloat16)
    sizes, plan = (16, 16, 16, 16), BlockMask.full(16, 16, 16, 16).plan

    def look(*others):
        for y in (x, *others):
            assert _native.are_ready(x, y, x) is False
            rest = sizes, None, (True, False), None, False
            assert _native.attention(x, x, y, plan, *rest) is None
            assert _native.attention(x, x, x, y, *rest) is None
            assert _native.plan_shape(y, sizes) is None
        return others[0]

    look(None, 3, "q", [x], np.zeros((1, 2, 16, 64)), x[0], x[:0], x.to("meta"), x.to_sparse())
    look(torch._to_functional_tensor(x), torch._efficientzerotensor((1, 2, 16, 64)))
    look(torch.nn.Parameter(x), x.as_subclass(Named), x.float().conj(), torch.tensor(1))
    torch.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x.float())
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))


# --- checkpoints, autocast, threads --------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", [by_tensor, by_block_mask])
def test_activation_checkpoints(function, reentrant):
    tensors = inputs()
    expected = function(*tensors)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), tensors)
    got = checkpoint(function, *tensors, use_reentrant=reentrant)
    got.sin().sum().backward()
    assert torch.equal(got, expected)
    assert bits_equal([x.grad for x in tensors], expected_gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """As if the tensors had been cast by hand; gradients come in the tensors' own dtype."""
    tensors = inputs()
    with torch.autocast("cpu", dtype):
        out = flex_block_attn_func(*tensors, 16, 16, BLOCKS)
        again = flex_block_attn(*tensors, MASK)
    assert out.dtype == dtype and torch.equal(out, again)
    gradients = torch.autograd.grad(out.float().sin().sum(), tensors)
    rounded = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected = flex_block_attn(*rounded, MASK)
    assert torch.equal(out, expected)
    expected_gradients = torch.autograd.grad(expected.float().sin().sum(), rounded)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_autocast_joins_dtypes_but_leaves_float64():
    q, k, v = inputs(grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert flex_block_attn(q, k.half(), v.bfloat16(), MASK).dtype == torch.bfloat16
        doubles = [x.double() for x in (q, k, v)]
        assert flex_block_attn(*doubles, MASK).dtype == torch.float64


def test_calls_from_several_python_threads():
    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = random_qkv(2, 2, 60, 40, 32, generator=generator)
        return value_and_gradients(by_block_mask, [x.requires_grad_() for x in tensors])

    seeds = range(24)
    expected = [work(seed) for seed in seeds]
    with ThreadPoolExecutor(6) as pool:
        for got, alone in zip(pool.map(work, seeds), expected, strict=True):
            assert bits_equal(got, alone)


def test_numbers_of_threads():
    """They change no bit of output, lse, dk and dv. dq is summed in parts whose number is theirs:
    it repeats for the same number, and agrees among others as far as rounding allows."""
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 3, 500, 450, 32))
    mask = BlockMask.random(500, 450, 32, 48, density=0.5, seed=3, heads=3)
    dout, dlse = torch.randn(1, 3, 500, 32), torch.randn(1, 3, 500)

    def run(threads):
        torch.set_num_threads(threads)
        out, lse = flex_block_attn(q, k, v, mask, return_lse=True)
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
        return dq, (out, lse, dk, dv)

    dq, others = run(1)
    for threads in (2, 5):
        first, again = run(threads), run(threads)
        assert bits_equal(first[1], others) and bits_equal(again[1], others)
        assert torch.equal(first[0], again[0])
        assert relative_error(first[0], dq) < 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_calls_from_a_forked_process():
    """A child has its parent's memory but not its threads, and must not wait for them."""
    torch.set_num_threads(2)
    tensors = inputs(grad=False)
    expected = flex_block_attn(*tensors, MASK)
    child = os.fork()
    if child == 0:
        same = torch.equal(flex_block_attn(*tensors, MASK), expected)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


# --- a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_training(dtype):
    """Twenty steps of Adam: the losses are those of the same model with dense masked attention."""
    mask = BlockMask.sliding_window(70, 70, 16, 16, left=16, right=0)
    x = torch.randn(3, 70, 16)
    target = x.roll(1, dims=1).mean(dim=2, keepdim=True)

    def losses(attend, dtype):
        torch.manual_seed(1)
        model = Model(attend).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            loss = (model(x.to(dtype)) - target.to(dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    sparse = list(losses(lambda q, k, v: flex_block_attn(q, k, v, mask), dtype))
    dense = list(losses(lambda q, k, v: attention(q, k, v, mask.blocks, 16, 16)[0], torch.float64))
    assert sparse[-1] < 0.3 * sparse[0]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert sparse == pytest.approx(dense, rel=tolerance)


def test_training_on_video():
    """The losses over patches of a clip are those with torch's own attention, densely masked."""
    mask = BlockMask.sliding_window(TOKENS, TOKENS, 32, 16, left=48, right=32)
    tokens = token_mask(mask.blocks, TOKENS, TOKENS, 32, 16)
    sparse = list(denoising(lambda q, k, v: flex_block_attn(q, k, v, mask), 64, 2, 30))
    dense = list(
        denoising(lambda q, k, v: scaled_dot_product_attention(q, k, v, tokens), 64, 2, 30)
    )
    assert sparse[-1] < 0.3 * sparse[0]
    assert sparse == pytest.approx(dense, rel=1e-3)

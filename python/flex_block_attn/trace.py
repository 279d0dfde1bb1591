"""Functions of FlexAttention's kind, ``mask_mod(b, h, q_idx, kv_idx)``, as expressions.

In: the function. Out: an :class:`Expression`: text that the library computes with, and the tensors
it looks up. Called by :mod:`.masks`.

The function is called once, with proxies that write down what is done to them. torch's functions
come here by a mode of torch's, which also sees a captured tensor that is indexed by a proxy.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _native

MaskMod = Callable[[Any, Any, Any, Any], Any]

# Attributes of what torch has for them take longer.
_LEAST, _MOST = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Expression:
    """Which pairs of a query and a key count.

    Attributes:
        text: the condition, as in ``q >= kv and t0[q] == t0[kv]``.
        tables: the tensors ``t0``, ``t1``, ...: int32, contiguous, on the mask's device.
        device: the mask's.
    """

    __slots__ = ("_captured", "_on_host", "_tables", "device", "tells_apart", "text")

    def __init__(
        self,
        text: str,
        on_host: Iterable[Tensor],
        device: torch.device,
        tells_apart: tuple[bool, bool],
        captured: list[Tensor] | None = None,
    ):
        self.text = text
        # None of what only a GPU has.
        self._on_host: list[Tensor | None] = list(on_host)
        self.device = device
        # Where the tables come from, until a mask has copies. On the host those of a GPU's int32
        # tensors are in pinned memory so long.
        self._captured = captured
        # Whether batches, and heads, have masks of their own.
        self.tells_apart = tells_apart
        self._tables: list[Tensor] | None = None

    @property
    def on_host(self) -> list[Tensor]:
        """The tables on the host."""
        self._on_host = [
            self._tables[i].cpu() if host is None else host for i, host in enumerate(self._on_host)
        ]
        return self._on_host

    @property
    def tables(self) -> list[Tensor]:
        if self._tables is None:
            self._tables = [host.to(self.device) for host in self.on_host]
        return self._tables

    def ready(self) -> "Expression":
        """The same, its tables copied, as those of a mask that is known are: no call is to do that
        later, perhaps into a graph."""
        if self._captured is not None:
            on_host, self._tables, self._on_host = self.on_host, [], []
            for host, captured in zip(on_host, self._captured):
                table = _on_device(captured, self.device)
                self._tables.append(host.to(self.device) if table is None else table)
                if captured.is_cuda and captured.dtype == torch.int32:
                    # The host has read what was pinned, and seldom needs it again.
                    host = self._tables[-1].clone() if self.device.type == "cpu" else None
                self._on_host.append(host)
            self._captured = None
        self.tables  # noqa: B018
        return self

    def to(self, device: torch.device) -> "Expression":
        """With its tables on a device."""
        return Expression(self.text, self.on_host, device, self.tells_apart)

    def moved(self, *places: tuple[int, int]) -> "Expression":
        """With ``factor * x + offset`` in the place of b, h, q and kv: four pairs of them."""
        text = _native.moved(self.text, places)
        tells_apart = tuple(
            apart and factor != 0 for apart, (factor, _) in zip(self.tells_apart, places[:2])
        )
        return Expression(text, self.on_host, self.device, tells_apart)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shapes = ", ".join(f"t{i} {tuple(t.shape)}" for i, t in enumerate(self.on_host))
        return f"Expression({self.text}{'; ' if shapes else ''}{shapes})"


def trace(mask_mod: MaskMod, device: torch.device | None) -> Expression:
    """The expression of a function, its tables on a device: by default that of the tensors it has
    captured, or the CPU."""
    if not callable(mask_mod):
        raise TypeError(
            f"mask_mod must be a function of (b, h, q_idx, kv_idx), got {type(mask_mod).__name__}"
        )
    writer = _Writer(device)
    places = [Proxy(writer, writer.steps.put(name), False) for name in ("b", "h", "q", "kv")]
    with _Listening(writer):
        result = mask_mod(*places)
    if isinstance(result, Tensor) and result.dim() == 0 and result.dtype == torch.bool:
        result = bool(result)
    if isinstance(result, bool):
        result = Proxy(writer, writer.steps.truth(result), True)
    if not isinstance(result, Proxy) or not result.is_truth:
        what = "a number" if isinstance(result, Proxy) else type(result).__name__
        raise TypeError(f"mask_mod must return a condition, but returned {what}")
    return writer.finish(result)


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """The pairs that all of the functions let through.

    >>> causal = lambda b, h, q, kv: q >= kv
    >>> near = lambda b, h, q, kv: q - kv < 64
    >>> str(trace(and_masks(causal, near), None))
    'q >= kv and q - kv < 64'
    """
    return _joined(mask_mods, operator.and_, True)


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The pairs that one or more of the functions let through."""
    return _joined(mask_mods, operator.or_, False)


def _joined(mask_mods: tuple[MaskMod, ...], join: Callable, alone: bool) -> MaskMod:
    for mask_mod in mask_mods:
        if not callable(mask_mod):
            raise TypeError(
                "mask_mods must be functions of (b, h, q_idx, kv_idx), "
                f"got {type(mask_mod).__name__}"
            )

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = b.new_ones((), dtype=torch.bool) if alone else b.new_zeros((), dtype=torch.bool)
        for part in mask_mods:
            result = join(result, part(b, h, q_idx, kv_idx))
        return result

    return mask_mod


class _Writer:
    """The steps of one function, and its tables."""

    def __init__(self, device: torch.device | None):
        self.steps = _native.Steps()
        self.device = device
        self.captured: list[Tensor] = []
        # The same on the host, once the streams have come past their copies.
        self.read: list[Tensor] = []
        self.streams: list[torch.cuda.Stream] = []
        self.places: dict[tuple, int] = {}
        # By identity; the tensors are kept, lest another one gets theirs.
        self.known: dict[int, tuple[Tensor, int]] = {}

    def table(self, tensor: Tensor) -> int:
        known = self.known.get(id(tensor))
        if known is not None:
            return known[1]
        # Views of the same numbers are one table; what is captured here stays alive, and with it
        # its address.
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        place = self.places.setdefault(key, len(self.captured))
        if place == len(self.captured):
            self.captured.append(tensor)
            self.read.append(self._start_reading(tensor))
        self.known[id(tensor)] = tensor, place
        return place

    def _start_reading(self, tensor: Tensor) -> Tensor:
        """Its numbers on the host. A GPU writes them while the function is traced on, into memory
        that is pinned, where no copy of the driver's is between; they do not stay there."""
        if not tensor.is_cuda:
            return tensor.cpu()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        stream = torch.cuda.current_stream(tensor.device)
        if stream not in self.streams:
            self.streams.append(stream)
        return pinned

    def finish(self, result: "Proxy") -> Expression:
        text, used, tells_apart = self.steps.finish(result.step)
        tensors = [self.captured[place] for place in used]
        device = self.device
        if device is None:
            device = tensors[0].device if tensors else torch.device("cpu")
        for stream in self.streams:
            stream.synchronize()
        on_host = [
            _as_table(self.read[place], tensor.is_cuda) for place, tensor in zip(used, tensors)
        ]
        return Expression(text, on_host, device, tells_apart, tensors)


def _on_device(captured: Tensor, device: torch.device) -> Tensor | None:
    """The table of a tensor that lies on a GPU; None if it does not lie on that one."""
    if device.type == "cpu" or captured.device != device:
        return None
    return captured.to(torch.int32, copy=True).contiguous()


def _as_table(host: Tensor, is_own: bool) -> Tensor:
    """As int32, and a copy unless nobody else has it: what is changed in place later must not part
    from the plan."""
    if host.dtype == torch.int64 and host.numel() > 0:
        low, high = (int(x) for x in torch.aminmax(host))
        if low < _LEAST or high > _MOST:
            raise ValueError(
                f"a tensor of shape {tuple(host.shape)} that mask_mod looks up has numbers from "
                f"{low} to {high}, but only those of int32 are supported"
            )
    return host.to(torch.int32, copy=not is_own).contiguous()


def _refuse(what: str, instead: str) -> NoReturn:
    raise TypeError(f"mask_mod uses {what}, which cannot be traced: write {instead} instead")


def _binary(name: str, swapped: bool = False) -> Callable:
    def method(self: "Proxy", other: Any) -> Any:
        a, b = (other, self) if swapped else (self, other)
        return _call(self.writer, name, (a, b), {})

    return method


class Proxy(_native.Term):
    """A number or a condition of the function that is traced, ``Proxy(writer, step, is_truth)``: a
    place of its steps. Most operators are the library's, and come to :func:`_call` with what is no
    matter of course."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        writer = next(x.writer for x in args if isinstance(x, Proxy))
        return _call(writer, _name_of(func), args, kwargs or {})

    __xor__, __rxor__ = _binary("xor"), _binary("xor", True)
    __lshift__, __rshift__ = _binary("lshift"), _binary("rshift")
    __truediv__, __rtruediv__ = _binary("true_divide"), _binary("true_divide", True)
    __pow__ = _binary("pow")

    def __neg__(self) -> "Proxy":
        return _call(self.writer, "neg", (self,), {})

    def __invert__(self) -> "Proxy":
        return _call(self.writer, "invert", (self,), {})

    def __pos__(self) -> "Proxy":
        return self

    def __bool__(self) -> NoReturn:
        _refuse(
            "`and`, `or`, `not`, `if`, min() or max() of a value that depends on the pair",
            "&, |, ~, torch.where, torch.minimum or torch.maximum",
        )

    def __index__(self) -> NoReturn:
        _refuse(
            "a Python list, or a whole number, where a value depends on the pair",
            "a tensor that is indexed, table[q_idx],",
        )

    __int__ = __len__ = __iter__ = __index__

    def __float__(self) -> NoReturn:
        _refuse("a float", "whole numbers")

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return torch.Size(())
        if name == "ndim":
            return 0
        if name == "device":
            return self.writer.device or torch.device("cpu")
        if name == "dtype":
            return torch.bool if self.is_truth else torch.int64
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _call(self.writer, name, (self, *args), kwargs)


class _Listening(TorchFunctionMode):
    """Hears of torch's functions while a function is traced."""

    def __init__(self, writer: _Writer):
        super().__init__()
        self.writer = writer

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (_has_proxy(args) or kwargs and _has_proxy(tuple(kwargs.values()))):
            return func(*args, **kwargs)
        return _call(self.writer, _name_of(func), args, kwargs)


def _has_proxy(values: tuple | list) -> bool:
    for value in values:
        if isinstance(value, (Proxy, _Part)):
            return True
        if isinstance(value, (tuple, list)) and _has_proxy(value):
            return True
    return False


def _name_of(func: Callable) -> str:
    return getattr(func, "__name__", str(func)).strip("_")


class _Part:
    """A captured tensor of which some indices are known: ``table[b]`` before ``[q_idx]``."""

    def __init__(self, writer: _Writer, tensor: Tensor, indices: tuple):
        self.writer, self.tensor, self.indices = writer, tensor, indices

    def __getitem__(self, index: Any) -> Any:
        indices = index if isinstance(index, tuple) else (index,)
        return _look_up(self.writer, self.tensor, (*self.indices, *indices))

    def refuse(self) -> NoReturn:
        raise TypeError(
            f"mask_mod looks up a tensor of shape {tuple(self.tensor.shape)} by "
            f"{len(self.indices)} indices: it needs one for each dimension"
        )

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        next(x for x in args if isinstance(x, _Part)).refuse()


def _look_up(writer: _Writer, tensor: Any, indices: tuple) -> Any:
    if isinstance(tensor, _Part):
        return tensor[indices]
    if isinstance(tensor, Proxy):
        _refuse("an index of a number", "the number itself")
    for index in indices:
        if isinstance(index, slice) or index is None or index is Ellipsis:
            _refuse("a slice of a tensor by a value that depends on the pair", "single indices")
    if len(indices) > tensor.dim():
        raise IndexError(
            f"mask_mod looks up a tensor of shape {tuple(tensor.shape)} by {len(indices)} indices"
        )
    if len(indices) < tensor.dim():
        return _Part(writer, tensor, indices)
    if tensor.dtype not in _INTEGERS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(
            f"mask_mod looks up a tensor of {dtype}, but only bool and integers are supported: "
            "compare it before, and look up the result"
        )
    # What is known before need not be looked up.
    for dim in reversed(range(len(indices))):
        index = indices[dim]
        if isinstance(index, Tensor) and index.dim() == 0 or isinstance(index, int):
            tensor = tensor.select(dim, int(index))
    places = [_number(writer, index) for index in indices if isinstance(index, Proxy)]
    if len(places) < tensor.dim():
        _refuse("a tensor as an index beside one that depends on the pair", "single indices")
    step = writer.steps.look_up(writer.table(tensor), places)
    if tensor.dtype == torch.bool:
        step = writer.steps.put("not", writer.steps.put("equal", step, writer.steps.number(0)))
    return Proxy(writer, step, tensor.dtype == torch.bool)


def _is_condition(value: Any) -> bool:
    if isinstance(value, Proxy):
        return value.is_truth
    return isinstance(value, bool) or isinstance(value, Tensor) and value.dtype == torch.bool


def _constant(value: Any) -> int | bool:
    if isinstance(value, Tensor):
        if value.dim() > 0:
            raise TypeError(
                f"mask_mod computes with a tensor of shape {tuple(value.shape)}: index it first, "
                "as in table[q_idx]"
            )
        if value.dtype not in _INTEGERS:
            _refuse("a float", "whole numbers")
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        _refuse(f"the float {value}", "whole numbers")
    if not hasattr(value, "__index__"):
        raise TypeError(f"mask_mod computes with {type(value).__name__}, which is no whole number")
    value = operator.index(value)
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"mask_mod has the number {value}, but only those of int32 are supported")
    return value


def _number(writer: _Writer, value: Any) -> int:
    """The step of a number; of a condition 0 or 1."""
    steps = writer.steps
    if type(value) is int and _LEAST <= value <= _MOST:
        return steps.number(value)
    if isinstance(value, Proxy):
        if value.is_truth:
            return steps.put("choose", value.step, steps.number(1), steps.number(0))
        return value.step
    if isinstance(value, _Part):
        value.refuse()
    return steps.number(int(_constant(value)))


def _truth(writer: _Writer, value: Any) -> int:
    """The step of a condition; a number is one if it is not 0."""
    steps = writer.steps
    if isinstance(value, _Part):
        value.refuse()
    if not isinstance(value, Proxy):
        return steps.truth(bool(_constant(value)))
    if value.is_truth:
        return value.step
    return steps.put("not", steps.put("equal", value.step, steps.number(0)))


def _call(writer: _Writer, name: str, args: tuple, kwargs: dict) -> Any:
    """A function of torch's, or an operator, on proxies."""
    name = _ALIASES.get(name, name)
    function = _FUNCTIONS.get(name)
    if function is None:
        instead = "arithmetic, comparisons, &, |, ~, torch.where and indexed tensors"
        _refuse(*_REFUSED.get(name, (name, instead)))
    return function(writer, *args, **kwargs)


def _arithmetic(step: str) -> Callable:
    def function(writer: _Writer, a: Any, b: Any, **_: Any) -> Proxy:
        return Proxy(writer, writer.steps.put(step, _number(writer, a), _number(writer, b)), False)

    return function


def _logical(name: str) -> Callable:
    def function(writer: _Writer, a: Any, b: Any) -> Proxy:
        steps, (a, b) = writer.steps, (_truth(writer, x) for x in (a, b))
        if name == "xor":
            one = steps.put("and", a, steps.put("not", b))
            other = steps.put("and", steps.put("not", a), b)
            return Proxy(writer, steps.put("or", one, other), True)
        return Proxy(writer, steps.put(name, a, b), True)

    return function


def _bitwise(name: str) -> Callable:
    logical = _logical(name)

    def function(writer: _Writer, a: Any, b: Any) -> Proxy:
        if not (_is_condition(a) and _is_condition(b)):
            sign = {"and": "&", "or": "|", "xor": "^"}[name]
            _refuse(f"{sign} of numbers, bit by bit", "//, % and comparisons, in parentheses,")
        return logical(writer, a, b)

    return function


def _sum(writer: _Writer, a: Any, b: Any) -> Proxy:
    if _is_condition(a) and _is_condition(b):
        return _logical("or")(writer, a, b)
    return _arithmetic("add")(writer, a, b)


def _product(writer: _Writer, a: Any, b: Any) -> Proxy:
    if _is_condition(a) and _is_condition(b):
        return _logical("and")(writer, a, b)
    return _arithmetic("multiply")(writer, a, b)


def _less(is_swapped: bool, is_negated: bool) -> Callable:
    def function(writer: _Writer, a: Any, b: Any) -> Proxy:
        a, b = (b, a) if is_swapped else (a, b)
        step = writer.steps.put("less", _number(writer, a), _number(writer, b))
        return Proxy(writer, writer.steps.put("not", step) if is_negated else step, True)

    return function


def _equal(is_negated: bool) -> Callable:
    def function(writer: _Writer, a: Any, b: Any) -> Proxy:
        steps = writer.steps
        if _is_condition(a) and _is_condition(b):
            differs = _logical("xor")(writer, a, b)
            step = differs.step if is_negated else steps.put("not", differs.step)
            return Proxy(writer, step, True)
        step = steps.put("equal", _number(writer, a), _number(writer, b))
        return Proxy(writer, steps.put("not", step) if is_negated else step, True)

    return function


def _where(writer: _Writer, condition: Any, a: Any = None, b: Any = None) -> Proxy:
    steps, condition = writer.steps, _truth(writer, condition)
    if a is None or b is None:
        _refuse("torch.where of a condition alone", "torch.where(condition, a, b)")
    if _is_condition(a) and _is_condition(b):
        a, b = _truth(writer, a), _truth(writer, b)
        inside = steps.put("and", condition, a)
        outside = steps.put("and", steps.put("not", condition), b)
        return Proxy(writer, steps.put("or", inside, outside), True)
    return Proxy(
        writer, steps.put("choose", condition, _number(writer, a), _number(writer, b)), False
    )


def _negative(writer: _Writer, a: Any) -> Proxy:
    return _arithmetic("subtract")(writer, 0, a)


def _absolute(writer: _Writer, a: Any) -> Proxy:
    return _arithmetic("max")(writer, a, _negative(writer, a))


def _not(writer: _Writer, a: Any) -> Proxy:
    return Proxy(writer, writer.steps.put("not", _truth(writer, a)), True)


def _invert(writer: _Writer, a: Any) -> Proxy:
    # Of a number, ~x is -x - 1.
    return _not(writer, a) if _is_condition(a) else _negative(writer, a) - 1


def _divide(writer: _Writer, a: Any, b: Any, *, rounding_mode: str | None = None) -> Proxy:
    if rounding_mode != "floor":
        _refuse(*_REFUSED["true_divide"])
    return _arithmetic("divide")(writer, a, b)


def _clamp(writer: _Writer, a: Any, min: Any = None, max: Any = None) -> Proxy:
    if min is not None:
        a = _arithmetic("max")(writer, a, min)
    if max is not None:
        a = _arithmetic("min")(writer, a, max)
    return a


def _extreme(step: str) -> Callable:
    def function(writer: _Writer, a: Any, b: Any = None, **_: Any) -> Proxy:
        if b is None:
            return a
        return _arithmetic(step)(writer, a, b)

    return function


def _shift(is_left: bool) -> Callable:
    def function(writer: _Writer, a: Any, b: Any) -> Proxy:
        if isinstance(b, Proxy):
            _refuse("a shift by a value that depends on the pair", "a table of powers")
        step = "multiply" if is_left else "divide"
        return _arithmetic(step)(writer, a, 2 ** int(_constant(b)))

    return function


def _power(writer: _Writer, a: Any, b: Any) -> Proxy:
    if isinstance(b, Proxy) or b != 2:
        _refuse("** but of 2", "products")
    return _arithmetic("multiply")(writer, a, a)


def _as_is(writer: _Writer, a: Any, *args: Any, **kwargs: Any) -> Any:
    for dtype in (*args, kwargs.get("dtype")):
        if not isinstance(dtype, torch.dtype):
            continue
        if dtype == torch.bool:
            return _as_bool(writer, a)
        if dtype not in _INTEGERS:
            _refuse(str(dtype).removeprefix("torch."), "whole numbers")
        return _as_number(writer, a)
    return a


def _as_number(writer: _Writer, a: Any, **_: Any) -> Proxy:
    return Proxy(writer, _number(writer, a), False)


def _as_bool(writer: _Writer, a: Any, **_: Any) -> Proxy:
    return Proxy(writer, _truth(writer, a), True)


def _filled(fill: int | None) -> Callable:
    """Of the functions that make a tensor like another: all of them have one element."""

    def function(writer: _Writer, a: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        value = fill if fill is not None else kwargs.get("fill_value", args[-1] if args else 0)
        if dtype == torch.bool or isinstance(value, bool):
            return Proxy(writer, writer.steps.truth(bool(value)), True)
        if dtype is not None and dtype not in _INTEGERS:
            _refuse(str(dtype).removeprefix("torch."), "whole numbers")
        return Proxy(writer, writer.steps.number(int(_constant(value))), False)

    return function


def _getitem(writer: _Writer, tensor: Any, index: Any) -> Any:
    return _look_up(writer, tensor, tuple(index) if isinstance(index, (tuple, list)) else (index,))


def _gather(writer: _Writer, tensor: Any, *args: Any) -> Any:
    """``torch.take`` and ``torch.index_select`` along the only dimension there is."""
    if tensor.dim() != 1:
        _refuse("take or index_select of a tensor of several dimensions", "table[b, q_idx]")
    return _look_up(writer, tensor, (args[-1],))


_ALIASES = {
    "radd": "add",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "rmul": "mul",
    "subtract": "sub",
    "multiply": "mul",
    "floordiv": "floor_divide",
    "ifloordiv": "floor_divide",
    "mod": "remainder",
    "imod": "remainder",
    "iand": "and",
    "ior": "or",
    "ixor": "xor",
    "rand": "and",
    "ror": "or",
    "rxor": "xor",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "invert",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "absolute": "abs",
    "negative": "neg",
    "clip": "clamp",
    "truediv": "true_divide",
    "rtruediv": "true_divide",
    "bitwise_left_shift": "lshift",
    "bitwise_right_shift": "rshift",
    "divide": "div",
}

_FUNCTIONS: dict[str, Callable] = {
    "add": _sum,
    "sub": _arithmetic("subtract"),
    "rsub": lambda writer, a, b: _arithmetic("subtract")(writer, b, a),
    "mul": _product,
    "floor_divide": _arithmetic("divide"),
    "rfloordiv": lambda writer, a, b: _arithmetic("divide")(writer, b, a),
    "div": _divide,
    "remainder": _arithmetic("remainder"),
    "rmod": lambda writer, a, b: _arithmetic("remainder")(writer, b, a),
    "minimum": _arithmetic("min"),
    "maximum": _arithmetic("max"),
    "min": _extreme("min"),
    "max": _extreme("max"),
    "clamp": _clamp,
    "neg": _negative,
    "abs": _absolute,
    "pow": _power,
    "lshift": _shift(True),
    "rshift": _shift(False),
    "lt": _less(False, False),
    "gt": _less(True, False),
    "le": _less(True, True),
    "ge": _less(False, True),
    "eq": _equal(False),
    "ne": _equal(True),
    "and": _bitwise("and"),
    "or": _bitwise("or"),
    "xor": _bitwise("xor"),
    "invert": _invert,
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("xor"),
    "logical_not": _not,
    "where": _where,
    "getitem": _getitem,
    "take": _gather,
    "index_select": _gather,
    "to": _as_is,
    "type": _as_is,
    "clone": _as_is,
    "contiguous": _as_is,
    "detach": _as_is,
    "squeeze": lambda writer, a, *_: a,
    "view": lambda writer, a, *_: a,
    "reshape": lambda writer, a, *_: a,
    "expand": lambda writer, a, *_: a,
    "int": _as_number,
    "long": _as_number,
    "bool": _as_bool,
    "dim": lambda writer, a: 0,
    "size": lambda writer, a: torch.Size(()),
    "new_ones": _filled(1),
    "new_zeros": _filled(0),
    "new_full": _filled(None),
    "ones_like": _filled(1),
    "zeros_like": _filled(0),
    "full_like": _filled(None),
}

_REFUSED = {
    "true_divide": ("/, whose result is a float", "//"),
    "fmod": ("torch.fmod", "%"),
    "float": ("float", "whole numbers"),
    "double": ("double", "whole numbers"),
    "half": ("half", "whole numbers"),
    "item": ("item() of a value that depends on the pair", "the value itself"),
    "tolist": ("tolist() of a value that depends on the pair", "the value itself"),
    "sqrt": ("torch.sqrt", "squares on the other side of the comparison"),
    "all": ("all()", "&"),
    "any": ("any()", "|"),
}

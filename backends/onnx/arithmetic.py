"""Arithmetic of two operands, comparisons, reductions, casts, and arithmetic on sizes."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx as fx
from qcompile.backends.onnx.emit import ONNX_TYPES, Emitter, converts


def common_dtype(*operands: Any) -> torch.dtype:
    """Return the dtype torch computes in for these operands, numbers and symbolic ints included."""
    values = [operand.meta["val"] if isinstance(operand, fx.Node) else operand for operand in operands]
    values = [value if isinstance(value, (torch.Tensor, int, float, bool)) else 1 for value in values]
    return functools.reduce(torch.result_type, values[1:], values[0]) if len(values) == 2 else values[0].dtype


def _pair(emitter: Emitter, arguments: SimpleNamespace) -> tuple[str, str, torch.dtype]:
    dtype = common_dtype(arguments.self, arguments.other)
    return emitter.value(arguments.self, dtype), emitter.value(arguments.other, dtype), dtype


@converts("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Tensor", "aten.rsub.Scalar")
def add(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a, b, dtype = _pair(emitter, arguments)
    name = emitter.current.target._opname
    if name == "rsub":
        a, b = b, a
    if arguments.alpha != 1:
        b = emitter.op("Mul", b, emitter.constant(arguments.alpha, dtype))
    if dtype == torch.bool:
        return emitter.op("Or", a, b)
    return emitter.op("Add" if name == "add" else "Sub", a, b)


@converts("aten.mul.Tensor", "aten.mul.Scalar")
def mul(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    a, b, dtype = _pair(emitter, arguments)
    return emitter.op("And" if dtype == torch.bool else "Mul", a, b)


@converts("aten.div.Tensor", "aten.div.Scalar")
def div(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    return emitter.op("Div", emitter.value(arguments.self, dtype), emitter.value(arguments.other, dtype))


@converts("aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.floor_divide")
def rounded_div(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    a, b, dtype = _pair(emitter, arguments)
    mode = getattr(arguments, "rounding_mode", "floor")
    if dtype.is_floating_point:
        if mode == "floor":
            return emitter.op("Floor", emitter.op("Div", a, b))
        raise emitter.refuse("truncated division of floats has no ONNX form")
    if mode == "trunc":
        return emitter.op("Div", a, b)
    remainder = emitter.op("Mod", a, b)  # of the divisor's sign, so that what is left divides exactly
    return emitter.op("Div", emitter.op("Sub", a, remainder), b)


@converts("aten.remainder", "aten.fmod")
def remainder(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a, b, dtype = _pair(emitter, arguments)
    if emitter.current.target._opname == "fmod":
        return emitter.op("Mod", a, b, fmod=1)
    if dtype.is_floating_point:
        return emitter.op("Sub", a, emitter.op("Mul", b, emitter.op("Floor", emitter.op("Div", a, b))))
    return emitter.op("Mod", a, b)


@converts("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    dtype = common_dtype(arguments.self, arguments.exponent)
    return emitter.op("Pow", emitter.value(arguments.self, dtype), emitter.value(arguments.exponent, dtype))


@converts("aten.maximum", "aten.minimum")
def extremum(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a, b, _ = _pair(emitter, arguments)
    return emitter.op("Max" if emitter.current.target._opname == "maximum" else "Min", a, b)


def _compare(type: str, negate: bool, emitter: Emitter, arguments: SimpleNamespace) -> Any:
    a, b, _ = _pair(emitter, arguments)
    made = emitter.op(type, a, b)
    return emitter.op("Not", made) if negate else made


for _aten, _onnx in {"eq": "Equal", "ne": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():
    converts(f"aten.{_aten}.Tensor", f"aten.{_aten}.Scalar")(functools.partial(_compare, _onnx, _aten == "ne"))


def _logic(type: str, emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op(type, emitter.value(arguments.self, torch.bool), emitter.value(arguments.other, torch.bool))


for _aten, _onnx in {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}.items():
    converts(f"aten.{_aten}.default")(functools.partial(_logic, _onnx))


@converts("aten.bitwise_and", "aten.bitwise_or", "aten.bitwise_xor")
def bitwise(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a, b, dtype = _pair(emitter, arguments)
    word = emitter.current.target._opname.removeprefix("bitwise_").capitalize()
    return emitter.op(word if dtype == torch.bool else f"Bitwise{word}", a, b)


@converts("aten.logical_not", "aten.bitwise_not")
def logical_not(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    if emitter.current.target._opname == "bitwise_not" and emitter.fake(arguments.self).dtype != torch.bool:
        return emitter.op("BitwiseNot", emitter.value(arguments.self))
    return emitter.op("Not", emitter.value(arguments.self, torch.bool))


@converts("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    condition = emitter.value(arguments.condition, torch.bool)
    return emitter.op("Where", condition, emitter.value(arguments.self, dtype), emitter.value(arguments.other, dtype))


@converts("aten.masked_fill")
def masked_fill(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    dtype = emitter.fake(arguments.self).dtype
    return emitter.op("Where", emitter.value(arguments.mask), emitter.value(arguments.value, dtype), emitter.value(arguments.self))


@converts("aten._to_copy", "aten.to.dtype")
def cast(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.value(arguments.self, arguments.dtype)


@converts("aten.clone", "aten.alias", "aten.detach", "aten.contiguous", "aten.lift_fresh_copy", "aten.dropout", "aten.detach_")
def same(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.value(next(iter(vars(arguments).values())))


# ---- reductions -----------------------------------------------------------------------------------------------------------


def _axes(emitter: Emitter, x: Any, dim: Any) -> list[int]:
    rank = emitter.fake(x).ndim
    axes = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return [axis % max(rank, 1) for axis in axes]


def _reduce(type: str, emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    axes = _axes(emitter, arguments.self, getattr(arguments, "dim", None))
    x = emitter.value(arguments.self, dtype)
    return emitter.op(type, x, emitter.constant(axes, torch.int64), keepdims=int(getattr(arguments, "keepdim", False)))


for _aten, _onnx in {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd",
                     "logsumexp": "ReduceLogSumExp", "max.default": "ReduceMax", "min.default": "ReduceMin"}.items():  # fmt: skip
    converts(f"aten.{_aten}")(functools.partial(_reduce, _onnx))


@converts("aten.any", "aten.all")
def any_all(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    truth = emitter.op("Cast", emitter.value(arguments.self, torch.bool), to=ONNX_TYPES[torch.int32])
    axes = emitter.constant(_axes(emitter, arguments.self, getattr(arguments, "dim", None)), torch.int64)
    type = "ReduceMax" if emitter.current.target._opname == "any" else "ReduceMin"
    reduced = emitter.op(type, truth, axes, keepdims=int(getattr(arguments, "keepdim", False)))
    return emitter.op("Cast", reduced, to=ONNX_TYPES[torch.bool])


@converts("aten.var.correction")
def variance(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    shape, axes = emitter.fake(arguments.self).shape, _axes(emitter, arguments.self, arguments.dim)
    sizes = [shape[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes):
        raise emitter.refuse("the variance over a dynamic axis has no ONNX form here")
    x, names = emitter.value(arguments.self), emitter.constant(axes, torch.int64)
    centered = emitter.op("Sub", x, emitter.op("ReduceMean", x, names, keepdims=1))
    total = emitter.op("ReduceSumSquare", centered, names, keepdims=int(arguments.keepdim))
    count = 1
    for size in sizes:
        count *= size
    correction = 1 if arguments.correction is None else arguments.correction
    return emitter.op("Div", total, emitter.constant(float(count - correction)))


@converts("aten.argmax", "aten.argmin")
def argmax(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    type = "ArgMax" if emitter.current.target._opname == "argmax" else "ArgMin"
    x = emitter.value(arguments.self)
    if arguments.dim is None:
        flat = emitter.op("Reshape", x, emitter.constant([-1], torch.int64))
        return emitter.op(type, flat, axis=0, keepdims=0)
    return emitter.op(type, x, axis=arguments.dim, keepdims=int(arguments.keepdim))


@converts("aten.cumsum")
def cumsum(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    return emitter.op("CumSum", emitter.value(arguments.self, dtype), emitter.constant(arguments.dim, torch.int64))


# ---- sizes ----------------------------------------------------------------------------------------------------------------


@converts("aten.sym_size")
def sym_size(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    axis = arguments.dim % emitter.fake(arguments.self).ndim
    return emitter.op("Shape", emitter.value(arguments.self), start=axis, end=axis + 1)


def _size_arithmetic(type: str, emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op(type, *(emitter.size(size) for size in arguments.args))


for _name, _onnx in {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "floordiv": "Div",
    "mod": "Mod",
    "neg": "Neg",
    "sym_max": "Max",
    "sym_min": "Min",
}.items():
    converts(f"py.{_name}")(functools.partial(_size_arithmetic, _onnx))


@converts("py.getitem")
def getitem(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    source, index = arguments.args
    return emitter.values[source][index]

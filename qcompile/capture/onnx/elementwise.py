"""Elementwise operators: arithmetic, comparisons, logic, casts."""

from __future__ import annotations

import functools
import math
from typing import Any

import onnx_ir as ir
import torch
import torch.fx as fx

from qcompile.capture.onnx.activation import recognize_product
from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.load import torch_dtype
from qcompile.capture.onnx.matrix import add_bias
from qcompile.capture.onnx.operators import Call, Result, operator
from qcompile.errors import Refused

aten = torch.ops.aten

_UNARY = {
    "Abs": aten.abs, "Neg": aten.neg, "Sqrt": aten.sqrt, "Exp": aten.exp, "Log": aten.log, "Erf": aten.erf, "Reciprocal": aten.reciprocal,
    "Floor": aten.floor, "Ceil": aten.ceil, "Round": aten.round, "Sign": aten.sign, "Sin": aten.sin, "Cos": aten.cos, "Tan": aten.tan,
    "Asin": aten.asin, "Acos": aten.acos, "Atan": aten.atan, "Sinh": aten.sinh, "Cosh": aten.cosh, "Asinh": aten.asinh,
    "Acosh": aten.acosh, "Atanh": aten.atanh, "Tanh": aten.tanh, "Sigmoid": aten.sigmoid, "Relu": aten.relu, "Not": aten.logical_not,
    "IsNaN": aten.isnan, "Softplus": aten.softplus, "HardSwish": aten.hardswish, "Mish": aten.mish, "BitwiseNot": aten.bitwise_not,
}  # fmt: skip


def _unary(target: Any, call: Call) -> Result:
    return call.call(target.default, call[0])


for _name, _target in _UNARY.items():
    operator(_name)(functools.partial(_unary, _target))


# ---- arithmetic -----------------------------------------------------------------------------------------------------------


def scalar_of(call: Call, value: Value, other: Value) -> float | int | None:
    """Return a constant of one element as a number where it cannot change the result's shape or dtype, as torch.export writes it."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, fx.Node) or value.numel() != 1 or value.ndim > call.build.rank(other):
        return None
    return value.item() if value.dtype == call.build.dtype(other) and value.dtype != torch.bool else None


def _binary(target: Any, call: Call, a: Value, b: Value) -> Any:
    number = scalar_of(call, b, a)
    return call.call(target.Tensor, a, b if number is None else number)


@operator("Add")
def add(call: Call) -> Result:
    fused = add_bias(call)
    return fused if fused is not None else commutative(call, aten.add)


@operator("Mul")
def mul(call: Call) -> Result:
    activation = recognize_product(call)
    return activation if activation is not None else commutative(call, aten.mul)


def commutative(call: Call, target: Any) -> Any:
    a, b = call[0], call[1]
    return _binary(target, call, b, a) if isinstance(a, torch.Tensor) and isinstance(b, fx.Node) else _binary(target, call, a, b)


@operator("Sub")
def sub(call: Call) -> Result:
    number = scalar_of(call, call[0], call[1])
    if number is not None:
        return call.call(aten.rsub.Scalar, call[1], number)
    return _binary(aten.sub, call, call[0], call[1])


@operator("Div")
def div(call: Call) -> Result:
    if call.build.dtype(call[0]).is_floating_point:
        return _binary(aten.div, call, call[0], call[1])
    return call.call(aten.div.Tensor_mode, call[0], call[1], rounding_mode="trunc")


@operator("Pow")
def power(call: Call) -> Result:
    base, exponent = call[0], call[1]
    dtype = call.build.dtype(base)
    if isinstance(exponent, torch.Tensor) and exponent.numel() == 1 and exponent.ndim <= call.build.rank(base) and dtype.is_floating_point:
        number = exponent.item()
        return call.call(aten.pow.Tensor_Scalar, base, int(number) if float(number).is_integer() else number)
    if call.build.dtype(exponent) != dtype:
        wide = call.build.cast(base, torch.float64) if call.build.dtype(exponent).is_floating_point else base
        return call.build.cast(call.call(aten.pow.Tensor_Tensor, wide, exponent), dtype)
    return call.call(aten.pow.Tensor_Tensor, base, exponent)


@operator("Mod")
def mod(call: Call) -> Result:
    return call.call((aten.fmod if call.integer("fmod") else aten.remainder).Tensor, call[0], call[1])


@operator("Sum", "Mean", "Min", "Max")
def variadic(call: Call) -> Result:
    name, values = call.node.op_type, call.given()
    target = {"Min": aten.minimum.default, "Max": aten.maximum.default}.get(name, aten.add.Tensor)
    result = values[0]
    for value in values[1:]:
        result = call.call(target, result, value)
    return call.call(aten.div.Tensor, result, len(values)) if name == "Mean" else result


_COMPARISONS = {
    "Equal": aten.eq, "Less": aten.lt, "Greater": aten.gt, "LessOrEqual": aten.le, "GreaterOrEqual": aten.ge, "And": aten.logical_and,
    "Or": aten.logical_or, "Xor": aten.logical_xor, "BitwiseAnd": aten.bitwise_and, "BitwiseOr": aten.bitwise_or,
    "BitwiseXor": aten.bitwise_xor,
}  # fmt: skip


def _comparison(target: Any, call: Call) -> Result:
    a, b = call[0], call[1]
    number = scalar_of(call, b, a) if "Scalar" in target.overloads() else None
    if number is not None:
        return call.call(target.Scalar, a, number)
    return call.call(target.Tensor if "Tensor" in target.overloads() else target.default, a, b)


for _name, _target in _COMPARISONS.items():
    operator(_name)(functools.partial(_comparison, _target))


@operator("Where")
def where(call: Call) -> Result:
    return call.call(aten.where.self, call[0], call[1], call[2])


@operator("IsInf")
def is_inf(call: Call) -> Result:
    if call.integer("detect_negative", 1) and call.integer("detect_positive", 1):
        return call.call(aten.isinf.default, call[0])
    if not call.integer("detect_negative", 1) and not call.integer("detect_positive", 1):
        return call.call(aten.full_like.default, call[0], False, dtype=torch.bool)
    return call.call(aten.eq.Scalar, call[0], math.inf if call.integer("detect_positive", 1) else -math.inf)


@operator("BitShift")
def bit_shift(call: Call) -> Result:
    left = call.string("direction") == "LEFT"
    target = aten.bitwise_left_shift if left else aten.bitwise_right_shift
    return call.call(target.Tensor, call[0], call[1])


# ---- types ----------------------------------------------------------------------------------------------------------------


@operator("Cast")
def cast(call: Call) -> Result:
    target = ir.DataType(call.integer("to"))
    dtype = torch_dtype(target, call.node.name or "")
    if target.bitwidth < 8 and target != ir.DataType.BOOL:
        raise Refused(f"a cast to {target.name.lower()} is not supported", way_out="use QuantizeLinear")
    return call.build.cast(call[0], dtype)


@operator("CastLike")
def cast_like(call: Call) -> Result:
    like = call[1]
    if isinstance(like, torch.Tensor) and id(like) in call.build.narrow:
        raise Refused(f"a cast to {call.build.narrow[id(like)]} is not supported", way_out="use QuantizeLinear")
    return call.build.cast(call[0], call.build.dtype(like))


@operator("Identity")
def identity(call: Call) -> Result:
    return call[0]


@operator("Dropout")
def dropout(call: Call) -> Result:
    """Return the input: dropout does nothing in evaluation, and its mask is all true."""
    training = call.get(2)
    if training is not None and not (isinstance(training, torch.Tensor) and not bool(training)):
        raise Refused("dropout in training mode is not supported", way_out="export the model in evaluation mode")
    if call.used_outputs() < 2:
        return call[0]
    return call[0], call.call(aten.ones_like.default, call[0], dtype=torch.bool)

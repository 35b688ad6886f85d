"""Converters of pointwise operators and reductions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.lowering.converters import NCHW, POINTWISE, SPATIAL, axis_in, converts
from qcompile.backends.lowering.shapes import dtype_name
from qcompile.backends.lowering.translate import Walk
from tvm import relax, tirx
from tvm.relax import op

Arguments = SimpleNamespace


def scalar(walk: Walk, value: Any, dtype: str) -> Any:
    """Return a Python number or a size as a tensor of rank 0; tensors are cast."""
    if isinstance(value, bool | int | float):
        return relax.const(value, dtype)
    if (isinstance(value, tirx.Expr) and not isinstance(value, relax.Expr)) or _is_size(value):
        return walk.emit(op.full([], _size_constant(walk, value), dtype))
    return cast(walk, value, dtype)


def _is_size(value: Any) -> bool:
    return isinstance(getattr(value, "ty", None), relax.PrimType) if hasattr(relax, "PrimType") else False


def _size_constant(walk: Walk, value: Any) -> Any:
    from tvm import te

    return walk.builder.emit_te(lambda size: te.compute((), lambda: size), value, primfunc_name_hint="size_to_tensor")


def cast(walk: Walk, value: Any, dtype: str) -> Any:
    """Return a tensor in another dtype, unchanged if it has it already."""
    return value if str(value.ty.dtype) == dtype else walk.emit(op.astype(value, dtype))


def _result_dtype(walk: Walk) -> str:
    return dtype_name(walk.fake(walk.node).dtype)


def _common_dtype(walk: Walk) -> str:
    """Return the dtype in which torch computes a binary operator."""
    operands = [*walk.node.args[:2]] + [v for k, v in walk.node.kwargs.items() if k in ("other", "exponent")]
    fakes = [walk.fake(a) if hasattr(a, "meta") else a for a in operands]
    fakes = [1 if isinstance(f, torch.SymInt) else f for f in fakes]
    return dtype_name(torch.result_type(*fakes[:2]))


def _unary(function: Any) -> Any:
    def emit(walk: Walk, a: Arguments) -> Any:
        return function(cast(walk, a.self, _result_dtype(walk)))

    return emit


def _constant(value: Any, like: Any) -> Any:
    return relax.const(value, str(like.ty.dtype))


for _name, _function in {
    "neg": op.negative, "sqrt": op.sqrt, "rsqrt": op.rsqrt, "exp": op.exp, "log": op.log, "erf": op.erf, "abs": op.abs,
    "tanh": op.tanh, "sigmoid": op.sigmoid, "sin": op.sin, "cos": op.cos, "floor": op.floor, "ceil": op.ceil,
    "trunc": op.trunc, "relu": op.nn.relu, "silu": op.nn.silu, "sign": op.sign, "bitwise_not": op.bitwise_not,
    "reciprocal": lambda x: op.divide(_constant(1, x), x), "square": lambda x: op.multiply(x, x),
    "log2": lambda x: op.multiply(op.log(x), _constant(1 / math.log(2), x)),
    "log1p": lambda x: op.log(op.add(x, _constant(1, x))), "relu6": op.nn.relu6,
    "hardsigmoid": lambda x: op.clip(op.divide(op.add(x, _constant(3, x)), _constant(6, x)), 0, 1),
    "hardswish": lambda x: op.divide(op.multiply(x, op.clip(op.add(x, _constant(3, x)), 0, 6)), _constant(6, x)),
    "mish": lambda x: op.multiply(x, op.tanh(op.log(op.add(op.exp(x), _constant(1, x))))),
    "clone": lambda x: x, "alias": lambda x: x, "detach": lambda x: x, "contiguous": lambda x: x, "lift_fresh_copy": lambda x: x,
    "round": op.round, "log_sigmoid": lambda x: op.negative(op.log(op.add(op.exp(op.negative(x)), _constant(1, x)))),
}.items():  # fmt: skip
    converts(f"aten.{_name}" if _name != "round" else "aten.round.default", order=POINTWISE)(_unary(_function))


@converts("aten.logical_not", order=POINTWISE)
def _logical_not(walk: Walk, a: Arguments) -> Any:
    return op.logical_not(cast(walk, a.self, "bool"))


def _binary(function: Any, integer_to_float: bool = False) -> Any:
    def emit(walk: Walk, a: Arguments) -> Any:
        dtype = _common_dtype(walk)
        if integer_to_float and not dtype.startswith(("float", "bfloat")):
            dtype = "float32"
        return function(scalar(walk, a.self, dtype), scalar(walk, a.other, dtype))

    return emit


for _name, _function in {
    "minimum": op.minimum, "maximum": op.maximum, "eq": op.equal, "ne": op.not_equal, "lt": op.less, "le": op.less_equal,
    "gt": op.greater, "ge": op.greater_equal, "bitwise_and": op.bitwise_and, "bitwise_or": op.bitwise_or,
    "bitwise_xor": op.bitwise_xor, "mul": op.multiply, "remainder": op.floor_mod, "fmod": op.mod,
    "max.other": op.maximum, "min.other": op.minimum, "__and__": op.bitwise_and, "__or__": op.bitwise_or,
}.items():  # fmt: skip
    converts(f"aten.{_name}", order=POINTWISE)(_binary(_function))


@converts("aten.logical_and", "aten.logical_or", "aten.logical_xor", order=POINTWISE)
def _logical(walk: Walk, a: Arguments) -> Any:
    function = {"and": op.logical_and, "or": op.logical_or, "xor": op.logical_xor}[str(walk.node.target.overloadpacket).rsplit("_", 1)[1]]
    return function(cast(walk, a.self, "bool"), cast(walk, a.other, "bool"))


@converts("aten.add", "aten.sub", order=POINTWISE)
def _add(walk: Walk, a: Arguments) -> Any:
    dtype = _common_dtype(walk)
    other = scalar(walk, a.other, dtype)
    if a.alpha != 1:
        other = walk.emit(op.multiply(other, relax.const(a.alpha, dtype)))
    function = op.add if "add" in str(walk.node.target) else op.subtract
    return function(scalar(walk, a.self, dtype), other)


@converts("aten.rsub", order=POINTWISE)
def _reverse_subtract(walk: Walk, a: Arguments) -> Any:
    dtype = _common_dtype(walk)
    subtracted = scalar(walk, a.self, dtype)
    if a.alpha != 1:
        subtracted = walk.emit(op.multiply(subtracted, relax.const(a.alpha, dtype)))
    return op.subtract(scalar(walk, a.other, dtype), subtracted)


@converts("aten.div", order=POINTWISE)
def _divide(walk: Walk, a: Arguments) -> Any:
    mode = getattr(a, "rounding_mode", None)
    dtype = _common_dtype(walk)
    if mode is None and not dtype.startswith(("float", "bfloat")):
        dtype = "float32"
    left, right = scalar(walk, a.self, dtype), scalar(walk, a.other, dtype)
    if mode == "floor":
        return op.floor_divide(left, right)
    quotient = op.divide(left, right)
    return quotient if mode is None or not dtype.startswith(("float", "bfloat")) else op.trunc(walk.emit(quotient))


@converts("aten.floor_divide", order=POINTWISE)
def _floor_divide(walk: Walk, a: Arguments) -> Any:
    dtype = _common_dtype(walk)
    return op.floor_divide(scalar(walk, a.self, dtype), scalar(walk, a.other, dtype))


@converts("aten.pow", order=POINTWISE)
def _power(walk: Walk, a: Arguments) -> Any:
    dtype = _common_dtype(walk)
    if isinstance(a.exponent, int | float) and a.exponent in (0.5, 1, 2, 3, -0.5, -1):
        x = cast(walk, a.self, dtype)
        return {
            0.5: lambda: op.sqrt(x), 1: lambda: x, 2: lambda: op.multiply(x, x), 3: lambda: op.multiply(walk.emit(op.multiply(x, x)), x),
            -0.5: lambda: op.rsqrt(x), -1: lambda: op.divide(_constant(1, x), x),
        }[a.exponent]()  # fmt: skip
    return op.power(scalar(walk, a.self, dtype), scalar(walk, a.exponent, dtype))


@converts("aten.clamp", "aten.clamp_min", "aten.clamp_max", order=POINTWISE)
def _clamp(walk: Walk, a: Arguments) -> Any:
    dtype = _result_dtype(walk)
    value = cast(walk, a.self, dtype)
    for bound, function in ((getattr(a, "min", None), op.maximum), (getattr(a, "max", None), op.minimum)):
        if bound is not None:
            value = walk.emit(function(value, scalar(walk, bound, dtype)))
    return value


@converts("aten.hardtanh", order=POINTWISE)
def _hardtanh(walk: Walk, a: Arguments) -> Any:
    return op.clip(a.self, a.min_val, a.max_val)


@converts("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar", order=POINTWISE)
def _where(walk: Walk, a: Arguments) -> Any:
    dtype = _result_dtype(walk)
    return op.where(cast(walk, a.condition, "bool"), scalar(walk, a.self, dtype), scalar(walk, a.other, dtype))


@converts("aten.masked_fill", order=POINTWISE)
def _masked_fill(walk: Walk, a: Arguments) -> Any:
    dtype = _result_dtype(walk)
    return op.where(cast(walk, a.mask, "bool"), scalar(walk, a.value, dtype), cast(walk, a.self, dtype))


@converts("aten.gelu", order=POINTWISE)
def _gelu(walk: Walk, a: Arguments) -> Any:
    return op.nn.gelu_tanh(a.self) if a.approximate == "tanh" else op.nn.gelu(a.self)


@converts("aten.leaky_relu", order=POINTWISE)
def _leaky_relu(walk: Walk, a: Arguments) -> Any:
    return op.nn.leakyrelu(a.self, a.negative_slope)


@converts("aten.elu", order=POINTWISE)
def _elu(walk: Walk, a: Arguments) -> Any:
    x = a.self
    grown = op.multiply(op.subtract(op.exp(op.multiply(x, _constant(a.input_scale, x))), _constant(1, x)), _constant(a.alpha * a.scale, x))
    return op.where(op.greater(x, _constant(0, x)), op.multiply(x, _constant(a.scale, x)), grown)


@converts("aten.softplus", order=POINTWISE)
def _softplus(walk: Walk, a: Arguments) -> Any:
    x = a.self
    scaled = walk.emit(op.multiply(x, _constant(a.beta, x)))
    soft = op.divide(op.log(op.add(op.exp(scaled), _constant(1, x))), _constant(a.beta, x))
    return op.where(op.greater(scaled, _constant(a.threshold, x)), x, soft)


@converts("aten.isnan", "aten.isinf", order=POINTWISE)
def _is_special(walk: Walk, a: Arguments) -> Any:
    return op.isnan(a.self) if "nan" in str(walk.node.target) else op.isinf(a.self)


@converts("aten.nan_to_num", order=POINTWISE)
def _nan_to_num(walk: Walk, a: Arguments) -> Any:
    x = walk.emit(op.where(op.isnan(a.self), _constant(a.nan or 0.0, a.self), a.self))
    limits = torch.finfo(walk.fake(walk.node).dtype)
    high, low = (limits.max if a.posinf is None else a.posinf), (limits.min if a.neginf is None else a.neginf)
    infinite = op.where(op.greater(x, _constant(0, x)), _constant(high, x), _constant(low, x))
    return op.where(op.isinf(x), infinite, x)


@converts("aten._to_copy", "aten.to", "aten.type_as", order=POINTWISE)
def _to(walk: Walk, a: Arguments) -> Any:
    return cast(walk, a.self, _result_dtype(walk))


# ---- reductions -----------------------------------------------------------------------------------------------------------


def reduced_axes(walk: Walk, a: Arguments) -> list[int]:
    """Return the axes a reduction runs over, in the order of memory of its input."""
    rank = len(a.self.ty.shape)
    axes = getattr(a, "dim", None)
    axes = list(range(rank)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else list(axes)
    return [axis_in(a.order, d) if a.order != NCHW else d % rank for d in axes]


def _reduction(function: Any) -> Any:
    def emit(walk: Walk, a: Arguments) -> Any:
        value = cast(walk, a.self, _result_dtype(walk))
        return function(value, reduced_axes(walk, a), bool(getattr(a, "keepdim", False)))

    return emit


for _name, _function in {
    "mean": op.mean, "sum": op.sum, "amax": op.max, "amin": op.min, "max.default": op.max, "min.default": op.min,
    "prod.dim_int": op.prod, "prod.default": op.prod,
}.items():  # fmt: skip
    converts(f"aten.{_name}", order=SPATIAL)(_reduction(_function))


@converts("aten.any", "aten.all")
def _any_all(walk: Walk, a: Arguments) -> Any:
    function = op.max if "any" in str(walk.node.target) else op.min
    found = walk.emit(function(cast(walk, cast(walk, a.self, "bool"), "int8"), reduced_axes(walk, a), bool(getattr(a, "keepdim", False))))
    return cast(walk, found, "bool")


@converts("aten.var")
def _variance(walk: Walk, a: Arguments) -> Any:
    axes, keepdim = reduced_axes(walk, a), bool(getattr(a, "keepdim", False))
    correction = getattr(a, "correction", None)
    if correction is None:
        correction = 1 if getattr(a, "unbiased", True) else 0
    count: Any = 1
    for axis in axes:
        count = count * a.self.ty.shape[axis]
    centered = walk.emit(op.subtract(a.self, op.mean(a.self, axes, True)))
    total = walk.emit(op.sum(op.multiply(centered, centered), axes, keepdim))
    divisor = count - correction
    divisor = int(divisor) if isinstance(divisor, tirx.IntImm) else divisor
    return op.divide(total, scalar(walk, divisor, "float32"))


@converts("aten.argmax", "aten.argmin")
def _arg_extreme(walk: Walk, a: Arguments) -> Any:
    function = op.argmax if "argmax" in str(walk.node.target) else op.argmin
    return function(a.self, a.dim, bool(a.keepdim))


@converts("aten.max.dim", "aten.min.dim")
def _extreme_with_index(walk: Walk, a: Arguments) -> Any:
    largest = "max" in str(walk.node.target)
    value = walk.emit((op.max if largest else op.min)(a.self, a.dim, a.keepdim))
    return [value, walk.emit((op.argmax if largest else op.argmin)(a.self, a.dim, a.keepdim))]


@converts("aten.cumsum")
def _cumulative_sum(walk: Walk, a: Arguments) -> Any:
    return op.cumsum(cast(walk, a.self, _result_dtype(walk)), a.dim)


@converts("aten.softmax", "aten._softmax")
def _softmax(walk: Walk, a: Arguments) -> Any:
    return op.nn.softmax(cast(walk, a.self, _result_dtype(walk)), a.dim)


@converts("aten.log_softmax", "aten._log_softmax")
def _log_softmax(walk: Walk, a: Arguments) -> Any:
    return op.nn.log_softmax(cast(walk, a.self, _result_dtype(walk)), a.dim)

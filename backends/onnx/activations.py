"""Elementwise functions of one operand."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.onnx.emit import Emitter, converts

_SAME = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs",
    "neg": "Neg", "reciprocal": "Reciprocal", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign", "sin": "Sin",
    "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "isnan": "IsNaN", "isinf": "IsInf", "hardswish": "HardSwish", "mish": "Mish",
}  # fmt: skip


def _input(arguments: SimpleNamespace) -> Any:
    return next(iter(vars(arguments).values()))


def _same(type: str, emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op(type, emitter.value(_input(arguments)))


for _aten, _onnx in _SAME.items():
    converts(f"aten.{_aten}.default")(functools.partial(_same, _onnx))


@converts("aten.rsqrt")
def rsqrt(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("Reciprocal", emitter.op("Sqrt", emitter.value(arguments.self)))


@converts("aten.gelu")
def gelu(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("Gelu", emitter.value(arguments.self), approximate=arguments.approximate)


@converts("aten.silu")
def silu(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    x = emitter.value(arguments.self)
    return emitter.op("Mul", x, emitter.op("Sigmoid", x))


@converts("aten.hardsigmoid")
def hardsigmoid(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("HardSigmoid", emitter.value(arguments.self), alpha=1 / 6, beta=0.5)


@converts("aten.leaky_relu")
def leaky_relu(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("LeakyRelu", emitter.value(arguments.self), alpha=float(arguments.negative_slope))


@converts("aten.elu")
def elu(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if arguments.input_scale != 1 and arguments.scale * arguments.input_scale != 1 and arguments.alpha * arguments.input_scale != 1:
        raise emitter.refuse("this scale of elu has no ONNX form")
    if arguments.input_scale != 1:
        return emitter.op("Celu", emitter.value(arguments.self), alpha=float(arguments.alpha))
    if arguments.scale != 1:
        return emitter.op("Selu", emitter.value(arguments.self), alpha=float(arguments.alpha), gamma=float(arguments.scale))
    return emitter.op("Elu", emitter.value(arguments.self), alpha=float(arguments.alpha))


@converts("aten.softplus")
def softplus(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if arguments.beta != 1:
        raise emitter.refuse("softplus with beta has no ONNX form")
    return emitter.op("Softplus", emitter.value(arguments.self))


@converts("aten.prelu")
def prelu(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    x, slope = emitter.fake(arguments.self), emitter.fake(arguments.weight)
    shape = emitter.constant([-1] + [1] * max(x.ndim - 2, 0), torch.int64)
    name = emitter.value(arguments.weight)
    return emitter.op("PRelu", emitter.value(arguments.self), emitter.op("Reshape", name, shape) if slope.numel() > 1 else name)


@converts("aten.relu6")
def relu6(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return clip(emitter, arguments.self, 0, 6)


@converts("aten.hardtanh")
def hardtanh(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return clip(emitter, arguments.self, arguments.min_val, arguments.max_val)


@converts("aten.clamp.default")
def clamp(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return clip(emitter, arguments.self, arguments.min, arguments.max)


@converts("aten.clamp.Tensor")
def clamp_by_channel(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Bounds are tensors: what is above the upper one is replaced last, as in PyTorch."""
    x = emitter.value(arguments.self)
    for operator, bound in (("Max", arguments.min), ("Min", arguments.max)):
        x = emitter.op(operator, x, emitter.value(bound)) if bound is not None else x
    return x


@converts("aten.clamp_min.default")
def clamp_min(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return clip(emitter, arguments.self, arguments.min, None)


@converts("aten.clamp_max.default")
def clamp_max(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return clip(emitter, arguments.self, None, arguments.max)


def clip(emitter: Emitter, x: Any, low: Any, high: Any) -> Any:
    dtype = emitter.fake(x).dtype
    limits = [emitter.constant(limit, dtype) if limit is not None else "" for limit in (low, high)]
    return emitter.op("Clip", emitter.value(x), *(limits if limits[1] else limits[:1]))


# Activations of qc operators, on names: see qcompile.graph.dialect.ACTIVATIONS.
def activate(emitter: Emitter, x: str, activation: str) -> str:
    """Return the value after one of the dialect's activations.

    Raises:
        Refused: the dialect has it and this file has not.
    """
    kind = activation.removeprefix("add_")
    if kind == "none":
        return x
    if kind == "silu":
        return str(emitter.op("Mul", x, emitter.op("Sigmoid", x)))
    if kind == "relu6":
        return str(emitter.op("Clip", x, emitter.constant(0.0), emitter.constant(6.0)))
    if kind in ("gelu", "gelu_tanh"):
        return str(emitter.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none"))
    if kind == "hardswish" and emitter.form == "integer":  # the order in which PyTorch rounds; HardSwish multiplies by 1 / 6
        gate = emitter.op("Clip", emitter.op("Add", x, emitter.constant(3.0)), emitter.constant(0.0), emitter.constant(6.0))
        return str(emitter.op("Div", emitter.op("Mul", x, gate), emitter.constant(6.0)))
    known = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "hardswish": "HardSwish"}
    if kind not in known:
        raise emitter.refuse(f"the activation '{activation}' has no ONNX form")
    return str(emitter.op(known[kind], x))

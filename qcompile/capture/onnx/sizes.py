"""Arithmetic on sizes: chains such as Shape -> Gather -> Mul -> Concat -> Reshape become symbolic ints, not tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from qcompile.capture.onnx.builder import Sizes, Value
from qcompile.capture.onnx.operators import Call

SizesRule = Callable[[Call, list[Any]], Any]
RULES: dict[str, SizesRule] = {}

# A larger integer tensor is data, not a shape.
LARGEST_SHAPE = 64

_INTEGERS = (torch.int64, torch.int32)


def rule(*names: str) -> Callable[[SizesRule], SizesRule]:
    """Enter a rule for operators; it gets the call and its inputs as object arrays, and returns one array or None to pass."""

    def enter(function: SizesRule) -> SizesRule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def compute_sizes(call: Call) -> Value | None:
    """Return the result of an operator on sizes as sizes, or None where it must be computed as a tensor."""
    if call.node.op_type not in RULES or call.node.domain not in ("", "ai.onnx") or not any(isinstance(v, Sizes) for v in call.inputs):
        return None
    arrays = [_array(value) if value is not None else None for value in call.inputs]
    if any(array is None and value is not None for array, value in zip(arrays, call.inputs, strict=True)):
        return None
    result = RULES[call.node.op_type](call, arrays)
    if result is None:
        return None
    if call.node.op_type == "Equal":
        return torch.tensor(np.asarray(result, dtype=bool))
    return Sizes(np.asarray(result, dtype=object))


def _array(value: Value) -> np.ndarray[Any, Any] | None:
    if isinstance(value, Sizes):
        return value.items
    if isinstance(value, torch.Tensor) and value.numel() <= LARGEST_SHAPE and value.dtype in (*_INTEGERS, torch.bool):
        return np.array(value.numpy(), dtype=object)
    return None


def _elementwise(call: Call, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    a, b = np.broadcast_arrays(a, b)
    items = [call.build.size_arithmetic(function, x, y) for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)]
    return _filled(items, a.shape)


def _filled(items: list[Any], shape: tuple[int, ...]) -> Any:
    made = np.empty(len(items), dtype=object)
    made[:] = items
    return made.reshape(shape)


@rule("Add", "Sub", "Mul")
def arithmetic(call: Call, inputs: list[Any]) -> Any:
    function = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}[call.node.op_type]
    return _elementwise(call, function, inputs[0], inputs[1])


@rule("Div", "Mod")
def division(call: Call, inputs: list[Any]) -> Any:
    """Divide sizes; only by known positive numbers, for which floor and truncation agree on sizes."""
    if any(not isinstance(divisor, int) or divisor <= 0 for divisor in inputs[1].reshape(-1)):
        return None
    return _elementwise(call, operator.floordiv if call.node.op_type == "Div" else operator.mod, inputs[0], inputs[1])


@rule("Min", "Max")
def extremum(call: Call, inputs: list[Any]) -> Any:
    function = torch.sym_min if call.node.op_type == "Min" else torch.sym_max
    result = inputs[0]
    for other in inputs[1:]:
        result = _elementwise(call, function, result, other)
    return result


@rule("Cast")
def cast(call: Call, inputs: list[Any]) -> Any:
    return inputs[0] if call.integer("to") in (6, 7) else None  # INT32, INT64


@rule("Identity")
def identity(call: Call, inputs: list[Any]) -> Any:
    return inputs[0]


@rule("Equal")
def equal(call: Call, inputs: list[Any]) -> Any:
    """Compare sizes; a symbolic size surely differs from a negative number (the -1 that exporters test for)."""
    a, b = np.broadcast_arrays(inputs[0], inputs[1])
    found = []
    for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True):
        known = [item for item in (x, y) if not isinstance(item, fx.Node)]
        if len(known) == 2 or x is y:
            found.append(int(x is y or x == y))
        elif known and known[0] < 0:
            found.append(0)
        else:
            return None
    return _filled(found, a.shape)


@rule("Where")
def where(call: Call, inputs: list[Any]) -> Any:
    condition, a, b = np.broadcast_arrays(*inputs)
    if any(isinstance(item, fx.Node) for item in condition.reshape(-1)):
        return None
    chosen = [x if c else y for c, x, y in zip(condition.reshape(-1), a.reshape(-1), b.reshape(-1), strict=True)]
    return _filled(chosen, condition.shape)


@rule("Concat")
def concat(call: Call, inputs: list[Any]) -> Any:
    return np.concatenate(inputs, axis=call.integer("axis"))


@rule("Gather")
def gather(call: Call, inputs: list[Any]) -> Any:
    if any(isinstance(item, fx.Node) for item in inputs[1].reshape(-1)):
        return None
    return np.take(inputs[0], inputs[1].astype(np.int64), axis=call.integer("axis"))


@rule("Slice")
def slice_sizes(call: Call, inputs: list[Any]) -> Any:
    if call.version < 10:
        starts, ends = call.integer_list("starts"), call.integer_list("ends")
        axes, steps = call.integer_list("axes") or list(range(len(starts))), [1] * len(starts)
    else:
        lists = [None if array is None else array.reshape(-1).tolist() for array in (inputs + [None] * 5)[1:5]]
        starts, ends = lists[0] or [], lists[1] or []
        axes, steps = lists[2] or list(range(len(starts))), lists[3] or [1] * len(starts)
    if any(isinstance(item, fx.Node) for item in [*starts, *ends, *axes, *steps]):
        return None
    result = inputs[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where_ = [slice(None)] * result.ndim
        where_[axis] = slice(start, None if step < 0 and end < -result.shape[axis] else end, step)
        result = result[tuple(where_)]
    return result


@rule("Unsqueeze", "Squeeze")
def change_rank(call: Call, inputs: list[Any]) -> Any:
    axes = [int(axis) for axis in inputs[1].reshape(-1)] if len(inputs) > 1 and inputs[1] is not None else call.integer_list("axes")
    if call.node.op_type == "Squeeze":
        return np.squeeze(inputs[0], tuple(axes) if axes else None)
    return np.expand_dims(inputs[0], tuple(axes))


@rule("Reshape")
def reshape(call: Call, inputs: list[Any]) -> Any:
    return np.reshape(inputs[0], [int(size) for size in inputs[1].reshape(-1)])


@rule("ReduceProd")
def reduce_product(call: Call, inputs: list[Any]) -> Any:
    if inputs[0].ndim != 1:
        return None
    result: Any = 1
    for item in inputs[0]:
        result = call.build.size_arithmetic(operator.mul, result, item)
    return _filled([result], (1,) if call.integer("keepdims", 1) else ())

"""Reductions, index of the largest, running sums."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.operators import Call, Result, normal_axis, operator
from qcompile.errors import Refused

aten = torch.ops.aten


def _sum(call: Call, x: Value, axes: list[int], keep: bool) -> Any:
    total = call.call(aten.sum.dim_IntList, x, axes, keep)
    return call.build.cast(total, call.build.dtype(x))


def _product(call: Call, x: Any, axes: list[int], keep: bool) -> Any:
    for axis in sorted(axes, reverse=True):
        x = call.build.cast(call.call(aten.prod.dim_int, x, axis, keep), call.build.dtype(x))
    return x


def _mean(call: Call, x: Value, axes: list[int], keep: bool) -> Any:
    if call.build.dtype(x).is_floating_point:
        return call.call(aten.mean.dim, x, axes, keep)
    return call.build.cast(call.call(aten.mean.dim, call.build.cast(x, torch.float64), axes, keep), call.build.dtype(x))


def _square_sum(call: Call, x: Value, axes: list[int], keep: bool) -> Any:
    return _sum(call, call.call(aten.mul.Tensor, x, x), axes, keep)


def _root(call: Call, x: Value) -> Any:
    return call.call(aten.sqrt.default, x)


_REDUCTIONS = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceProd": _product,
    "ReduceMax": lambda call, x, axes, keep: call.call(aten.amax.default, x, axes, keep),
    "ReduceMin": lambda call, x, axes, keep: call.call(aten.amin.default, x, axes, keep),
    "ReduceL1": lambda call, x, axes, keep: _sum(call, call.call(aten.abs.default, x), axes, keep),
    "ReduceL2": lambda call, x, axes, keep: _root(call, _square_sum(call, x, axes, keep)),
    "ReduceSumSquare": _square_sum,
    "ReduceLogSum": lambda call, x, axes, keep: call.call(aten.log.default, _sum(call, x, axes, keep)),
    "ReduceLogSumExp": lambda call, x, axes, keep: call.call(aten.logsumexp.default, x, axes, keep),
}


@operator(*_REDUCTIONS)
def reduce(call: Call) -> Result:
    """Reduce over axes given as attribute or input; none means all of them, or nothing where ``noop_with_empty_axes`` says so."""
    x = call[0]
    rank = call.build.rank(x)
    axes = call.integers(1) if call.get(1) is not None else call.integer_list("axes")
    if not axes and call.integer("noop_with_empty_axes"):
        return _elementwise_part(call, x)
    axes = sorted({normal_axis(axis, rank) for axis in axes}) if axes else list(range(rank))
    if not rank:
        return _elementwise_part(call, x)
    return _REDUCTIONS[call.node.op_type](call, x, axes, bool(call.integer("keepdims", 1)))


def _elementwise_part(call: Call, x: Value) -> Any:
    """Return what a reduction over no axis gives: its inner function of each element."""
    name = call.node.op_type
    if name in ("ReduceL1", "ReduceL2"):
        return call.call(aten.abs.default, x)
    if name == "ReduceSumSquare":
        return call.call(aten.mul.Tensor, x, x)
    return call.call(aten.log.default, x) if name == "ReduceLogSum" else x


@operator("ArgMax", "ArgMin")
def index_of_extremum(call: Call) -> Result:
    target = aten.argmax.default if call.node.op_type == "ArgMax" else aten.argmin.default
    axis, keep = call.axis("axis", call.build.rank(call[0]), 0), bool(call.integer("keepdims", 1))
    if not call.integer("select_last_index"):
        return call.call(target, call[0], axis, keep)
    found = call.call(target, call.call(aten.flip.default, call[0], [axis]), axis, keep)
    return call.call(aten.rsub.Scalar, found, call.build.static_shape(call[0], [axis])[0] - 1)


@operator("CumSum", since=11)
def cumulative_sum(call: Call) -> Result:
    x = call[0]
    axis = normal_axis(int(call.constant(1).reshape(()).item()), call.build.rank(x))
    if call.integer("reverse"):
        x = call.call(aten.flip.default, x, [axis])
    total = call.build.cast(call.call(aten.cumsum.default, x, axis), call.build.dtype(x))
    if call.integer("exclusive"):
        total = call.call(aten.sub.Tensor, total, x)
    return call.call(aten.flip.default, total, [axis]) if call.integer("reverse") else total


@operator("TopK", since=10)
def top_k(call: Call) -> Result:
    count = call.integers(1)
    if len(count) != 1:
        raise Refused("TopK needs one number of elements")
    axis = call.axis("axis", call.build.rank(call[0]), -1)
    if count[0] > call.build.static_shape(call[0], [axis])[0]:
        raise Refused(f"axis {axis} has fewer than {count[0]} elements")
    # A stable sort, because among equal elements ONNX takes the one with the lower index first; torch.topk takes any.
    made = call.call(aten.sort.stable, call[0], stable=True, dim=axis, descending=bool(call.integer("largest", 1)))
    return tuple(call.call(aten.slice.Tensor, call.build.item(made, index), axis, 0, count[0]) for index in range(2))

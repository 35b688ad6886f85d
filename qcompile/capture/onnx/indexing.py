"""Operators that pick elements by position."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from qcompile.capture.onnx.builder import Size, Value
from qcompile.capture.onnx.operators import Call, Result, bounded, normal_axis, operator
from qcompile.errors import Refused

aten = torch.ops.aten

_LARGEST = (1 << 63) - 1


@operator("Slice", since=10)
def slice_inputs(call: Call) -> Result:
    starts, ends = call.sizes(1), call.sizes(2)
    axes = call.integers(3) if call.get(3) is not None else list(range(len(starts)))
    steps = call.integers(4) if call.get(4) is not None else [1] * len(starts)
    return _slice(call, starts, ends, axes, steps)


@operator("Slice")
def slice_attributes(call: Call) -> Result:
    starts, ends = call.integer_list("starts"), call.integer_list("ends")
    return _slice(call, starts, ends, call.integer_list("axes") or list(range(len(starts))), [1] * len(starts))


def _slice(call: Call, starts: list[Size], ends: list[Size], axes: list[int], steps: list[int]) -> Value:
    x: Any = call[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = normal_axis(axis, call.build.rank(x))
        if step == 0:
            raise Refused("a slice has step 0")
        if step > 0:
            size = call.build.shape(x)[axis]
            if isinstance(start, int) and start == 0 and isinstance(end, int) and step == 1 and (end >= (1 << 31) - 1 or end == size):
                continue
            if isinstance(size, int):
                call.build.limit(end, size)
            x = call.call(aten.slice.Tensor, x, axis, start, min(end, _LARGEST) if isinstance(end, int) else end, step)
        else:
            size = call.build.static_shape(x, [axis])[0]
            if not isinstance(start, int) or not isinstance(end, int):
                raise Refused("a slice that runs backwards needs known bounds")
            first = min(start, size - 1) if start >= 0 else max(start + size, -1)
            last = min(end, size - 1) if end >= 0 else max(end + size, -1)
            places = range(first, last, step)
            bounded(len(places))
            x = call.call(aten.index_select.default, x, axis, torch.arange(first, last, step) if places else torch.arange(0))
    return x


def _wrapped(call: Call, indices: Value, x: Value, axis: int) -> Any:
    """Return int64 indices without negative ones, which ONNX counts from the end."""
    indices = call.build.cast(indices, torch.int64)
    if isinstance(indices, torch.Tensor):
        if not bool((indices < 0).any()):
            return indices
        return torch.where(indices < 0, indices + call.build.static_shape(x, [axis])[0], indices)
    ends = call.call(aten.add.Tensor, indices, call.build.size(x, axis))
    return call.call(aten.where.self, call.call(aten.lt.Scalar, indices, 0), ends, indices)


@operator("Gather")
def gather(call: Call) -> Result:
    """Pick along one axis; a constant table on axis 0 is an embedding, a single constant index a select."""
    x, indices = call[0], call[1]
    rank = call.build.rank(x)
    axis = call.axis("axis", rank, 0)
    if isinstance(x, torch.Tensor) and axis == 0 and rank == 2 and isinstance(indices, fx.Node) and x.dtype.is_floating_point:
        # A table is indexed by tokens, which are never negative; the run-time check of the index is the runtime's.
        return call.call(aten.embedding.default, x, call.build.cast(indices, torch.int64))
    if isinstance(indices, torch.Tensor) and indices.ndim == 0:
        return call.call(aten.select.int, x, axis, int(indices))
    wrapped = _wrapped(call, indices, x, axis)
    if call.build.rank(wrapped) == 1:
        return call.call(aten.index_select.default, x, axis, wrapped)
    return call.call(aten.index.Tensor, x, [None] * axis + [wrapped])


@operator("GatherElements", since=11)
def gather_elements(call: Call) -> Result:
    axis = call.axis("axis", call.build.rank(call[0]), 0)
    return call.call(aten.gather.default, call[0], axis, _wrapped(call, call[1], call[0], axis))


@operator("GatherND", since=11)
def gather_nd(call: Call) -> Result:
    if call.integer("batch_dims"):
        raise Refused("GatherND with batch_dims is not supported")
    indices = call.build.cast(call[1], torch.int64)
    count = _index_length(call, indices)
    picked = [call.call(aten.select.int, indices, -1, position) for position in range(count)]
    return call.call(aten.index.Tensor, call[0], picked)


def _index_length(call: Call, indices: Value) -> int:
    """Return how many axes each index of GatherND or ScatterND names."""
    count = call.build.static_shape(indices, [-1])[0]
    if not 1 <= count <= call.build.rank(call[0]):
        raise Refused(f"an index names {count} axes of a tensor that has {call.build.rank(call[0])}")
    return count


@operator("ScatterElements", since=11)
def scatter_elements(call: Call) -> Result:
    axis = call.axis("axis", call.build.rank(call[0]), 0)
    indices, mode = _wrapped(call, call[1], call[0], axis), call.string("reduction", "none")
    if mode == "none":
        return call.call(aten.scatter.src, call[0], axis, indices, call[2])
    names = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}
    return call.call(aten.scatter_reduce.two, call[0], axis, indices, call[2], names[mode])


@operator("ScatterND", since=11)
def scatter_nd(call: Call) -> Result:
    if call.string("reduction", "none") not in ("none", "add"):
        raise Refused("ScatterND with this reduction is not supported")
    indices = call.build.cast(call[1], torch.int64)
    count = _index_length(call, indices)
    places = [call.call(aten.select.int, indices, -1, position) for position in range(count)]
    accumulate = call.string("reduction", "none") == "add"
    return call.call(aten.index_put.default, call[0], places, call[2], accumulate)


@operator("OneHot", since=9)
def one_hot(call: Call) -> Result:
    depth = int(call.constant(1).reshape(()).item())
    if depth < 0:
        raise Refused("OneHot has a negative depth")
    bounded(depth)
    rank = call.build.rank(call[0])
    axis = normal_axis(call.integer("axis", -1), rank + 1)
    indices = call.build.cast(call[0], torch.int64)
    indices = call.call(aten.unsqueeze.default, call.call(aten.remainder.Scalar, indices, depth), axis)
    inside = call.call(aten.unsqueeze.default, _inside(call, depth), axis)
    places = torch.arange(depth).reshape([depth if d == axis else 1 for d in range(rank + 1)])
    hits = call.call(aten.logical_and.default, call.call(aten.eq.Tensor, indices, places), inside)
    off, on = (call.call(aten.select.int, call[2], 0, position) for position in (0, 1))
    return call.call(aten.where.self, hits, on, off)


def _inside(call: Call, depth: int) -> Any:
    above = call.call(aten.ge.Scalar, call[0], -depth)
    return call.call(aten.logical_and.default, above, call.call(aten.lt.Scalar, call[0], depth))

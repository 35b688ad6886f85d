"""Operators that change the shape, and those that make tensors from shapes."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompile.capture.onnx.builder import Size, Sizes, Value
from qcompile.capture.onnx.load import NARROW_DTYPES
from qcompile.capture.onnx.normalization import flat_size
from qcompile.capture.onnx.operators import Call, Result, bounded, normal_axis, operator
from qcompile.errors import Refused

aten = torch.ops.aten


@operator("Reshape")
def reshape(call: Call) -> Result:
    """Reshape; 0 copies a size, -1 is what remains."""
    x = call[0]
    wanted: list[Size] = list(call.sizes(1))
    if not call.integer("allowzero"):
        rank = call.build.rank(x)
        if any(size == 0 and axis >= rank for axis, size in enumerate(wanted) if isinstance(size, int)):
            raise Refused("the shape copies an axis that the input does not have")
        wanted = [call.build.size(x, axis) if isinstance(size, int) and size == 0 else size for axis, size in enumerate(wanted)]
    shape = call.build.shape(x)
    if all(isinstance(size, int) for size in (*shape, *wanted)) and -1 in wanted:
        rest = math.prod(size for size in wanted if size != -1)
        wanted = [math.prod(shape) // rest if size == -1 and rest else size for size in wanted]
    return call.build.reshape(x, wanted)


@operator("Flatten")
def flatten(call: Call) -> Result:
    x, rank = call[0], call.build.rank(call[0])
    axis = call.integer("axis", 1)
    if not -rank <= axis <= rank:
        raise Refused(f"axis {axis} is outside a tensor of {rank} axes")
    axis = axis + rank if axis < 0 else axis
    return call.build.reshape(x, [flat_size(call, x, range(axis)), flat_size(call, x, range(axis, rank))])


@operator("Transpose")
def transpose(call: Call) -> Result:
    rank = call.build.rank(call[0])
    order = call.integer_list("perm") or list(reversed(range(rank)))
    return call.call(aten.permute.default, call[0], order)


def _axes(call: Call, index: int, rank: int) -> list[int]:
    given = call.integers(index) if call.get(index) is not None else call.integer_list("axes")
    axes = [normal_axis(axis, rank) for axis in given]
    if len(set(axes)) != len(axes):
        raise Refused("an axis is named twice")
    return axes


@operator("Squeeze")
def squeeze(call: Call) -> Result:
    x, shape = call[0], call.build.shape(call[0])
    axes = _axes(call, 1, len(shape)) or [axis for axis, size in enumerate(shape) if isinstance(size, int) and size == 1]
    if wrong := [axis for axis in axes if not isinstance(shape[axis], int) or shape[axis] != 1]:
        raise Refused(f"axis {wrong[0]} has not the size 1")
    return call.call(aten.squeeze.dims, x, axes) if axes else x


@operator("Unsqueeze")
def unsqueeze(call: Call) -> Result:
    x = call[0]
    count = len(call.integers(1) if call.get(1) is not None else call.integer_list("axes"))
    for axis in sorted(_axes(call, 1, call.build.rank(x) + count)):
        x = call.call(aten.unsqueeze.default, x, axis)
    return x


@operator("Concat")
def concat(call: Call) -> Result:
    parts = call.given()
    return parts[0] if len(parts) == 1 else call.call(aten.cat.default, parts, normal_axis(call.integer("axis"), call.build.rank(parts[0])))


@operator("Split")
def split(call: Call) -> Result:
    x = call[0]
    axis = call.axis("axis", call.build.rank(x), 0)
    count = len(call.node.outputs)
    sizes: Sequence[Size] = call.sizes(1) if call.get(1) is not None else call.integer_list("split")
    if not sizes:
        size = call.build.static_shape(x, [axis])[0]
        each = -(-size // count)
        sizes = [max(0, min(each, size - each * i)) for i in range(count)]
    if len(sizes) != count:
        raise Refused(f"{len(sizes)} sizes are given for {count} outputs")
    made = call.call(aten.split_with_sizes.default, x, list(sizes), axis)
    return tuple(call.build.item(made, index) for index in range(count))


@operator("Expand", since=8)
def expand(call: Call) -> Result:
    """Broadcast both ways: a size 1 in the wanted shape keeps the input's."""
    x, wanted = call[0], call.sizes(1)
    rank = max(call.build.rank(x), len(wanted))
    wanted = [1] * (rank - len(wanted)) + list(wanted)
    for axis in range(1, call.build.rank(x) + 1):
        own = call.build.shape(x)[-axis]
        keeps = isinstance(own, torch.SymInt) or own != 1
        if isinstance(wanted[-axis], int) and wanted[-axis] not in (1, own) and keeps:
            raise Refused(f"size {own} does not broadcast to {wanted[-axis]}")
        wanted[-axis] = -1 if keeps else wanted[-axis]
    return call.call(aten.expand.default, x, list(wanted))


@operator("Tile")
def tile(call: Call) -> Result:
    repeats = call.sizes(1)
    if len(repeats) != call.build.rank(call[0]):
        raise Refused("Tile needs one number for each axis")
    return call.call(aten.repeat.default, call[0], list(repeats))


@operator("Pad")
def pad(call: Call) -> Result:
    x, rank, mode = call[0], call.build.rank(call[0]), call.string("mode", "constant")
    amounts = call.integer_list("pads") if call.version < 11 else call.integers(1)
    axes = [normal_axis(axis, rank) for axis in call.integers(3)] if call.get(3) is not None else list(range(rank))
    if len(amounts) != 2 * len(axes):
        raise Refused(f"{len(amounts)} pads are given for {len(axes)} axes")
    both = [(0, 0)] * rank
    for position, axis in enumerate(axes):
        both[axis] = amounts[position], amounts[position + len(axes)]
    if mode == "constant":
        value: Any = call.real("value") if call.version < 11 else 0
        if call.version >= 11 and call.get(2) is not None:
            value = call.constant(2).reshape(()).item()
        return call.call(aten.constant_pad_nd.default, x, [n for pair in reversed(both) for n in pair], value)
    for axis, (before, after) in enumerate(both):
        if before or after:
            x = _pad_by_index(call, x, axis, before, after, mode)
    return x


def _pad_by_index(call: Call, x: Value, axis: int, before: int, after: int, mode: str) -> Value:
    """Pad one axis by selecting elements: reflect mirrors without the edge, edge repeats it, wrap starts again."""
    size = call.build.static_shape(x, [axis])[0]
    bounded(before + size + after)
    positions = torch.arange(-before, size + after)
    if mode == "edge":
        positions = positions.clamp(0, size - 1)
    elif mode == "wrap":
        positions = positions % size
    elif mode == "reflect":
        period = max(2 * (size - 1), 1)
        positions = (positions % period if size > 1 else positions * 0).clone()
        positions = torch.minimum(positions, period - positions) if size > 1 else positions
    else:
        raise Refused(f"padding mode '{mode}' is not known")
    return call.call(aten.index_select.default, x, axis, positions)


# ---- shapes as values -----------------------------------------------------------------------------------------------------


@operator("Shape")
def shape_of(call: Call) -> Result:
    rank = call.build.rank(call[0])
    start, end = call.integer("start", 0), call.integer("end", rank) if call.has("end") else rank
    start, end = (max(0, min(rank, axis + rank if axis < 0 else axis)) for axis in (start, end))
    return Sizes.of([call.build.size(call[0], axis) for axis in range(start, end)])


@operator("Size")
def size_of(call: Call) -> Result:
    return Sizes.of(flat_size(call, call[0], range(call.build.rank(call[0]))))


@operator("Constant")
def constant(call: Call) -> Result:
    name, attribute = next(iter(call.node.attributes.items()), ("value", None))
    if attribute is None:
        raise Refused("the constant has no value")
    if name == "value":
        found = call.read_tensor(attribute.value, call.node.outputs[0].name or "")
        if attribute.value.dtype in NARROW_DTYPES:
            call.build.narrow[id(found)] = NARROW_DTYPES[attribute.value.dtype][1]
        return found
    if name not in ("value_int", "value_ints", "value_float", "value_floats"):
        raise Refused(f"a constant given as '{name}' is not supported")
    return torch.tensor(attribute.value, dtype=torch.int64 if "int" in name else torch.float32)


@operator("ConstantOfShape", since=9)
def constant_of_shape(call: Call) -> Result:
    attribute = call.node.attributes.get("value")
    value = call.read_tensor(attribute.value, "value") if attribute is not None else torch.zeros(1)
    return call.call(aten.full.default, list(call.sizes(0)), value.reshape(-1)[0].item(), dtype=value.dtype)


@operator("Range", since=11)
def value_range(call: Call) -> Result:
    """Count from start to limit; only with integer bounds known now or coming from shapes, or constant floats."""
    values = [call[index] for index in range(3)]
    if all(isinstance(value, torch.Tensor) for value in values):
        start, limit, delta = (value.reshape(()).item() for value in values)  # type: ignore[union-attr]
        count = max(0, math.ceil((limit - start) / delta)) if delta else 0
        steps = call.call(aten.arange.default, count, dtype=torch.float64 if call.build.dtype(values[0]).is_floating_point else torch.int64)
        return (start + steps * delta).to(call.build.dtype(values[0]))
    bounds = [call.sizes(index)[0] for index in range(3)]
    return call.call(aten.arange.start_step, *bounds, dtype=torch.int64)


@operator("EyeLike", since=9)
def eye_like(call: Call) -> Result:
    rows, columns = call.build.static_shape(call[0])
    bounded(rows * columns)
    from qcompile.capture.onnx.load import torch_dtype

    dtype = torch_dtype(ir.DataType(call.integer("dtype")), "") if call.has("dtype") else call.build.dtype(call[0])
    positions = torch.arange(columns) - torch.arange(rows).unsqueeze(1)
    return (positions == call.integer("k")).to(dtype)


# ---- blocks of images -----------------------------------------------------------------------------------------------------


@operator("DepthToSpace")
def depth_to_space(call: Call) -> Result:
    x, block = call[0], call.integer("blocksize")
    channels, height, width = (call.build.size(x, axis) for axis in (1, 2, 3))
    batch = call.build.size(x, 0)
    inner = call.build.size_arithmetic(python.floordiv, channels, block * block)
    rows_first = call.string("mode", "DCR") == "DCR"
    parts = [batch, block, block, inner, height, width] if rows_first else [batch, inner, block, block, height, width]
    split_up = call.build.reshape(x, parts)
    turned = call.call(aten.permute.default, split_up, [0, 3, 4, 1, 5, 2] if rows_first else [0, 1, 4, 2, 5, 3])
    times = call.build.size_arithmetic
    return call.build.reshape(turned, [batch, inner, times(python.mul, height, block), times(python.mul, width, block)])


@operator("SpaceToDepth")
def space_to_depth(call: Call) -> Result:
    x, block = call[0], call.integer("blocksize")
    batch, channels = call.build.size(x, 0), call.build.size(x, 1)
    arithmetic = call.build.size_arithmetic
    height, width = (arithmetic(python.floordiv, call.build.size(x, axis), block) for axis in (2, 3))
    split_up = call.build.reshape(x, [batch, channels, height, block, width, block])
    rows_first = call.string("mode", "DCR") == "DCR"
    turned = call.call(aten.permute.default, split_up, [0, 3, 5, 1, 2, 4] if rows_first else [0, 1, 3, 5, 2, 4])
    return call.build.reshape(turned, [batch, arithmetic(python.mul, channels, block * block), height, width])


@operator("Trilu", since=14)
def triangle(call: Call) -> Result:
    diagonal = int(call.constant(1).reshape(()).item()) if call.get(1) is not None else 0
    target = aten.triu.default if call.integer("upper", 1) else aten.tril.default
    return call.call(target, call[0], diagonal)

"""Converters that move or make elements: views, slices, joins, gathers, new tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.lowering.arithmetic import cast, scalar
from qcompile.backends.lowering.converters import NCHW, POINTWISE, SPATIAL, axis_in, converts
from qcompile.backends.lowering.shapes import dtype_name
from qcompile.backends.lowering.translate import Walk
from tvm import relax
from tvm.relax import op

from qcompile.errors import Refused

Arguments = SimpleNamespace


@converts(
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze",
    "aten.view_copy", "aten._reshape_alias", "aten.unsqueeze_copy", "aten.squeeze_copy",
)  # fmt: skip
def _view(walk: Walk, a: Arguments) -> Any:
    if str(walk.node.target).endswith("view.dtype"):
        raise Refused("a view with another dtype cannot be lowered", node=walk.node.name, operator=str(walk.node.target))
    return walk.reshape(a.self, walk.shape())


def _dimensions(walk: Walk) -> list[Any]:
    return [relax.expr.ShapeExpr([s]).values[0] for s in walk.shape()]


@converts("aten.permute", "aten.permute_copy")
def _permute(walk: Walk, a: Arguments) -> Any:
    return op.permute_dims(a.self, [d % len(a.dims) for d in a.dims])


@converts("aten.transpose", "aten.t", "aten.numpy_T", "aten.mT", "aten.transpose_copy")
def _transpose(walk: Walk, a: Arguments) -> Any:
    rank = len(a.self.ty.shape)
    axes = list(range(rank))
    one, other = (a.dim0 % rank, a.dim1 % rank) if hasattr(a, "dim0") else (rank - 2, rank - 1) if rank > 1 else (0, 0)
    axes[one], axes[other] = axes[other], axes[one]
    return op.permute_dims(a.self, axes)


@converts("aten.expand", "aten.expand_copy", "aten.expand_as", "aten.broadcast_to")
def _expand(walk: Walk, a: Arguments) -> Any:
    return op.broadcast_to(a.self, _dimensions(walk))


@converts("aten.cat", "aten.concat", order=SPATIAL)
def _cat(walk: Walk, a: Arguments) -> Any:
    dtype = dtype_name(walk.fake(walk.node).dtype)
    rank = walk.fake(walk.node).ndim
    # torch lets an empty tensor of rank 1 stand among tensors of any rank
    parts = [cast(walk, t, dtype) for t in a.tensors if len(t.ty.shape) == rank]
    return op.concat(parts, axis_in(a.order, a.dim) if a.order != NCHW else a.dim % rank)


@converts("aten.stack")
def _stack(walk: Walk, a: Arguments) -> Any:
    return op.stack(list(a.tensors), a.dim)


@converts("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.split_copy", "aten.unbind_copy")
def _split(walk: Walk, a: Arguments) -> list[Any]:
    parts, start = [], 0
    rank = len(a.self.ty.shape)
    unbind = "unbind" in str(walk.node.target)
    for fake in walk.fake(walk.node):
        length = 1 if unbind else walk.sizes.size(fake.shape[a.dim])
        part = walk.emit(op.strided_slice(a.self, [a.dim % rank], [start], [start + length], assume_inbound=True))
        parts.append(walk.reshape(part, walk.sizes.shape(fake.shape)) if unbind else part)
        start = start + length
    return parts


@converts("python.getitem")
def _getitem(walk: Walk, a: Arguments) -> Any:
    return a.argument_0[a.argument_1]


@converts("aten.slice", "aten.slice_copy", "aten.narrow", "aten.narrow_copy", order=SPATIAL)
def _slice(walk: Walk, a: Arguments) -> Any:
    dim = a.dim % len(a.self.ty.shape)
    axis = axis_in(a.order, dim) if a.order != NCHW else dim
    size = a.self.ty.shape[axis]
    start, step = (0 if a.start is None else a.start), getattr(a, "step", 1)
    if isinstance(start, int) and start < 0:
        start = size + start
    count = walk.shape()[dim]
    # The result's size is known, so the end follows from it: no clamping at run time, and it stays a symbol.
    end = start + (count - 1) * step + 1
    return op.strided_slice(a.self, [axis], [start], [end], [step], assume_inbound=True)


@converts("aten.select", "aten.select_copy")
def _select(walk: Walk, a: Arguments) -> Any:
    axis = a.dim % len(a.self.ty.shape)
    index = a.index if not isinstance(a.index, int) or a.index >= 0 else a.self.ty.shape[axis] + a.index
    part = walk.emit(op.strided_slice(a.self, [axis], [index], [index + 1], assume_inbound=True))
    return op.reshape(part, _dimensions(walk))


@converts("aten.constant_pad_nd", "aten.pad", order=SPATIAL)
def _pad(walk: Walk, a: Arguments) -> Any:
    mode = getattr(a, "mode", "constant")
    if mode not in ("constant", "reflect"):
        raise Refused(f"padding mode {mode} cannot be lowered", node=walk.node.name, operator=str(walk.node.target))
    if any(p < 0 for p in a.pad):
        raise Refused("padding by a negative number cannot be lowered", node=walk.node.name, operator=str(walk.node.target))
    rank = len(a.self.ty.shape)
    widths = [0] * (2 * rank)
    for i in range(len(a.pad) // 2):
        axis = rank - 1 - i
        axis = axis_in(a.order, axis) if a.order != NCHW else axis
        widths[2 * axis : 2 * axis + 2] = a.pad[2 * i : 2 * i + 2]
    return op.nn.pad(a.self, widths, mode, float(a.value or 0))


@converts("aten.repeat")
def _repeat(walk: Walk, a: Arguments) -> Any:
    return op.tile(a.self, list(a.repeats))


@converts("aten.repeat_interleave.self_int")
def _repeat_interleave(walk: Walk, a: Arguments) -> Any:
    return op.repeat(a.self, a.repeats, a.dim)


@converts("aten.flip")
def _flip(walk: Walk, a: Arguments) -> Any:
    value = a.self
    for axis in a.dims:
        value = walk.emit(op.flip(value, axis))
    return value


@converts("aten.tril", "aten.triu")
def _triangle(walk: Walk, a: Arguments) -> Any:
    return (op.tril if "tril" in str(walk.node.target) else op.triu)(a.self, a.diagonal)


# ---- gathers --------------------------------------------------------------------------------------------------------------


def nonnegative(walk: Walk, index: Any, size: Any) -> Any:
    """Return indices with negative ones counted from the end, as torch reads them."""
    dtype = str(index.ty.dtype)
    if dtype.startswith("uint"):
        return index
    return walk.emit(op.where(op.less(index, relax.const(0, dtype)), op.add(index, scalar(walk, size, dtype)), index))


@converts("aten.embedding")
def _embedding(walk: Walk, a: Arguments) -> Any:
    return op.take(a.weight, a.indices, axis=0, mode="clip")


@converts("aten.index_select")
def _index_select(walk: Walk, a: Arguments) -> Any:
    return op.take(a.self, a.index, axis=a.dim, mode="clip")


@converts("aten.gather")
def _gather(walk: Walk, a: Arguments) -> Any:
    return op.gather_elements(a.self, a.index, a.dim)


@converts("aten.index.Tensor")
def _index(walk: Walk, a: Arguments) -> Any:
    present = [(axis, index) for axis, index in enumerate(a.indices) if index is not None]
    if any(str(index.ty.dtype) == "bool" for _, index in present):
        raise Refused("indexing by a mask gives a size that depends on data", node=walk.node.name, operator=str(walk.node.target))
    if len(present) == 1:
        axis, index = present[0]
        return op.take(a.self, nonnegative(walk, index, a.self.ty.shape[axis]), axis=axis, mode="clip")
    axes = [axis for axis, _ in present]
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise Refused("advanced indices with a slice between them cannot be lowered", node=walk.node.name, operator=str(walk.node.target))
    return _joint_index(walk, a.self, axes, [index for _, index in present])


def _joint_index(walk: Walk, value: Any, axes: list[int], indices: list[Any]) -> Any:
    """Flatten the indexed axes to one and gather along it: the indices become one linear index."""
    shape = list(value.ty.shape)
    linear: Any = None
    for axis, index in zip(axes, indices, strict=True):
        index = cast(walk, nonnegative(walk, index, shape[axis]), "int64")
        linear = index if linear is None else walk.emit(op.add(op.multiply(linear, scalar(walk, shape[axis], "int64")), index))
    flat: Any = 1
    for axis in axes:
        flat = flat * shape[axis]
    joined = walk.reshape(value, [*shape[: axes[0]], flat, *shape[axes[-1] + 1 :]])
    return op.take(joined, linear, axis=axes[0], mode="clip")


# ---- new tensors ----------------------------------------------------------------------------------------------------------


@converts("aten.arange")
def _arange(walk: Walk, a: Arguments) -> Any:
    start, step = getattr(a, "start", 0) or 0, getattr(a, "step", 1)
    return op.arange(start, a.end, 1 if step is None else step, dtype_name(walk.fake(walk.node).dtype))


def _filled(walk: Walk, value: float) -> Any:
    return op.full(_dimensions(walk), scalar(walk, value, dtype_name(walk.fake(walk.node).dtype)))


@converts("aten.full", "aten.full_like", "aten.new_full")
def _full(walk: Walk, a: Arguments) -> Any:
    return _filled(walk, a.fill_value)


@converts("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.empty", "aten.empty_like", "aten.new_empty")
def _zeros(walk: Walk, a: Arguments) -> Any:
    return _filled(walk, 0)


@converts("aten.ones", "aten.ones_like", "aten.new_ones")
def _ones(walk: Walk, a: Arguments) -> Any:
    return _filled(walk, 1)


@converts("aten.scalar_tensor")
def _scalar_tensor(walk: Walk, a: Arguments) -> Any:
    return scalar(walk, a.s, dtype_name(walk.fake(walk.node).dtype))


@converts("aten.slice_scatter")
def _slice_scatter(walk: Walk, a: Arguments) -> Any:
    count = walk.fake(walk.node.args[1]).shape[a.dim]
    start = a.start or 0
    return op.slice_scatter(a.self, a.src, start, start + walk.sizes.size(count) * a.step, a.step, a.dim)


@converts("aten.sym_size", "aten.sym_numel", "aten._assert_tensor_metadata", "aten.copy", order=POINTWISE)
def _copy(walk: Walk, a: Arguments) -> Any:
    if not hasattr(a, "src"):
        return None
    like = walk.fake(walk.node)
    return op.broadcast_to(cast(walk, a.src, dtype_name(like.dtype)), _dimensions(walk)) if isinstance(like, torch.Tensor) else None

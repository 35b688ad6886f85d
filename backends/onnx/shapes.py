"""Operators that move, pick or make elements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.onnx.emit import Emitter, converts

_LARGEST = (1 << 63) - 1


def _rank(emitter: Emitter, x: Any) -> int:
    return emitter.fake(x).ndim


def _result_sizes(emitter: Emitter) -> list[int]:
    """Return the result's sizes with -1 for the dynamic one.

    Raises:
        Refused: more than one of them is dynamic.
    """
    assert emitter.current is not None
    sizes = [size if isinstance(size, int) else -1 for size in emitter.fake(emitter.current).shape]
    if sizes.count(-1) > 1:
        raise emitter.refuse("a result with several dynamic sizes has no export here")
    return sizes


@converts("aten.view", "aten.reshape", "aten._unsafe_view")
def view(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    sizes = list(arguments.size if hasattr(arguments, "size") else arguments.shape)
    assert emitter.current is not None
    # A size of 0 would copy one, so allowzero says that it is meant; -1 then may not stand beside it.
    zero = any(size == 0 for size in sizes)
    return emitter.op("Reshape", emitter.value(arguments.self), emitter.sizes(sizes), allowzero=1 if zero else None)


@converts("aten.flatten", "aten.unflatten", "aten.squeeze.default")
def reshape_to_result(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("Reshape", emitter.value(arguments.self), emitter.constant(_result_sizes(emitter), torch.int64))


@converts("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    shape = emitter.fake(arguments.self).shape
    axes = [arguments.dim] if isinstance(arguments.dim, int) else list(arguments.dim)
    axes = [axis % len(shape) for axis in axes if isinstance(shape[axis], int) and shape[axis] == 1]
    x = emitter.value(arguments.self)
    return emitter.op("Squeeze", x, emitter.constant(axes, torch.int64)) if axes else x


@converts("aten.unsqueeze")
def unsqueeze(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("Unsqueeze", emitter.value(arguments.self), emitter.constant([arguments.dim], torch.int64))


@converts("aten.permute")
def permute(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = _rank(emitter, arguments.self)
    return emitter.op("Transpose", emitter.value(arguments.self), perm=[axis % rank for axis in arguments.dims])


@converts("aten.transpose.int")
def transpose(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return _swap(emitter, arguments.self, arguments.dim0, arguments.dim1)


@converts("aten.t", "aten.mT", "aten.numpy_T")
def transpose_last(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return _swap(emitter, arguments.self, -2, -1) if _rank(emitter, arguments.self) > 1 else emitter.value(arguments.self)


def _swap(emitter: Emitter, x: Any, a: int, b: int) -> Any:
    order = list(range(_rank(emitter, x)))
    order[a], order[b] = order[b], order[a]
    return emitter.op("Transpose", emitter.value(x), perm=order)


@converts("aten.expand")
def expand(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    sizes = [1 if isinstance(size, int) and size == -1 else size for size in arguments.size]  # 1 keeps the size in ONNX
    return emitter.op("Expand", emitter.value(arguments.self), emitter.sizes(sizes))


@converts("aten.repeat")
def repeat(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    x, rank = emitter.value(arguments.self), _rank(emitter, arguments.self)
    if missing := len(arguments.repeats) - rank:
        x = emitter.op("Unsqueeze", x, emitter.constant(list(range(missing)), torch.int64))
    return emitter.op("Tile", x, emitter.sizes(list(arguments.repeats)))


@converts("aten.cat")
def concat(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    parts = [part for part in arguments.tensors if emitter.fake(part).shape != (0,)]
    return emitter.op("Concat", *(emitter.value(part, dtype) for part in parts), axis=arguments.dim)


@converts("aten.stack")
def stack(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = _rank(emitter, arguments.tensors[0])
    axis = emitter.constant([arguments.dim % (rank + 1)], torch.int64)
    return emitter.op(
        "Concat", *(emitter.op("Unsqueeze", emitter.value(part), axis) for part in arguments.tensors), axis=arguments.dim % (rank + 1)
    )


# ---- picking --------------------------------------------------------------------------------------------------------------


@converts("aten.split_with_sizes")
def split_with_sizes(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    sizes = list(arguments.split_sizes)
    made = emitter.op("Split", emitter.value(arguments.self), emitter.sizes(sizes), outputs=len(sizes), axis=arguments.dim)
    return made if len(sizes) > 1 else [made]


@converts("aten.split.Tensor", "aten.chunk")
def split(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    sizes = [part.shape[arguments.dim] for part in emitter.current.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        raise emitter.refuse("a split of a dynamic axis has no export")
    made = emitter.op("Split", emitter.value(arguments.self), emitter.sizes(sizes), outputs=len(sizes), axis=arguments.dim)
    return made if len(sizes) > 1 else [made]


@converts("aten.unbind")
def unbind(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    count = len(emitter.current.meta["val"])
    indices = [emitter.constant(index, torch.int64) for index in range(count)]
    return [emitter.op("Gather", emitter.value(arguments.self), index, axis=arguments.dim) for index in indices]


@converts("aten.slice")
def slice_axis(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    start = arguments.start if arguments.start is not None else 0
    end = arguments.end if arguments.end is not None else _LARGEST
    bounds = [emitter.size(start), emitter.size(end), emitter.constant([arguments.dim], torch.int64), emitter.size(arguments.step)]
    return emitter.op("Slice", emitter.value(arguments.self), *bounds)


@converts("aten.narrow")
def narrow(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    start = emitter.size(arguments.start)
    end = emitter.op("Add", start, emitter.size(arguments.length))
    return emitter.op("Slice", emitter.value(arguments.self), start, end, emitter.constant([arguments.dim], torch.int64))


@converts("aten.select.int")
def select(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    index = arguments.index
    name = emitter.constant(index, torch.int64) if isinstance(index, int) else emitter.op("Squeeze", emitter.size(index))
    return emitter.op("Gather", emitter.value(arguments.self), name, axis=arguments.dim)


@converts("aten.index_select")
def index_select(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("Gather", emitter.value(arguments.self), emitter.value(arguments.index), axis=arguments.dim)


@converts("aten.gather")
def gather(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("GatherElements", emitter.value(arguments.self), emitter.value(arguments.index), axis=arguments.dim)


@converts("aten.index.Tensor")
def index(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Indexing by one integer tensor is Gather; leading ones together are GatherND over their broadcast."""
    given = [(axis, item) for axis, item in enumerate(arguments.indices) if item is not None]
    if any(emitter.fake(item).dtype == torch.bool for _, item in given):
        raise emitter.refuse("indexing by a mask gives a size that depends on values")
    x = emitter.value(arguments.self)
    if len(given) == 1:
        axis, item = given[0]
        return emitter.op("Gather", x, emitter.value(item, torch.int64), axis=axis)
    if [axis for axis, _ in given] != list(range(len(given))):
        raise emitter.refuse("indexing by several tensors is exported only from the first axis on")
    total = emitter.value(given[0][1], torch.int64)
    for _, item in given[1:]:
        total = emitter.op("Add", total, emitter.value(item, torch.int64))
    shape, last = emitter.op("Shape", total), emitter.constant([-1], torch.int64)
    parts = [emitter.op("Unsqueeze", emitter.op("Expand", emitter.value(item, torch.int64), shape), last) for _, item in given]
    return emitter.op("GatherND", x, emitter.op("Concat", *parts, axis=-1))


@converts("aten.flip")
def flip(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    count = len(arguments.dims)
    bounds = [emitter.constant([value] * count, torch.int64) for value in (-1, -_LARGEST)]
    axes = emitter.constant(list(arguments.dims), torch.int64)
    return emitter.op("Slice", emitter.value(arguments.self), *bounds, axes, emitter.constant([-1] * count, torch.int64))


@converts("aten.constant_pad_nd", "aten.pad")
def pad(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    mode = getattr(arguments, "mode", "constant")
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    amounts = list(arguments.pad)
    rank = _rank(emitter, arguments.self)
    begin, end = [0] * rank, [0] * rank
    for position in range(len(amounts) // 2):
        begin[rank - 1 - position], end[rank - 1 - position] = amounts[2 * position], amounts[2 * position + 1]
    operands = [emitter.value(arguments.self), emitter.sizes(begin + end)]
    if mode == "constant":
        operands.append(emitter.constant(arguments.value or 0, emitter.fake(arguments.self).dtype))
    return emitter.op("Pad", *operands, mode=modes[mode])


@converts("aten.tril", "aten.triu")
def triangle(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    upper = int(emitter.current.target._opname == "triu")
    return emitter.op("Trilu", emitter.value(arguments.self), emitter.constant(arguments.diagonal, torch.int64), upper=upper)


# ---- making ---------------------------------------------------------------------------------------------------------------


@converts("aten.arange")
def arange(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    bounds = [getattr(arguments, "start", 0), arguments.end, getattr(arguments, "step", 1)]
    return emitter.op("Range", *(emitter.value(bound, dtype) for bound in bounds))


@converts("aten.full", "aten.zeros", "aten.ones", "aten.new_full", "aten.new_zeros", "aten.new_ones", "aten.scalar_tensor")
def full(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    dtype = emitter.fake(emitter.current).dtype
    value = emitter.value(_fill(emitter, arguments), dtype)
    sizes = list(getattr(arguments, "size", []))
    return emitter.op("Expand", value, emitter.sizes(sizes)) if sizes else value


@converts("aten.full_like", "aten.zeros_like", "aten.ones_like")
def full_like(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    value = emitter.value(_fill(emitter, arguments), emitter.fake(emitter.current).dtype)
    return emitter.op("Expand", value, emitter.op("Shape", emitter.value(arguments.self)))


def _fill(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    if hasattr(arguments, "fill_value"):
        return arguments.fill_value
    name = emitter.current.target._opname
    return arguments.s if name == "scalar_tensor" else int("ones" in name)

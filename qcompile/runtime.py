"""The boundary of a compiled model: arrays in and out, checked against the graph's input types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.graph.types import TensorType, short_dtype


def check_inputs(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], str]:
    """Return the inputs as contiguous tensors in graph order, and the kind (``numpy`` or ``torch``) to answer in.

    NumPy arrays and anything with DLPack are taken without a copy; an array that is not contiguous is copied.

    Raises:
        Refused: naming the input whose presence, dtype or shape is wrong.
    """
    names = [node.name for node in graph.inputs]
    if len(args) == 1 and not kwargs and isinstance(first := args[0], Mapping):
        args, kwargs = [], first
    if len(args) > len(names):
        raise Refused(f"the model takes {len(names)} inputs ({', '.join(names)}), {len(args)} were given")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise Refused(
                "there is no such input" if name not in names else "it is given twice", node=name, way_out=f"inputs are {', '.join(names)}"
            )
        given[name] = value
    if missing := [name for name in names if name not in given]:
        raise Refused("the input is missing", node=missing[0], way_out=f"inputs are {', '.join(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    tensors = [_check(name, given[name], type, graph, sizes) for name, type in zip(names, graph.input_types, strict=True)]
    return tensors, "torch" if any(isinstance(value, torch.Tensor) for value in given.values()) else "numpy"


def _check(name: str, value: Any, expected: TensorType, graph: Graph, sizes: dict[str, tuple[int, str]]) -> torch.Tensor:
    tensor = _to_tensor(name, value)
    if tensor.dtype != expected.dtype:
        raise Refused(
            f"expected {expected}, the array is {short_dtype(tensor.dtype)}{list(tensor.shape)}", node=name, way_out="convert its dtype"
        )
    if tensor.ndim != len(expected.shape):
        raise Refused(f"expected {expected}, the array has shape {list(tensor.shape)}", node=name)
    for axis, (size, wanted) in enumerate(zip(tensor.shape, expected.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            raise Refused(f"axis {axis} has size {size}, expected {wanted} of {expected}", node=name)
        if isinstance(wanted, str):
            low, high = graph.symbols.ranges[wanted]
            if not low <= size <= high:
                raise Refused(f"axis {axis} ({wanted}) has size {size}, allowed are {low} to {high}", node=name)
            known = sizes.setdefault(wanted, (size, name))
            if known[0] != size:
                raise Refused(f"axis {axis} ({wanted}) has size {size}, input {known[1]} has {known[0]}", node=name)
    return tensor


def _to_tensor(name: str, value: Any) -> torch.Tensor:
    try:
        if isinstance(value, np.ndarray) and not _shareable(value):
            value = np.ascontiguousarray(value, value.dtype.newbyteorder("=")).copy()
        tensor = (
            value
            if isinstance(value, torch.Tensor)
            else torch.from_numpy(value)
            if isinstance(value, np.ndarray)
            else torch.utils.dlpack.from_dlpack(value)
        )
    except (TypeError, ValueError, BufferError, RuntimeError, AttributeError) as error:
        raise Refused(
            f"a {type(value).__name__} is no array that can be taken", node=name, way_out="give a NumPy array or a torch tensor"
        ) from error
    return tensor.detach().contiguous()


def _shareable(array: np.ndarray) -> bool:
    """Say whether torch can look at the array's own memory."""
    strides = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return bool(array.flags.writeable and array.dtype.isnative and strides)


def check_indices(graph: Graph, tensors: Sequence[torch.Tensor], rows: Sequence[int | None]) -> None:
    """Raise Refused where an input that indexes a table points beyond it; kernels read where they are told to."""
    for node, tensor, count in zip(graph.inputs, tensors, rows, strict=True):
        if count is not None and tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < count):
            raise Refused(f"it holds an index outside of its table, allowed are 0 to {count - 1}", node=node.name)


def to_output_kind(output: torch.Tensor, kind: str) -> Any:
    """Return the output as a NumPy array or as the tensor itself."""
    return output.numpy() if kind == "numpy" else output

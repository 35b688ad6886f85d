"""Read a .tflite file with float weights into a torch module: what MLPerf Tiny's networks hold, and no more.

The file is a FlatBuffer; its tables are read by their field numbers in TensorFlow Lite's ``schema.fbs`` (version 3). The module reads and
gives NCHW, the file NHWC. Batch normalization is folded in such files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

_DTYPES = {0: "<f4", 2: "<i4", 3: "u1", 4: "<i8", 9: "i1"}
_OPERATORS = {0: "add", 1: "average_pool", 3: "conv", 4: "depthwise", 9: "dense", 17: "max_pool", 22: "reshape", 25: "softmax"}
_ACTIVATIONS = {0: lambda y: y, 1: torch.relu, 3: F.relu6}
# Fields of each operator's options: name -> (field number, struct format, default).
_STRIDES = {"padding": (0, "b", 0), "stride_w": (1, "i", 0), "stride_h": (2, "i", 0)}
_OPTIONS: dict[str, dict[str, tuple[int, str, int]]] = {
    "conv": _STRIDES | {"activation": (3, "b", 0)},
    "depthwise": _STRIDES | {"activation": (4, "b", 0)},
    "average_pool": _STRIDES | {"width": (3, "i", 0), "height": (4, "i", 0), "activation": (5, "b", 0)},
    "max_pool": _STRIDES | {"width": (3, "i", 0), "height": (4, "i", 0), "activation": (5, "b", 0)},
    "dense": {"activation": (0, "b", 0)},
    "add": {"activation": (0, "b", 0)},
}


@dataclass(frozen=True)
class Value:
    """A tensor of the file: its sizes, and its elements where it is constant."""

    name: str
    shape: tuple[int, ...]
    constant: np.ndarray | None


@dataclass(frozen=True)
class Operator:
    """One operator: the numbers of the tensors that it reads (-1: none) and makes, and its options."""

    name: str
    inputs: list[int]
    outputs: list[int]
    options: dict[str, int]


@dataclass(frozen=True)
class File:
    """The only subgraph of a file."""

    values: list[Value]
    operators: list[Operator]
    inputs: list[int]
    outputs: list[int]


class _Table:
    """A FlatBuffer table at a place in the bytes."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place
        self.fields = place - struct.unpack_from("<i", data, place)[0]

    def _field(self, number: int) -> int:
        """Return where a field lies, 0 where the table leaves it out."""
        size = struct.unpack_from("<H", self.data, self.fields)[0]
        offset = struct.unpack_from("<H", self.data, self.fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return self.place + offset if offset else 0

    def number(self, number: int, format: str, default: int = 0) -> int:
        place = self._field(number)
        return int(struct.unpack_from(f"<{format}", self.data, place)[0]) if place else default

    def _behind(self, number: int) -> int:
        place = self._field(number)
        return place + struct.unpack_from("<I", self.data, place)[0] if place else 0

    def table(self, number: int) -> _Table | None:
        place = self._behind(number)
        return _Table(self.data, place) if place else None

    def vector(self, number: int, dtype: str) -> np.ndarray:
        place = self._behind(number)
        count = struct.unpack_from("<I", self.data, place)[0] if place else 0
        return np.frombuffer(self.data, dtype, count, place + 4) if count else np.zeros(0, dtype)

    def tables(self, number: int) -> list[_Table]:
        place = self._behind(number)
        count = struct.unpack_from("<I", self.data, place)[0] if place else 0
        starts = [place + 4 + 4 * i for i in range(count)]
        return [_Table(self.data, start + struct.unpack_from("<I", self.data, start)[0]) for start in starts]


def read(path: Path) -> File:
    """Return what a file holds.

    Raises:
        ValueError: it is no .tflite file, or has an operator that these networks do not have.
    """
    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ValueError(f"{path} is no .tflite file")
    model = _Table(data, struct.unpack_from("<I", data, 0)[0])
    codes = [max(code.number(0, "b"), code.number(3, "i")) for code in model.tables(1)]
    graph, buffers = model.tables(2)[0], model.tables(4)
    values = [_value(table, buffers) for table in graph.tables(0)]
    operators = [_operator(table, codes, path) for table in graph.tables(3)]
    return File(values, operators, graph.vector(1, "<i4").tolist(), graph.vector(2, "<i4").tolist())


def _value(table: _Table, buffers: list[_Table]) -> Value:
    shape = tuple(table.vector(0, "<i4").tolist())
    data = buffers[table.number(2, "I")].vector(0, "u1")
    dtype = _DTYPES.get(table.number(1, "b"), "u1")
    return Value(bytes(table.vector(3, "u1")).decode(), shape, data.view(dtype).reshape(shape) if data.size else None)


def _operator(table: _Table, codes: list[int], path: Path) -> Operator:
    code = codes[table.number(0, "I")]
    if code not in _OPERATORS:
        raise ValueError(f"{path} has operator {code}, which is not read")
    name, options = _OPERATORS[code], table.table(4)
    found = {key: options.number(*field) if options else field[2] for key, field in _OPTIONS.get(name, {}).items()}
    return Operator(name, table.vector(1, "<i4").tolist(), table.vector(2, "<i4").tolist(), found)


# ---- the module -----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A file's network over NCHW; a softmax at its end is left out, so it gives logits."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self.file = file
        self.layers = nn.ModuleDict({str(i): _layer(file, op) for i, op in enumerate(file.operators) if op.name in _LAYERS})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: dict[int, Any] = {self.file.inputs[0]: x}
        for i, op in enumerate(self.file.operators):
            values[op.outputs[0]] = self._compute(i, op, values)
        return values[self.file.outputs[0]]  # type: ignore[no-any-return]

    def _compute(self, number: int, op: Operator, values: dict[int, Any]) -> torch.Tensor:
        x = values[op.inputs[0]]
        if op.name == "softmax":
            return x  # type: ignore[no-any-return]
        if op.name == "reshape":
            # The axes of an image stand in another order in the file: only those of one place may be flattened as they are.
            assert x.ndim == 2 or x.shape[2:] == (1, 1)
            return torch.flatten(x, 1)
        if op.name in _LAYERS:
            x = x.flatten(1) if op.name == "dense" else _padded(x, op, self.layers[str(number)].kernel_size)
            y = self.layers[str(number)](x)
        elif op.name == "add":
            y = x + values[op.inputs[1]]
        else:
            kernel, stride = (op.options["height"], op.options["width"]), (op.options["stride_h"], op.options["stride_w"])
            pool = F.avg_pool2d if op.name == "average_pool" else F.max_pool2d
            y = x.mean((2, 3), keepdim=True) if kernel == tuple(x.shape[2:]) and pool is F.avg_pool2d else pool(x, kernel, stride)
        return _ACTIVATIONS[op.options["activation"]](y)


_LAYERS = ("conv", "depthwise", "dense")


def _layer(file: File, op: Operator) -> nn.Module:
    weight, bias = (file.values[i].constant if i >= 0 else None for i in op.inputs[1:3])
    assert weight is not None
    # TFLite: conv [out, h, w, in], depthwise [1, h, w, channels], dense [out, in].
    kernel = torch.from_numpy(weight.copy())
    if op.name == "dense":
        layer: Any = nn.Linear(kernel.shape[1], kernel.shape[0], bias is not None)
    else:
        kernel = kernel.permute(3, 0, 1, 2) if op.name == "depthwise" else kernel.permute(0, 3, 1, 2)
        groups = kernel.shape[0] if op.name == "depthwise" else 1
        stride, same = (op.options["stride_h"], op.options["stride_w"]), op.options["padding"] == 0
        # SAME padding that is equal on both sides is the layer's; the rest stands before it, see ``_padded``.
        padding = tuple((k - 1) // 2 if same and s == 1 and k % 2 else 0 for k, s in zip(kernel.shape[2:], stride, strict=True))
        layer = nn.Conv2d(kernel.shape[1] * groups, kernel.shape[0], tuple(kernel.shape[2:]), stride, padding, 1, groups, bias is not None)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    return layer  # type: ignore[no-any-return]


def _padded(x: torch.Tensor, op: Operator, kernel: tuple[int, int]) -> torch.Tensor:
    """Return x with the SAME padding that the layer itself does not add: the larger part below and to the right."""
    if op.options["padding"] != 0:
        return x
    sides: list[int] = []
    for size, k, stride in zip((x.shape[3], x.shape[2]), kernel[::-1], (op.options["stride_w"], op.options["stride_h"]), strict=True):
        if stride == 1 and k % 2:
            sides += [0, 0]
            continue
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides) if any(sides) else x

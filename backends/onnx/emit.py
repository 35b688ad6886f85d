"""Writing of an ONNX graph: nodes, initializers and names, in a fixed order so that equal graphs give equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import onnx
import torch
import torch.fx as fx
from onnx import TensorProto, helper

from qcompile.errors import Refused
from qcompile.graph import Graph

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8, torch.uint8: TensorProto.UINT8, torch.bool: TensorProto.BOOL,
}  # fmt: skip

FORMS = ("qdq", "integer")

Converter = Callable[["Emitter", SimpleNamespace], Any]
TABLE: dict[str, Converter] = {}
INTEGER_TABLE: dict[str, Converter] = {}  # asked first in the integer form


def converts(*names: str, table: dict[str, Converter] = TABLE) -> Callable[[Converter], Converter]:
    """Enter a function in a table under operator names such as ``aten.relu``, or ``aten.sum.dim_IntList`` for one overload."""

    def enter(function: Converter) -> Converter:
        for name in names:
            if name in table:
                raise ValueError(f"{name} has two converters")
            table[name] = function
        return function

    return enter


class Emitter:
    """The ONNX graph being written.

    Attributes:
        graph: what is exported.
        form: one of ``FORMS``.
        float_products: why the product of a node is one of floats in the integer form, by the node's name.
        values: name of the ONNX value, or names where there are several, of each FX node. A symbolic int is a vector of one int64.
        current: the FX node being converted; its name begins the names of what it makes.
    """

    def __init__(self, graph: Graph, form: str = "qdq") -> None:
        self.graph = graph
        self.form = form
        self.float_products: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.values: dict[fx.Node, Any] = {}
        self.current: fx.Node | None = None
        self._taken: set[str] = set()
        self._known: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    # ---- names and constants ----------------------------------------------------------------------------------------------

    def free_name(self, wanted: str) -> str:
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def constant(self, value: Any, dtype: torch.dtype | None = None, *, name: str = "") -> str:
        """Return the name of an initializer; equal ones are shared."""
        tensor = value.detach().contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return self.initializer(data, ONNX_TYPES[tensor.dtype], tuple(tensor.shape), name)

    def initializer(self, data: bytes, type: int, shape: tuple[int, ...], name: str = "") -> str:
        key = (type, shape, data)
        if key not in self._known:
            name = self.free_name(name or f"{self.current.name if self.current else 'graph'}.constant")
            self.initializers[name] = TensorProto(name=name, data_type=type, dims=shape, raw_data=data)
            self._known[key] = name
        return self._known[key]

    # ---- calls ------------------------------------------------------------------------------------------------------------

    def op(self, type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add an ONNX node and return the name of its output, or a list of names."""
        base = self.current.name if self.current is not None else "graph"
        names = [self.free_name(f"{base}.{type}") for _ in range(outputs)]
        kept = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(type, list(inputs), names, name=names[0], **kept))
        return names[0] if outputs == 1 else names

    def rename_last(self, value: str, wanted: str) -> str:
        """Give the value a name of its own where the node added last makes it; return the name it has then."""
        if not self.nodes or list(self.nodes[-1].output) != [value]:
            return value
        name = self.free_name(wanted)
        self.nodes[-1].output[0] = self.nodes[-1].name = name
        return name

    # ---- operands ---------------------------------------------------------------------------------------------------------

    def value(self, argument: Any, dtype: torch.dtype | None = None) -> str:
        """Return the name of an operand, cast to a dtype if one is given; numbers become constants."""
        if not isinstance(argument, fx.Node):
            return self.constant(argument, dtype or (torch.float32 if isinstance(argument, float) else torch.int64))
        found = argument.meta["val"]
        if not isinstance(found, torch.Tensor):  # a symbolic int as a tensor operand is a scalar
            scalar = self.op("Squeeze", self.size(argument))
            return scalar if dtype in (None, torch.int64) else self.op("Cast", scalar, to=ONNX_TYPES[dtype])
        if argument not in self.values:  # a constant, written where a float operator first reads it
            self.values[argument] = self.constant(self.graph.constant(argument), name=str(argument.target))
        name = str(self.values[argument])
        return name if dtype in (None, found.dtype) else self.op("Cast", name, to=ONNX_TYPES[dtype])

    def size(self, size: Any) -> str:
        """Return the name of a vector of one int64 for a size."""
        return str(self.values[size]) if isinstance(size, fx.Node) else self.constant([int(size)], torch.int64)

    def sizes(self, sizes: Sequence[Any]) -> str:
        """Return the name of an int64 vector of sizes, some of which may be computed."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes), torch.int64)
        return str(self.op("Concat", *(self.size(size) for size in sizes), axis=0))

    def tensor(self, argument: Any) -> torch.Tensor | None:
        """Return the tensor of a constant operand, or None."""
        return self.graph.constant(argument)

    def fake(self, argument: Any) -> torch.Tensor:
        found = argument.meta["val"]
        assert isinstance(found, torch.Tensor)
        return found

    def refuse(self, reason: str, way_out: str = "") -> Refused:
        assert self.current is not None
        return Refused(reason, node=self.current.name, operator=str(self.current.target), way_out=way_out)

"""Import of ONNX models: the walk over the nodes, inputs and outputs. The operators are in the files beside this one."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from qcompile.capture.onnx import (  # noqa: F401  (each of these files enters its operators in the table)
    activation,
    convolution,
    elementwise,
    indexing,
    matrix,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    shape,
)
from qcompile.capture.onnx.builder import Builder, RangeTooWide, Sizes, Value
from qcompile.capture.onnx.load import NARROW_DTYPES, load_model, printable, read_tensor, torch_dtype
from qcompile.capture.onnx.operators import Call, Result, find_operator
from qcompile.capture.onnx.sizes import compute_sizes
from qcompile.errors import Refused
from qcompile.graph import Graph, Stage, TensorType
from qcompile.graph.graph import build_module
from qcompile.graph.types import LARGEST_SIZE


def capture_onnx(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Graph:
    """Return the graph of an ONNX model; named and anonymous dynamic dimensions stay symbols.

    Constants keep their initializers' names, outputs theirs, and each call has the ONNX node's name as ``meta["scope"]``. A model that
    holds QuantizeLinear or DequantizeLinear gives a graph in stage ``integer``, any other one in stage ``float``.

    Args:
        source: path, bytes of a file, or a model.

    Raises:
        Refused: naming the file, tensor or node that is not taken, with the reason.
    """
    model, folder = load_model(source)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # torch logs a traceback for each call it refuses; Refused says it in one line
    largest: dict[str, int] = {}
    try:
        while True:
            try:
                return _Import(model, folder, largest).run()
            except RangeTooWide as error:  # at most once for each table of the model that a size runs along
                largest[error.symbol] = error.largest
    finally:
        logger.setLevel(level)


class _Import:
    """One import: values by name, and the walk in topological order."""

    def __init__(self, model: ir.Model, folder: Path | None, largest: dict[str, int]) -> None:
        self.model, self.folder, self.largest = model, folder, largest
        self.versions = {("" if domain == "ai.onnx" else domain): version for domain, version in model.opset_imports.items()}
        self.values: dict[str, Value] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.symbol_of: dict[str, str] = {}

    def run(self) -> Graph:
        graph = self.model.graph
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        types = [self._input_type(value) for value in inputs]
        self.build = Builder(self.ranges)
        for value, type in zip(inputs, types, strict=True):
            self.values[value.name or ""] = self.build.placeholder(value.name or "", type)
        for name, initializer in graph.initializers.items():
            self._read_initializer(name, initializer)
        for node in self._sorted_nodes():
            self._import_node(node)
        outputs = [value.name or "" for value in graph.outputs]
        if not outputs:
            raise Refused("the graph has no outputs", node=printable(graph.name or "graph"))
        self.build.graph.output(tuple(self.build.node(self.values[name]) for name in outputs))
        self._check_symbols(types)
        return self._finish(types, [printable(name) for name in outputs])

    def _finish(self, types: list[TensorType], names: list[str]) -> Graph:
        targets = {node.target for node in self.build.graph.nodes if node.op == "call_function"}
        quantized = any(getattr(target, "namespace", "") == "qc" for target in targets)
        module = build_module(self.build.constants, {}, self.build.graph)
        stage = Stage.INTEGER if quantized else Stage.FLOAT
        captured = Graph(module, types, self.ranges, stage=stage, history=("capture",), output_names=names)
        captured.clean()
        return captured

    # ---- inputs and constants ---------------------------------------------------------------------------------------------

    def _input_type(self, value: ir.Value) -> TensorType:
        name = printable(value.name)
        if not isinstance(value.type, ir.TensorType):
            raise Refused("the input is not a tensor", node=name, way_out="give the model tensor inputs")
        if value.shape is None:
            raise Refused("the input has no shape", node=name, way_out="export the model with a shape, dynamic sizes may be names")
        dtype = torch_dtype(value.dtype, name)
        if value.dtype in NARROW_DTYPES:
            raise Refused(
                f"{NARROW_DTYPES[value.dtype][1]} inputs are not supported", node=name, way_out="give the model int8 or float inputs"
            )
        return TensorType(dtype, tuple(self._input_size(size, name, axis) for axis, size in enumerate(value.shape)))

    def _input_size(self, size: int | ir.SymbolicDim, input_name: str, axis: int) -> int | str:
        if isinstance(size, int):
            if size < 0:
                raise Refused(f"axis {axis} has the size {size}", node=input_name)
            return size
        wanted = size.value or f"{input_name}_{axis}"
        if wanted not in self.symbol_of:
            legal = re.sub(r"[^0-9A-Za-z_]", "_", wanted)
            legal = legal if legal.isidentifier() else f"size_{legal}"
            free, number = legal, 0
            while free in self.ranges:
                number += 1
                free = f"{legal}_{number}"
            self.symbol_of[wanted] = free
            self.ranges[free] = (1, self.largest.get(free, LARGEST_SIZE))
        return self.symbol_of[wanted]

    def _read_initializer(self, name: str, value: ir.Value) -> None:
        if value.const_value is None:
            raise Refused("the initializer holds no data", node=printable(name))
        tensor = read_tensor(value.const_value, name, self.folder)
        self.values[name] = self.build.name_constant(tensor, name)
        if value.const_value.dtype in NARROW_DTYPES:
            self.build.narrow[id(tensor)] = NARROW_DTYPES[value.const_value.dtype][1]

    # ---- nodes ------------------------------------------------------------------------------------------------------------

    def _sorted_nodes(self) -> list[ir.Node]:
        """Return the nodes so that each comes after those it reads; nodes with subgraphs are refused before."""
        for node in self.model.graph:
            if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
                raise Refused(
                    "control flow is not supported",
                    node=_node_name(node),
                    operator=printable(node.op_type),
                    way_out="export the model without it",
                )
        try:
            self.model.graph.sort()
        except ValueError as error:
            raise Refused("the graph has a cycle", node=_cycle_member(self.model.graph), way_out="an ONNX graph must be acyclic") from error
        return list(self.model.graph)

    def _import_node(self, node: ir.Node) -> None:
        name, operator = _node_name(node), printable(node.op_type)
        domain = "" if node.domain == "ai.onnx" else node.domain
        function = find_operator(domain, node.op_type, self.versions.get(domain, 0))
        if function is None:
            full = f"{printable(domain)}.{operator}" if domain else operator
            way_out = "replace it in the model" if domain in self.versions else "the model imports no operator set for it"
            raise Refused(f"there is no import of {full}", node=name, operator=operator, way_out=way_out)
        self.build.scope = name
        try:
            inputs = [self.values[value.name or ""] if value is not None and value.name else None for value in node.inputs]
            call = Call(node, inputs, self.versions[domain], self.build)
            call.read_tensor = lambda tensor, label: read_tensor(tensor, label, self.folder)
            result: Result | None = compute_sizes(call)
            result = function(call) if result is None else result
        except RangeTooWide:
            raise
        except Refused as error:
            raise Refused(error.reason, node=error.node or name, operator=error.operator or operator, way_out=error.way_out) from error
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            raise Refused(
                f"{type(error).__name__}: {printable(lines[0])}", node=name, operator=operator, way_out="check the model with onnx.checker"
            ) from error
        self._keep(node, result)

    def _keep(self, node: ir.Node, result: Result) -> None:
        results = result if isinstance(result, tuple) else (result,)
        for index, output in enumerate(node.outputs):
            if not output.name:
                continue
            value = results[index] if index < len(results) else None
            if value is None:
                if output.uses() or output.is_graph_output():
                    raise Refused(f"its output {index} is not supported", node=_node_name(node), operator=printable(node.op_type))
                continue
            if isinstance(value, Sizes) and all(isinstance(item, int) for item in value.items.reshape(-1)):
                value = torch.tensor(value.items.astype("int64"))
            if isinstance(value, torch.Tensor):
                self.build.name_constant(value, output.name)
            self.values[output.name] = value

    def _check_symbols(self, types: list[TensorType]) -> None:
        """Refuse a dynamic size that the model's own arithmetic allows only one value for."""
        for node, type in zip(self.build.graph.find_nodes(op="placeholder"), types, strict=True):
            for wanted, size in zip(type.shape, node.meta["val"].shape, strict=True):
                if isinstance(wanted, str) and (isinstance(size, int) or size.node.expr.is_number):
                    raise Refused(f"the model works only for one size of '{wanted}'", node=node.name, way_out="make that dimension static")


def _node_name(node: ir.Node) -> str:
    return printable(node.name or next((out.name for out in node.outputs if out.name), None) or node.op_type)


def _cycle_member(graph: ir.Graph) -> str:
    """Return the name of a node on a cycle: walk back from a node that is never ready until one repeats."""
    waiting = {node: {v.producer() for v in node.inputs if v is not None and v.producer() is not None} for node in graph}
    ready = [node for node, before in waiting.items() if not before]
    while ready:
        done = ready.pop()
        waiting.pop(done, None)
        for output in done.outputs:
            for user, _ in output.uses():
                if user in waiting:
                    waiting[user].discard(done)
                    if not waiting[user]:
                        ready.append(user)
    node, seen = next(iter(waiting), None), set()
    while node is not None and node not in seen:
        seen.add(node)
        node = next((before for before in waiting[node] if before in waiting), None)
    return _node_name(node) if node is not None else ""

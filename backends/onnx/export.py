"""Export to standard ONNX: float operators, and quantized ones as QuantizeLinear and DequantizeLinear around them.

    qc.linear(%x, ..) {x_scheme="int8 tensor sym", out_scheme="int8 tensor sym"}
 -> DequantizeLinear(x), DequantizeLinear(weight) -> MatMul -> Add -> QuantizeLinear

That is the form ``qdq``. Its products run in float32 unless the runtime fuses them, so codes agree except where the float sum falls on
the other side of a rounding boundary. In the form ``integer`` products of codes are MatMulInteger and ConvInteger, and every
operator after them rounds where the graph does: codes are equal.

    qc.linear(%x, ..) -> MatMulInteger -> Cast -> Mul(weight_scale) -> Mul(x_scale) -> Add -> QuantizeLinear
"""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import onnx
import torch
import torch.fx as fx
from onnx import helper
from qcompile.backends.onnx import activations, arithmetic, integers, layers, quantized, shapes  # noqa: F401  enter their operators
from qcompile.backends.onnx.emit import FORMS, INTEGER_TABLE, ONNX_TYPES, TABLE, Converter, Emitter

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Stage
from qcompile.graph.code_operators import is_fixed_point
from qcompile.graph.text import bound_arguments

OPSET = 21
IR_VERSION = 10  # the first that knows int4, and what runtimes of operator set 21 read


def export_onnx(graph: Graph, form: str = "qdq") -> onnx.ModelProto:
    """Return the graph as an ONNX model of operator set 21; the same graph gives the same bytes.

    Names of inputs, outputs and constants are kept, dynamic sizes are named dimensions. The model's metadata names its form
    (``qcompile.form``); in the form ``integer`` also the layers whose products are of floats, with the reason
    (``qcompile.float_products``, JSON).

    Raises:
        Refused: there is no such form, the graph is in stage ``simulated``, or an operator has no export; the message names node and
            operator.
    """
    if form not in FORMS:
        raise Refused(f"unknown ONNX form '{form}'", way_out=f"known are {', '.join(FORMS)}")
    if graph.stage is Stage.SIMULATED:
        raise Refused("a graph with quantizers has no ONNX form", way_out="materialize it first")
    emitter = Emitter(graph, form)
    inputs = [_value_info(emitter, node, emitter.free_name(node.name)) for node in graph.inputs]
    for node, info in zip(graph.inputs, inputs, strict=True):
        emitter.values[node] = info.name
    wanted = _output_names(graph, emitter)
    for node in graph.nodes:
        if node.op == "call_function":
            _convert(emitter, node, wanted.get(node, node.name))
    outputs = [_output(emitter, node, name) for node, name in zip(graph.outputs, graph.output_names, strict=True)]
    body = helper.make_graph(emitter.nodes, "main", inputs, outputs, list(emitter.initializers.values()))
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qcompile")
    about = {"qcompile.form": form}
    about |= {"qcompile.float_products": json.dumps(emitter.float_products)} if form == "integer" else {}
    helper.set_model_props(model, about)
    onnx.checker.check_model(model, full_check=True)
    return model


def _output_names(graph: Graph, emitter: Emitter) -> dict[fx.Node, str]:
    """Return the output name of each node that is returned once; those names are kept free for them."""
    names: dict[fx.Node, str] = {}
    for node, name in zip(graph.outputs, graph.output_names, strict=True):
        names.setdefault(node, name)
    return names


def converter_of(target: Any, form: str = "qdq") -> Converter | None:
    """Return the function that exports an operator, or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return TABLE.get(f"py.{getattr(target, '__name__', target)}")
    packet = f"{target.namespace}.{target._opname}"
    if form == "integer" and packet in INTEGER_TABLE:
        return INTEGER_TABLE[packet]
    return TABLE.get(f"{packet}.{target._overloadname}") or TABLE.get(packet)


def _convert(emitter: Emitter, node: fx.Node, name: str) -> None:
    converter = converter_of(node.target, emitter.form)
    if converter is None:
        raise Refused("there is no ONNX export of this operator", node=node.name, operator=str(node.target), way_out="use another target")
    arguments = bound_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {"args": node.args}
    emitter.current = node
    if is_fixed_point(arguments):
        raise emitter.refuse("ONNX has no requantization by multiplier and shift", "compile without use-fixed-point")
    for key, text in arguments.items():
        if key.endswith("scheme") and text and not parse_scheme(text).format.scaled:
            raise emitter.refuse(f"{parse_scheme(text).format} has no ONNX form", "run it on the target cpu, or use another scheme")
    made = converter(emitter, SimpleNamespace(**arguments))
    emitter.values[node] = emitter.rename_last(made, name) if isinstance(made, str) else made


def _output(emitter: Emitter, node: fx.Node, name: str) -> onnx.ValueInfoProto:
    value = emitter.value(node)
    if value != name or any(value == other.name for other in emitter.graph.inputs):
        emitter.current = node
        emitter.nodes.append(helper.make_node("Identity", [value], [name], name=emitter.free_name(f"{name}.Identity")))
    return _value_info(emitter, node, name)


def _value_info(emitter: Emitter, node: fx.Node, name: str) -> onnx.ValueInfoProto:
    """Return name, type and shape of a value; sizes that are expressions of symbols are named by their text."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype not in ONNX_TYPES:
        raise Refused("the value is not a tensor that ONNX can hold", node=node.name)
    inside = re.fullmatch(r"\w+\[(.*)\]", emitter.graph.type_text(node))
    texts = inside[1].split(",") if inside and inside[1] else []
    texts = texts if len(texts) == value.ndim else [""] * value.ndim
    shape = [int(text) if text.isdigit() else text or None for text in texts]
    return helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], shape)

"""The report of a compile: layers with schemes and errors, what stayed float and why, sizes, and the probes that ``verify`` replays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from qcompile.formats import parse_scheme
from qcompile.graph import Graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, sqnr_db
from qcompile.probe import probe_digests

_LAYERS = {"aten.linear", "aten.conv2d", "aten.embedding"}
_INTEGER_LAYERS = {"qc.linear", "qc.conv2d", "qc.embedding"}
_SIDES = {  # arguments that are stored for a weight; of each, a zero point is the third
    "qc.linear": ("weight", "weight_scale", "weight_zero_point", "weight_table"),
    "qc.conv2d": ("weight", "weight_scale", "weight_zero_point"),
    "qc.embedding": ("weight", "scale", "zero_point"),
}
# Operators that only move or index values: nothing there could be quantized.
_MOVES = frozenset(
    [
        "aten.view",
        "aten.permute",
        "aten.transpose.int",
        "aten.unsqueeze",
        "aten.squeeze.dim",
        "aten.expand",
        "aten.slice.Tensor",
        "aten.select.int",
        "aten.cat",
        "aten.gather",
        "aten.arange",
        "aten.arange.start_step",
        "aten.sym_size.int",
        "aten.flatten.using_ints",
        "aten.clone",
        "aten.embedding",
        "aten.full",
        "aten.ne.Scalar",
        "aten.max_pool2d",
        "aten.constant_pad_nd",
    ]
)


def layer_errors(float_graph: Graph, simulated: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return for each layer the SQNR in dB of its simulated output against its float output, on one batch."""
    names = [n.name for n in float_graph.nodes if n.op == "call_function" and operator_name(n.target) in _LAYERS]
    kept = _values(float_graph, inputs, set(names))
    actual = _values(simulated, inputs, set(names))
    return {name: _finite(sqnr_db(kept[name], actual[name])) for name in names if name in actual}


def _finite(value: float) -> float:
    return 999.0 if math.isinf(value) and value > 0 else round(value, 3) if math.isfinite(value) else -999.0


def _values(graph: Graph, inputs: Sequence[torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                found[n.name] = value
            return value

    with torch.no_grad():
        Recorder(graph.module).run(*inputs)
    return found


def build_report(graph: Graph, context: Context, errors: Mapping[str, float]) -> dict[str, Any]:
    """Return the report as plain data; it holds no times and no paths, so that equal compiles give equal reports."""
    nodes = [node for node in graph.nodes if _is_layer(node)]
    layers = [_layer(graph, node, errors) for node in nodes]
    leftovers = context.target.leftovers(graph)
    float_ops = [{"node": node, "op": op, "reason": reason} for node, op, reason in (*float_operators(graph), *leftovers)]
    stored = {tensor_digest(t): t.numel() * t.element_size() for t in graph.constants.values()}
    once = {_weight_digest(graph, node): layer for node, layer in zip(nodes, layers, strict=True)}  # a tied head is stored once
    bits = sum(layer["stored_bits"] for layer in once.values())
    elements = sum(layer["elements"] for layer in once.values())
    return {
        "layers": [{key: value for key, value in layer.items() if key not in ("stored_bits",)} for layer in layers],
        "float_ops": float_ops,
        "kernel_times": context.kernel_times_used,
        "notes": [list(note) for note in context.notes],
        "warnings": context.warnings,
        "bits_per_weight": round(bits / elements, 4) if elements else 32.0,
        "bytes": sum(stored.values()),
        "float_bytes": float_bytes(graph),
        "probes": probe_digests(graph),
    }


def float_bytes(graph: Graph) -> int:
    """Return the bytes the constants would take with every weight in float32."""
    layers = {id(node): _weight_elements(node) for node in graph.nodes if _is_layer(node)}
    weights = {str(bound_arguments(n)["weight"].target) for n in graph.nodes if _is_layer(n)}
    rest = {tensor_digest(t): t.numel() * 4 for name, t in graph.constants.items() if name not in weights and not _is_side_data(name)}
    return 4 * sum(layers.values()) + sum(rest.values())


def _is_side_data(name: str) -> bool:
    return name.endswith(("_scale", "_zero_point", "_codes", "_table"))


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target) in _LAYERS | _INTEGER_LAYERS and _has_constant_weight(node)


def _has_constant_weight(node: fx.Node) -> bool:
    weight = bound_arguments(node)["weight"]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _weight_digest(graph: Graph, node: fx.Node) -> str:
    weight = graph.constant(bound_arguments(node)["weight"])
    assert weight is not None
    return tensor_digest(weight)


def _weight_shape(node: fx.Node) -> tuple[int, ...]:
    arguments = bound_arguments(node)
    shape = tuple(int(size) for size in arguments["weight"].meta["val"].shape)
    last = arguments.get("in_features") or arguments.get("kernel_width") or arguments.get("size")
    return (*shape[:-1], last) if last else shape


def _weight_elements(node: fx.Node) -> int:
    return math.prod(_weight_shape(node))


def _layer(graph: Graph, node: fx.Node, errors: Mapping[str, float]) -> dict[str, Any]:
    arguments, operator = bound_arguments(node), operator_name(node.target)
    notes, elements = node.meta.get("notes", {}), _weight_elements(node)
    weight, activation, bits = "float32", "float32", 32.0
    if operator in _INTEGER_LAYERS:
        weight = str(arguments.get("weight_scheme") or arguments.get("scheme"))
        activation = arguments.get("x_scheme") or "float32"
        sides = [arguments.get(key) for key in _SIDES[operator]]
        tensors = [graph.constant(side) for side in sides]
        bits = (
            8
            * sum(
                t.numel() * (1 if key == 2 and parse_scheme(weight).bits <= 8 else t.element_size())
                for key, t in enumerate(tensors)
                if t is not None
            )
            / elements
        )
    name = notes.get("layer", node.name)
    return {
        "name": name,
        "node": node.name,
        "op": operator,
        "weight": weight,
        "activation": activation,
        "bits_per_weight": round(bits, 4),
        "sqnr_db": errors.get(notes.get("float_node", node.name)),
        "reason": notes.get("reason", "" if operator in _INTEGER_LAYERS else "no scheme assigned"),
        "elements": elements,
        "stored_bits": bits * elements,
    }


def float_operators(graph: Graph) -> list[tuple[str, str, str]]:
    """Return (node, operator, reason) of float operators that compute: the audit of what stayed float."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or not node.meta["val"].is_floating_point():
            continue
        operator = operator_name(node.target)
        if operator.startswith("qc.") or operator in _MOVES:
            continue
        reason = node.meta.get("notes", {}).get("reason") or "no integer form in the dialect; computed in float32"
        found.append((node.name, operator, reason))
    return found

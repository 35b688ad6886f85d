"""Probes: for every integer layer, seeded codes in, exact products out. The same digests on every target, or ``verify`` names the layer.

A probe runs the layer's own weights and scales without its float epilogue (no activation, residual or float bias), so its float32
result is determined to the bit by the dialect: ``(float32(acc) * weight_scale) * x_scale``. A layer that requantizes by multiplier and
shift has no float part: its probe gives codes. Scales and zero points that a layer would
be given by the values before it (dynamic schemes) are drawn too.

Where codes are values without a scale (bfloat16), a kernel may sum in any order: there each row has one element that is not zero, and so
one product, which is exact.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from qcompile.formats import parse_scheme
from qcompile.graph.code_operators import is_fixed_point
from qcompile.graph.graph import Graph, build_module, tensor_digest
from qcompile.graph.stage import Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.graph.types import TensorType

ROWS = 5  # odd, so that no kernel's row block divides it
VALUE_ROWS = 37  # each meets the weights of one input, so there are more
_NO_EPILOGUE = {"activation": "none", "residual": None, "out_scale": None, "out_zero_point": None, "out_scheme": ""}


def probe_graph(graph: Graph) -> tuple[Graph | None, list[torch.Tensor], list[str]]:
    """Return a graph with one output for each integer layer, its inputs, and the layers' names.

    The graph is None where there is no such layer.
    """
    nodes = [node for node in graph.nodes if _is_probed(graph, node)]
    if not nodes:
        return None, [], []
    made = fx.Graph()
    drawn = [_draw(graph, node) for node in nodes]
    placeholders = [{key: made.placeholder(f"{key}_{i}") for key in inputs} for i, inputs in enumerate(drawn)]
    constants: dict[str, torch.Tensor] = {}
    outputs = []
    for node, given in zip(nodes, placeholders, strict=True):
        arguments = bound_arguments(node)
        arguments |= {} if is_fixed_point(arguments) else _NO_EPILOGUE
        arguments |= given
        bias = graph.constant(arguments["bias"])
        arguments["bias"] = arguments["bias"] if bias is not None and not bias.is_floating_point() else None
        for key, value in arguments.items():
            if isinstance(value, fx.Node) and key not in given:
                tensor = graph.constant(value)
                assert tensor is not None
                constants[str(value.target)] = tensor
                arguments[key] = made.get_attr(str(value.target))
        names = [a.name for a in node.target._schema.arguments]
        outputs.append(made.call_function(node.target, tuple(arguments[name] for name in names)))
    made.output(tuple(outputs))
    tensors = [tensor for inputs in drawn for tensor in inputs.values()]
    types = [TensorType(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    return Graph(build_module(constants, {}, made), types, stage=Stage.INTEGER), tensors, [node.name for node in nodes]


def _is_probed(graph: Graph, node: fx.Node) -> bool:
    """Return whether the node is a layer of integer products whose every weight and scale of its own is a constant."""
    if node.op != "call_function" or operator_name(node.target) not in ("qc.linear", "qc.conv2d"):
        return False
    arguments = bound_arguments(node)
    return bool(arguments["x_scheme"]) and graph.constant(arguments["weight"]) is not None


def _draw(graph: Graph, node: fx.Node) -> dict[str, torch.Tensor]:
    """Return codes drawn by the node's name, over the whole range of the format, extremes included, and what scales them if not constant.

    Scales lie between 2**-10 and 1, zero points in the format's range; both have one value for each row of codes.
    """
    arguments = bound_arguments(node)
    format = parse_scheme(arguments["x_scheme"]).format
    seed = int.from_bytes(hashlib.sha256(node.name.encode()).digest()[:8], "little")
    if operator_name(node.target) == "qc.linear":
        shape: tuple[int, ...] = (ROWS if format.scaled else VALUE_ROWS, arguments["in_features"])
    else:
        weight = arguments["weight"].meta["val"]
        kernel = (weight.shape[2], arguments["kernel_width"])
        side = [
            max(2 * stride + dilation * (k - 1) + 1, 3)
            for k, stride, dilation in zip(kernel, arguments["stride"], arguments["dilation"], strict=True)
        ]
        shape = (1, int(weight.shape[1]) * arguments["groups"], *side)
    generator = np.random.Generator(np.random.PCG64(seed))
    if not format.scaled:
        values = torch.zeros(shape).flatten(1)
        places = generator.integers(0, values.shape[1], len(values))
        values[torch.arange(len(values)), torch.from_numpy(places)] = torch.from_numpy(
            generator.uniform(-8, 8, len(values)).astype(np.float32)
        )
        return {"x": format.encode(values.reshape(shape))}
    drawn = generator.integers(int(format.lowest), int(format.highest) + 1, shape)
    found = {"x": torch.from_numpy(drawn).to(format.storage)}
    if graph.constant(arguments["x_scale"]) is None:
        rows = (*shape[:-1], 1)
        found["x_scale"] = torch.from_numpy(generator.uniform(2.0**-10, 1, rows).astype(np.float32))
        if arguments["x_zero_point"] is not None:
            zero_point = generator.integers(int(format.lowest), int(format.highest) + 1, rows)
            found["x_zero_point"] = torch.from_numpy(zero_point.astype(np.int32))
    return found


def probe_digests(graph: Graph, run: Any = None) -> dict[str, str]:
    """Return the digest of each layer's probe result; ``run(graph, inputs)`` computes them, by default the reference."""
    probe, inputs, names = probe_graph(graph)
    if probe is None:
        return {}
    outputs = run(probe, inputs) if run else probe(*inputs)
    return {name: tensor_digest(output.contiguous()) for name, output in zip(names, outputs, strict=True)}

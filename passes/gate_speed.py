"""Keep a layer float where its low-bit kernel is measured slower than the float kernel.

    %conv2d = aten.conv2d(%x, %w, %b) !{scheme="weight=int8 ..; activation=uint8 .."}
    %conv2d = aten.conv2d(%x, %w, %b) !{scheme="weight=float; activation=float", reason="low-bit kernel takes 1.32x the float time"}

Each different layer (operator, shapes at the example's sizes, scheme) is measured once for a machine, both ways, on the built kernels
themselves. The table is
an input of the build: its entries are reused and stand in the report. A target that measures nothing (reference, onnx) gates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.files import cache_folder
from qcompile.formats import LayerScheme, Scheme, parse_layer_scheme, quantize_dynamic, quantize_tensor
from qcompile.graph import Graph, Stage, TensorType
from qcompile.graph.graph import build_module
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.kernel_times import KernelTimes
from qcompile.pipeline import BITS, Context, Keeps, Pass

_qc = torch.ops.qc

NOISE_US = 5.0  # times of one small kernel differ by so much from run to run


@dataclass(frozen=True)
class GateSpeed(Pass):
    """Take the scheme from layers that it would make slower.

    Attributes:
        margin: how many times the float kernel's time a low-bit kernel may take; more than 1, so that noise decides nothing.
    """

    keeps: ClassVar[Keeps] = BITS
    needs: ClassVar[tuple[str, ...]] = ("assign-bits",)

    margin: float = 1.1

    def run(self, graph: Graph, context: Context) -> int:
        if not context.target.measures:
            return 0
        table = KernelTimes(context.kernel_times or cache_folder() / "kernel_times.json")
        shapes = _input_shapes(graph, context.example_inputs)
        changed = 0
        for node in graph.nodes:
            scheme = _gated(node)
            if scheme is None:
                continue
            key = _key(graph, node, shapes[node.name], scheme, context.target.machine())
            times = table.get(key) or _measure(graph, node, shapes[node.name], scheme, context, table, key)
            ratio = times["low_us"] / times["float_us"]
            if ratio > self.margin and times["low_us"] - times["float_us"] > NOISE_US:
                reason = f"low-bit kernel takes {ratio:.2f}x the float time"
                node.meta["notes"] |= {"scheme": str(LayerScheme()), "reason": reason}
                changed += 1
        context.kernel_times_used = dict(sorted(table.used.items()))
        return changed


def _gated(node: fx.Node) -> LayerScheme | None:
    text = node.meta.get("notes", {}).get("scheme")
    if not text or operator_name(node.target) not in ("aten.linear", "aten.conv2d"):
        return None
    scheme = parse_layer_scheme(text)
    return scheme if scheme.weight else None


def _input_shapes(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape that each layer reads, on the example inputs."""
    if not inputs:
        raise Refused("gate-speed measures at the sizes of the example inputs, there are none", way_out="give example inputs")
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
            if n.op == "call_function" and operator_name(n.target) in ("aten.linear", "aten.conv2d"):
                shapes[n.name] = tuple(self.env[bound_arguments(n)["input"]].shape)
            return super().run_node(n)

    with torch.no_grad():
        Recorder(graph.module).run(*inputs)
    return shapes


def _key(graph: Graph, node: fx.Node, shape: tuple[int, ...], scheme: LayerScheme, machine: str) -> str:
    weight = "x".join(map(str, bound_arguments(node)["weight"].meta["val"].shape))
    arguments = bound_arguments(node)
    geometry = "".join(f" {key}={arguments[key]}" for key in ("stride", "padding", "dilation", "groups") if key in arguments)
    return f"{operator_name(node.target)} input={'x'.join(map(str, shape))} weight={weight}{geometry}; {scheme}; {machine}"


def _measure(
    graph: Graph, node: fx.Node, shape: tuple[int, ...], scheme: LayerScheme, context: Context, table: KernelTimes, key: str
) -> dict[str, float]:
    weight = graph.constant(bound_arguments(node)["weight"])
    assert weight is not None
    assert scheme.weight is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    float_us = context.target.measure(*_float_layer(node, weight, x))
    low_us = context.target.measure(*_low_bit_layer(node, weight, x, scheme.weight, scheme.activation))
    table.add(key, low_us, float_us)
    found = table.get(key)
    assert found is not None
    return found


def _geometry(node: fx.Node) -> list[object]:
    a = bound_arguments(node)
    return [*([list(a[key]) * (2 // len(a[key])) for key in ("stride", "padding", "dilation")]), a["groups"]]


def _float_layer(node: fx.Node, weight: torch.Tensor, x: torch.Tensor) -> tuple[Graph, list[torch.Tensor]]:
    made = fx.Graph()
    operands = (made.placeholder("x"), made.get_attr("weight"), None)
    made.output((made.call_function(node.target, (*operands, *(_geometry(node) if operator_name(node.target) == "aten.conv2d" else []))),))
    return Graph(build_module({"weight": weight}, {}, made), [TensorType(x.dtype, tuple(x.shape))]), [x]


def _low_bit_layer(
    node: fx.Node, weight: torch.Tensor, x: torch.Tensor, weight_scheme: Scheme, x_scheme: Scheme | None
) -> tuple[Graph, list[torch.Tensor]]:
    """Return the layer over codes that are there already: producers quantize in their epilogue."""
    stored = quantize_tensor(weight, weight_scheme)
    sides = {"weight_scale": stored.scale, "weight_zero_point": stored.zero_point}
    constants = {"weight": stored.packed()} | {name: value for name, value in sides.items() if value is not None}
    made, inputs = fx.Graph(), [x]
    x_node, operands = made.placeholder("x"), [None, None]
    if x_scheme is not None:
        codes, scale, zero_point = quantize_dynamic(x, x_scheme)
        inputs = [codes]
        for place, (name, value) in enumerate((("x_scale", scale), ("x_zero_point", zero_point))):
            if value is None:
                continue
            if x_scheme.dynamic:
                operands[place] = made.placeholder(name)
                inputs.append(value)
            else:
                constants[name] = value
                operands[place] = made.get_attr(name)
    leading = (
        x_node,
        *operands,
        made.get_attr("weight"),
        *(made.get_attr(name) if name in constants else None for name in sides),
        None,
        None,
        None,
        None,
        str(x_scheme or ""),
        str(weight_scheme),
    )
    if operator_name(node.target) == "aten.linear":
        made.output((made.call_function(_qc.linear.default, (*leading, weight.shape[1])),))
    else:
        made.output((made.call_function(_qc.conv2d.default, (*leading, weight.shape[-1], *_geometry(node))),))
    types = [TensorType(value.dtype, tuple(value.shape)) for value in inputs]
    return Graph(build_module(constants, {}, made), types, stage=Stage.INTEGER), inputs

"""What goes in and out of a model in C: codes. The graph's first quantizers and last dequantizers are left to the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.graph.text import bound_arguments

qc = torch.ops.qc
CHANNELS_LAST = (0, 2, 3, 1)


@dataclass(frozen=True)
class Port:
    """An input or output as C sees it.

    Attributes:
        name: of the model's input or output.
        dtype: of an element, ``int8``.
        shape: in memory; images are NHWC.
        scale: value of one step of a code; None for values that are no codes.
        zero_point: the code of zero.
        scheme: of the codes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int = 0
    scheme: str = ""

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        return self.elements * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()


def without_boundary(graph: Graph) -> tuple[Graph, list[Port], list[Port]]:
    """Return the graph from codes to codes, and what its inputs and outputs are.

    An input that is read in any other way than by one quantizer stays what it is, and so does an output that nothing dequantizes.

    Raises:
        Refused: a size is known only at the call.
    """
    graph = graph.copy()
    inputs = [_strip_input(graph, node) for node in graph.inputs]
    outputs = []
    returned = list(graph.outputs)
    for number, node in enumerate(returned):
        given = bound_arguments(node) if node.target is qc.dequantize.default and node.op == "call_function" else {}
        whole = given and given["size"] is None and given["table"] is None and graph.constant(given["scale"]) is not None
        if whole and graph.constant(given["scale"]).numel() == 1:  # type: ignore[union-attr]
            returned[number] = given["codes"]
            outputs.append(_port(graph, graph.output_names[number], given["codes"], given))
        else:
            outputs.append(_port(graph, graph.output_names[number], node, {}))
    graph.output.args = (tuple(returned),)
    graph.clean()
    return graph, inputs, outputs


def _strip_input(graph: Graph, node: fx.Node) -> Port:
    users = list(node.users)
    if len(users) != 1 or users[0].target is not qc.quantize.default:
        return _port(graph, node.name, node, {})
    quantize = users[0]
    given = bound_arguments(quantize)
    scale = graph.constant(given["scale"])
    if scale is None or scale.numel() != 1:
        return _port(graph, node.name, node, {})
    node.meta["val"] = quantize.meta["val"]
    graph.replace(quantize, node)
    return _port(graph, node.name, node, given)


def _port(graph: Graph, name: str, node: fx.Node, grid: dict[str, Any]) -> Port:
    fake = node.meta["val"]
    if not all(isinstance(size, int) for size in fake.shape):
        sizes = ", ".join(
            dict.fromkeys(str(size) for size in graph.type_text(node)[:-1].partition("[")[2].split(",") if not size.isdigit())
        )
        raise Refused(
            f"code for an edge target has fixed sizes, and {name} is {graph.type_text(node)}",
            node=node.name,
            way_out=f"give them with --size, such as --size {sizes.split(', ')[0]}=1",
        )
    shape = tuple(fake.shape)
    shape = tuple(shape[axis] for axis in CHANNELS_LAST) if len(shape) == 4 else shape
    dtype = str(fake.dtype).removeprefix("torch.")
    if not grid:
        return Port(name, dtype, shape)
    scale, zero_point = graph.constant(grid["scale"]), graph.constant(grid["zero_point"])
    assert scale is not None
    return Port(name, dtype, shape, float(scale), 0 if zero_point is None else int(zero_point), grid["scheme"])


def in_memory(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the graph as it lies in C's memory."""
    return (value.permute(CHANNELS_LAST) if value.ndim == 4 else value).contiguous()

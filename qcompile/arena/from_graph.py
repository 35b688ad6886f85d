"""The work of a graph whose sizes are known: each operator a step, each tensor a value in NHWC.

What needs no bytes of its own is seen through: views; slices of rows, which are contiguous in NHWC; a concatenation of rows, whose
parts are written straight into it. Inputs, outputs and constants lie outside the arena: a caller gives them, and flash holds constants. An
input's codes are the input, and the codes behind an output are the output: quantizing and dequantizing them is the caller's.

What a target's kernels need and allow is the target's to say (``Kernels``); ``PLAIN`` is what plain loops in order allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from qcompile.arena.overlap import Windows, windows_lead
from qcompile.arena.plan import Plan, plan_work
from qcompile.arena.work import Overlap, Step, Work
from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name

ELEMENTWISE = frozenset({
    "qc.add", "qc.lookup", "aten.minimum", "aten.maximum", "aten.clamp", "aten.clamp.Tensor", "aten.relu", "aten.relu6", "aten.hardtanh",
    "aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "qc.quantize", "qc.dequantize",
})  # fmt: skip
WINDOWS = frozenset({"qc.conv2d", "aten.max_pool2d", "aten.avg_pool2d", "qc.avg_pool2d"})
_VIEWS = frozenset(
    {"aten.view", "aten.reshape", "aten.flatten.using_ints", "aten.squeeze.dim", "aten.unsqueeze", "aten.alias", "aten.detach"}
)


def plain_leads(node: fx.Node) -> dict[fx.Node, int]:
    """Return the lead of each operand that plain loops in order may write the result over: pairs of pixels, all their channels."""
    name, result = operator_name(node.target), node.meta["val"]
    if name in ELEMENTWISE:
        return {
            operand: 0
            for operand in node.all_input_nodes
            if _is_tensor(operand) and operand.meta["val"].shape == result.shape and _element(operand) == _element(node)
        }
    if name in WINDOWS:
        windows = windows_of(node)
        arguments = bound_arguments(node)
        leads = {first_operand(node): windows_lead(windows, block=2)} if windows else {}
        if isinstance(arguments.get("residual"), fx.Node) and _element(arguments["residual"]) == _element(node):
            leads[arguments["residual"]] = 0  # read at the place that is written
        return leads
    return {}


def windows_of(node: fx.Node) -> Windows | None:
    """Return a convolution or pooling as its addresses see it; a 1x1 kernel sees one long row. None for more than one picture."""
    x, y = first_operand(node), node
    arguments = bound_arguments(node)
    (batch, channels, *size), (_, out_channels, *result) = (tuple(map(int, n.meta["val"].shape)) for n in (x, y))
    if batch != 1:
        return None
    kernel = (
        (int(arguments["weight"].meta["val"].shape[-2]), int(arguments["kernel_width"]))
        if "kernel_width" in arguments
        else _pair(arguments["kernel_size"])
    )
    dilation, padding = _pair(arguments.get("dilation", 1)), _pair(arguments["padding"])
    stride = _pair(arguments["stride"] or kernel)
    pixel, result_pixel = channels * _element(x), out_channels * _element(y)
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        return Windows((1, size[0] * size[1]), (1, result[0] * result[1]), pixel, result_pixel)
    span = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    return Windows((size[0], size[1]), (result[0], result[1]), pixel, result_pixel, span, stride, padding)


@dataclass(frozen=True)
class Kernels:
    """What a target's kernels need beside operands and results, and what they allow.

    Attributes:
        leads: for a node, the operands that its result may overlap, each with its lead in bytes (``Overlap``).
        scratch: for a node, the bytes that are its own while it runs.
    """

    leads: Callable[[fx.Node], Mapping[fx.Node, int | None]] = plain_leads
    scratch: Callable[[fx.Node], int] = lambda node: 0


PLAIN = Kernels()


@dataclass(frozen=True)
class GraphWork:
    """The work of a graph, and the node of every step."""

    work: Work
    nodes: tuple[fx.Node, ...]


def planned_bytes(graph: Graph, kernels: Kernels = PLAIN, *, alignment: int = 1, inputs: bool = False) -> int:
    """Return how many bytes the arena of a graph takes, operators in the order of the graph; arguments as ``plan_graph``'s."""
    return plan_graph(graph, kernels, alignment=alignment, inputs=inputs).bytes


def plan_graph(graph: Graph, kernels: Kernels = PLAIN, *, alignment: int = 1, inputs: bool = False, exact: bool = False) -> Plan:
    """Return the plan of a graph's arena.

    Args:
        graph: its sizes are numbers.
        kernels: what the target's kernels need and allow.
        alignment: of every value, in bytes.
        inputs: inputs are copied into the arena, where their place is free once they are read.
        exact: see ``place``.

    Raises:
        Refused: a size is a symbol.
    """
    return plan_work(describe_graph(graph, kernels, inputs=inputs).work, alignment=alignment, exact=exact)


def describe_graph(graph: Graph, kernels: Kernels = PLAIN, *, inputs: bool = False) -> GraphWork:
    """Return the work of a graph; arguments as ``plan_graph``'s.

    Raises:
        Refused: a size is a symbol.
    """
    return _Reader(graph, kernels, inputs).read()


def caller_takes(graph: Graph) -> set[fx.Node]:
    """Return the nodes whose values the caller takes: outputs, and the codes behind outputs that are dequantized."""
    found: set[fx.Node] = set(graph.outputs)
    for node in graph.outputs:
        if node.op == "call_function" and operator_name(node.target) == "qc.dequantize" and len(node.users) == 1:
            found.add(bound_arguments(node)["codes"])
    return found


@dataclass(frozen=True)
class _Piece:
    """Bytes of a value from ``at`` on."""

    value: int
    at: int = 0


@dataclass
class _Reader:
    graph: Graph
    kernels: Kernels
    inputs: bool
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pieces: dict[fx.Node, _Piece] = field(default_factory=dict)
    inside: dict[int, _Piece] = field(default_factory=dict)  # values that are parts of others
    given: set[int] = field(default_factory=set)
    steps: list[fx.Node] = field(default_factory=list)

    def read(self) -> GraphWork:
        outside = caller_takes(self.graph)
        for node in self.graph.nodes:
            if node.op == "placeholder" or self._is_input_codes(node):
                self._add_input(node)
            elif node.op == "call_function" and _is_tensor(node):
                self._add(node, outside)
        nodes = tuple(self.steps)
        steps = tuple(self._step(node) for node in nodes)
        return GraphWork(Work(tuple(self.names), tuple(self.sizes), steps, frozenset(self.given)), nodes)

    def _is_input_codes(self, node: fx.Node) -> bool:
        """Say whether a node quantizes an input that nothing else reads."""
        if node.op != "call_function" or operator_name(node.target) != "qc.quantize":
            return False
        x = first_operand(node)
        return x is not None and x.op == "placeholder" and len(x.users) == 1

    def _add_input(self, node: fx.Node) -> None:
        codes = all(self._is_input_codes(user) for user in node.users) if node.op == "placeholder" else False
        if self.inputs and not codes:
            self.pieces[node] = self._new(node)
            self.given.add(self.pieces[node].value)

    def _new(self, node: fx.Node) -> _Piece:
        self.names.append(node.name)
        self.sizes.append(_bytes(node))
        return _Piece(len(self.sizes) - 1)

    def _add(self, node: fx.Node, outside: set[fx.Node]) -> None:
        source = first_operand(node)
        if node in outside and operator_name(node.target) == "qc.dequantize" and source in outside:
            return
        name = operator_name(node.target)
        if name in _VIEWS and source is not None and _keeps_bytes(source, node):
            if source in self.pieces:
                self.pieces[node] = self.pieces[source]
            return
        if name == "aten.slice.Tensor" and (start := row_slice(node)) is not None:
            if source in self.pieces:
                self.pieces[node] = _Piece(self.pieces[source].value, self.pieces[source].at + start)
            return
        parts = self._direct_parts(node, outside) if name == "aten.cat" else []
        if node not in outside:
            self.pieces[node] = self._new(node)
        if not parts:
            self.steps.append(node)
        at = 0
        for part in parts:
            if node in outside:
                del self.pieces[part]
            else:
                self.inside[self.pieces[part].value] = _Piece(self.pieces[node].value, at)
            at += _bytes(part)

    def _direct_parts(self, cat: fx.Node, outside: set[fx.Node]) -> list[fx.Node]:
        """Return the parts of a concatenation where all of them can be written straight into it."""
        parts = list(bound_arguments(cat)["tensors"])
        written = set(self.steps)
        whole = all(
            part in self.pieces
            and (part in written or (part.op == "call_function" and operator_name(part.target) == "aten.cat"))
            and self.pieces[part].value not in self.inside
            and part not in outside
            for part in parts
        )
        return parts if whole and len(set(parts)) == len(parts) and joins_rows(cat) else []

    def _place(self, node: fx.Node) -> _Piece | None:
        piece = self.pieces.get(node)
        while piece is not None and piece.value in self.inside:
            outer = self.inside[piece.value]
            piece = _Piece(outer.value, outer.at + piece.at)
        return piece

    def _step(self, node: fx.Node) -> Step:
        result = self._place(node)
        reads = [(operand, place) for operand in node.all_input_nodes if (place := self._place(operand)) is not None]
        overlaps = []
        if result is not None:
            leads = self.kernels.leads(node)
            for operand, place in reads:
                lead = leads.get(operand, 0)
                if operand in leads and (lead is not None or place.at == result.at):
                    overlaps.append(Overlap(place.value, result.value, None if lead is None else lead + result.at - place.at))
        return Step(
            node.name,
            tuple(place.value for _, place in reads),
            (result.value,) if result is not None else (),
            self.kernels.scratch(node),
            tuple(overlaps),
        )


def row_slice(node: fx.Node) -> int | None:
    """Return the byte at which a slice begins in what it is taken from, where it is contiguous in NHWC, else None."""
    arguments = bound_arguments(node)
    source, result = arguments["self"].meta["val"], node.meta["val"]
    order = _memory_order(source.ndim)
    dim = arguments["dim"] % source.ndim
    place = order.index(dim)
    if arguments["step"] != 1 or any(int(source.shape[axis]) != 1 for axis in order[:place]):
        return None
    size = int(source.shape[dim])
    start = arguments["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    return start * math.prod(int(source.shape[axis]) for axis in order[place + 1 :]) * result.element_size()


def joins_rows(node: fx.Node) -> bool:
    """Say whether the parts of a concatenation follow one another in NHWC."""
    value = node.meta["val"]
    order = _memory_order(value.ndim)
    place = order.index(bound_arguments(node)["dim"] % value.ndim)
    return all(int(value.shape[axis]) == 1 for axis in order[:place])


def _memory_order(rank: int) -> list[int]:
    return [0, 2, 3, 1] if rank == 4 else list(range(rank))


def _keeps_bytes(source: fx.Node, node: fx.Node) -> bool:
    """Say whether a view leaves bytes where they are in NHWC: of images only where one pixel or one channel is all there is."""
    before, after = (tuple(map(int, n.meta["val"].shape)) for n in (source, node))
    return before == after or all(len(shape) != 4 or shape[1] == 1 or math.prod(shape[2:]) == 1 for shape in (before, after))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def first_operand(node: fx.Node) -> Any:
    """Return the first argument of an operator where it is a node, else None; it may be given by name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    first = next(iter(bound_arguments(node).values()), None)
    return first if isinstance(first, fx.Node) else None


def _element(node: fx.Node) -> int:
    return int(node.meta["val"].element_size())


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[1 if len(values) > 1 else 0]))


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    if any(not isinstance(size, int) for size in value.shape):
        sizes = ", ".join(str(size) for size in value.shape)
        raise Refused(f"its size [{sizes}] is not known: no arena can be planned", node=node.name, way_out="fix it, --size batch=1")
    return int(math.prod(value.shape)) * int(value.element_size())

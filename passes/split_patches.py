"""Compute the first layers of a network patch by patch, so that their large images never exist as a whole.

    %a = qc.conv2d(%x, ..) {padding=[1, 1]} : u8[1,16,8,8]
    %b = qc.conv2d(%a, ..) {padding=[1, 1]} : u8[1,8,8,8]

    %slice = aten.slice.Tensor(%x) {dim=2, start=0, end=6, step=1} : u8[1,3,6,8]                 # split-patches{last=b, rows=2}
    %a_patch0 = qc.conv2d(%slice, ..) {padding=[1, 1, 0, 1]} : u8[1,16,5,8]
    %b_patch0 = qc.conv2d(%a_patch0, ..) {padding=[1, 1, 0, 1]} : u8[1,8,4,8]
    .. the same for rows 4 to 7 ..
    %b_patches = aten.cat([%b_patch0, %b_patch1]) {dim=2} : u8[1,8,8,8]

A pixel of a convolution depends on a window of pixels, so a patch of the last image needs a patch of each image before it, larger by the
windows between them; patches overlap there and pixels are computed more than once. Images are padded at their own borders alone
(``qc.conv2d`` pads side by side), inside them a window reads the pixels that are there: every code is the same.

With ``arena_limit`` the fewest patches are taken whose planned arena fits, of these rows before columns, then the split that computes
least. Rows cost no copies: in NHWC a slice of rows is a view, and patches of rows are written into their image; columns are copied.

Source: Lin et al., MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning (2021), section 3.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.fx as fx

from qcompile.arena.from_graph import Kernels, caller_takes, describe_graph, first_operand, plan_graph
from qcompile.arena.plan import Plan, require_fit
from qcompile.errors import Refused
from qcompile.graph import Graph, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import BITS, Context, Keeps, Pass

aten = torch.ops.aten

POINTWISE = frozenset({"aten.minimum", "aten.maximum", "aten.clamp", "aten.relu", "qc.lookup", "qc.add"})
MOST_PATCHES = 16
DEEPEST = 8  # last images that are tried, from the first one that can help

Span = tuple[int, int]  # first pixel, and the one after the last


@dataclass(frozen=True)
class SplitPatches(Pass):
    """Compute the layers up to ``last`` patch by patch.

    Attributes:
        last: the node that is put together from patches; with an arena limit it may be left out.
        rows: of patches.
        columns: of patches.
        arena_limit: bytes that the arena may take. Where it is given, as many patches as needed are taken, none where it fits without.
        inputs: the arena holds the inputs too.
        alignment: of values in the arena, in bytes.
    """

    stage: ClassVar[Stage] = Stage.INTEGER
    keeps: ClassVar[Keeps] = BITS
    needs: ClassVar[tuple[str, ...]] = ("materialize",)

    last: str = ""
    rows: int = 1
    columns: int = 1
    arena_limit: int = 0
    inputs: bool = False
    alignment: int = 4

    def run(self, graph: Graph, context: Context) -> int:
        if any("patches" in node.meta["notes"] for node in graph.nodes):
            return 0
        kernels = context.target.memory()
        if self.arena_limit:
            split = self._fitting(graph, kernels, context)
        elif self.rows * self.columns > 1:
            split = Split(self.last, self.rows, self.columns)
        else:
            return 0
        if split is None:
            return 0
        split.apply(graph)
        context.notes.append((f"{split.last}_patches", f"split-patches: {split.rows} x {split.columns} patches up to {split.last}"))
        return 1

    def plan(self, graph: Graph, kernels: Kernels) -> Plan:
        return plan_graph(graph, kernels, alignment=self.alignment, inputs=self.inputs)

    def _fitting(self, graph: Graph, kernels: Kernels, context: Context) -> Split | None:
        """Return the split with the fewest patches that fits, None where the graph fits as it is.

        Raises:
            Refused: none fits; naming the operator at the peak of the smallest that was found.
        """
        whole = self.plan(graph, kernels)
        if whole.bytes <= self.arena_limit:
            return None
        candidates = list(self._candidates(graph, whole, kernels))
        least, closest = whole.bytes, ""
        for patches in range(2, MOST_PATCHES + 1):
            fitting: list[tuple[bool, int, int, Split]] = []
            for number, last in enumerate(candidates):
                for rows in (r for r in range(1, patches + 1) if patches % r == 0):
                    split = Split(last, rows, patches // rows)
                    if split.refuses(graph):
                        continue
                    bytes = self._needed(split, graph, kernels)
                    if bytes < least:
                        least, closest = bytes, split.text
                    if bytes <= self.arena_limit:
                        fitting.append((split.columns > 1, split.pixels(graph), number, split))
            for *_, split in sorted(fitting, key=lambda entry: entry[:3]):
                if self.plan(split.applied(graph), kernels).bytes <= self.arena_limit:
                    return split
        self._refuse(whole, least, closest)
        return None

    def _needed(self, split: Split, graph: Graph, kernels: Kernels) -> int:
        """Return a bound of the arena that patches need, from a sketch of them alone: what follows them fits."""
        work = describe_graph(split.sketched(graph), kernels, inputs=self.inputs).work  # type: ignore[arg-type]
        return work.blocks(self.alignment).needed() * self.alignment

    def _refuse(self, whole: Plan, least: int, closest: str) -> None:
        found = f"the least that patches need is {least} bytes ({closest})" if closest else "no patches help"
        require_fit(whole, self.arena_limit, way_out=found)

    def _candidates(self, graph: Graph, whole: Plan, kernels: Kernels) -> list[str]:
        """Return last images that can help: behind each of them everything fits, so that only what is split must shrink."""
        nodes = describe_graph(graph, kernels, inputs=self.inputs).nodes
        over = [node for node, used in zip(nodes, whole.used, strict=True) if used > self.arena_limit]
        place = {node: number for number, node in enumerate(graph.nodes)}
        # Where holes between values make the arena larger than any step needs, the peak is what must shrink.
        furthest = place[over[-1]] if over else place[nodes[whole.peak]]
        behind = (node.name for node in graph.nodes if place[node] >= furthest and Split(node.name, 2, 1).refuses(graph) == "")
        return [name for name in itertools.islice(behind, DEEPEST) if self.last in ("", name)]


@dataclass(frozen=True)
class Split:
    """The patches of one image: ``rows`` times ``columns`` patches of the node ``last``."""

    last: str
    rows: int
    columns: int

    @property
    def text(self) -> str:
        return f"{self.rows} x {self.columns} patches up to {self.last}"

    def refuses(self, graph: Graph) -> str:
        """Return why a graph cannot be split so, or ""."""
        try:
            region = Region.of(graph, graph.node(self.last))
        except Refused as error:
            return error.reason
        height, width = _size(region.last)
        return "" if self.rows <= height and self.columns <= width else f"its image has {height} x {width} pixels"

    def patches(self, region: Region) -> Iterator[tuple[int, int, dict[fx.Node, tuple[Span, Span]]]]:
        """Yield row and column of each patch, and the rows and columns that each node of the region has in it."""
        spans = [_parts(size, count) for size, count in zip(_size(region.last), (self.rows, self.columns), strict=True)]
        for (i, rows), (j, columns) in itertools.product(*map(enumerate, spans)):
            yield i, j, region.needed(rows, columns)

    def pixels(self, graph: Graph) -> int:
        """Return how many products the region takes, pixels that patches share counted for each."""
        region = Region.of(graph, graph.node(self.last))
        return sum(
            (rows[1] - rows[0]) * (columns[1] - columns[0]) * _work_of_pixel(node)
            for _, _, spans in self.patches(region)
            for node, (rows, columns) in spans.items()
            if node is not region.source
        )

    def applied(self, graph: Graph) -> Graph:
        """Return a copy of a graph that is split."""
        copy = graph.copy()
        self.apply(copy)
        copy.clean()
        return copy

    def apply(self, graph: Graph) -> None:
        """Split a graph in place.

        Raises:
            Refused: it cannot be split so.
        """
        if reason := self.refuses(graph):
            raise Refused(reason, node=self.last, way_out="name the last node of convolutions and sums behind the input")
        region = Region.of(graph, graph.node(self.last))
        whole = self._emit(region, _Insert(graph, region.last.next))
        whole.meta["notes"]["patches"] = f"{self.rows}x{self.columns}"
        graph.replace(region.last, whole)

    def sketched(self, graph: Graph) -> Sketch:
        """Return the patches alone, types without values, for a plan of their memory."""
        sketch, region = Sketch(), Region.of(graph, graph.node(self.last))
        whole = self._emit(region, sketch)
        sketch.outputs = (whole,) if region.last in caller_takes(graph) else ()
        return sketch

    def _emit(self, region: Region, emit: Emitter) -> fx.Node:
        made: dict[tuple[int, int], fx.Node] = {}
        for i, j, spans in self.patches(region):
            made[i, j] = _emit_patch(emit, region, spans, f"patch{i * self.columns + j}")
        lines = [[made[i, j] for j in range(self.columns)] for i in range(self.rows)]
        return _join(emit, [_join(emit, line, 3, region.last) for line in lines], 2, region.last)


class Emitter(Protocol):
    """Makes the nodes of patches."""

    def call(self, target: Any, arguments: list[Any], size: tuple[int, int], like: fx.Node, name: str) -> fx.Node:
        """Return a call whose result has so many rows and columns, and else the type of ``like``."""


@dataclass(frozen=True)
class _Insert:
    """Inserts nodes into a graph."""

    graph: Graph
    before: fx.Node

    def call(self, target: Any, arguments: list[Any], size: tuple[int, int], like: fx.Node, name: str) -> fx.Node:
        return self.graph.call(target, *arguments, before=self.before, like=like, name=name)


class Sketch:
    """Nodes with types alone, in a graph of their own: what ``describe_graph`` reads, made without inferring types."""

    def __init__(self) -> None:
        self.outputs: tuple[fx.Node, ...] = ()
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self._graph.nodes)

    def call(self, target: Any, arguments: list[Any], size: tuple[int, int], like: fx.Node, name: str) -> fx.Node:
        node = self._graph.call_function(target, tuple(fx.map_arg(arguments, self._own)))
        node.name, value = name, like.meta["val"]
        node.meta["val"] = torch.empty((1, int(value.shape[1]), *size), dtype=value.dtype, device="meta")
        return node

    def _own(self, node: fx.Node) -> fx.Node:
        """Return a node of this graph: a constant or the input of the same type for one of another graph."""
        if node.graph is self._graph:
            return node
        if node not in self._copies:
            kind = "get_attr" if node.op == "get_attr" else "placeholder"
            copy = self._graph.create_node(kind, node.name)
            copy.meta["val"] = node.meta["val"]
            self._copies[node] = copy
        return self._copies[node]


@dataclass(frozen=True)
class Region:
    """The images between ``source``, the codes of the input, and ``last``; ``nodes`` are those that are computed, in order."""

    source: fx.Node
    last: fx.Node
    nodes: tuple[fx.Node, ...]

    @classmethod
    def of(cls, graph: Graph, last: fx.Node) -> Region:
        """Return the region before a node.

        Raises:
            Refused: something in it is not computed pixel by pixel, or is read behind it as well.
        """
        found, waiting, sources = {last}, [last], set()
        while waiting:
            node = waiting.pop()
            if reason := _no_image(node):
                raise Refused(reason, node=node.name)
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" or operand in found:
                    continue
                if _is_source(operand):
                    sources.add(operand)
                else:
                    found.add(operand)
                    waiting.append(operand)
        nodes = tuple(node for node in graph.nodes if node in found)
        if len(sources) != 1:
            raise Refused(f"it depends on {len(sources)} inputs", node=last.name)
        for node in nodes:
            if node is not last and not found.issuperset(node.users):
                raise Refused(f"{node.name} is read behind it too", node=last.name)
        return cls(sources.pop(), last, nodes)

    def needed(self, rows: Span, columns: Span) -> dict[fx.Node, tuple[Span, Span]]:
        """Return the rows and columns of each image that these of the last one need, the source included."""
        needed: dict[fx.Node, list[tuple[Span, Span]]] = {self.last: [(rows, columns)]}
        found: dict[fx.Node, tuple[Span, Span]] = {}
        for node in (*reversed(self.nodes), self.source):
            spans = needed[node]
            found[node] = (_hull([s[0] for s in spans]), _hull([s[1] for s in spans]))
            if node is not self.source:
                for operand in _images(node):
                    needed.setdefault(operand, []).append(_read(node, *found[node]))
        return found


def _is_source(node: fx.Node) -> bool:
    """Say whether a node is an input, or its codes."""
    if node.op == "placeholder":
        return True
    return node.op == "call_function" and operator_name(node.target) == "qc.quantize" and first_operand(node).op == "placeholder"


def _no_image(node: fx.Node) -> str:
    """Return why a node cannot be computed in patches, or ""."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.ndim != 4:
        return f"{node.name} is not an image"
    name, arguments = operator_name(node.target), bound_arguments(node)
    if any(not isinstance(size, int) for size in value.shape) or value.shape[0] != 1:
        return f"{node.name} is not one image of a known size"
    if name == "qc.conv2d":
        return "" if arguments["x_scheme"] and len(arguments["padding"]) == 2 else f"{node.name} does not read codes"
    if name not in POINTWISE:
        return f"{node.name} ({name}) is not computed in patches"
    for operand in node.all_input_nodes:
        other = operand.meta["val"].shape
        if operand.op == "get_attr" and len(other) >= 2 and math.prod(other[-2:]) != 1 and name != "qc.lookup":
            return f"{node.name} has a constant for each pixel"
        if operand.op != "get_attr" and tuple(other) != tuple(value.shape):
            return f"{node.name} reads values of different shapes"
    return ""


def _images(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if operand.op != "get_attr"]


def _size(node: fx.Node) -> tuple[int, int]:
    return int(node.meta["val"].shape[2]), int(node.meta["val"].shape[3])


def _parts(size: int, count: int) -> list[Span]:
    """Return a size cut into parts that differ by one pixel at most."""
    ends = [size * i // count for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def _hull(spans: list[Span]) -> Span:
    return min(first for first, _ in spans), max(end for _, end in spans)


def _read(node: fx.Node, rows: Span, columns: Span) -> tuple[Span, Span]:
    """Return the pixels of a node's images that some of its own pixels read."""
    if operator_name(node.target) != "qc.conv2d":
        return rows, columns
    spans = [_window(node, d, span)[0] for d, span in enumerate((rows, columns))]
    return spans[0], spans[1]


def _window(node: fx.Node, d: int, span: Span) -> tuple[Span, Span]:
    """Return the pixels that a convolution reads along an axis, and how many it pads before and after them."""
    a = bound_arguments(node)
    kernel = a["kernel_width"] if d else int(a["weight"].meta["val"].shape[-2])
    size = _size(a["x"])[d]
    first = span[0] * a["stride"][d] - a["padding"][d]
    end = (span[1] - 1) * a["stride"][d] - a["padding"][d] + a["dilation"][d] * (kernel - 1) + 1
    low, high = min(max(first, 0), size), max(min(end, size), 0)
    return (low, max(high, low)), (low - first, end - max(high, low))


def _emit_patch(emit: Emitter, region: Region, needed: dict[fx.Node, tuple[Span, Span]], name: str) -> fx.Node:
    """Make one patch and return its last node."""
    made: dict[fx.Node, fx.Node] = {}

    def cut(image: fx.Node, spans: tuple[Span, Span]) -> fx.Node:
        """Return these pixels of an image of the patch."""
        rows, columns = needed[image] if image in made else tuple((0, size) for size in _size(image))
        result = made.get(image, image)
        for dim, want, own in ((2, spans[0], rows), (3, spans[1], columns)):
            if want != own:
                size = _length(spans[0]), _length(spans[1] if dim == 3 else columns)
                cut_out = [result, dim, want[0] - own[0], want[1] - own[0], 1]
                result = emit.call(aten.slice.Tensor, cut_out, size, image, f"{image.name}_{name}_slice")
        return result

    for node in region.nodes:
        arguments = bound_arguments(node)
        spans = _read(node, *needed[node])
        pieces = {image: cut(image, spans) for image in _images(node)}
        if operator_name(node.target) == "qc.conv2d":
            sides = [_window(node, d, span)[1] for d, span in enumerate(needed[node])]
            padding = [sides[0][0], sides[1][0], sides[0][1], sides[1][1]]
            arguments["padding"] = padding[:2] if padding[:2] == padding[2:] else padding
        given: list[Any] = [pieces.get(value, value) if isinstance(value, fx.Node) else value for value in arguments.values()]
        rows, columns = needed[node]
        made[node] = emit.call(node.target, given, (_length(rows), _length(columns)), node, f"{node.name}_{name}")
    return made[region.last]


def _join(emit: Emitter, parts: list[fx.Node], dim: int, like: fx.Node) -> fx.Node:
    if len(parts) == 1:
        return parts[0]
    sizes = [_size(part) for part in parts]
    joined = sizes[0][0] if dim == 3 else sum(size[0] for size in sizes), sizes[0][1] if dim == 2 else sum(size[1] for size in sizes)
    return emit.call(aten.cat.default, [parts, dim], joined, like, f"{like.name}_patches")


def _length(span: Span) -> int:
    return span[1] - span[0]


def _work_of_pixel(node: fx.Node) -> int:
    """Return the products of one pixel of a node."""
    if operator_name(node.target) != "qc.conv2d":
        return 0
    weight = bound_arguments(node)["weight"].meta["val"].shape
    return int(math.prod(weight[:-1])) * int(bound_arguments(node)["kernel_width"])

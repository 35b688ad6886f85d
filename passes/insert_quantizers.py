"""Insert quantizers where the schemes say: on weights, and on the activations that layers read.

    %linear = aten.linear(%x, %w, %b) : f32[4,8] !{scheme="W8A8 ..."}

    %x.quantizer = quantizer(%x, scale=@.., zero_point=@..) {scheme="uint8 tensor affine"} : f32[4,16]
    %w.quantizer = quantizer(%w) {scheme="int8 channel=0 sym"} : f32[8,16]
    %linear = aten.linear(%x.quantizer, %w.quantizer, %b) : f32[4,8]

A value has one quantizer for each scheme, however many layers read it; so has a weight that layers share, such as that of embedding and
head. Attention reads its queries, keys and values so, and a product of two computed values both of them. Image-shaped sums and
concatenations between quantized convolutions are integer too (Krishnamoorthi 2018, section 2): their operands and results get quantizers,
and the operands of a concatenation share the grid of its result, so that it only moves codes.

With ``everywhere=true`` every computed value has a quantizer, for processors that have integers alone: ``_places.py`` says how. Values
that are returned, or that a softmax reads, then have the range of all that was seen: of large values cut to one code, none is the largest.

Static ranges come from calibration (``minmax``, ``percentile``, ``mse``, ``entropy``) or, with ``range=model``, from the model itself:
beta +- 6 gamma of the folded batch normalization (Nagel et al. 2019, section 4.2), carried through the operators between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from qcompile.passes import _places
from qcompile.passes.assign_bits import PRODUCTS

from qcompile.errors import Refused
from qcompile.formats import Scheme, choose_scale, parse_layer_scheme
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.statistics import Request, range_request
from qcompile.statistics.model_ranges import DEVIATIONS, ModelRanges
from qcompile.statistics.ranges import find_range

# The arguments that a layer reads in its activation scheme.
_INPUT_ARGUMENTS = {"aten.linear": ("input",), "aten.conv2d": ("input",)} | {name: product[2] for name, product in PRODUCTS.items()}
_JOINS = ("aten.add.Tensor", "aten.cat")


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Insert quantizers and set the ranges of the static ones.

    Attributes:
        range: minmax, percentile, mse, entropy, or model (no data).
        percentile: the share, in percent, of values inside a ``percentile`` range.
        deviations: a ``model`` range reaches so many standard deviations of a channel to either side; 6 in the paper.
        everywhere: quantize every computed value, not only those that layers and joins of images read.
    """

    gives: ClassVar[Stage | None] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()
    needs: ClassVar[tuple[str, ...]] = ("assign-bits",)

    range: str = "minmax"
    percentile: float = 99.99
    deviations: float = DEVIATIONS
    everywhere: bool = False

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if self.range == "model":
            return ()
        activations = self._activations(graph)
        kinds, deciding = self._kinds(activations), self._deciding(activations)
        asked = {other for node in activations for other in deciding.get(node, (node,))}
        return [range_request(kinds[node], node.name) for node, scheme in activations.items() if scheme.calibrated and node in asked]

    def _activations(self, graph: Graph) -> dict[fx.Node, Scheme]:
        return _places.all_places(graph, _activations(graph)) if self.everywhere else _activations(graph)

    def _deciding(self, activations: dict[fx.Node, Scheme]) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Return by value those whose ranges its grid covers, where that is not the value alone."""
        return _places.grids(activations) if self.everywhere else _shared_grids(activations)

    def _kinds(self, activations: dict[fx.Node, Scheme]) -> dict[fx.Node, str]:
        """Return the kind of range that each value has."""
        kinds = dict.fromkeys(activations, self.range)
        if self.everywhere and self.range != "model":
            deciding = _places.grids(activations)
            kinds |= {other: "minmax" for node in activations if _places.keeps_extremes(node) for other in deciding[node]}
        return kinds

    def run(self, graph: Graph, context: Context) -> int:
        activations = self._activations(graph)
        grids = _Grids(self, graph, context, self._kinds(activations))
        placed: dict[fx.Node, fx.Node] = {}
        shared = self._deciding(activations)
        for node, scheme in activations.items():
            scale, zero_point = (None, None) if not scheme.calibrated else grids.find(shared.get(node, (node,)), scheme)
            first_user = _first(graph, node.users)
            placed[node] = graph.call_quantizer(
                Quantizer(scheme, scale, zero_point), node, before=first_user, name=f"{node.name}.quantizer"
            )
            if self.everywhere:
                node.replace_all_uses_with(placed[node], delete_user_cb=lambda user, own=placed[node]: user is not own)
        weights: dict[tuple[fx.Node, Scheme], fx.Node] = {}
        for node in graph.nodes:
            scheme = _scheme(node)
            if _is_join(node) and node in activations:
                _read_quantized(node, placed)
            if scheme is None:
                continue
            for x in _inputs(node) if scheme.activation else ():
                if x in placed:
                    node.replace_input_with(x, placed[x])
            if scheme.weight:
                weight = bound_arguments(node)["weight"]
                if (weight, scheme.weight) not in weights:
                    name = f"{weight.target}_quantizer"
                    weights[weight, scheme.weight] = graph.call_quantizer(Quantizer(scheme.weight), weight, before=node, name=name)
                node.replace_input_with(weight, weights[weight, scheme.weight])
        return len(weights) + len(placed)


def _scheme(node: fx.Node):  # type: ignore[no-untyped-def]
    text = node.meta.get("notes", {}).get("scheme")
    return parse_layer_scheme(text) if text and node.op == "call_function" else None


def _inputs(node: fx.Node) -> dict[fx.Node, None]:
    """Return the values that a layer reads in its activation scheme, each once."""
    arguments = bound_arguments(node)
    return dict.fromkeys(arguments[name] for name in _INPUT_ARGUMENTS[operator_name(node.target)])


def _activations(graph: Graph) -> dict[fx.Node, Scheme]:
    """Return the values that get a quantizer, in graph order, with their scheme.

    Raises:
        Refused: two layers want different schemes of one value.
    """
    wanted: dict[fx.Node, Scheme] = {}
    for node in graph.nodes:
        scheme = _scheme(node)
        for x in _inputs(node) if scheme and scheme.activation else ():
            if wanted.setdefault(x, scheme.activation) != scheme.activation:
                raise Refused(
                    f"two layers want it as '{wanted[x]}' and as '{scheme.activation}'", node=x.name, way_out="give both one scheme"
                )
    for node in reversed(graph.nodes):  # joins last to first, so that a chain of sums is reached from its quantized end
        if _is_join(node) and (scheme := _joined_scheme(node, wanted)):
            for value in (node, *_operands(node)):
                wanted.setdefault(value, scheme)
    return {node: wanted[node] for node in graph.nodes if node in wanted}


def _is_join(node: fx.Node) -> bool:
    """Say whether a node is a sum or concatenation of image-shaped values."""
    if node.op != "call_function" or operator_name(node.target) not in _JOINS:
        return False
    values = _operands(node)
    return (
        all(
            isinstance(v, fx.Node)
            and v.meta["val"].ndim == 4
            and v.op != "get_attr"
            and v.meta["val"].shape[2:] == node.meta["val"].shape[2:]
            for v in values
        )
        and node.meta["val"].is_floating_point()
    )


def _operands(node: fx.Node) -> list[fx.Node]:
    arguments = bound_arguments(node)
    return list(arguments["tensors"]) if "tensors" in arguments else [arguments["self"], arguments["other"]]


def _joined_scheme(node: fx.Node, wanted: dict[fx.Node, Scheme]) -> Scheme | None:
    """Return the static scheme that the result of a join is read with, directly or through one activation."""
    readers = [
        node,
        *(user for user in node.users if user.op == "call_function" and operator_name(user.target) in ("aten.relu", "aten.hardtanh")),
    ]
    schemes = [wanted[reader] for reader in readers if reader in wanted and wanted[reader].calibrated]
    return schemes[0] if schemes else None


def _shared_grids(activations: dict[fx.Node, Scheme]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Map each operand of a concatenation to the concatenation whose grid it takes."""
    shared: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in reversed(activations):
        if node.op == "call_function" and operator_name(node.target) == "aten.cat" and _is_join(node):
            for operand in _operands(node):
                shared.setdefault(operand, shared.get(node, (node,)))
    return shared


def _read_quantized(join: fx.Node, placed: dict[fx.Node, fx.Node]) -> None:
    for operand in dict.fromkeys(_operands(join)):
        if operand in placed and placed[operand] is not join:
            join.replace_input_with(operand, placed[operand])


def _first(graph: Graph, users) -> fx.Node:  # type: ignore[no-untyped-def]
    return next(node for node in graph.nodes if node in users)


class _Grids:
    """Finds scale and zero point of a value from statistics or from the model."""

    def __init__(self, item: InsertQuantizers, graph: Graph, context: Context, kinds: dict[fx.Node, str]) -> None:
        self.item, self.context, self.kinds = item, context, kinds
        self.model = ModelRanges(graph, context.example_inputs, item.deviations) if item.range == "model" else None

    def find(self, nodes: tuple[fx.Node, ...], scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the grid that covers the ranges of these values."""
        if self.item.everywhere and not scheme.symmetric and _places.is_softmax(nodes[0]):
            return _places.softmax_grid(scheme)
        ends = [self._ends(node, scheme) for node in nodes]
        low = torch.stack([torch.as_tensor(low, dtype=torch.float32) for low, _ in ends]).min()
        high = torch.stack([torch.as_tensor(high, dtype=torch.float32) for _, high in ends]).max()
        return choose_scale(low, high, scheme)

    def _ends(self, node: fx.Node, scheme: Scheme) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        if self.model:
            return self.model.range(node)
        assert self.context.statistics is not None
        kind = self.kinds[node]
        result = self.context.statistics[range_request(kind, node.name)]
        return find_range(kind, result, scheme, percentile=self.item.percentile)

"""Write a scheme on every layer with a constant weight, and on products of computed values: uniform, or by pattern from the recipe.

    %linear = aten.linear(%x, %weight, %bias) : f32[4,8]
    %linear = aten.linear(%x, %weight, %bias) : f32[4,8] !{scheme="weight=int8 channel=0 sym; activation=uint8 tensor affine"}

Attention, and a product of two values that are both computed, have no weight: the scheme is of their operands, and they stay float unless
the recipe's ``schemes.attention`` or ``schemes.matmul`` says otherwise. Attention takes codes ``int8 tensor sym``.

Nothing is rounded here: the note is what ``insert-quantizers`` reads, so any other way to choose bits is a pass that writes the same note.
A scheme without a kernel on the target is refused here, and an operator that it cannot run at all, before any work on data starts. A
pattern of the recipe that fits no layer is warned about, and refused where it is a plain name: it was written for a layer that the model
does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import Channel, Group, Integer, LayerScheme, Scheme, parse_layer_scheme
from qcompile.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.nearest import nearest_names
from qcompile.pipeline import BITS, Context, Keeps, Pass

# Operators whose second argument is a weight that can be stored in few bits, and the integer operator that runs them.
QUANTIZABLE = {"aten.linear": "qc.linear", "aten.conv2d": "qc.conv2d", "aten.embedding": "qc.embedding"}

# Products of computed values: their name in a recipe's schemes, the integer operator that runs them, and their operands.
PRODUCTS = {
    "qc.attention": ("attention", "qc.attention_codes", ("q", "k", "v")),
    "aten.matmul": ("matmul", "qc.matmul", ("self", "other")),
    "aten.bmm": ("matmul", "qc.matmul", ("self", "mat2")),
}


@dataclass(frozen=True)
class AssignBits(Pass):
    """Assign schemes to layers.

    Attributes:
        scheme: one scheme for all layers, such as ``W8A8``; empty takes the recipe's.
    """

    keeps: ClassVar[Keeps] = BITS

    scheme: str = ""

    def run(self, graph: Graph, context: Context) -> int:
        changed = 0
        context.target.check(graph)
        self._check_patterns(graph, context)
        for node in graph.nodes:
            if node.op != "call_function" or operator_name(node.target) not in QUANTIZABLE:
                continue
            weight = bound_arguments(node)["weight"]
            if graph.constant(weight) is None:
                context.notes.append((node.name, "stays float: the weight is not a constant"))
                continue
            text, source = self._chosen(node, str(weight.target), context)
            scheme = _fitted(_parsed(text, node, source), tuple(graph.constant(weight).shape), operator_name(node.target))  # type: ignore[union-attr]
            if reason := context.target.supports(QUANTIZABLE[operator_name(node.target)], scheme):
                raise Refused(reason, node=node.name, operator=operator_name(node.target), way_out=f"change {source} in the recipe")
            node.meta["notes"].pop("reason", None)
            if scheme == LayerScheme():
                node.meta["notes"]["reason"] = f"float by {source}"
            node.meta["notes"] |= {"layer": str(weight.target).removesuffix(".weight"), "float_node": node.name}
            changed += node.meta["notes"].get("scheme") != str(scheme)
            node.meta["notes"]["scheme"] = str(scheme)
        return changed + sum(self._assign_product(graph, node, context) for node in _products(graph))

    def _assign_product(self, graph: Graph, node: fx.Node, context: Context) -> bool:
        """Write the scheme of the operands of a product of computed values; return whether it is another one than before."""
        kind, operator, _ = PRODUCTS[operator_name(node.target)]
        text, source = "float", "default"
        if not self.scheme and context.recipe is not None:
            text, source = _by_pattern(node, "", context, kind, lambda text: parse_layer_scheme(text).weight is None)
        scheme, before = _parsed(text, node, source), node.meta["notes"].get("scheme")
        if scheme == LayerScheme():
            node.meta["notes"].pop("scheme", None)
            return before is not None
        if reason := _why_no_product(kind, scheme) or context.target.supports(operator, scheme):
            raise Refused(reason, node=node.name, operator=operator_name(node.target), way_out=f"change {source} in the recipe")
        node.meta["notes"]["scheme"] = str(scheme)
        return before != str(scheme)

    def _chosen(self, node: fx.Node, weight: str, context: Context) -> tuple[str, str]:
        """Return the scheme's text and where it was written; the last pattern that fits wins."""
        kind = operator_name(node.target).removeprefix("aten.")
        if self.scheme or context.recipe is None:
            scheme = self.scheme or "W8A8"
            return (scheme if kind != "embedding" else "weight=int8 channel=0 sym; activation=float"), f"assign-bits{{scheme={scheme}}}"
        kind = "depthwise" if context.recipe.schemes.depthwise and _is_depthwise(node) else kind
        return _by_pattern(node, weight, context, kind)

    def _check_patterns(self, graph: Graph, context: Context) -> None:
        """Warn of the recipe's patterns that fit no layer; raise Refused for one without a wildcard."""
        patterns = context.recipe.schemes.layers if context.recipe else {}
        if patterns and self.scheme:
            _warn(context, f"schemes.layers is not read: assign-bits{{scheme={self.scheme}}} gives every layer one scheme")
            return
        layers = [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) in QUANTIZABLE]
        weights = [str(bound_arguments(node)["weight"].target) for node in layers]
        for pattern in patterns:
            if any(_fits(pattern, node, weight) for node, weight in zip(layers, weights, strict=True)):
                continue
            if any(_fits(pattern, node, "") for node in _products(graph)):
                continue
            reason = f"schemes.layers['{pattern}'] fits no layer"
            known = nearest_names(pattern, (weight.removesuffix(".weight") for weight in weights))
            nearest = f"the nearest of the {len(layers)} layers are {known}" if layers else "the model has no layer that takes a scheme"
            if not any(c in pattern for c in "*?["):
                raise Refused(reason, way_out=nearest)
            _warn(context, f"{reason}; {nearest}")


def _is_depthwise(node: fx.Node) -> bool:
    """Say whether a layer is a convolution of one input channel for each of several groups."""
    arguments = bound_arguments(node)
    return arguments.get("groups", 1) > 1 and arguments["weight"].meta["val"].shape[1] == 1


def _by_pattern(node: fx.Node, weight: str, context: Context, kind: str, may: Callable[[str], bool] = lambda text: True) -> tuple[str, str]:
    """Return the text of a scheme in the recipe and where it was written; the last pattern that fits, and whose scheme may be, wins."""
    assert context.recipe is not None
    schemes = context.recipe.schemes
    chosen = getattr(schemes, kind), f"schemes.{kind}"
    for pattern, text in schemes.layers.items():
        if _fits(pattern, node, weight) and may(text):
            chosen = text, f"schemes.layers['{pattern}']"
    return chosen


def _products(graph: Graph) -> list[fx.Node]:
    """Return the products of values that are both computed."""
    found = [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) in PRODUCTS]
    return [node for node in found if all(graph.constant(x) is None for x in operands(node))]


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a product of ``PRODUCTS``."""
    arguments = bound_arguments(node)
    return [arguments[name] for name in PRODUCTS[operator_name(node.target)][2]]


def _why_no_product(kind: str, scheme: LayerScheme) -> str | None:
    """Return why operands of a product cannot have a scheme; None where they can."""
    x = scheme.activation
    if scheme.weight or x is None:
        return f"{kind} has no weight; its scheme reads 'weight=float; activation=int8 tensor sym'"
    if x.dynamic or str(x.granularity) != "tensor":
        return f"operands of {kind} have one scale each, known before it runs, not '{x}'"
    if kind == "attention" and not (x.symmetric and x.bits <= 8 and isinstance(x.format, Integer) and x.format.lowest < 0):
        return f"attention reads codes 'int8 tensor sym', not '{x}'"
    return None


def _fits(pattern: str, node: fx.Node, weight: str) -> bool:
    """Return whether a recipe's pattern fits a layer's weight, its name, its node or its module."""
    return any(fnmatchcase(name, pattern) for name in (weight, weight.removesuffix(".weight"), node.name, node.meta.get("scope", "")))


def _warn(context: Context, line: str) -> None:
    if line not in context.warnings:  # a pipeline may assign more than once
        context.warnings.append(line)


def _parsed(text: str, node: fx.Node, source: str) -> LayerScheme:
    try:
        return parse_layer_scheme(text)
    except ValueError as error:
        raise Refused(str(error), node=node.name, operator=operator_name(node.target), way_out=f"change {source}") from error


def _fitted(scheme: LayerScheme, shape: tuple[int, ...], operator: str) -> LayerScheme:
    """Return the scheme as this weight can have it: a table is only stored, and groups longer than a row are one group."""
    weight = scheme.weight
    if weight and isinstance(weight.granularity, Group) and weight.granularity.size >= shape[-1]:
        weight = Scheme(weight.format, Channel(0), weight.symmetric, weight.dynamic, weight.scale_format)
    return LayerScheme(weight, None if operator == "aten.embedding" else scheme.activation)

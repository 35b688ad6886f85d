"""Replace rotary positions, written out, by one ``qc.rotary`` over [batch, tokens, features].

    %mul = aten.mul.Tensor(%x, %cos) : f32[batch,4,seq,32]
    %low, %high = aten.slice.Tensor(%x) {dim=3, ..}
    %neg = aten.neg(%high)
    %turned = aten.cat([%neg, %low]) {dim=-1} : f32[batch,4,seq,32]
    %mul_1 = aten.mul.Tensor(%turned, %sin) : f32[batch,4,seq,32]
    %add = aten.add.Tensor(%mul, %mul_1) : f32[batch,4,seq,32]
    ->
    %rotary = qc.rotary(%x, %cos, %sin) {heads=4} : f32[batch,seq,128]

The same bit for bit. Where only the first channels of a head are rotated (GPT-NeoX, Phi), the concatenation with the others goes too.
Around the new operator views and transposes back to the old layout are put; they cancel against those of ``recognize-attention``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from qcompile.passes._layout_rules import rank, size_nodes, static_size, view
from qcompile.passes.canonicalize import tidy_layout

from qcompile.graph import Graph
from qcompile.graph.rewrite import Any_, Match, Op, Rule, apply_rules
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import BITS, Context, Keeps, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class _Rotation:
    """x [batch, heads, tokens, d], of whose heads the first channels are rotated; angles [1 or batch, 1, tokens, channels]."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclass(frozen=True)
class RecognizeRotary(Pass):
    """Rotary positions become one ``qc.rotary``."""

    keeps: ClassVar[Keeps] = BITS
    needs: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, graph: Graph, context: Context) -> int:
        count = apply_rules(graph, RULES, context.log)
        # Only where something changed: a second run must change nothing.
        return count + tidy_layout(graph, context.log) if count else 0


def _find(root: fx.Node) -> _Rotation | str:
    """Return the rotation whose result a node is, or why it is none."""
    if operator_name(root.target) == "aten.cat":
        parts = bound_arguments(root)["tensors"]
        found = _find_whole(parts[0]) if len(parts) == 2 and _is(parts[0], "aten.add.Tensor") else "it joins no rotation"
        if isinstance(found, str):
            return found
        source = _beginning(found.x)
        if source is None or not _is_rest(parts[1], source, found.x):
            return "it does not join what is rotated with the rest of it"
        return _Rotation(source, found.cos, found.sin)
    found = _find_whole(root)
    if not isinstance(found, str) and any(_is(user, "aten.cat") and not isinstance(_find(user), str) for user in root.users):
        return "it is a part of a head: see the concatenation"
    return found


def _find_whole(add: fx.Node) -> _Rotation | str:
    if rank(add) != 4 or add.meta["val"].dtype != torch.float32 or bound_arguments(add)["alpha"] != 1:
        return "it is not float32 over [batch, heads, tokens, channels]"
    products = [bound_arguments(add)[key] for key in ("self", "other")]
    if not all(_is(product, "aten.mul.Tensor") for product in products):
        return "it adds no two products"
    for plain, turned in (products, products[::-1]):
        for x, cos in _orders(plain):
            for other, sin in _orders(turned):
                if _turns(other, x) and all(_is_angle(angle, x) for angle in (cos, sin)):
                    return _Rotation(x, cos, sin)
    return "its products are not of one tensor and of its halves changed"


def _orders(product: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    a = bound_arguments(product)
    return (a["self"], a["other"]), (a["other"], a["self"])


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node.target) == name


def _turns(node: Any, x: Any) -> bool:
    """Say whether a node is (-second half, first half) of x along the last axis."""
    width = static_size(x, 3) if isinstance(x, fx.Node) and rank(x) == 4 else None
    if not width or width % 2 or not _is(node, "aten.cat") or bound_arguments(node)["dim"] not in (-1, 3):
        return False
    parts = bound_arguments(node)["tensors"]
    if len(parts) != 2 or not _is(parts[0], "aten.neg"):
        return False
    return _part(bound_arguments(parts[0])["self"]) == (x, width // 2, width) and _part(parts[1]) == (x, 0, width // 2)


def _part(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return (source, start, end) of a slice of the last axis."""
    if not _is(node, "aten.slice.Tensor"):
        return None
    a = bound_arguments(node)
    width = static_size(a["self"], -1)
    if a["dim"] % rank(a["self"]) != rank(a["self"]) - 1 or a["step"] != 1 or width is None:
        return None
    start, end = a["start"] or 0, width if a["end"] is None else min(a["end"], width)
    return (a["self"], start, end) if isinstance(start, int) and isinstance(end, int) else None


def _beginning(x: fx.Node) -> fx.Node | None:
    """Return what x is the beginning of, along the last axis."""
    part = _part(x)
    return part[0] if part and part[1] == 0 else None


def _is_rest(node: Any, source: fx.Node, x: fx.Node) -> bool:
    return _part(node) == (source, static_size(x, 3), static_size(source, 3))


def _is_angle(node: Any, x: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or rank(node) != 4 or node.meta["val"].dtype != torch.float32:
        return False
    batch, heads, tokens, width = node.meta["val"].shape
    like = x.meta["val"].shape
    return bool(heads == 1 and width == like[3] and str(tokens) == str(like[2]) and (batch == 1 or str(batch) == str(like[0])))


def _guard(graph: Graph, m: Match) -> str | None:
    found = _find(m.root)
    if isinstance(found, str):
        return found
    return None if static_size(found.x, 1) and static_size(found.x, 3) else "its heads are not a fixed number"


def _replace(graph: Graph, m: Match) -> fx.Node:
    found = _find(m.root)
    assert isinstance(found, _Rotation)
    batch, heads, tokens, width = size_nodes(graph, found.x)
    turned = graph.call(aten.transpose.int, found.x, 1, 2, before=m.root, like=found.x)
    x = view(graph, turned, [batch, tokens, heads * width], m.root, like=found.x)
    cos, sin = (_without_heads(graph, angle, m.root) for angle in (found.cos, found.sin))
    rotary = graph.call(torch.ops.qc.rotary.default, x, cos, sin, heads, before=m.root, name="rotary")
    split = graph.call(aten.view.default, rotary, [batch, tokens, heads, width], before=m.root)
    return graph.call(aten.transpose.int, split, 1, 2, before=m.root)


def _without_heads(graph: Graph, angle: fx.Node, before: fx.Node) -> fx.Node:
    if _is(angle, "aten.unsqueeze") and bound_arguments(angle)["dim"] in (1, -3):
        return angle.args[0]
    return graph.call(aten.squeeze.dim, angle, 1, before=before, like=angle)


RULES = (
    Rule("rotary-part", Op("aten.cat", dim=Any_()), _replace, _guard),
    Rule("rotary", Op("aten.add.Tensor", self=Op("aten.mul.Tensor"), other=Op("aten.mul.Tensor")), _replace, _guard),
)

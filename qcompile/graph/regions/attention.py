"""Attention: its query, key and value projections and the linear that reads its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.fx as fx

from qcompile.graph.graph import Graph
from qcompile.graph.regions.residual import operator_name_of
from qcompile.graph.regions.scale import ATTENTION
from qcompile.graph.text import bound_arguments


@dataclass(frozen=True, eq=False)
class AttentionRegion:
    """One attention.

    Attributes:
        node: ``aten.scaled_dot_product_attention`` or ``qc.attention``.
        query: the linear behind the queries, None where it is not one linear.
        key: the same for the keys.
        value: the same for the values.
        output: the linear that reads the result, None where it is not one linear.
        heads: number of query heads.
        kv_heads: number of key and value heads before they are repeated, 0 where there is no value projection.
    """

    node: fx.Node
    query: fx.Node | None
    key: fx.Node | None
    value: fx.Node | None
    output: fx.Node | None
    heads: int
    kv_heads: int


def attention_regions(graph: Graph) -> list[AttentionRegion]:
    """Return every attention of a graph, in graph order."""
    return [_describe(node) for node in graph.nodes if operator_name_of(node) in ATTENTION]


def _describe(node: fx.Node) -> AttentionRegion:
    arguments = bound_arguments(node)
    recognized = operator_name_of(node) == "qc.attention"
    names = ("q", "k", "v") if recognized else ("query", "key", "value")
    query, key, value = (_linear_behind(arguments[name]) for name in names)
    if recognized:
        heads, kv_heads = arguments["heads"], arguments["kv_heads"]
    else:
        heads, d = node.meta["val"].shape[1], node.meta["val"].shape[-1]
        kv_heads = value.meta["val"].shape[-1] // d if value is not None else 0
    return AttentionRegion(node, query, key, value, _linear_after(node), heads, kv_heads)


def _linear_behind(node: fx.Node) -> fx.Node | None:
    """Return the one linear that a value is computed from through views and rotary embedding."""
    found = set(_walk(node, lambda n: n.all_input_nodes))
    return next(iter(found)) if len(found) == 1 else None


def _linear_after(node: fx.Node) -> fx.Node | None:
    found = {x for user in node.users for x in _walk(user, lambda n: n.users)}
    return next(iter(found)) if len(found) == 1 else None


def _walk(start: fx.Node, step) -> Iterable[fx.Node]:  # type: ignore[no-untyped-def]
    """Yield the first linears met from a node on, the node itself included."""
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        if operator_name_of(node) == "aten.linear":
            yield node
            continue
        new = [n for n in step(node) if n.op == "call_function" and n not in seen]
        seen.update(new)
        waiting += new

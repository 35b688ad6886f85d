"""Compute what depends on constants only, and keep one of each value that occurs twice.

    %full = aten.full() {size=[1, 4], fill_value=1} : f32[1,4]
    %mul = aten.mul.Tensor(%weight, %full) : f32[8,4]            ->      %folded.mul = const f32[8,4] @..
    %a = aten.relu(%x) : f32[2,8]
    %b = aten.relu(%x) : f32[2,8]                                ->      %a = aten.relu(%x) : f32[2,8]

Values are computed by the same operators that would compute them while the model runs, so results stay equal bit for bit. A result
larger than both its inputs and ``limit`` bytes is left to be computed: an ``expand`` stays small that way.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from qcompile.passes._layout_rules import unify_sizes

from qcompile.graph import Graph, tensor_digest
from qcompile.pipeline import BITS, Context, Keeps, Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Operators over constants become constants; equal constants and equal operators become one."""

    keeps: ClassVar[Keeps] = BITS
    limit: int = 65536

    def run(self, graph: Graph, context: Context) -> int:
        changes = unify_sizes(graph) + self._evaluate(graph, context)
        # Constants first: operators over two copies of one constant are then seen to be equal.
        changes += _merge_constants(graph) + _merge_operators(graph)
        graph.clean()
        return changes

    def _evaluate(self, graph: Graph, context: Context) -> int:
        known: dict[fx.Node, Any] = {}
        computed: list[fx.Node] = []
        for node in graph.nodes:
            if (constant := graph.constant(node)) is not None:
                known[node] = constant
            elif node.op == "call_function" and _is_pure(node) and all(parent in known for parent in node.all_input_nodes):
                if self._too_large(node, known):
                    context.log.reasons[node.name].append(f"{self.name()}: its value is larger than its operands and {self.limit} bytes")
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                with torch.no_grad():
                    known[node] = node.target(*args, **kwargs)
                computed.append(node)
        # Only values that something unknown reads are stored; those between are gone with their users.
        stored = [node for node in computed if isinstance(known[node], torch.Tensor) and any(user not in known for user in node.users)]
        for node in stored:
            graph.replace(node, graph.add_constant(f"folded.{node.name}", known[node], before=_first_call(graph), like=node))
        return len(stored)

    def _too_large(self, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
        size = _bytes(node.meta["val"])
        return size > self.limit and size > sum(_bytes(known[parent]) for parent in node.all_input_nodes)


def _first_call(graph: Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.numel()) * value.dtype.itemsize
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 8


def _is_pure(node: fx.Node) -> bool:
    """Say whether a call gives the same values every time and does nothing else."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable


# ---- one of each ----------------------------------------------------------------------------------------------------------


def _merge_constants(graph: Graph) -> int:
    first: dict[Hashable, fx.Node] = {}
    changes = 0
    for node in graph.nodes:
        value = graph.constant(node)
        if value is None:
            continue
        kept = first.setdefault((tensor_digest(value), _notes_key(node)), node)
        if kept is not node:
            graph.replace(node, kept)
            changes += 1
    return changes


def _merge_operators(graph: Graph) -> int:
    first: dict[Hashable, fx.Node] = {}
    changes = 0
    for node in graph.nodes:
        if node.op != "call_function" or not _is_pure(node):
            continue
        kept = first.setdefault((node.target, _key(node.args), _key(node.kwargs), _notes_key(node)), node)
        if kept is not node:
            graph.replace(node, kept)
            changes += 1
    return changes


def _notes_key(node: fx.Node) -> Hashable:
    """Return a key of a node's notes: nodes that passes marked differently stay apart."""
    notes = node.meta.get("notes", {})
    return tuple(sorted((key, tensor_digest(value) if isinstance(value, torch.Tensor) else value) for key, value in notes.items()))


def _key(value: Any) -> Hashable:
    """Return a key that is equal for equal arguments only: 1, 1.0 and True stay apart."""
    if isinstance(value, (list, tuple)):
        return ("list", *map(_key, value))
    if isinstance(value, dict):
        return ("dict", *((name, _key(item)) for name, item in sorted(value.items())))
    return (type(value).__name__, value if isinstance(value, fx.Node) else repr(value))

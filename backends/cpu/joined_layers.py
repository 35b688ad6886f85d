"""Which linear layers one product computes: those that read the same input, as query, key and value do, or the two of a gated MLP.

Layers that differ in nothing but weight, bias and activation are one product with the rows of all their weights: the input is packed
once, and threads are woken once. Every layer keeps its scales, its bias and a result of its own, so each result has the same bits
wherever it is computed, and who reads it sees no difference. Layers whose result is codes, or that add a residual, stay alone: what
their kernels do at the end is work of their own.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.legalize_arguments import may_be_swallowed
from torch import fx

from qcompile.graph.text import bound_arguments, operator_name

_WEIGHT = ("weight", "weight_scale", "weight_zero_point", "bias")  # constants, of a dtype and kind that is the same in all layers
_OWN = (*_WEIGHT, "activation")


def joined(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the layers that are computed with a linear layer, itself among them, in the graph's order; alone if it is alone."""
    key = _key(node)
    if key is None:
        return (node,)
    same = {user for user in _input(node).users if _key(user) == key}
    return tuple(other for other in node.graph.nodes if other in same) if len(same) > 1 else (node,)


def _key(node: fx.Node) -> tuple[Any, ...] | None:
    """Return what layers have in common that can be joined; None for a node that cannot be."""
    name = operator_name(node.target) if node.op == "call_function" else ""
    if name not in ("qc.linear", "aten.linear") or not node.users:
        return None
    a = bound_arguments(node)
    if a.get("residual") is not None or a.get("out_scheme") or (name == "aten.linear" and _may_swallow(node)):
        return None
    constants = [a.get(key) for key in _WEIGHT]
    if any(constant is not None and constant.op != "get_attr" for constant in constants):
        return None
    kinds = tuple(None if constant is None else constant.meta["val"].dtype for constant in constants)
    return (name, kinds, *(value for key, value in a.items() if key not in _OWN))


def _may_swallow(node: fx.Node) -> bool:
    """Return whether the kernel of a float layer could also compute what follows it (``legalize_arguments.following``)."""
    return len(node.users) == 1 and may_be_swallowed(next(iter(node.users)))


def _input(node: fx.Node) -> fx.Node:
    a = bound_arguments(node)
    found: fx.Node = a["x"] if "x" in a else a["input"]
    return found

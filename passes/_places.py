"""Where quantizers stand for processors without floating point: on every value, so that each operator takes codes to codes.

    %conv = aten.conv2d(%x, ..)                no quantizer: the relu is a part of the product
    %relu = aten.relu(%conv)                   one
    %pool = aten.max_pool2d(%relu, ..)         one on the grid of its operand: it only compares codes
    %cat = aten.cat([%pool, %other])           one; its operands take its grid
    %soft = aten.softmax.int(%cat, -1)         one on the grid of qc.softmax, 1/256

A chain of functions of one value has a quantizer at its end alone: it becomes one table.
"""

from __future__ import annotations

import torch
import torch.fx as fx
from qcompile.passes.materialize import activation_name

from qcompile.formats import Scheme
from qcompile.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name

# Operators whose results are elements of their one operand, in other places: on codes they are the same.
MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "view", "reshape", "flatten.using_ints", "permute", "transpose.int", "slice.Tensor", "select.int", "squeeze.dim", "squeeze.dims",
        "squeeze", "unsqueeze", "expand", "max_pool2d", "constant_pad_nd", "pad", "upsample_nearest2d.vec", "pixel_shuffle", "clone",
    )
)  # fmt: skip

# Functions of one value, with numbers for all other operands.
POINTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "relu", "relu6", "hardtanh", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "softplus", "mish",
        "clamp", "clamp_min", "clamp_max", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "pow.Tensor_Scalar", "erf", "sin",
        "cos", "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor",
    )
)  # fmt: skip
_FUSING = ("aten.conv2d", "aten.linear", "aten.add.Tensor")  # what a relu becomes a part of
SOFTMAX_STEPS = 256  # the scale of probabilities is 1 over this


def is_pointwise(node: object) -> bool:
    """Say whether a node is a function of one computed value."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or operator_name(node.target) not in POINTWISE:
        return False
    return len(node.all_input_nodes) == 1 and node.all_input_nodes[0].op != "get_attr"


def all_places(graph: Graph, wanted: dict[fx.Node, Scheme]) -> dict[fx.Node, Scheme]:
    """Return every computed float value that gets a quantizer, in graph order, with its scheme.

    Args:
        graph: of stage float.
        wanted: the schemes in which layers read values; values that no layer reads have the first static one of them.
    """
    static = next((scheme for scheme in wanted.values() if scheme.calibrated), None)
    if static is None:
        return wanted
    computed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(x in computed for x in node.all_input_nodes):
            computed.add(node)
    return {
        node: wanted.get(node, static)
        for node in graph.nodes
        if node in wanted or (node in computed and node.op != "output" and _is_float(node) and node.users and not _is_inner(node))
    }


def _is_float(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].is_floating_point()


def _is_inner(node: fx.Node) -> bool:
    """Say whether the one reader of a value computes the next part of the same operator."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    return is_pointwise(user) and ((is_pointwise(node) and not _is_fused(node)) or _is_fused(user))


def _is_fused(node: fx.Node) -> bool:
    """Say whether a relu becomes a part of the product or sum that it alone reads."""
    if operator_name(node.target) not in ("aten.relu", "aten.relu6", "aten.hardtanh") or activation_name(node) is None:
        return False
    x = node.all_input_nodes[0]
    return x.op == "call_function" and operator_name(x.target) in _FUSING and not is_pointwise(x) and len(x.users) == 1


def grids(places: dict[fx.Node, Scheme]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Map each value to those whose ranges its grid covers: itself, the operand it moves, or the concatenations it is a part of."""
    groups = {node: [node] for node in places}
    for node in places:
        for other in _on_one_grid(node):
            if other in groups and groups[other] is not groups[node]:
                joined = groups[other] + groups[node]
                for member in joined:
                    groups[member] = joined
    return {node: _deciding(groups[node], list(places)) for node in places}


def _on_one_grid(node: fx.Node) -> list[fx.Node]:
    name = operator_name(node.target) if node.op == "call_function" else ""
    if name == "aten.cat":
        return [part for part in bound_arguments(node)["tensors"] if not is_softmax(part)]
    return [node.all_input_nodes[0]] if name in MOVES else []


def _deciding(group: list[fx.Node], order: list[fx.Node]) -> tuple[fx.Node, ...]:
    members = sorted(set(group), key=order.index)
    joins = [node for node in members if node.op == "call_function" and operator_name(node.target) == "aten.cat"]
    return tuple(joins) or (members[0],)


def is_softmax(node: fx.Node) -> bool:
    """Say whether a value is a softmax over its last axis, whose grid is always the same."""
    if node.op != "call_function" or operator_name(node.target) not in ("aten.softmax.int", "aten._softmax"):
        return False
    return int(bound_arguments(node)["dim"]) % node.meta["val"].ndim == node.meta["val"].ndim - 1


def softmax_grid(scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point of probabilities in an affine scheme."""
    return torch.tensor(1.0 / SOFTMAX_STEPS), torch.tensor(int(scheme.format.lowest), dtype=torch.int32)


def keeps_extremes(node: fx.Node) -> bool:
    """Say whether the largest values of a value matter most: what is returned is compared, and softmax looks at the greatest."""
    return any(user.op == "output" or is_softmax(user) for user in node.users)

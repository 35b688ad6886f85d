"""Rules about names, layouts and no-ops: what a value is stays the same bit for bit.

These rules bring views, transposes and copies into one form, so that two neighbours that undo each other meet and vanish:

- operators that return their input go: ``clone``, ``dropout`` in evaluation, a cast, expand, slice or view to the same type, ``x + 0``;
- ``permute``, ``t``, ``movedim`` of two axes are ``aten.transpose.int`` with ``dim0 < dim1``;
- a view of a view is one view; a transpose of the same transpose is nothing;
- operators that write in place or under a second name have the name of the plain one: ``relu_`` is ``relu``, ``bmm`` is ``matmul``.

Views have two names. ``aten.view`` is the usual one; ``aten.reshape`` stands only where PyTorch must copy because the strides of the
input do not allow a view, which is the case behind most transposes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from qcompile.graph import Graph
from qcompile.graph.rewrite import Any_, Match, Op, Rule
from qcompile.graph.text import bound_arguments, find_operator, operator_name

aten = torch.ops.aten

VIEWS = "aten.view|aten.reshape|aten._unsafe_view|aten.view_copy|aten._reshape_copy"


def rank(node: fx.Node) -> int:
    """Return the number of axes of a node's tensor."""
    return int(node.meta["val"].ndim)


def static_size(node: fx.Node, axis: int) -> int | None:
    """Return the size of an axis, or None where it is symbolic."""
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else None


def same_type(graph: Graph, a: Any, b: fx.Node) -> str | None:
    """Return None if two values have the same dtype and, symbols included, the same sizes, else the reason."""
    if not isinstance(a, fx.Node) or not isinstance(a.meta["val"], torch.Tensor):
        return "its input is not one tensor"
    left, right = graph.type_text(a), graph.type_text(b)
    return None if left == right else f"{left} becomes {right}"


# ---- operators that return their input ------------------------------------------------------------------------------------


def _keep_input(name: str) -> Callable[[Graph, Match], fx.Node]:
    return lambda graph, m: m[name]


def _keeps_type(graph: Graph, m: Match) -> str | None:
    return same_type(graph, m["x"], m.root)


def _evaluates(graph: Graph, m: Match) -> str | None:
    return "it drops values: the model is in training mode" if bound_arguments(m.root).get("train") else None


def _adds_nothing(graph: Graph, m: Match) -> str | None:
    neutral = 0 if "add" in str(m.root.target) or "sub" in str(m.root.target) else 1
    other = bound_arguments(m.root)["other"]
    if isinstance(other, bool) or not isinstance(other, (int, float)) or other != neutral:
        return f"its operand is not {neutral}"
    return _keeps_type(graph, m)


_COPIES = "aten.clone|aten.contiguous|aten.detach|aten.alias|aten.lift_fresh_copy|aten.positive"
_CASTS = "aten._to_copy|aten.to.dtype|aten.to.dtype_layout|aten.to.device|aten.to.other|aten.type_as|prims.convert_element_type"
_NEUTRAL = "|".join(f"aten.{name}.{kind}" for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar"))

IDENTITY_RULES = (
    Rule("copy", Op(_COPIES, self=Any_("x")), _keep_input("x")),
    Rule("copy", Op("aten.alias_copy|aten.detach_copy", self=Any_("x")), _keep_input("x")),
    Rule("dropout", Op("aten.dropout|aten.feature_dropout|aten.alpha_dropout", input=Any_("x")), _keep_input("x"), _evaluates),
    Rule("cast", Op(_CASTS, self=Any_("x")), _keep_input("x"), _keeps_type),
    Rule("cast", Op("prims.convert_element_type", a=Any_("x")), _keep_input("x"), _keeps_type),
    Rule("same-expand", Op("aten.expand|aten.expand_copy", self=Any_("x")), _keep_input("x"), _keeps_type),
    Rule("whole-slice", Op("aten.slice.Tensor|aten.slice_copy.Tensor|aten.narrow", self=Any_("x")), _keep_input("x"), _keeps_type),
    Rule("same-view", Op(VIEWS, self=Any_("x")), _keep_input("x"), _keeps_type),
    Rule("neutral-operand", Op(_NEUTRAL, self=Any_("x")), _keep_input("x"), _adds_nothing),
)


# ---- views and transposes -------------------------------------------------------------------------------------------------


def _size_argument(node: fx.Node) -> Any:
    arguments = bound_arguments(node)
    return arguments["shape"] if "shape" in arguments else arguments["size"]


def view(graph: Graph, x: fx.Node, size: Any, before: fx.Node, like: fx.Node | None = None) -> fx.Node:
    """Insert a view of x, or a reshape where its strides do not allow one."""
    target = aten.view.default if x.meta["val"].is_contiguous() else aten.reshape.default
    return graph.call(target, x, list(size), before=before, like=like or before)


def _make_view(graph: Graph, m: Match) -> fx.Node:
    return view(graph, m["x"], _size_argument(m.root), m.root)


def _is_not_view(graph: Graph, m: Match) -> str | None:
    contiguous = m["x"].meta["val"].is_contiguous()
    wanted = "aten.view" if contiguous else "aten.reshape"
    name = operator_name(m.root.target)
    # A view of strided data that PyTorch accepts (splitting an axis) stays a view.
    return "it is in canonical form" if name in (wanted, "aten.view") else None


def _flatten_sizes(graph: Graph, m: Match) -> str | None:
    """Only the last axes may become -1 without naming symbolic sizes: all others must be static or the first."""
    shape = m.root.meta["val"].shape
    return None if sum(not isinstance(size, int) for size in shape) <= 1 else "more than one of its sizes is symbolic"


def _reshape_to_type(graph: Graph, m: Match) -> fx.Node:
    return view(graph, m["x"], [size if isinstance(size, int) else -1 for size in m.root.meta["val"].shape], m.root)


def _transpose(graph: Graph, x: fx.Node, a: int, b: int, before: fx.Node) -> fx.Node:
    first, second = sorted((a % rank(x), b % rank(x)))
    return graph.call(aten.transpose.int, x, first, second, before=before)


def _is_unsorted(graph: Graph, m: Match) -> str | None:
    a = bound_arguments(m.root)
    return "it is in canonical form" if 0 <= a["dim0"] < a["dim1"] else None


def _sort_axes(graph: Graph, m: Match) -> fx.Node:
    a = bound_arguments(m.root)
    if a["dim0"] % rank(m["x"]) == a["dim1"] % rank(m["x"]):
        return m["x"]
    return _transpose(graph, m["x"], a["dim0"], a["dim1"], m.root)


def _axes(node: fx.Node) -> list[int]:
    """Return the axes of a permute or transpose: output axis i is input axis axes[i]."""
    a = bound_arguments(node)
    axes = list(range(rank(node)))
    if "dims" in a:
        return [axis % len(axes) for axis in a["dims"]]
    first, second = (a["dim0"], a["dim1"]) if "dim0" in a else (0, 1)
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return axes


def _permute(graph: Graph, x: fx.Node, axes: list[int], before: fx.Node) -> fx.Node:
    moved = [i for i, axis in enumerate(axes) if i != axis]
    if not moved:
        return x
    if len(moved) == 2:
        return _transpose(graph, x, moved[0], moved[1], before)
    return graph.call(aten.permute.default, x, axes, before=before)


def _is_wide_permute(graph: Graph, m: Match) -> str | None:
    moved = sum(i != axis for i, axis in enumerate(_axes(m.root)))
    return "it is in canonical form" if moved > 2 and operator_name(m.root.target) == "aten.permute" else None


def _compose(graph: Graph, m: Match) -> fx.Node:
    inner, outer = _axes(m["inner"]), _axes(m.root)
    return _permute(graph, m["x"], [inner[axis] for axis in outer], m.root)


_PERMUTES = "aten.permute|aten.transpose.int|aten.t"

LAYOUT_RULES = (
    Rule("one-view", Op(VIEWS, self=Op(VIEWS, self=Any_("x"), shared=True)), _make_view),
    Rule("view", Op(VIEWS, self=Any_("x")), _make_view, _is_not_view),
    Rule("flatten", Op("aten.flatten.using_ints|aten.unflatten.int", self=Any_("x")), _reshape_to_type, _flatten_sizes),
    Rule("one-permute", Op(_PERMUTES, self=Op(_PERMUTES, self=Any_("x"), name="inner", shared=True)), _compose),
    Rule("swap", Op("aten.permute|aten.t", self=Any_("x")), lambda g, m: _permute(g, m["x"], _axes(m.root), m.root), _is_wide_permute),
    Rule("sorted-axes", Op("aten.transpose.int", self=Any_("x")), _sort_axes, _is_unsorted),
)


# ---- names ----------------------------------------------------------------------------------------------------------------

# Every operator on the left means exactly what the one on the right does, arguments in the same order.
_SAME: dict[str, str] = {
    **{f"aten.{name}_": f"aten.{name}" for name in ("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "elu")},
    **{f"aten.{name}_.{kind}": f"aten.{name}.{kind}" for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    "aten.hardtanh_": "aten.hardtanh",
    "aten.leaky_relu_": "aten.leaky_relu",
    "aten.clamp_": "aten.clamp",
    "aten.clamp_min_": "aten.clamp_min",
    "aten.bmm": "aten.matmul",
    "aten.mm": "aten.matmul",
    "aten._adaptive_avg_pool2d": "aten.adaptive_avg_pool2d",
    "aten.squeeze_copy.dim": "aten.squeeze.dim",
    "aten.unsqueeze_copy": "aten.unsqueeze",
    "aten.permute_copy": "aten.permute",
    "aten.transpose_copy.int": "aten.transpose.int",
    "aten.t_copy": "aten.t",
    "aten.numpy_T": "aten.t",
}


def _rename(graph: Graph, m: Match) -> fx.Node:
    target = find_operator(_SAME[operator_name(m.root.target)])
    return graph.call(target, *m.root.args, before=m.root, **m.root.kwargs)


def _has_two_axes(graph: Graph, m: Match) -> str | None:
    return None if operator_name(m.root.target) != "aten.numpy_T" or rank(m.root) == 2 else "it reverses more than two axes"


NAME_RULES = (Rule("plain-name", Op("|".join(_SAME)), _rename, _has_two_axes),)


# ---- sizes ----------------------------------------------------------------------------------------------------------------


def size_nodes(graph: Graph, node: fx.Node) -> list[Any]:
    """Return the sizes of a node's tensor as ints and, for symbolic ones, as nodes that stand before every operator."""
    return [
        size if isinstance(size, int) else symbol_node(graph, graph.symbols.text(size)) or _read_size(graph, node, axis)
        for axis, size in enumerate(node.meta["val"].shape)
    ]


def _read_size(graph: Graph, node: fx.Node, axis: int) -> fx.Node:
    return graph.call(aten.sym_size.int, node, axis, before=node.next, like=node)


def symbol_node(graph: Graph, text: str) -> fx.Node | None:
    """Return the one node of a symbol, ``sym_size`` of the first input that has it, or None if the text is no symbol.

    Args:
        graph: gets the node if it has none yet, named after the symbol.
        text: the type of an int in the text form, such as ``int batch``.
    """
    symbol = text.removeprefix("int ")
    for node, type in zip(graph.inputs, graph.input_types, strict=True):
        if symbol in type.shape:
            axis = type.shape.index(symbol)
            for user in node.users:
                if user.target is aten.sym_size.int and user.args == (node, axis) and _is_first(user):
                    return user
            return graph.call(aten.sym_size.int, node, axis, before=_first_call(graph), name=symbol)
    return None


def _first_call(graph: Graph) -> fx.Node:
    """Return the first node that is neither input nor constant nor a size."""
    return next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr") and n.target is not aten.sym_size.int)


def _is_first(node: fx.Node) -> bool:
    """Say whether only inputs, constants and sizes stand before a node, so that every operator may use it."""
    previous = node.prev
    while previous.op in ("placeholder", "get_attr") or previous.target is aten.sym_size.int:
        previous = previous.prev
    return previous.op == "root"


def unify_sizes(graph: Graph) -> int:
    """Let every size that is one symbol be read from one node, and every size that is known be a number; return the changes."""
    changes = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or isinstance(value, (torch.Tensor, bool)) or not isinstance(value, (int, torch.SymInt)):
            continue
        new = value if isinstance(value, int) else symbol_node(graph, graph.symbols.text(value))
        if new is None or new is node:
            continue
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n, old=node, new=new: new if n is old else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n, old=node, new=new: new if n is old else n)
        changes += 1
    graph.clean()
    return changes

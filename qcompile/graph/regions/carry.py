"""How each operator carries the channels of a producer to its users: the table behind scale edges, rotations and absorbed shifts.

A positive scale of each channel passes views, ReLU, pooling, attention (at the value) and gates. A rotation passes only where the operator
is linear and treats the channels that are mixed alike. Anything else has no line in the table and ends the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from qcompile.graph.regions.layout import Layout, axis_channels, channel_axis, expand_layout, repeat_heads, view_layout
from qcompile.graph.text import bound_arguments, operator_name


@dataclass(frozen=True)
class Way:
    """What an operator lets pass.

    Attributes:
        layout: of the result.
        block: runs of so many channels may be mixed with each other (0: all, 1: none).
        clamp: the operator cuts at an upper bound above zero: the bound must be scaled too.
    """

    layout: Layout
    block: int = 0
    shifts: bool = True
    clamp: bool = False


Carry = Callable[[fx.Node, fx.Node, dict[str, Any], Layout], Way | None]

_VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten.using_ints",
          "aten.unsqueeze", "aten.squeeze.dim", "aten.squeeze.dims")  # fmt: skip
_SAME = ("aten.clone", "aten.alias", "aten.detach", "aten.contiguous", "aten.dropout", "aten.lift_fresh_copy")
_POOLS = ("aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.max_pool2d")


def carry(user: fx.Node, x: fx.Node, layout: Layout) -> Way | None:
    """Return what ``user`` lets pass from its operand x with this layout, or None: it ends or blocks the path."""
    if user.op != "call_function" or not isinstance(user.target, torch._ops.OpOverload):
        return None
    rule = _RULES.get(operator_name(user.target))
    return rule(user, x, bound_arguments(user), layout) if rule else None


def _same(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    return Way(layout) if user.meta["val"].dtype == x.meta["val"].dtype else None


def _view(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    viewed = view_layout(layout, user.meta["val"].shape)
    return Way(viewed) if viewed else None


def _transpose(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way:
    axes = list(layout)
    i, j = arguments["dim0"], arguments["dim1"]
    axes[i], axes[j] = axes[j], axes[i]
    return Way(tuple(axes))


def _permute(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way:
    return Way(tuple(layout[d] for d in arguments["dims"]))


def _expand(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way:
    return Way(expand_layout(layout, user.meta["val"].shape))


def _slice(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    """Slices of axes without channels, among them the first or last token."""
    d = arguments["dim"] % len(layout)
    if any(stride for _, stride in layout[d]):
        return None
    return Way(tuple(((user.meta["val"].shape[d], 0),) if i == d else axis for i, axis in enumerate(layout)))


def _select(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    d = arguments["dim"] % len(layout)
    return None if any(stride for _, stride in layout[d]) else Way(layout[:d] + layout[d + 1 :])


def _mean(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    axes = {d % len(layout) for d in arguments["dim"] or range(len(layout))}
    if any(stride for d in axes for _, stride in layout[d]):
        return None
    kept = [((1, 0),) if i in axes else axis for i, axis in enumerate(layout) if arguments["keepdim"] or i not in axes]
    return Way(tuple(kept))


def _pool(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    """Pooling works inside each channel; maxima do not mix."""
    if channel_axis(layout) != len(layout) - 3:
        return None
    size = user.meta["val"].shape
    pooled = (*layout[:-2], ((size[-2], 0),), ((size[-1], 0),))
    return Way(pooled, block=1 if operator_name(user.target) == "aten.max_pool2d" else 0)


def _relu(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way:
    return Way(layout, block=1)


def _bounded(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    """Clamp between 0 and a bound: ReLU6 as hardtanh, as clamp, or with a bound for each channel."""
    low = arguments.get("min_val", arguments.get("min"))
    return Way(layout, block=1, clamp=True) if low == 0 or operator_name(user.target) == "aten.relu6" else None


def _clamp_tensor(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    """An upper bound for each channel, as scaling a ReLU6 leaves it behind."""
    bound = arguments["max"]
    constant = isinstance(bound, fx.Node) and bound.op == "get_attr" and arguments["min"] is None
    return Way(layout, block=1, clamp=True) if constant and x is arguments["self"] else None


def _multiply(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    """A product with something else: a gate, a scalar. A square is no product with something else."""
    left, right = arguments["self"], arguments["other"]
    if left is right or str(user.meta["val"].shape) != str(x.meta["val"].shape):
        return None
    scalar = not isinstance(right if left is x else left, fx.Node)
    return Way(layout, block=0 if scalar else 1)


def _divide(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    if arguments["self"] is not x or arguments["other"] is x or str(user.meta["val"].shape) != str(x.meta["val"].shape):
        return None
    return Way(layout, block=1 if isinstance(arguments["other"], fx.Node) else 0)


def _sdpa(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    """Attention mixes tokens, never the channels of its value."""
    if x is not arguments["value"] or x in (arguments["query"], arguments["key"]) or len(layout) != 4:
        return None
    heads, kv_heads = user.meta["val"].shape[1], x.meta["val"].shape[1]
    axis = layout[1] if heads == kv_heads else repeat_heads(layout[1], kv_heads, heads // kv_heads)
    d = axis_channels(layout[3])
    if axis is None or d is None or any(stride for _, stride in layout[2]):
        return None
    return Way((layout[0], axis, ((user.meta["val"].shape[2], 0),), layout[3]), block=len(d))


def _attention(user: fx.Node, x: fx.Node, arguments: dict[str, Any], layout: Layout) -> Way | None:
    if x is not arguments["v"] or x in (arguments["q"], arguments["k"]) or any(stride for _, stride in layout[1]):
        return None
    heads, kv_heads = arguments["heads"], arguments["kv_heads"]
    axis = repeat_heads(layout[2], kv_heads, heads // kv_heads)
    if axis is None:
        return None
    return Way((layout[0], ((user.meta["val"].shape[1], 0),), axis), block=x.meta["val"].shape[2] // kv_heads)


_RULES: dict[str, Carry] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_POOLS, _pool),
    "aten.transpose.int": _transpose,
    "aten.permute": _permute,
    "aten.expand": _expand,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.mean.dim": _mean,
    "aten.relu": _relu,
    "aten.leaky_relu": _relu,
    "aten.relu6": _bounded,
    "aten.hardtanh": _bounded,
    "aten.clamp": _bounded,
    "aten.clamp.Tensor": _clamp_tensor,
    "aten.mul.Tensor": _multiply,
    "aten.mul.Scalar": _multiply,
    "aten.div.Tensor": _divide,
    "aten.div.Scalar": _divide,
    "aten.scaled_dot_product_attention": _sdpa,
    "qc.attention": _attention,
}

"""Scale edges: where a positive factor of each channel can move from a producer into the weights of its consumers.

    producer   conv, linear, the gain of a normalization
    path       views, ReLU, pooling, the value side of attention, the ungated side of a product
    consumers  conv and linear, depthwise and grouped included

Dividing the producer's rows by s and multiplying the consumers' columns by s changes no output: f(x / s) = f(x) / s for every operator
on the path. It is used by equalization (Nagel et al. 2019), SmoothQuant (Xiao et al. 2022) and AWQ (Lin et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.fx as fx

from qcompile.graph.graph import Graph, node_name
from qcompile.graph.regions.carry import carry
from qcompile.graph.regions.layout import Layout, axis_channels, channel_axis, channel_layout
from qcompile.graph.rewrite import RewriteLog
from qcompile.graph.text import bound_arguments, operator_name


@dataclass(frozen=True, eq=False)
class Consumer:
    """A conv or linear at the end of an edge.

    Attributes:
        node: its call.
        columns: the producer's channel that each input channel of the node reads, i64 [in].
    """

    node: fx.Node
    columns: torch.Tensor

    @property
    def input(self) -> fx.Node:
        return bound_arguments(self.node)["input"]

    @property
    def weight(self) -> fx.Node:
        return bound_arguments(self.node)["weight"]


@dataclass(frozen=True, eq=False)
class ScaleEdge:
    """One producer and everything that reads its channels.

    Attributes:
        producer: the conv, linear, normalization, or product with a constant gain.
        channels: number of its output channels.
        consumers: the convs and linears that read them, in graph order.
        path: the operators between.
        clamps: those of the path that cut at an upper bound (ReLU6): the bound is divided with the channels.
        block: channels that a rotation may mix: 0 all of them, 1 none, d runs of d (the heads of attention).
    """

    producer: fx.Node
    channels: int
    consumers: tuple[Consumer, ...]
    path: tuple[fx.Node, ...]
    clamps: tuple[fx.Node, ...]
    block: int

    @property
    def kind(self) -> str:
        """Return ``norm``, ``value`` (through attention), ``gate`` (through a product), ``conv`` or ``linear``."""
        name = operator_name(self.producer.target)
        if name in PRODUCTS:
            through = {operator_name(node.target) for node in self.path}
            if through & ATTENTION:
                return "value"
            return "gate" if "aten.mul.Tensor" in through else name.removeprefix("aten.").removesuffix("2d")
        return "norm"

    @property
    def parameters(self) -> tuple[fx.Node, ...]:
        """Return the constants of the producer whose channels are scaled: weight (or gain) and bias."""
        return producer_parameters(self.producer)


ATTENTION = frozenset({"aten.scaled_dot_product_attention", "qc.attention"})
PRODUCTS = frozenset({"aten.linear", "aten.conv2d"})
NORMS = frozenset({"aten.layer_norm", "aten.rms_norm"})


def scale_edges(graph: Graph, log: RewriteLog | None = None) -> list[ScaleEdge]:
    """Return every scale edge of a float graph in graph order; ``log`` gets the reason at each producer that has none."""
    edges: list[ScaleEdge] = []
    for node in graph.nodes:
        channels = _produced_channels(graph, node)
        if channels is None:
            continue
        found = _shared_parameter(producer_parameters(node)) or follow(node, channels[0], channels[1])
        if isinstance(found, str):
            if log is not None:
                log.reasons[node_name(node)].append(f"scale-edge: {found}")
        else:
            edges.append(found)
    return edges


def producer_parameters(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the constants that hold a producer's output channels along their first (or only) axis."""
    arguments = bound_arguments(node)
    if operator_name(node.target) == "aten.mul.Tensor":
        return tuple(value for value in (arguments["self"], arguments["other"]) if value.op == "get_attr")
    return tuple(value for value in (arguments["weight"], arguments.get("bias")) if value is not None)


def _produced_channels(graph: Graph, node: fx.Node) -> tuple[int, Layout] | None:
    """Return number and layout of the channels a node produces from constants of its own, or None if it is no producer."""
    if node.op != "call_function":
        return None
    name = operator_name(node.target)
    if name not in PRODUCTS | NORMS and not (name == "aten.mul.Tensor" and _is_gain(graph, node)):
        return None
    if any(graph.constant(value) is None for value in producer_parameters(node)):
        return None
    weight = producer_parameters(node)[:1]
    if not weight or (name in NORMS and len(bound_arguments(node)["normalized_shape"]) != 1):
        return None
    axis = len(node.meta["val"].shape) - 3 if name == "aten.conv2d" else -1
    return int(weight[0].meta["val"].shape[0]), channel_layout(node.meta["val"].shape, axis)


def _is_gain(graph: Graph, node: fx.Node) -> bool:
    """Say whether a product is ``x * gain`` with one constant gain for each index of the last axis."""
    values = [bound_arguments(node)[key] for key in ("self", "other")]
    gains = [value for value in values if graph.constant(value) is not None]
    if len(gains) != 1 or not all(isinstance(value, fx.Node) for value in values):
        return False
    shape = gains[0].meta["val"].shape
    return len(shape) == 1 and shape[0] > 1 and node.meta["val"].ndim > 1 and shape[0] == node.meta["val"].shape[-1]


def _shared_parameter(parameters: tuple[fx.Node, ...]) -> str:
    shared = [value for value in parameters if len(value.users) > 1]
    return f"%{node_name(shared[0])} is used elsewhere too" if shared else ""


def follow(producer: fx.Node, channels: int, layout: Layout, *, shared: bool = False) -> ScaleEdge | str:
    """Return the edge from a producer's result to its consumers, or the reason why some user cannot take part.

    ``shared`` allows consumers whose weight other nodes read too: then the pass must give them one of their own.
    """
    walk = _Walk(shared)
    reason = walk.visit(producer, layout, 0)
    if reason or not walk.consumers:
        return reason or "nothing reads it"
    consumers = tuple(walk.consumers)
    return ScaleEdge(producer, channels, consumers, tuple(walk.path), tuple(walk.clamps), walk.block)


@dataclass
class _Walk:
    shared: bool
    consumers: list[Consumer] = field(default_factory=list)
    path: dict[fx.Node, None] = field(default_factory=dict)
    clamps: list[fx.Node] = field(default_factory=list)
    block: int = 0

    def visit(self, node: fx.Node, layout: Layout, block: int) -> str:
        """Follow every user of a node; return the reason against the edge, or ""."""
        for user in node.users:
            if user.op == "output":
                return "it is an output of the model"
            if user.op == "call_function" and operator_name(user.target) in PRODUCTS and bound_arguments(user)["input"] is node:
                if reason := self._end(user, layout):
                    return reason
                self.block = _smaller(self.block, block)
                continue
            way = carry(user, node, layout)
            if way is None:
                return f"%{node_name(user)} ({_name(user)}) reads it"
            if user in self.path:
                return f"two ways meet at %{node_name(user)} ({_name(user)})"
            self.path[user] = None
            if way.clamp:
                if not _one_axis(layout):
                    return f"%{node_name(user)} ({_name(user)}) cuts channels that lie on several axes"
                self.clamps.append(user)
            if reason := self.visit(user, way.layout, _smaller(block, way.block)):
                return reason
        return ""

    def _end(self, user: fx.Node, layout: Layout) -> str:
        arguments = bound_arguments(user)
        axis = len(layout) - (3 if operator_name(user.target) == "aten.conv2d" else 1)
        columns = axis_channels(layout[axis]) if channel_axis(layout) == axis else None
        if columns is None:
            return f"%{node_name(user)} does not read the channels along its input axis"
        weight = arguments["weight"]
        if weight.op != "get_attr":
            return f"the weight of %{node_name(user)} is not a constant"
        if reason := "" if self.shared else _shared_parameter((weight,)):
            return reason
        self.consumers.append(Consumer(user, columns))
        return ""


def _one_axis(layout: Layout) -> bool:
    """Say whether the channels lie in order on the axis where producers put them: the last one, or the third from the end."""
    axis = channel_axis(layout)
    return axis in (len(layout) - 1, len(layout) - 3) and len(layout[axis]) == 1


def _smaller(a: int, b: int) -> int:
    """Return the finer of two blocks of channels, 0 standing for all of them."""
    return min(a, b) if a and b else a or b


def _name(node: fx.Node) -> str:
    return operator_name(node.target) if node.op == "call_function" else node.op


# ---- the fold ---------------------------------------------------------------------------------------------------------------


def divide_channels(graph: Graph, edge: ScaleEdge, scale: torch.Tensor) -> None:
    """Divide the producer's channels by ``scale`` (f64 [channels], positive) and multiply the consumers' columns by it."""
    for parameter in edge.parameters:
        _rescale(graph, parameter, edge.producer, 1 / scale, axis=0)
    notes = edge.producer.meta["notes"]
    for key in ("bn_mean", "bn_std"):  # what folding batch normalization left behind about the producer's output
        if key in notes:
            notes[key] = (notes[key].to(torch.float64) / scale).to(notes[key].dtype)
    for consumer in edge.consumers:
        scale_columns(graph, consumer.node, scale[consumer.columns])
    for clamp in edge.clamps:
        _scale_bound(graph, edge, clamp, scale)


def scale_columns(graph: Graph, node: fx.Node, scale: torch.Tensor) -> None:
    """Multiply the weight of a conv or linear by ``scale`` [in], one factor for each of its input channels."""
    arguments = bound_arguments(node)
    weight = graph.own_constant(arguments["weight"], node)
    value = tensor_of(graph, weight)
    graph.set_constant(weight, (value.to(torch.float64) * column_factors(value, scale, arguments.get("groups", 1))).to(value.dtype))


def column_factors(weight: torch.Tensor, scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Return ``scale`` [in] as a tensor that broadcasts against a weight [out, in / groups, ...] of a grouped conv or a linear."""
    rows = scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)  # [out, in / groups]
    return rows.view(*rows.shape, *[1] * (weight.ndim - 2))


def _rescale(graph: Graph, parameter: fx.Node, user: fx.Node, factor: torch.Tensor, axis: int) -> None:
    own = graph.own_constant(parameter, user)
    value = tensor_of(graph, own)
    shape = [1] * value.ndim
    shape[axis] = -1
    graph.set_constant(own, (value.to(torch.float64) * factor.view(shape)).to(value.dtype))


def tensor_of(graph: Graph, node: fx.Node) -> torch.Tensor:
    """Return the tensor of a node known to be a constant."""
    value = graph.constant(node)
    assert value is not None
    return value


def _scale_bound(graph: Graph, edge: ScaleEdge, clamp: fx.Node, scale: torch.Tensor) -> None:
    """Give a clamp one upper bound for each channel: min(max(x, 0), 6) becomes min(max(x / s, 0), 6 / s)."""
    arguments = bound_arguments(clamp)
    if operator_name(clamp.target) == "aten.clamp.Tensor":
        _rescale(graph, arguments["max"], clamp, 1 / scale, axis=0)
        return
    bound = 6.0 if operator_name(clamp.target) == "aten.relu6" else arguments.get("max_val", arguments.get("max"))
    x = arguments["self"]
    rectified = graph.call(torch.ops.aten.relu.default, x, before=clamp)
    if bound is None:
        graph.replace(clamp, rectified)
        return
    value = (bound / scale).to(x.meta["val"].dtype)
    shape = [-1] + [1] * (x.meta["val"].ndim - 2) if operator_name(edge.producer.target) == "aten.conv2d" else [-1]
    constant = graph.add_constant(f"{clamp.name}.bound", value.view(shape), like=clamp)
    graph.replace(clamp, graph.call(torch.ops.aten.clamp.Tensor, rectified, None, constant, before=clamp))

"""Residual streams: the sums that all blocks of a network add to, and whether an orthogonal rotation may act on them.

    embedding, attention output, down projection   write: their rows can be rotated
    normalization -> linears, linears              read: their columns can be rotated back

RMS normalization commutes with a rotation once its gain has moved into the linears that follow. LayerNorm also subtracts the mean over
channels; if every reader does so, the writers can do it instead, and what is left is RMS normalization (Ashkboos et al., SliceGPT 2024,
section 3). A stream on which a LayerNorm stands itself (post-norm: BERT) cannot be rotated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.fx as fx

from qcompile.graph.graph import Graph, node_name
from qcompile.graph.regions.layout import channel_layout
from qcompile.graph.regions.scale import Consumer, follow
from qcompile.graph.text import bound_arguments, operator_name


@dataclass(frozen=True, eq=False)
class NormRead:
    """A normalization that reads a stream.

    Attributes:
        result: the node that gives the normalized (and scaled) value.
        kind: ``rms`` or ``layer``.
        eps: added to the mean square, None for the operator's own default.
        gain: constant f[channels] or None.
        bias: constant f[channels] or None.
        scaled: the product with the gain where it is a node of its own, else None.
        entries: the nodes through which it reads the stream.
        readers: the linears that read the result; all columns in order.
    """

    result: fx.Node
    kind: str
    eps: float | None
    gain: fx.Node | None
    bias: fx.Node | None
    scaled: fx.Node | None
    entries: tuple[fx.Node, ...]
    readers: tuple[Consumer, ...]


@dataclass(eq=False)
class ResidualStream:
    """One residual stream.

    Attributes:
        channels: its width.
        values: its nodes: sums, and views and scalings between them.
        writers: linears, embeddings and constants whose result is added.
        norms: the normalizations that read it.
        readers: the linears that read it without normalization.
        refused: why no rotation may act on it, empty if one may.
    """

    channels: int
    values: list[fx.Node]
    writers: list[fx.Node] = field(default_factory=list)
    norms: list[NormRead] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    refused: str = ""


_SUM = "aten.add.Tensor"
_HAND_ON = frozenset(
    {"aten.clone", "aten.dropout", "aten.alias", "aten.detach", "aten.view", "aten._unsafe_view", "aten.reshape", "aten.slice.Tensor",
     "aten.select.int", "aten.unsqueeze", "aten.squeeze.dim", "aten.expand", "aten.mul.Scalar", "aten.mul.Tensor", "aten.contiguous"}
)  # fmt: skip


def residual_streams(graph: Graph) -> list[ResidualStream]:
    """Return the streams of a float graph: values of one width joined by sums, that a normalization reads or writes."""
    group: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        for operand in _joined(node):
            merged = group.get(node, {node}) | group.get(operand, {operand})
            for member in merged:
                group[member] = merged
    streams = []
    for members in {id(part): part for part in group.values()}.values():
        values = [node for node in graph.nodes if node in members]
        stream = _describe(graph, values) if any(operator_name_of(node) == _SUM for node in values) else None
        if stream and (stream.norms or (stream.refused and _touches_norm(values))):
            streams.append(stream)
    return streams


def _touches_norm(values: list[fx.Node]) -> bool:
    near = {*values, *(user for node in values for user in node.users)}
    return any(operator_name_of(node) in ("aten.layer_norm", "aten.rms_norm") or operator_name_of(node) == "aten.rsqrt" for node in near)


def _joined(node: fx.Node) -> list[fx.Node]:
    """Return the operands that lie on the same stream as a node: those of a sum, or what a view or a product with a number takes."""
    if node.op != "call_function":
        return []
    name = operator_name(node.target)
    shape = _shape(node)
    if not shape or not isinstance(shape[-1], int) or shape[-1] < 2 or not _is_float(node):
        return []
    operands = [x for x in node.all_input_nodes if _shape(x) and _shape(x)[-1] == shape[-1] and _is_float(x)]
    if name == _SUM:
        return operands if len(operands) == 2 and bound_arguments(node)["alpha"] == 1 else []
    if name == "aten.mul.Tensor" and not all(x in operands or _is_number(x) for x in node.all_input_nodes):
        return []
    keeps_axis = name in _HAND_ON and not _moves_last(node, shape)
    return operands[:1] if keeps_axis else []


def _is_number(node: fx.Node) -> bool:
    """Say whether a node is a constant of one element, such as the scale of an embedding."""
    return node.op == "get_attr" and node.meta["val"].numel() == 1


def _moves_last(node: fx.Node, shape: tuple) -> bool:  # type: ignore[type-arg]
    arguments = bound_arguments(node)
    rank = len(shape)
    return operator_name(node.target) in ("aten.slice.Tensor", "aten.select.int", "aten.unsqueeze") and arguments["dim"] % rank == rank - 1


def _shape(node: fx.Node) -> tuple:  # type: ignore[type-arg]
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _describe(graph: Graph, values: list[fx.Node]) -> ResidualStream:
    stream = ResidualStream(int(_shape(values[0])[-1]), values)
    members = set(values)
    for node in values:
        if not _joined(node):
            _add_writer(graph, stream, node)
    done: set[fx.Node] = set()
    for node in values:
        for user in node.users:
            if user not in members and user not in done:
                _add_reader(graph, stream, node, user, done)
    kinds = {norm.kind for norm in stream.norms}
    if not stream.refused and not stream.norms:
        stream.refused = "no normalization reads it"
    if len(kinds) > 1:
        stream.refused = stream.refused or "both LayerNorm and RMS normalization read it"
    if "layer" in kinds and stream.readers:
        stream.refused = stream.refused or f"%{stream.readers[0].name} reads it without the LayerNorm that the others have"
    return stream


def _add_writer(graph: Graph, stream: ResidualStream, node: fx.Node) -> None:
    name = operator_name(node.target) if node.op == "call_function" else node.op
    table = name in ("aten.linear", "aten.embedding") and graph.constant(bound_arguments(node)["weight"]) is not None
    constant = name == "get_attr" or table
    stream.writers.append(node)
    if name in ("aten.layer_norm", "aten.rms_norm"):
        stream.refused = stream.refused or f"the normalization %{node.name} stands on the stream itself (post-norm)"
    elif name == "get_attr" and any(user not in stream.values for user in node.users):
        stream.refused = stream.refused or f"the constant %{node_name(node)} is used elsewhere too"
    elif not constant:
        stream.refused = stream.refused or f"%{node_name(node)} ({name}) writes to it"


def _add_reader(graph: Graph, stream: ResidualStream, value: fx.Node, user: fx.Node, done: set[fx.Node]) -> None:
    done.add(user)
    name = operator_name(user.target) if user.op == "call_function" else user.op
    if name == "aten.linear" and bound_arguments(user)["input"] is value:
        stream.readers.append(user)
        return
    norm = _fused_norm(graph, value, user) if name in ("aten.layer_norm", "aten.rms_norm") else _composed_norm(graph, value, user)
    if isinstance(norm, NormRead):
        stream.norms.append(norm)
        done |= {*norm.entries, norm.result}
    else:
        stream.refused = (
            stream.refused or norm or ("it is an output of the model" if user.op == "output" else f"%{node_name(user)} ({name}) reads it")
        )


def _fused_norm(graph: Graph, value: fx.Node, node: fx.Node) -> NormRead | str:
    arguments = bound_arguments(node)
    if arguments["input"] is not value or len(arguments["normalized_shape"]) != 1:
        return f"%{node.name} normalizes more than the last axis"
    kind = "layer" if operator_name(node.target) == "aten.layer_norm" else "rms"
    scaled, gain = None, arguments["weight"]
    if kind == "rms" and gain is None:
        scaled, gain = _gain_after(graph, node)
    readers = _linear_readers(scaled or node)
    if isinstance(readers, str):
        return readers
    return NormRead(scaled or node, kind, arguments["eps"], gain, arguments.get("bias"), scaled, (node,), readers)


def _composed_norm(graph: Graph, value: fx.Node, user: fx.Node) -> NormRead | str:
    """Recognize x * rsqrt(mean(x^2) + eps), and the gain that may follow, from any of the two users of x."""
    normalized = next((node for node in value.users if operator_name_of(node) == "aten.mul.Tensor" and _rsqrt_of(node, value)), None)
    if normalized is None:
        return ""
    chain = _rsqrt_of(normalized, value)
    if user not in (normalized, *chain):
        return ""
    scaled, gain = _gain_after(graph, normalized)
    readers = _linear_readers(scaled or normalized)
    if isinstance(readers, str):
        return readers
    return NormRead(scaled or normalized, "rms", None, gain, None, scaled, (normalized, *chain), readers)


def _rsqrt_of(product: fx.Node, value: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes square, mean, sum, rsqrt if a product is value * rsqrt(mean(value^2) + eps), else nothing."""
    arguments = bound_arguments(product)
    other = arguments["other"] if arguments["self"] is value else arguments["self"]
    if value not in (arguments["self"], arguments["other"]) or operator_name_of(other) != "aten.rsqrt":
        return ()
    total = bound_arguments(other)["self"]
    if operator_name_of(total) not in ("aten.add.Tensor", "aten.add.Scalar") or isinstance(bound_arguments(total)["other"], fx.Node):
        return ()
    mean = bound_arguments(total)["self"]
    if operator_name_of(mean) != "aten.mean.dim" or bound_arguments(mean)["dim"] not in ([-1], [value.meta["val"].ndim - 1]):
        return ()
    square = bound_arguments(mean)["self"]
    return (square, mean, total, other) if _is_square(square, value) else ()


def _is_square(node: object, value: fx.Node) -> bool:
    name = operator_name_of(node)
    if name == "aten.pow.Tensor_Scalar":
        arguments = bound_arguments(node)
        return arguments["self"] is value and arguments["exponent"] == 2
    return name == "aten.mul.Tensor" and set(node.all_input_nodes) == {value}  # type: ignore[attr-defined]


def _gain_after(graph: Graph, normalized: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the product with a constant gain that is the only user of a normalized value, and the gain."""
    user = next(iter(normalized.users))
    if len(normalized.users) == 1 and operator_name_of(user) == "aten.mul.Tensor":
        gains = [x for x in user.all_input_nodes if graph.constant(x) is not None and _shape(x) == _shape(normalized)[-1:]]
        if gains:
            return user, gains[0]
    return None, None


def _linear_readers(node: fx.Node) -> tuple[Consumer, ...] | str:
    """Return the linears that read a normalized value in place of all others, or the reason against them."""
    channels = int(_shape(node)[-1])
    edge = follow(node, channels, channel_layout(node.meta["val"].shape, -1), shared=True)
    if isinstance(edge, str):
        return f"after the normalization, {edge}"
    for consumer in edge.consumers:
        in_order = torch.equal(consumer.columns, torch.arange(channels))
        if operator_name(consumer.node.target) != "aten.linear" or edge.block or not in_order:
            return f"%{consumer.node.name} reads the normalization %{node.name} through operators that a rotation does not pass"
    return edge.consumers


def operator_name_of(node: object) -> str:
    """Return the operator of a call, "" for anything else."""
    return operator_name(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else ""

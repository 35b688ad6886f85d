"""Rotate activations so that outlier channels spread over all channels, with no change of the outputs.

    %linear = aten.linear(%a, %o.weight)                  %linear = aten.linear(%a, Q^T %o.weight)
    %add = aten.add.Tensor(%stream, %linear)        ->    %add = aten.add.Tensor(%stream, %linear)
    %norm = aten.rms_norm(%add) {weight=%g}               %norm = aten.rms_norm(%add)
    %linear_1 = aten.linear(%norm, %up.weight)            %linear_1 = aten.linear(%norm, %up.weight g Q)

- **Residual stream**: everything that writes to it gives x Q, everything that reads it takes W Q: x Q (W Q)^T = x W^T. RMS
  normalization commutes with Q once its gain stands in the weights. Where all readers are LayerNorms the writers also subtract the mean.
- **Values** (``heads``): inside each head, the value projection is rotated and the output projection rotated back; attention mixes
  tokens only. Heads that share values share the rotation.
- **Down projections** (``mlp``): a nonlinear function stands before them, so the rotation runs online: ``qc.hadamard`` and H folded into
  the weight, in blocks of the largest Hadamard matrix whose size divides theirs (``qcompile.graph.hadamard``).
- **Keys** (``keys``, off by default): queries and keys of each head are rotated online where attention reads them, after rotary
  positions and normalization: (q H) (k H)^T = q k^T. It pays where keys are kept in few bits.

Source: Ashkboos et al., QuaRot (2024); the mean subtraction is SliceGPT's (Ashkboos et al. 2024, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from qcompile.graph import Graph
from qcompile.graph.graph import node_name
from qcompile.graph.hadamard import hadamard_block, hadamard_matrix
from qcompile.graph.regions import (
    NormRead,
    ResidualStream,
    ScaleEdge,
    attention_regions,
    fold_affine,
    map_inputs,
    map_outputs,
    orthogonal_matrix,
    residual_streams,
    scale_edges,
)
from qcompile.graph.rewrite import RewriteLog
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pass

SMALLEST_BLOCK = 4  # a Hadamard matrix of size 2 spreads an outlier over two channels only
_NONLINEAR = frozenset(
    {"aten.gelu", "aten.silu", "aten.relu", "aten.relu6", "aten.hardtanh", "aten.leaky_relu", "aten.sigmoid", "aten.tanh", "aten.hardswish",
     "aten.mul.Tensor", "aten.pow.Tensor_Scalar"}
)  # fmt: skip
_SAME = frozenset({"aten.clone", "aten.dropout", "aten.alias", "aten.view", "aten._unsafe_view", "aten.reshape"})


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate residual streams, values and the inputs of down projections.

    Attributes:
        kind: ``hadamard`` (signs times Hadamard) or ``random`` (orthogonal) for what is folded into weights.
        seed: of the signs or of the matrix.
        stream: rotate residual streams.
        heads: rotate values inside each head.
        mlp: insert ``qc.hadamard`` before down projections.
        keys: insert ``qc.hadamard`` on queries and keys.
    """

    kind: str = "hadamard"
    seed: int = 0
    stream: bool = True
    heads: bool = True
    mlp: bool = True
    keys: bool = False

    def run(self, graph: Graph, context: Context) -> int:
        steps = (self.stream, self._streams), (self.heads, self._values), (self.mlp, self._down_projections), (self.keys, self._keys)
        return sum(step(graph, context) for wanted, step in steps if wanted)

    def _streams(self, graph: Graph, context: Context) -> int:
        changed = 0
        for stream in residual_streams(graph):
            name = stream.values[0].name
            if stream.refused:
                context.log.reasons[name].append(f"rotate: {stream.refused}")
            elif any("rotated" in node.meta["notes"] for node in stream.writers):
                context.log.reasons[name].append("rotate: it is rotated already")
            else:
                _rotate_stream(graph, stream, orthogonal_matrix(stream.channels, self.kind, self.seed), self.kind)
                changed += 1
        graph.clean()
        return changed

    def _values(self, graph: Graph, context: Context) -> int:
        changed, log = 0, RewriteLog()
        edges = {edge.producer: edge for edge in scale_edges(graph, log) if edge.kind == "value"}
        for producer in dict.fromkeys(region.value or region.node for region in attention_regions(graph)):
            edge = edges.get(producer)
            if edge is None:
                against = [reason.removeprefix("scale-edge: ") for reason in log.why_not(node_name(producer))]
                context.log.reasons[producer.name].append(f"rotate: {(against or ['no one linear gives the values'])[0]}")
                continue
            if reason := _against_value(edge):
                context.log.reasons[producer.name].append(f"rotate: {reason}")
                continue
            matrix = orthogonal_matrix(edge.block, self.kind, self.seed)
            map_outputs(graph, edge.producer, matrix)
            for consumer in edge.consumers:
                map_inputs(graph, consumer.node, matrix)
            edge.producer.meta["notes"]["value_rotated"] = self.kind
            changed += 1
        return changed

    def _down_projections(self, graph: Graph, context: Context) -> int:
        changed = 0
        for x, linears in _nonlinear_inputs(graph).items():
            size = int(x.meta["val"].shape[-1])
            block = hadamard_block(size)
            if block < SMALLEST_BLOCK:
                context.log.reasons[linears[0].name].append(f"rotate: no Hadamard matrix above size 2 divides its {size} inputs")
                continue
            rotated = graph.call(torch.ops.qc.hadamard.default, x, block, before=linears[0], like=x)
            for linear in linears:
                linear.replace_input_with(x, rotated)
                map_inputs(graph, linear, hadamard_matrix(block, torch.float64))  # H is symmetric and its own inverse
            changed += 1
        return changed

    def _keys(self, graph: Graph, context: Context) -> int:
        changed = 0
        for region in attention_regions(graph):
            node = region.node
            if reason := _against_keys(node):
                context.log.reasons[node.name].append(f"rotate: {reason}")
                continue
            arguments = bound_arguments(node)
            block = hadamard_block(int(arguments["q"].meta["val"].shape[-1]) // arguments["heads"])
            rotated = [graph.call(torch.ops.qc.hadamard.default, x, block, before=node, like=x) for x in (arguments["q"], arguments["k"])]
            node.args = (*rotated, *node.args[2:])
            node.meta["notes"]["keys_rotated"] = block
            changed += 1
        return changed


def _rotate_stream(graph: Graph, stream: ResidualStream, matrix: torch.Tensor, kind: str) -> None:
    centered = any(norm.kind == "layer" for norm in stream.norms)
    n = stream.channels
    write = (torch.eye(n, dtype=torch.float64) - 1 / n) @ matrix if centered else matrix
    for norm in stream.norms:
        _fold_norm(graph, norm)
        for reader in norm.readers:
            map_inputs(graph, reader.node, matrix)
    for node in stream.readers:
        map_inputs(graph, node, matrix)
    for node in stream.writers:
        map_outputs(graph, node, write)
        node.meta["notes"]["rotated"] = kind


def _fold_norm(graph: Graph, norm: NormRead) -> None:
    """Leave of a normalization only x / rms(x); its gain and bias move into the linears that read it."""
    gain, bias = (None if part is None else graph.constant(part) for part in (norm.gain, norm.bias))
    for reader in norm.readers:
        fold_affine(graph, reader.node, gain, bias)
    if norm.scaled is not None:
        normalized = next(x for x in norm.scaled.all_input_nodes if x is not norm.gain)
        graph.replace(norm.scaled, normalized)
    elif gain is not None or norm.kind == "layer":
        arguments = bound_arguments(norm.result)
        operands = arguments["input"], list(arguments["normalized_shape"]), None, norm.eps
        plain = graph.call(torch.ops.aten.rms_norm.default, *operands, before=norm.result, like=norm.result)
        graph.replace(norm.result, plain)


def _against_value(edge: ScaleEdge) -> str:
    d = edge.block
    if "value_rotated" in edge.producer.meta["notes"]:
        return "it is rotated already"
    if d < SMALLEST_BLOCK:
        return "a nonlinear operator stands between values and output projection"
    for consumer in edge.consumers:
        if operator_name(consumer.node.target) != "aten.linear" or not _reads_whole_runs(consumer.columns, d):
            return f"%{consumer.node.name} does not read whole heads"
    return ""


def _against_keys(attention: fx.Node) -> str:
    if operator_name(attention.target) != "qc.attention":
        return "recognize-attention has not found its heads"
    if "keys_rotated" in attention.meta["notes"]:
        return "its keys are rotated already"
    arguments = bound_arguments(attention)
    size = int(arguments["q"].meta["val"].shape[-1]) // arguments["heads"]
    return "" if hadamard_block(size) >= SMALLEST_BLOCK else f"no Hadamard matrix above size 2 divides its heads of {size}"


def _reads_whole_runs(columns: torch.Tensor, d: int) -> bool:
    """Say whether the columns are runs of d channels in order, each starting at a multiple of d."""
    if len(columns) % d:
        return False
    runs = columns.view(-1, d)
    return bool((runs - runs[:, :1] == torch.arange(d)).all()) and not bool((runs[:, 0] % d).any())


def _nonlinear_inputs(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return the values that come out of a nonlinear function, each with the linears of constant weight that read it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or operator_name(node.target) != "aten.linear":
            continue
        x = bound_arguments(node)["input"]
        constant = graph.constant(bound_arguments(node)["weight"]) is not None
        if constant and isinstance(x.meta["val"].shape[-1], int) and _is_nonlinear(graph, x):
            found.setdefault(x, []).append(node)
    return found


def _is_nonlinear(graph: Graph, x: fx.Node) -> bool:
    size = x.meta["val"].shape[-1]
    while x.op == "call_function" and operator_name(x.target) in _SAME and x.all_input_nodes[0].meta["val"].shape[-1:] == (size,):
        x = x.all_input_nodes[0]
    if x.op != "call_function" or operator_name(x.target) not in _NONLINEAR:
        return False
    # The product of a normalization with its gain or with 1 / rms is no gate.
    others = [y for y in x.all_input_nodes if graph.constant(y) is None and str(y.meta["val"].shape) == str(x.meta["val"].shape)]
    return operator_name(x.target) != "aten.mul.Tensor" or len(others) == 2

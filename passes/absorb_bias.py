"""Move the part of a bias that a ReLU passes almost surely into the next layer, so that activations have a smaller range.

    %conv2d = aten.conv2d(%x, %a.weight, %a.bias)         %conv2d = aten.conv2d(%x, %a.weight, %a.bias - c)
    %relu = aten.relu(%conv2d)                      ->    %relu = aten.relu(%conv2d)
    %conv2d_1 = aten.conv2d(%relu, %b.weight, %b.bias)    %conv2d_1 = aten.conv2d(%relu, %b.weight, %b.bias + sum(%b.weight) c)

Where a channel is normal with mean beta and deviation gamma, c = max(0, beta - 3 gamma) lies below 99.87 % of its values, and
relu(x - c) = relu(x) - c for those. A consumer that pads with zeros would see c missing at its border: it is left alone.

Source: Nagel et al. (2019), section 4.1.3, equation 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.graph import Graph
from qcompile.graph.regions import Consumer, ScaleEdge, add_to_bias, column_sums, scale_edges, shift_bias
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately

DEVIATIONS = 3.0

# Operators that hand on a constant added to a channel, besides the ReLU itself.
_HAND_ON = frozenset(
    {"aten.relu", "aten.max_pool2d", "aten.adaptive_avg_pool2d", "aten.mean.dim", "aten.view", "aten.reshape", "aten.clone", "aten.dropout",
     "aten.flatten.using_ints"}
)  # fmt: skip


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Absorb high biases into the next layer."""

    keeps: ClassVar[Keeps] = approximately()

    def run(self, graph: Graph, context: Context) -> int:
        changed = 0
        for edge in scale_edges(graph):
            excess = _excess(edge)
            if excess is None:
                continue
            if reason := _against(edge):
                context.log.reasons[edge.producer.name].append(f"absorb-bias: {reason}")
            elif float(excess.max()) > 0:
                shift_bias(graph, edge.producer, -excess)
                for consumer in edge.consumers:
                    add_to_bias(graph, consumer.node, column_sums(graph, consumer.node) @ excess[consumer.columns])
                changed += 1
        return changed


def _excess(edge: ScaleEdge) -> torch.Tensor | None:
    """Return c = max(0, beta - 3 gamma), f64 [channels], or None where batch normalization left no notes or there is no ReLU."""
    notes = edge.producer.meta["notes"]
    if "bn_mean" not in notes or not any(operator_name(node.target) == "aten.relu" for node in edge.path):
        return None
    return (notes["bn_mean"].to(torch.float64) - DEVIATIONS * notes["bn_std"].to(torch.float64)).clamp(min=0)


def _against(edge: ScaleEdge) -> str:
    for node in edge.path:
        if operator_name(node.target) not in _HAND_ON:
            return f"%{node.name} ({operator_name(node.target)}) does not hand on a shift"
    padded = [consumer.node for consumer in edge.consumers if _pads(consumer)]
    return f"%{padded[0].name} pads with zeros" if padded else ""


def _pads(consumer: Consumer) -> bool:
    return any(bound_arguments(consumer.node).get("padding", ()))

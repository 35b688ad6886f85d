"""Equalize the weight ranges of consecutive convolutions by moving a factor of each channel from one to the next.

    %conv2d = aten.conv2d(%x, %a.weight, %a.bias)             %conv2d = aten.conv2d(%x, %a.weight / s, %a.bias / s)
    %relu = aten.relu(%conv2d)                         ->     %relu = aten.relu(%conv2d)
    %conv2d_1 = aten.conv2d(%relu, %b.weight)                 %conv2d_1 = aten.conv2d(%relu, %b.weight * s)

relu(x / s) = relu(x) / s for s > 0, so no output changes. With r1, r2 the largest magnitudes of channel c in the rows of the first and
the columns of the second weight, s = sqrt(r1 / r2) makes the two equal; chains are swept until nothing moves any more, depthwise
convolutions included. The upper bound of a ReLU6 becomes a bound for each channel, min(max(x / s, 0), 6 / s), which ``clamp-codes`` later
moves behind the quantizer.

A small s widens the range of the activation in between, and with it the step of its quantizer: on a net whose first activation is read by
a depthwise convolution this costs more than the even weights gain. With ``activations`` r1 and r2 are shares of their tensor's largest
range and r1 is the larger of the weight's and the activation's, whose range is that of the folded batch normalization (as ``range=model``
of ``insert-quantizers``). This is our addition.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.1, equation 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.graph import Graph
from qcompile.graph.regions import ScaleEdge, column_factors, divide_channels, scale_edges, tensor_of
from qcompile.graph.text import bound_arguments
from qcompile.pipeline import Context, Pass
from qcompile.statistics.model_ranges import ModelRanges

SETTLED = 1e-3  # a sweep that moves no factor by more than this is the last one


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize weight ranges across layers.

    Attributes:
        sweeps: at most so many sweeps over all edges.
        linear: take linear -> linear edges too, not only those that start at or end in a convolution.
        activations: even out the ranges of activations too, where batch normalization tells them.
    """

    sweeps: int = 100
    linear: bool = True
    activations: bool = False

    def run(self, graph: Graph, context: Context) -> int:
        kinds = ("conv", "linear") if self.linear else ("conv",)
        edges = [edge for edge in scale_edges(graph, context.log) if edge.kind in kinds]
        spans = _activation_spans(graph, edges, context) if self.activations else {}
        factors = _settle(graph, edges, self.sweeps, spans)
        changed = 0
        for edge, factor in zip(edges, factors, strict=True):
            if float(factor.log().abs().max()) > SETTLED:
                divide_channels(graph, edge, factor)
                changed += 1
        return changed


def _activation_spans(graph: Graph, edges: list[ScaleEdge], context: Context) -> dict[int, torch.Tensor]:
    """Return the width of each channel's range, zero included, f64 [channels], by number of the edges whose activation the model tells."""
    model = ModelRanges(graph, context.example_inputs)
    spans: dict[int, torch.Tensor] = {}
    for i, edge in enumerate(edges):
        for consumer in edge.consumers:
            spread = model.spreads.get(consumer.input)
            if spread is not None and len(spread.low) == len(consumer.columns):
                width = spread.high.clamp(min=0) - spread.low.clamp(max=0)
                known = spans.setdefault(i, torch.zeros(edge.channels, dtype=torch.float64))
                known.scatter_reduce_(0, consumer.columns, width, "amax")
    return spans


def _settle(graph: Graph, edges: list[ScaleEdge], sweeps: int, spans: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """Return the factors f64 [channels] of each edge after which no pair of ranges differs any more."""
    weights = {}
    for edge in edges:
        for node in (edge.producer, *(consumer.node for consumer in edge.consumers)):
            weights[node] = tensor_of(graph, bound_arguments(node)["weight"]).abs().to(torch.float64)
    factors = [torch.ones(edge.channels, dtype=torch.float64) for edge in edges]
    for _ in range(sweeps):
        moved = 0.0
        for i, edge in enumerate(edges):
            factor = _pair_factor(edge, weights, spans[i] / factors[i] if i in spans else None)
            weights[edge.producer] = weights[edge.producer] / factor.view(-1, *[1] * (weights[edge.producer].ndim - 1))
            for consumer in edge.consumers:
                weight = weights[consumer.node]
                groups = bound_arguments(consumer.node).get("groups", 1)
                weights[consumer.node] = weight * column_factors(weight, factor[consumer.columns], groups)
            factors[i] = factors[i] * factor
            moved = max(moved, float(factor.log().abs().max()))
        if moved < SETTLED / 10:
            break
    return factors


def _pair_factor(edge: ScaleEdge, weights: dict, span: torch.Tensor | None) -> torch.Tensor:  # type: ignore[type-arg]
    """Return sqrt(r1 / r2) for each channel; 1 where a channel is dead on either side.

    With the span of the activation, ranges are shares of their tensor's largest, and r1 is the larger share of weight and activation.
    """
    first = weights[edge.producer].flatten(1).amax(1)
    second = torch.zeros_like(first)
    for consumer in edge.consumers:
        weight = weights[consumer.node]
        groups = bound_arguments(consumer.node).get("groups", 1)
        columns = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).flatten()  # [in]
        second.scatter_reduce_(0, consumer.columns, columns if span is None else _share(columns), "amax")
    alive = (first > 0) & (second > 0)
    if span is not None:
        first = torch.maximum(_share(first), _share(span))
    factor = (first / second).sqrt()
    return torch.where(alive, factor, torch.ones_like(factor))


def _share(ranges: torch.Tensor) -> torch.Tensor:
    return ranges / ranges.max().clamp(min=torch.finfo(torch.float64).tiny)

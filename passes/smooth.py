"""Move outliers of activations into weights: each channel is divided by a factor, the weight columns that read it are multiplied.

    %layer_norm = aten.layer_norm(%x) {weight=%g, bias=%b}          %layer_norm = aten.layer_norm(%x) {weight=%g / s, bias=%b / s}
    %linear = aten.linear(%layer_norm, %w)                  ->      %linear = aten.linear(%layer_norm, %w * s)

It acts on every scale edge that ends in linears: normalization -> linears, values -> output projection, the ungated side of a gate ->
down projection, linear -> ReLU -> linear. No output changes: f(x / s) (s W) = f(x) W on such edges.

- ``smoothquant``: s = max|X|^alpha / max|W|^(1 - alpha) (Xiao et al. 2022, equation 4). With ``search``, alpha is chosen for each edge
  from a grid, by the error of the consumers' outputs with weight and activation rounded.
- ``awq``: s = mean|X|^r, normalized by sqrt(max s min s), r from a grid of 20 by the error of the consumers' outputs with the weight
  rounded (Lin et al. 2023, section 3.2). The consumers of one edge are searched together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qcompile.errors import Refused
from qcompile.formats import Scheme, parse_scheme, quantize_tensor
from qcompile.graph import Graph
from qcompile.graph.regions import Consumer, ScaleEdge, divide_channels, scale_edges, tensor_of
from qcompile.graph.text import operator_name
from qcompile.pipeline import Context, Pass
from qcompile.statistics import AbsMax, AbsMean, Request, Samples

GRID = 20  # steps of the search: 0, 0.05, ..., 0.95
SMALLEST = 1e-5  # of a magnitude: a dead channel is left as it is


@dataclass(frozen=True)
class Smooth(Pass):
    """Smooth activations by scales folded into weights.

    Attributes:
        alpha: how much of the difficulty moves to the weights: 0 none, 1 all of it.
        method: ``smoothquant`` or ``awq``.
        search: choose alpha for each edge (smoothquant).
        rows: sampled rows behind each search.
        weight: scheme of the weights in the search.
        activation: scheme of the activations in the search of smoothquant.
    """

    alpha: float = 0.5
    method: str = "smoothquant"
    search: bool = False
    rows: int = 512
    weight: str = "int8 channel=0 sym"
    activation: str = "int8 tensor sym"

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if self.method not in ("smoothquant", "awq"):
            raise Refused(f"unknown method '{self.method}' of smooth", way_out="known are smoothquant and awq")
        found: dict[Request, None] = {}
        for edge in linear_edges(graph):
            for consumer in edge.consumers:
                name = consumer.input.name
                found |= dict.fromkeys([AbsMean(name) if self.method == "awq" else AbsMax(name)])
                found |= dict.fromkeys([Samples(name, rows=self.rows)] if self._searches else [])
        return list(found)

    @property
    def _searches(self) -> bool:
        return self.search or self.method == "awq"

    def run(self, graph: Graph, context: Context) -> int:
        scale_edges(graph, context.log)
        changed = 0
        for edge in linear_edges(graph):
            if "smoothed" in edge.producer.meta["notes"]:
                context.log.reasons[edge.producer.name].append("smooth: it is smoothed already")
                continue
            scale = self._scale(graph, edge, context)
            if not torch.equal(scale, torch.ones_like(scale)):
                divide_channels(graph, edge, scale)
                edge.producer.meta["notes"]["smoothed"] = self.method
                changed += 1
        return changed

    def _scale(self, graph: Graph, edge: ScaleEdge, context: Context) -> torch.Tensor:
        """Return the factor of each channel, f64 [channels]."""
        assert context.statistics is not None
        if self.method == "awq":
            activation = gather_channels(edge, [context.statistics[AbsMean(c.input.name)]["abs_mean"] for c in edge.consumers])
            candidates: Iterable[torch.Tensor] = (_normalized(activation.clamp(min=1e-4) ** (step / GRID)) for step in range(GRID))
        else:
            activation = gather_channels(edge, [context.statistics[AbsMax(c.input.name)]["abs_max"] for c in edge.consumers])
            weight = gather_channels(edge, [tensor_of(graph, c.weight).abs().amax(0) for c in edge.consumers])
            if not self.search:
                return smoothing_scale(activation, weight, self.alpha)
            candidates = (smoothing_scale(activation, weight, step / GRID) for step in range(GRID))
        rows = [context.statistics[Samples(c.input.name, rows=self.rows)]["rows"] for c in edge.consumers]
        schemes = parse_scheme(self.weight), None if self.method == "awq" else parse_scheme(self.activation)
        ones = torch.ones(edge.channels, dtype=torch.float64)
        return min([ones, *candidates], key=lambda scale: _search_error(graph, edge, rows, scale, *schemes))


def linear_edges(graph: Graph) -> list[ScaleEdge]:
    """Return the scale edges that end in linears and do not begin at a convolution."""
    return [edge for edge in scale_edges(graph) if all(operator_name(c.node.target) == "aten.linear" for c in edge.consumers)
            and operator_name(edge.producer.target) != "aten.conv2d"]  # fmt: skip


def gather_channels(edge: ScaleEdge, columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest of what the consumers' input columns have, for each channel of the producer, f64 [channels]."""
    largest = torch.zeros(edge.channels, dtype=torch.float64)
    for consumer, values in zip(edge.consumers, columns, strict=True):
        largest.scatter_reduce_(0, consumer.columns, values.to(torch.float64), "amax")
    return largest


def smoothing_scale(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return max|X|^alpha / max|W|^(1 - alpha) for each channel, 1 where either is dead."""
    scale = activation.clamp(min=SMALLEST) ** alpha / weight.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where((activation > SMALLEST) & (weight > SMALLEST), scale, torch.ones_like(scale))


def _normalized(scale: torch.Tensor) -> torch.Tensor:
    return scale / (scale.max() * scale.min()).sqrt()


def _search_error(
    graph: Graph, edge: ScaleEdge, rows: Sequence[torch.Tensor], scale: torch.Tensor, weight: Scheme, activation: Scheme | None
) -> float:
    """Return the summed squared error of the consumers' outputs on the sampled rows, relative to each output's power."""
    return sum(_consumer_error(graph, c, x, scale, weight, activation) for c, x in zip(edge.consumers, rows, strict=True))


def _consumer_error(
    graph: Graph, consumer: Consumer, x: torch.Tensor, scale: torch.Tensor, weight: Scheme, activation: Scheme | None
) -> float:
    w = tensor_of(graph, consumer.weight)
    factor = scale[consumer.columns].to(w.dtype)
    rounded = quantize_tensor(w * factor, weight).dequantize()
    seen = x / factor if activation is None else quantize_tensor(x / factor, activation).dequantize()
    exact = x @ w.T
    return float((seen @ rounded.T - exact).square().sum() / exact.square().sum().clamp(min=1e-30))

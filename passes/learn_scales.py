"""Learn a scale for each channel by gradient steps on what rounding does to the layers that read it.

    %rms_norm = aten.rms_norm(%x) {weight=%g}            %rms_norm = aten.rms_norm(%x) {weight=%g / s}
    %linear = aten.linear(%rms_norm, %w)          ->     %linear = aten.linear(%rms_norm, %w * s)

No output changes: (x / s) (W s)^T = x W^T on the scale edges that ``smooth`` acts on. s starts as SmoothQuant's and follows the gradient of

    L(s) = sum over the linears of an edge of |x W^T - Q(x / s) Q(W s)^T|^2 / |x W^T|^2

by Adam on log s, over sampled rows of x; the best s met, that start and s = 1 among them, is folded in. Rounding counts as the identity,
its step depends on s by the extremes of what is rounded. Equal data give equal scales.

This is the diagonal of AffineQuant's matrix A in (x A^-1) Q(W A^T)^T: what stays of it where nothing runs at inference. Its full matrices
and its shift are not learned, and the loss is that of the layers on one edge, where the paper's is that of a whole block.

Source: Ma et al., AffineQuant: Affine Transformation Quantization for Large Language Models (2024), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from qcompile.passes._straight_through import round_dynamic
from qcompile.passes.smooth import gather_channels, linear_edges, smoothing_scale

from qcompile.formats import parse_scheme
from qcompile.graph import Graph
from qcompile.graph.regions import ScaleEdge, divide_channels, tensor_of
from qcompile.pipeline import Context, Pass
from qcompile.statistics import AbsMax, Request, Samples


@dataclass(frozen=True)
class LearnScales(Pass):
    """Learn scales of channels, folded into weights, for a coming quantization.

    Attributes:
        weight: scheme of the weights to come.
        activation: scheme of the activations to come; ``float`` for none.
        alpha: of the smoothing that the scales start from.
        steps: of Adam.
        rate: its learning rate, for the logarithm of a scale; 0.005 in the paper.
        rows: sampled rows of each input.
    """

    weight: str = "int4 channel=0 sym"
    activation: str = "int8 token sym dynamic"
    alpha: float = 0.5
    steps: int = 100
    rate: float = 0.005
    rows: int = 256

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        inputs = dict.fromkeys(consumer.input.name for edge in linear_edges(graph) for consumer in edge.consumers)
        return [request for name in inputs for request in (AbsMax(name), Samples(name, rows=self.rows))]

    def run(self, graph: Graph, context: Context) -> int:
        changed = 0
        for edge in linear_edges(graph):
            if "scales_learned" in edge.producer.meta["notes"]:
                context.log.reasons[edge.producer.name].append("learn-scales: it is scaled already")
                continue
            scale, share = self._learned(graph, edge, context)
            edge.producer.meta["notes"]["scales_learned"] = True
            if share < 1:
                divide_channels(graph, edge, scale)
                context.notes.append((edge.producer.name, f"learn-scales: {share:.3f} of the error without scales"))
                changed += 1
        return changed

    def _learned(self, graph: Graph, edge: ScaleEdge, context: Context) -> tuple[torch.Tensor, float]:
        """Return the best scale met, f64 [channels], and its error relative to that without scales."""
        assert context.statistics is not None
        weights = [tensor_of(graph, c.weight).to(torch.float32) for c in edge.consumers]
        inputs = [context.statistics[Samples(c.input.name, rows=self.rows)]["rows"] for c in edge.consumers]
        columns = [c.columns for c in edge.consumers]
        largest = gather_channels(edge, [context.statistics[AbsMax(c.input.name)]["abs_max"] for c in edge.consumers])
        start = smoothing_scale(largest, gather_channels(edge, [w.abs().amax(0) for w in weights]), self.alpha)
        schemes = parse_scheme(self.weight), None if self.activation == "float" else parse_scheme(self.activation)

        def loss(scale: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(())
            for x, w, chosen in zip(inputs, weights, columns, strict=True):
                factor, exact = scale[chosen], x @ w.T
                seen = x / factor if schemes[1] is None else round_dynamic(x / factor, schemes[1])
                error = seen @ round_dynamic(w * factor, schemes[0]).T - exact
                total = total + error.square().sum() / exact.square().sum().clamp(min=1e-30)
            return total

        with torch.no_grad():
            plain = float(loss(torch.ones(edge.channels)))
        best, least = torch.ones(edge.channels), plain
        with torch.enable_grad():
            logarithm = start.to(torch.float32).log().requires_grad_()
            optimizer = torch.optim.Adam([logarithm], lr=self.rate)
            for _ in range(self.steps + 1):
                optimizer.zero_grad()
                value = loss(logarithm.exp())
                if float(value.detach()) < least:
                    best, least = logarithm.detach().exp(), float(value.detach())
                value.backward()
                optimizer.step()
        return best.to(torch.float64), least / plain if plain else 1.0

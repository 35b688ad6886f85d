"""Divide activations by a power of their channels' largest magnitudes, so that a row's scale rounds fewer small values to zero.

    %rms_norm = aten.rms_norm(%x) {weight=%g}            %rms_norm = aten.rms_norm(%x) {weight=%g / s}
    %linear = aten.linear(%rms_norm, %w)          ->     %linear = aten.linear(%rms_norm, %w * s)      s_j = c_j^(1 - alpha)

CrossQuant rounds x_ij with the step t_i^alpha c_j^(1 - alpha) / (2^(b - 1) - 1), t_i the largest magnitude of token i and c_j that of
channel j; alpha = 1 is a scale for each token. The part of the channel is known before the model runs, here from calibration data, and is
folded into weights before they are rounded; no output changes. The part of the token stays what ``token dynamic`` finds: the largest
magnitude of the folded row instead of t_i^alpha, so that nothing is cut that calibration has not seen. It acts on the scale edges that
``smooth`` acts on, and unlike it looks at no weight.

What it changes is the kernel of quantization: the share of values other than zero that round to zero, noted for each edge.

Source: Liu et al., CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel (2024), equation 5. The paper's alpha
is 0.15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from qcompile.passes.smooth import SMALLEST, gather_channels, linear_edges

from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.graph.regions import ScaleEdge, divide_channels
from qcompile.pipeline import Context, Pass
from qcompile.statistics import AbsMax, Request, Samples


@dataclass(frozen=True)
class CrossScale(Pass):
    """Fold the channels' share of CrossQuant's scales into weights.

    Attributes:
        alpha: how much of a scale is the token's: 1 all of it, 0 none.
        bits: of the activations, for the share of values that round to zero.
        rows: sampled rows behind that share.
    """

    alpha: float = 0.15
    bits: int = 8
    rows: int = 256

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if not 0 <= self.alpha <= 1:
            raise Refused(f"alpha is 0 to 1, not {self.alpha:g}", node=self.name())
        inputs = dict.fromkeys(consumer.input.name for edge in linear_edges(graph) for consumer in edge.consumers)
        return [request for name in inputs for request in (AbsMax(name), Samples(name, rows=self.rows))]

    def run(self, graph: Graph, context: Context) -> int:
        assert context.statistics is not None
        changed = 0
        for edge in linear_edges(graph):
            if "cross_scaled" in edge.producer.meta["notes"]:
                context.log.reasons[edge.producer.name].append("cross-scale: it is scaled already")
                continue
            largest = gather_channels(edge, [context.statistics[AbsMax(c.input.name)]["abs_max"] for c in edge.consumers])
            scale = channel_scale(largest, self.alpha)
            context.notes.append((edge.producer.name, self._kernel_note(edge, scale, context)))
            divide_channels(graph, edge, scale)
            edge.producer.meta["notes"]["cross_scaled"] = self.alpha
            changed += 1
        return changed

    def _kernel_note(self, edge: ScaleEdge, scale: torch.Tensor, context: Context) -> str:
        assert context.statistics is not None
        consumer = edge.consumers[0]
        x = context.statistics[Samples(consumer.input.name, rows=self.rows)]["rows"].to(torch.float64)
        before, after = (100 * kernel_share(value, self.bits) for value in (x, x / scale[consumer.columns]))
        return f"cross-scale: {after:.2f} % of the inputs of %{consumer.node.name} round to zero in {self.bits} bits, {before:.2f} % before"


def channel_scale(largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return c^(1 - alpha) for each channel, f64 [channels]; 1 where a channel is dead."""
    return torch.where(largest > SMALLEST, largest.clamp(min=SMALLEST) ** (1 - alpha), torch.ones_like(largest))


def kernel_share(x: torch.Tensor, bits: int) -> float:
    """Return the share of the values of x f[rows, channels], zeros left out, that round to zero with a symmetric scale for each row."""
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    alive = x != 0
    return float(((x.abs() < step / 2) & alive).sum() / alive.sum().clamp(min=1))

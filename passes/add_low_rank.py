"""Add a low-rank side branch beside linears with low-bit weights, which gives back the largest part of what rounding took.

    %linear = aten.linear(%x, %w.quantizer)                %linear = aten.linear(%x, %w.quantizer)
                                                           %down = aten.linear(%x, %A.quantizer)        A f32[rank,in]
    %y = ..(%linear)                              ->       %up = aten.linear(%down, %B.quantizer)       B f32[out,rank]
                                                           %sum = aten.add.Tensor(%linear, %up)
                                                           %y = ..(%sum)

With E = W - W_q and S a square matrix of the layer's input, the singular vectors of E S = U s V^T of the largest s give B = U_k s_k and
A = V_k^T S^-1: B A is the matrix of rank k nearest to E in ||(E - B A) S||. LQER (Zhang et al. 2024, arXiv 2402.02446, section 3) calls it
LQER for S = 1 (``weigh=none``) and L2QER for S = diag(s), s_i = mean |x_i|, not below 1e-4, over sqrt(min s max s) (``weigh=magnitude``;
the authors' code takes the largest mean of a batch, here it is that of all data). ``weigh=gram`` has S = (x^T x)^(1/2), with which
||(E - B A) S|| is the error of the layer's output itself (QERA, Zhang et al. 2024, arXiv 2410.06040, theorem 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import parse_scheme, quantize_tensor
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.statistics import AbsMean, Gram, Request

SMALLEST = 1e-4  # of a mean magnitude, as in the authors' code


@dataclass(frozen=True)
class AddLowRank(Pass):
    """Add a low-rank side branch beside linears with low-bit weights (LQER).

    Attributes:
        rank: of the branch; a layer whose smaller side is less has that.
        weigh: none (LQER), magnitude (L2QER) or gram (the output's own error).
        factors: scheme of both factors, or ``float``.
        most_bits: layers with more bits get no branch.
    """

    stage: ClassVar[Stage] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()
    after: ClassVar[tuple[str, ...]] = ("quantize-weights",)

    rank: int = 16
    weigh: str = "magnitude"
    factors: str = "int8 channel=0 sym"
    most_bits: int = 4

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if self.weigh not in ("none", "magnitude", "gram"):
            raise Refused(f"weigh of add-low-rank is none, magnitude or gram, not '{self.weigh}'")
        if self.weigh == "none":
            return ()
        return list(dict.fromkeys(self._request(node) for node in self._layers(graph)))

    def _request(self, node: fx.Node) -> Request:
        name = bound_arguments(node)["input"].name
        return AbsMean(name) if self.weigh == "magnitude" else Gram(name)

    def _layers(self, graph: Graph) -> list[fx.Node]:
        """Return the linears that read a constant weight through a quantizer of few bits, and have no branch yet."""
        found = []
        for node in graph.nodes:
            if node.op != "call_function" or operator_name(node.target) != "aten.linear" or "low_rank" in node.meta["notes"]:
                continue
            weight = bound_arguments(node)["weight"]
            quantizer = graph.quantizer(weight)
            if quantizer and quantizer.scheme.bits <= self.most_bits and graph.constant(weight.args[0]) is not None:
                found.append(node)
        return found

    def run(self, graph: Graph, context: Context) -> int:
        if self.rank < 1:
            raise Refused(f"rank of add-low-rank is at least 1, not {self.rank}")
        layers = self._layers(graph)
        for node in layers:
            quantizer = graph.quantizer(bound_arguments(node)["weight"])
            weight = graph.constant(bound_arguments(node)["weight"].args[0])
            assert quantizer is not None
            assert weight is not None
            with torch.no_grad():
                error = weight.to(torch.float64) - quantizer(weight).to(torch.float64)
            self._branch(graph, node, *low_rank(error, self._scale(node, error.shape[1], context), self.rank))
        return len(layers)

    def _scale(self, node: fx.Node, inputs: int, context: Context) -> torch.Tensor:
        """Return S, float64 [in, in]."""
        if self.weigh == "none":
            return torch.eye(inputs, dtype=torch.float64)
        assert context.statistics is not None
        found = context.statistics[self._request(node)]
        if self.weigh == "magnitude":
            s = found["abs_mean"].to(torch.float64).clamp(min=SMALLEST)
            return torch.diag(s / (s.min() * s.max()).sqrt())
        values, vectors = torch.linalg.eigh(found["gram"])
        return vectors @ torch.diag(values.clamp(min=1e-6 * float(values[-1])).sqrt()) @ vectors.T

    def _branch(self, graph: Graph, node: fx.Node, down: torch.Tensor, up: torch.Tensor) -> None:
        """Put up (down x) beside the layer; both are layers like any other from here on."""
        layer = node.meta["notes"].get("layer", node.name)
        x, linear = bound_arguments(node)["input"], torch.ops.aten.linear.default
        after = node.next
        inner = graph.call(linear, x, self._factor(graph, f"{layer}.low_rank_down", down, after), before=after, like=node)
        outer = graph.call(linear, inner, self._factor(graph, f"{layer}.low_rank_up", up, after), before=after, like=node)
        total = graph.call(torch.ops.aten.add.Tensor, node, outer, before=after, like=node)
        for user in list(node.users):
            if user is not total:
                user.replace_input_with(node, total)
        for part, name in ((inner, "low_rank_down"), (outer, "low_rank_up"), (total, "")):
            part.meta["notes"] = {"layer": f"{layer}.{name}", "low_rank": self.rank} if name else {}
        node.meta["notes"]["low_rank"] = self.rank

    def _factor(self, graph: Graph, name: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
        constant = graph.add_constant(name, value.to(torch.float32).contiguous())
        if self.factors == "float":
            return constant
        quantizer = Quantizer.of(quantize_tensor(value.to(torch.float32).contiguous(), parse_scheme(self.factors)))
        return graph.call_quantizer(quantizer, constant, before=before, name=f"{name}_quantizer")


def low_rank(error: torch.Tensor, scale: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, in] and B [out, rank] whose product is nearest to ``error`` [out, in] in ||(E - B A) S||, S = ``scale`` [in, in].

    Both take the square root of the singular values, so that neither has rows much larger than the other's.
    """
    U, s, V = torch.linalg.svd(error @ scale, full_matrices=False)
    k = min(rank, len(s))
    root = s[:k].sqrt()
    return root.unsqueeze(1) * torch.linalg.solve(scale.T, V[:k].T).T, U[:, :k] * root

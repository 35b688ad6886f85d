"""Cut the largest weights of each group where the finer grid that follows gains more than the cut loses.

    %w = const f32[256,256]    ->    %w = const f32[256,256]    (each group clamped to +- its own bound)

For each row and group the bound is max|w| (1 - t), t = 0, 0.05, ..., 0.45; the one whose rounded group gives the smallest error of its
partial sums on sampled inputs is taken, and the weight is clamped to it, so that any later quantizer finds the bound as its range.
Query and key projections are left alone: their product is too sensitive.

Source: Lin et al., AWQ (2023), the clip search of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.formats import Scheme, choose_scale, dequantize, parse_scheme, quantize
from qcompile.formats.granularity import Channel, Group
from qcompile.graph import Graph
from qcompile.graph.regions import attention_regions, tensor_of
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.statistics import Request, Samples

STEPS = 10  # shrink by 0, 5, ..., 45 %


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Clip the weights of linears for a coming quantization.

    Attributes:
        weight: the scheme that the weights will have: by group or by output channel.
        rows: sampled inputs behind each search.
    """

    keeps: ClassVar[Keeps] = approximately()

    weight: str = "int4 group=128 sym"
    rows: int = 512

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        return list(dict.fromkeys(Samples(bound_arguments(node)["input"].name, rows=self.rows) for node in _linears(graph)))

    def run(self, graph: Graph, context: Context) -> int:
        assert context.statistics is not None
        scheme = parse_scheme(self.weight)
        changed = 0
        for node in _linears(graph):
            if "clipped" in node.meta["notes"]:
                continue
            arguments = bound_arguments(node)
            w = tensor_of(graph, arguments["weight"])
            size = _group_size(scheme, w)
            if size is None:
                context.log.reasons[node.name].append(f"clip-weights: '{scheme}' has no groups along the inputs that divide {w.shape[1]}")
                continue
            x = context.statistics[Samples(arguments["input"].name, rows=self.rows)]["rows"]
            bound = best_bound(w, x, size, scheme)
            clipped = torch.minimum(torch.maximum(w, -bound), bound)
            node.meta["notes"]["clipped"] = str(scheme)
            if not torch.equal(clipped, w):
                graph.set_constant(graph.own_constant(arguments["weight"], node), clipped)
                changed += 1
        return changed


def _linears(graph: Graph) -> list[fx.Node]:
    sensitive = {node for region in attention_regions(graph) for node in (region.query, region.key)}
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and operator_name(node.target) == "aten.linear"
        and node not in sensitive
        and graph.constant(bound_arguments(node)["weight"]) is not None
        and len(bound_arguments(node)["weight"].users) == 1
    ]


def _group_size(scheme: Scheme, w: torch.Tensor) -> int | None:
    granularity = scheme.granularity
    if isinstance(granularity, Channel) and granularity.axis == 0:
        return w.shape[1]
    size = granularity.size if isinstance(granularity, Group) and granularity.axis == -1 else 0
    size = min(size, w.shape[1])
    return size if size and w.shape[1] % size == 0 else None


def best_bound(w: torch.Tensor, x: torch.Tensor, size: int, scheme: Scheme) -> torch.Tensor:
    """Return the bound of each weight, f[out, in], equal inside each group of ``size`` inputs.

    Args:
        w: [out, in].
        x: sampled inputs [rows, in].
        size: inputs in a group.
        scheme: how the weights will be rounded.
    """
    groups = w.unflatten(1, (-1, size))  # [out, groups, size]
    gram = torch.einsum("rgi,rgj->gij", x.unflatten(1, (-1, size)), x.unflatten(1, (-1, size)))  # the error of a partial sum is e^T G e
    top = groups.abs().amax(2, keepdim=True)
    best = torch.full_like(top, torch.inf)
    bound = top.clone()
    for step in range(STEPS):
        limit = top * (1 - 0.05 * step)
        error = _rounded(groups, limit, scheme) - groups
        cost = torch.einsum("ogi,gij,ogj->og", error, gram, error).unsqueeze(2)
        better = cost < best
        best, bound = torch.where(better, cost, best), torch.where(better, limit, bound)
    return bound.expand_as(groups).reshape(w.shape)


def _rounded(groups: torch.Tensor, limit: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the groups clamped to +- limit and rounded with one scale each."""
    clipped = torch.minimum(torch.maximum(groups, -limit), limit)
    row = Scheme(scheme.format, Group(groups.shape[-1]), scheme.symmetric, scale_format=scheme.scale_format)
    scale, zero_point = choose_scale(*row.granularity.reduce_range(clipped), row)
    return dequantize(quantize(clipped, scale, zero_point, row), scale, zero_point, row)

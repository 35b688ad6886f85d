"""Split outlier channels behind a normalization into several smaller ones, and merge similar channels to make room: the width stays.

    %rms_norm = aten.rms_norm(%x) {weight=%g}                %rms_norm = aten.rms_norm(%x) {weight=%g}
    %linear = aten.linear(%rms_norm, %w)                     %taken = aten.index_select(%rms_norm, -1, %index)
                                                      ->     %channels = aten.mul.Tensor(%taken, %factor)
                                                             %linear = aten.linear(%channels, %w')

With m_i the largest magnitude of channel i and a threshold t, T_i = max(1, ceil(m_i / t)): channel i becomes T_i copies of x_i / T_i, each
with the column w_i of every linear that reads it. That is exact. R = sum(T_i - 1) channels have to go: channels on even places are matched
with those on odd places, split ones left out; a pair i, j costs |(w_i - w_j) (x_i - x_j) / 2|^2 on the sampled rows, and the R cheapest
pairs become one channel (x_i + x_j) / 2 with column w_i + w_j: a second ``index_select`` adds x_j. Without merging (``merge=false``) the
linears get R columns more, and no output changes.

The threshold is the one of ``thresholds`` between the largest magnitude and the one at which R reaches ``share`` of the channels that gives
the linears of the edge the least squared error with weights and activations rounded; none where nothing helps. It acts on edges from
a normalization to linears. The low-rank weights that the paper learns afterwards are not part of this pass.

Source: Liu et al., QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models (2024), section 4. The paper judges a
threshold by the output of attention or feed-forward network, here by the linears of the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from qcompile.passes.smooth import linear_edges

from qcompile.errors import Refused
from qcompile.formats import Scheme, parse_scheme, quantize_tensor
from qcompile.graph import Graph
from qcompile.graph.regions import ScaleEdge, tensor_of
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.statistics import AbsMax, Request, Samples

aten = torch.ops.aten


@dataclass(frozen=True)
class ReassembleChannels(Pass):
    """Split outlier channels and merge similar ones, for a coming quantization.

    Attributes:
        weight: scheme of the weights to come.
        activation: scheme of the activations to come.
        share: the largest share of channels that is merged; 0.1 to 0.2 in the paper.
        thresholds: how many are tried; at least 100 in the paper.
        merge: keep the width; without, split channels are added and the function is kept.
        rows: sampled rows of each input.
    """

    keeps: ClassVar[Keeps] = approximately()

    weight: str = "int4 channel=0 sym"
    activation: str = "int4 token sym dynamic"
    share: float = 0.1
    thresholds: int = 100
    merge: bool = True
    rows: int = 128

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if not 0 < self.share <= 0.5 or self.thresholds < 1:
            raise Refused("share is above 0 to 0.5 of the channels, thresholds 1 or more", node=self.name())
        inputs = dict.fromkeys(consumer.input.name for edge in _norm_edges(graph) for consumer in edge.consumers)
        return [request for name in inputs for request in (AbsMax(name), Samples(name, rows=self.rows))]

    def run(self, graph: Graph, context: Context) -> int:
        changed = 0
        for edge in _norm_edges(graph):
            notes, log = edge.producer.meta["notes"], context.log.reasons[edge.producer.name]
            if "channels_reassembled" in notes:
                log.append("reassemble-channels: its channels are reassembled already")
                continue
            notes["channels_reassembled"] = True
            plan, share = self._best(graph, edge, context)
            if plan is None:
                log.append("reassemble-channels: no threshold lowers the error of what reads it")
                continue
            _rewrite(graph, edge, plan)
            text = f"{plan.split} channels split, {len(plan.merged)} pairs merged, {share:.3f} of the error"
            context.notes.append((edge.producer.name, f"reassemble-channels: {text}"))
            changed += 1
        return changed

    def _best(self, graph: Graph, edge: ScaleEdge, context: Context) -> tuple[Plan | None, float]:
        """Return the plan of the threshold with the least error, and that error relative to the edge as it stands."""
        assert context.statistics is not None
        name = edge.consumers[0].input.name
        x = context.statistics[Samples(name, rows=self.rows)]["rows"].to(torch.float32)
        largest = context.statistics[AbsMax(name)]["abs_max"].to(torch.float64)
        weight = torch.cat([tensor_of(graph, c.weight).to(torch.float32) for c in edge.consumers])
        schemes = parse_scheme(self.activation), parse_scheme(self.weight)
        pairs = _similar_pairs(x, weight) if self.merge else torch.empty(0, 2, dtype=torch.int64)
        best, plain = None, _error(x, weight, x @ weight.T, schemes)
        least, most = plain, int(self.share * edge.channels)
        seen: set[tuple[int, ...]] = set()
        for step in range(1, self.thresholds):
            copies = (largest / (largest.max() * (1 - step / self.thresholds))).ceil().clamp(min=1).to(torch.int64)
            if int((copies - 1).sum()) > most:
                break
            key = tuple(copies.tolist())
            plan = None if key in seen else _plan(copies, pairs, merge=self.merge)
            seen.add(key)
            if plan is None:
                continue
            error = _error(plan.channels(x), plan.columns(weight), x @ weight.T, schemes)
            if error < least:
                best, least = plan, error
        return best, least / plain if plain else 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """Which old channel every new one takes, and how.

    Attributes:
        index: i64 [new], the old channel.
        factor: f32 [new], its share: 1 / T for split channels, 1/2 for merged ones.
        merged: i64 [pairs, 2], a new channel and the old one that is added to it with a factor of 1/2.
        split: how many old channels are split.
    """

    index: torch.Tensor
    factor: torch.Tensor
    merged: torch.Tensor
    split: int

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        """Return the new channels of x f32 [rows, old]."""
        made = x[:, self.index] * self.factor
        made[:, self.merged[:, 0]] += x[:, self.merged[:, 1]] / 2
        return made

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, new] that reads the new channels in place of weight [out, old]."""
        made = weight[:, self.index].clone()
        made[:, self.merged[:, 0]] += weight[:, self.merged[:, 1]]
        return made


def _norm_edges(graph: Graph) -> list[ScaleEdge]:
    """Return the edges from a normalization straight to linears that all read one value, every channel in its place."""
    return [
        edge
        for edge in linear_edges(graph)
        if edge.kind == "norm"
        and len({consumer.input for consumer in edge.consumers}) == 1
        and all(torch.equal(consumer.columns, torch.arange(edge.channels)) for consumer in edge.consumers)
    ]


def _similar_pairs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return for each even channel the odd one that it is merged with at least cost, i64 [pairs, 2], the cheapest first.

    The cost |(w_i - w_j) (x_i - x_j) / 2|^2 is the product of the squared distances of columns and of channels.
    """
    even, odd = torch.arange(0, x.shape[1], 2), torch.arange(1, x.shape[1], 2)
    cost = torch.cdist(x.T[even], x.T[odd]).square() * torch.cdist(weight.T[even], weight.T[odd]).square()
    lowest, partner = cost.min(1)
    order = lowest.argsort(stable=True)
    return torch.stack([even[order], odd[partner[order]]], 1)


def _plan(copies: torch.Tensor, pairs: torch.Tensor, *, merge: bool) -> Plan | None:
    """Return how channels are split into so many copies and merged; None where nothing is split or too few can be merged."""
    places = torch.arange(len(copies)).repeat_interleave(copies - 1)  # the old channel of each copy that is added
    if not len(places):
        return None
    index, factor = torch.arange(len(copies)), 1 / copies.to(torch.float32)
    if not merge:
        return Plan(torch.cat([index, places]), torch.cat([factor, factor[places]]), torch.empty(0, 2, dtype=torch.int64), _split(copies))
    chosen: list[tuple[int, int]] = []
    taken = set((copies > 1).nonzero().flatten().tolist())
    for i, j in pairs.tolist():
        if len(chosen) == len(places):
            break
        if i not in taken and j not in taken:
            chosen.append((i, j))
            taken |= {i, j}
    if len(chosen) < len(places):
        return None
    merged = torch.tensor(chosen)
    index, factor = index.clone(), factor.clone()
    index[merged[:, 1]], factor[merged[:, 1]] = places, factor[places]  # the copies stand where the second of each pair was
    factor[merged[:, 0]] = 0.5
    return Plan(index, factor, merged, _split(copies))


def _split(copies: torch.Tensor) -> int:
    return int((copies > 1).sum())


def _error(x: torch.Tensor, weight: torch.Tensor, exact: torch.Tensor, schemes: tuple[Scheme, Scheme]) -> float:
    seen, stored = (quantize_tensor(value, scheme).dequantize() for value, scheme in zip((x, weight), schemes, strict=True))
    return float((seen @ stored.T - exact).square().sum())


def _rewrite(graph: Graph, edge: ScaleEdge, plan: Plan) -> None:
    x, first, name = edge.consumers[0].input, edge.consumers[0].node, edge.producer.name
    dtype = x.meta["val"].dtype

    def constant(part: str, value: torch.Tensor) -> torch.fx.Node:
        return graph.add_constant(f"{name}.{part}", value, before=first, like=edge.producer)

    def taken(part: str, index: torch.Tensor, factor: torch.Tensor) -> torch.fx.Node:
        channels = graph.call(aten.index_select.default, x, -1, constant(f"{part}_index", index), before=first)
        return graph.call(aten.mul.Tensor, channels, constant(f"{part}_factor", factor.to(dtype)), before=first)

    made = taken("channel", plan.index, plan.factor)
    if len(plan.merged):
        index, factor = torch.zeros_like(plan.index), torch.zeros_like(plan.factor)
        index[plan.merged[:, 0]], factor[plan.merged[:, 0]] = plan.merged[:, 1], 0.5
        made = graph.call(aten.add.Tensor, made, taken("partner", index, factor), before=first)
    for consumer in edge.consumers:
        weight = graph.own_constant(consumer.weight, consumer.node)
        value = tensor_of(graph, weight)
        consumer.node.replace_input_with(x, made)
        graph.set_constant(weight, plan.columns(value.to(torch.float64)).to(value.dtype))

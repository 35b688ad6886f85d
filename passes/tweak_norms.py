"""Tune the gains and biases of normalizations block by block, so that a quantized block gives the float block's mean and variance.

    %rms_norm = aten.rms_norm(%x) {weight=%g}      ->     %rms_norm = aten.rms_norm(%x) {weight=%g'}

Nothing else changes: codes and scales stay as solvers chose them. For block l, which reads what the quantized blocks before it give,

    L = mean over channels of |mean_float - mean_quantized| + |var_float - var_quantized|,      moments over tokens,

where the float block reads the same input, with no quantizer on weights, activations and caches. One pass of Adam over the calibration
samples changes the block's gains and biases, at the rate r_l = rate (1 + growth l / L) for block l of L; the tuned values are kept only if
they lower L over those samples. Then the next block reads the tuned one's output. Rounding counts as the identity for the gradient.

The paper generates its calibration text with the model; here it is the calibration data of the compile. Its rate is found by search from
1e-5; the default here suits models whose blocks are small. Equal data give equal gains.

Source: Li et al., Norm Tweaking: High-performance Low-bit Quantization of Large Language Models (2023), section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from qcompile.passes._straight_through import round_through

from qcompile.errors import Refused
from qcompile.graph import Graph, Stage
from qcompile.graph.regions import Block, repeated_blocks
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class TweakNorms(Pass):
    """Tune normalizations to the float blocks' channel moments, after weights are solved.

    Attributes:
        rate: learning rate of the first block.
        growth: how much larger it is towards the last block.
        samples: calibration samples that are used, one for each step.
    """

    stage: ClassVar[Stage] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()
    needs: ClassVar[tuple[str, ...]] = ("quantize-weights",)

    rate: float = 1e-3
    growth: float = 1.0
    samples: int = 128

    def run(self, graph: Graph, context: Context) -> int:
        if context.calibration is None:
            raise Refused("it tunes on calibration data", node=self.name(), way_out="give --calibrate DATA")
        blocks = repeated_blocks(graph)
        if not blocks:
            context.log.reasons[graph.outputs[0].name].append("tweak-norms: no blocks repeat")
            return 0
        batches = list(itertools.islice(_single(graph, context.calibration.batches(graph)), self.samples))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        streams: list[Values] = [dict(zip(placeholders, batch, strict=True)) for batch in batches]
        nodes = [node for node in graph.nodes if node.op in ("call_function", "call_module")]
        place = {node: number for number, node in enumerate(nodes)}
        changed = reached = 0
        for number, block in enumerate(blocks):
            start, stop = place[block.nodes[0]], place[block.nodes[-1]] + 1
            _advance(graph, streams, nodes[reached:start], nodes[start:])
            changed += self._tune(graph, block, streams, self.rate * (1 + self.growth * number / len(blocks)), context)
            _advance(graph, streams, nodes[start:stop], nodes[stop:])
            reached = stop
        return changed

    def _tune(self, graph: Graph, block: Block, streams: Sequence[Values], rate: float, context: Context) -> int:
        """Tune one block's gains and biases; return how many changed."""
        if any("norms_tweaked" in node.meta["notes"] for node in block.nodes):
            context.log.reasons[block.nodes[0].name].append("tweak-norms: the block is tuned already")
            return 0
        parameters = _parameters(graph, block)
        outputs = [node for node in block.outputs if _has_channels(node)]
        if not parameters or not outputs:
            context.log.reasons[block.nodes[0].name].append("tweak-norms: the block has no gain or bias of a normalization")
            return 0
        fixed = _constants(graph, block)
        exact = _constants(graph, block, exact=True)
        with torch.no_grad():
            targets = [_moments(_run(graph, block.nodes, {**exact, **values}, exact=True), outputs) for values in streams]
        learned = {node: fixed[node].clone().requires_grad_() for node in parameters}
        before = _total(graph, block, streams, fixed, outputs, targets)
        optimizer = torch.optim.Adam(learned.values(), lr=rate)
        with torch.enable_grad():
            for values, target in zip(streams, targets, strict=True):
                optimizer.zero_grad()
                loss = _distance(_moments(_run(graph, block.nodes, {**fixed, **learned, **values}), outputs), target)
                loss.backward()
                optimizer.step()
        tuned = {node: value.detach() for node, value in learned.items()}
        after = _total(graph, block, streams, {**fixed, **tuned}, outputs, targets)
        context.notes.append((block.name, f"tweak-norms: distance of channel moments {after:.4g}, {before:.4g} before"))
        block.nodes[0].meta["notes"]["norms_tweaked"] = True
        if not after < before:
            return 0
        for node, value in tuned.items():
            graph.set_constant(node, value)
        return len(tuned)


def _single(graph: Graph, batches: Iterable[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the samples of each batch one by one; whole batches where the graph takes one size only."""
    symbolic = all(isinstance(kind.shape[0], str) for kind in graph.input_types)
    for batch in batches:
        yield from zip(*(x.split(1) for x in batch), strict=True) if symbolic else [batch]


def _parameters(graph: Graph, block: Block) -> list[fx.Node]:
    """Return the constants that scale or shift a normalized value inside a block, each read by one node."""
    found: dict[fx.Node, None] = {}
    for node in block.nodes:
        name = operator_name(node.target) if node.op == "call_function" else ""
        if name in ("aten.rms_norm", "aten.layer_norm"):
            arguments = bound_arguments(node)
            owned = [x for x in (arguments["weight"], arguments.get("bias")) if x is not None and graph.constant(x) is not None]
            found |= dict.fromkeys(graph.own_constant(x, node) for x in owned)
    return list(found)


def _has_channels(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1 and isinstance(value.shape[-1], int)


# ---- running --------------------------------------------------------------------------------------------------------------


def _constants(graph: Graph, block: Block, *, exact: bool = False) -> Values:
    """Return the constants that a block reads, and its weights as quantized, or ``exact`` as they were."""
    values: Values = {}
    for node in block.nodes:
        values |= {x: graph.constant(x) for x in node.all_input_nodes if x.op == "get_attr"}
        if (quantizer := graph.quantizer(node)) and node.args[0] in values:
            values[node] = values[node.args[0]] if exact else quantizer(values[node.args[0]])
    return values


def _run(graph: Graph, nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any], *, exact: bool = False) -> Values:
    """Return the values of a run of nodes; quantizers of activations pass gradients, or round nothing if ``exact``."""
    made = dict(values)
    for node in nodes:
        if quantizer := graph.quantizer(node):
            if node not in made:
                made[node] = made[node.args[0]] if exact else round_through(made[node.args[0]], quantizer)
            continue
        if exact and node.op == "call_function" and operator_name(node.target) in ("qc.vector_codes", "qc.vectors"):
            made[node] = made[node.args[0]]
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
        made[node] = node.target(*args, **kwargs)
    return made


def _advance(graph: Graph, streams: Sequence[Values], nodes: Sequence[fx.Node], rest: Sequence[fx.Node]) -> None:
    """Run nodes on every stream and leave in it what the rest reads."""
    needed = {x for node in rest for x in node.all_input_nodes}
    fixed = {x: graph.constant(x) for node in nodes for x in node.all_input_nodes if x.op == "get_attr"}
    weights = {node: quantizer(fixed[node.args[0]]) for node in nodes if (quantizer := graph.quantizer(node)) and node.args[0] in fixed}
    with torch.no_grad():
        for stream in streams:
            made = _run(graph, nodes, {**fixed, **weights, **stream})
            stream.clear()
            stream |= {node: value for node, value in made.items() if node in needed and node.op != "get_attr"}


# ---- the loss -------------------------------------------------------------------------------------------------------------


def _moments(values: Values, outputs: Sequence[fx.Node]) -> list[torch.Tensor]:
    """Return mean and variance over tokens of each channel of each output, f32 [2, channels]."""
    rows = [values[node].flatten(0, -2) for node in outputs]
    return [torch.stack([x.mean(0), x.var(0, correction=0)]) for x in rows]


def _distance(found: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a - b).abs().sum(0).mean() for a, b in zip(found, targets, strict=True)]).sum()


def _total(
    graph: Graph,
    block: Block,
    streams: Sequence[Values],
    constants: Values,
    outputs: Sequence[fx.Node],
    targets: Sequence[Sequence[torch.Tensor]],
) -> float:
    with torch.no_grad():
        losses = [
            _distance(_moments(_run(graph, block.nodes, {**constants, **values}), outputs), target)
            for values, target in zip(streams, targets, strict=True)
        ]
    return float(torch.stack(losses).mean())

"""Take back the mean error that quantized weights add to each output, by changing the bias.

    %w.quantizer = quantizer(%w) {scheme="int8 tensor sym"}
    %conv2d = aten.conv2d(%x, %w.quantizer, %b)    ->    %conv2d = aten.conv2d(%x, %w.quantizer, %b - (Q(w) - w) E[x])

The output error (Q(w) - w) x has the mean (Q(w) - w) E[x], kernel taps summed; borders, where taps read padding instead of x, are taken
like the inside (as in the paper). E[x] comes from the calibration data if there is any, else from the model: batch normalization gives
the mean of a channel before its ReLU, and the rectified (or clipped) normal distribution the mean after it.

Source: Nagel et al. (2019), section 4.2, equations 17-19.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.graph import Graph, Stage
from qcompile.graph.regions import add_to_bias, tap_sums, tensor_of
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.statistics import Moments, Request
from qcompile.statistics.model_ranges import ModelRanges

SMALLEST = 1e-12  # a correction below this share of the largest bias is rounding


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct the biases of layers with quantized weights.

    Attributes:
        means: ``data``, ``model``, or ``auto``: data where there is calibration, else the model.
    """

    stage: ClassVar[Stage] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()

    means: str = "auto"

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if not self._from_data(context):
            return ()
        return list({node: _moments(node) for node in _quantized_layers(graph)}.values())

    def run(self, graph: Graph, context: Context) -> int:
        model = None if self._from_data(context) else ModelRanges(graph, context.example_inputs)
        changed = 0
        for node in _quantized_layers(graph):
            if "bias_corrected" in node.meta["notes"]:
                continue
            mean = self._mean(node, model, context)
            if mean is None:
                context.log.reasons[node.name].append("correct-bias: the mean of its input is not known without data")
                continue
            add_to_bias(graph, node, -(_weight_error(graph, node) @ mean))
            node.meta["notes"]["bias_corrected"] = "data" if model is None else "model"
            changed += 1
        return changed

    def _from_data(self, context: Context) -> bool:
        return self.means == "data" or (self.means == "auto" and context.calibration is not None)

    def _mean(self, node: fx.Node, model: ModelRanges | None, context: Context) -> torch.Tensor | None:
        """Return E[x] of each input channel, f64 [in]."""
        if model is not None:
            spread = model.spreads.get(bound_arguments(node)["input"])
            return None if spread is None else spread.mean.to(torch.float64)
        assert context.statistics is not None
        return context.statistics[_moments(node)]["mean"].to(torch.float64)


def _moments(node: fx.Node) -> Moments:
    return Moments(bound_arguments(node)["input"].name, axis=1 if operator_name(node.target) == "aten.conv2d" else -1)


def _quantized_layers(graph: Graph) -> list[fx.Node]:
    """Return the convs and linears that read a constant weight through a quantizer."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and operator_name(node.target) in ("aten.conv2d", "aten.linear"):
            weight = bound_arguments(node)["weight"]
            if graph.quantizer(weight) and graph.constant(weight.args[0]) is not None:
                found.append(node)
    return found


def _weight_error(graph: Graph, node: fx.Node) -> torch.Tensor:
    """Return Q(w) - w summed over kernel taps, f64 [out, in]."""
    arguments = bound_arguments(node)
    quantizer = graph.quantizer(arguments["weight"])
    assert quantizer is not None
    weight = tensor_of(graph, arguments["weight"].args[0])
    with torch.no_grad():
        error = quantizer(weight).to(torch.float64) - weight.to(torch.float64)
    return tap_sums(error, arguments.get("groups", 1))

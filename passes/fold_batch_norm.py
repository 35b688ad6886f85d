"""Fold batch normalisation in evaluation mode into the convolution or linear layer before it (or after it).

    %conv2d = aten.conv2d(%x, %w) : f32[n,8,6,6]
    %bn = aten.batch_norm(%conv2d, %gain, %shift, %mean, %var) {training=false, momentum=0.1, eps=1e-05, cudnn_enabled=false} : f32[n,8,6,6]
    ->
    %conv2d = aten.conv2d(%x, %w, %bias) : f32[n,8,6,6] !{bn_mean=@.., bn_std=@..}

With s = gain / sqrt(var + eps): s * (W x + b - mean) + shift = (s W) x + (s (b - mean) + shift) (Krishnamoorthi 2018, section
3.2.2). The same holds for a normalisation before a layer: W (s x + t) + b = (W s) x + (W t + b), unless the layer pads, since padding
adds zeros after the normalisation. The arithmetic is float64.

The folded layer keeps what data-free methods need to know of its output: on the training data it had mean ``shift`` and deviation
``|gain|`` in each channel (Nagel et al. 2019, section 4.2.1). They stand in the notes ``bn_mean`` and ``bn_std``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from qcompile.graph import Graph
from qcompile.graph.rewrite import Any_, Match, Op, Rule
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import VALUES, Keeps, Pass

_CONVOLUTIONS = "aten.conv1d|aten.conv2d|aten.conv3d"


# ---- the normalisation as a scale and an offset ---------------------------------------------------------------------------


def _statistics(graph: Graph, node: fx.Node) -> dict[str, torch.Tensor]:
    """Return gain, shift, mean and variance [channels] of a batch norm in float64."""
    a = bound_arguments(node)
    mean = graph.constant(a["running_mean"])
    assert mean is not None
    found = {"gain": torch.ones_like(mean), "shift": torch.zeros_like(mean)}
    for name, argument in (("gain", "weight"), ("shift", "bias"), ("mean", "running_mean"), ("variance", "running_var")):
        value = graph.constant(a[argument])
        found |= {name: value} if value is not None else {}
    return {name: value.to(torch.float64) for name, value in found.items()}


def _affine(graph: Graph, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and offset [channels] with batch_norm(x) = scale * x + offset, in float64."""
    s = _statistics(graph, node)
    scale = s["gain"] / torch.sqrt(s["variance"] + bound_arguments(node)["eps"])
    return scale, s["shift"] - scale * s["mean"]


def _not_foldable(graph: Graph, norm: fx.Node, layer: fx.Node) -> str | None:
    a, b = bound_arguments(norm), bound_arguments(layer)
    if a["training"]:
        return "the normalisation is in training mode"
    if graph.constant(a["running_mean"]) is None or graph.constant(a["running_var"]) is None:
        return "the normalisation has no constant statistics"
    if any(a[key] is not None and graph.constant(a[key]) is None for key in ("weight", "bias")):
        return "the normalisation's gain or shift is not a constant"
    if graph.constant(b["weight"]) is None or (b["bias"] is not None and graph.constant(b["bias"]) is None):
        return "the layer's weight or bias is not a constant"
    if operator_name(layer.target) == "aten.linear" and layer.meta["val"].ndim != 2:
        return "the normalised axis is not the layer's output"
    return None


def _set_affine(graph: Graph, layer: fx.Node, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give a layer a weight and a bias of its own, float64 tensors that are stored in the weight's dtype."""
    a = bound_arguments(layer)
    old = graph.own_constant(a["weight"], layer)
    dtype = old.meta["val"].dtype
    graph.set_constant(old, weight.to(dtype))
    if a["bias"] is None:
        place = str(old.target)
        name = f"{place.removesuffix('.weight')}.bias" if place.endswith(".weight") else f"{place}_bias"
        new = graph.add_constant(name, bias.to(dtype), before=old.next, like=layer)
    else:
        new = graph.own_constant(a["bias"], layer)
        graph.set_constant(new, bias.to(dtype))
    a = bound_arguments(layer) | {"bias": new}
    layer.args, layer.kwargs = tuple(a.values()), {}
    layer.meta["made_by"] = graph.maker


def _bias(graph: Graph, layer: fx.Node, channels: int) -> torch.Tensor:
    value = graph.constant(bound_arguments(layer)["bias"])
    return torch.zeros(channels, dtype=torch.float64) if value is None else value.to(torch.float64)


# ---- layer, then normalisation --------------------------------------------------------------------------------------------


def _fold_after(graph: Graph, m: Match) -> fx.Node:
    layer: fx.Node = m["layer"]
    scale, offset = _affine(graph, m.root)
    weight = _float64(graph, layer)
    bias = scale * _bias(graph, layer, scale.numel()) + offset
    s = _statistics(graph, m.root)
    layer.meta["notes"] |= {"bn_mean": s["shift"].to(torch.float32), "bn_std": s["gain"].abs().to(torch.float32)}
    _set_affine(graph, layer, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias)
    return layer


def _float64(graph: Graph, layer: fx.Node) -> torch.Tensor:
    value = graph.constant(bound_arguments(layer)["weight"])
    assert value is not None
    return value.to(torch.float64)


# ---- normalisation, then layer --------------------------------------------------------------------------------------------


def _not_foldable_before(graph: Graph, m: Match) -> str | None:
    padding: Any = bound_arguments(m.root).get("padding", 0)
    if padding == "same" or (isinstance(padding, (list, tuple)) and any(padding)):
        return "the layer pads with zeros, which the normalisation would not leave zero"
    if operator_name(m.root.target) == "aten.linear" and m["norm"].meta["val"].ndim != 2:
        return "the normalised axis is not the layer's input"
    return _not_foldable(graph, m["norm"], m.root)


def _fold_before(graph: Graph, m: Match) -> fx.Node:
    layer = m.root
    scale, offset = _affine(graph, m["norm"])
    weight = _float64(graph, layer)  # [out, in / groups, ..]
    groups = bound_arguments(layer).get("groups", 1)
    # Output channels of group g read the input channels of group g: one row of scales for each output channel.
    rows = [values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0) for values in (scale, offset)]
    scales, offsets = (row.reshape(*row.shape, *[1] * (weight.ndim - 2)) for row in rows)
    bias = _bias(graph, layer, weight.shape[0]) + (weight * offsets).flatten(1).sum(1)
    # Before the weight changes: the layer reads the normalisation's input from now on.
    layer.replace_input_with(m["norm"], bound_arguments(m["norm"])["input"])
    _set_affine(graph, layer, weight * scales, bias)
    return layer


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Batch normalisation in evaluation mode becomes part of the layer before or after it."""

    keeps: ClassVar[Keeps] = VALUES
    rules = (
        Rule(
            "fold-batch-norm",
            Op("aten.batch_norm", input=Op(f"{_CONVOLUTIONS}|aten.linear", name="layer")),
            _fold_after,
            lambda graph, m: _not_foldable(graph, m.root, m["layer"]),
        ),
        Rule(
            "fold-batch-norm-forward",
            Op(f"{_CONVOLUTIONS}|aten.linear", input=Op("aten.batch_norm", input=Any_("x"), name="norm")),
            _fold_before,
            _not_foldable_before,
        ),
    )

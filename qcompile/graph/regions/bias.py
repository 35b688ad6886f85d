"""Edits of biases that folds share: shift a producer's output, add to a layer's bias, sum a weight over its kernel taps."""

from __future__ import annotations

import torch
import torch.fx as fx

from qcompile.graph.graph import Graph
from qcompile.graph.regions.scale import tensor_of
from qcompile.graph.text import bound_arguments


def add_to_bias(graph: Graph, node: fx.Node, shift: torch.Tensor) -> None:
    """Add ``shift`` (f64 [out]) to the bias of a conv or linear; one without bias gets it."""
    bias = bound_arguments(node)["bias"]
    if bias is None:
        weight = bound_arguments(node)["weight"]
        source = weight.args[0] if weight.op == "call_module" else weight  # a quantizer stands between
        name = str(source.target).removesuffix(".weight")
        bias = graph.add_constant(f"{name}.bias", shift.to(source.meta["val"].dtype), before=node, like=node)
        node.args = (*node.args[:2], bias, *node.args[3:])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        return
    own = graph.own_constant(bias, node)
    value = tensor_of(graph, own)
    graph.set_constant(own, (value.to(torch.float64) + shift).to(value.dtype))


def shift_bias(graph: Graph, node: fx.Node, shift: torch.Tensor) -> None:
    """Add ``shift`` (f64 [out]) to all outputs of a conv or linear and to what batch normalization noted about their mean."""
    add_to_bias(graph, node, shift)
    notes = node.meta["notes"]
    if "bn_mean" in notes:
        notes["bn_mean"] = (notes["bn_mean"].to(torch.float64) + shift).to(notes["bn_mean"].dtype)


def tap_sums(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Return a weight [out, in / groups, taps...] summed over its taps as a dense matrix, f64 [out, in]."""
    sums = weight.to(torch.float64).reshape(*weight.shape[:2], -1).sum(-1)  # [out, in / groups]
    if groups == 1:
        return sums
    return torch.block_diag(*sums.chunk(groups))


def column_sums(graph: Graph, node: fx.Node) -> torch.Tensor:
    """Return what a constant input of ones in each channel alone adds to the outputs, f64 [out, in]; padding is ignored."""
    arguments = bound_arguments(node)
    return tap_sums(tensor_of(graph, arguments["weight"]), arguments.get("groups", 1))

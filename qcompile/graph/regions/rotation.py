"""Folds of matrices into weights: a map of a producer's output channels, and of the channels that a consumer reads."""

from __future__ import annotations

import torch
import torch.fx as fx

from qcompile.graph.graph import Graph
from qcompile.graph.regions.bias import add_to_bias
from qcompile.graph.regions.scale import tensor_of
from qcompile.graph.text import bound_arguments, operator_name


def map_outputs(graph: Graph, node: fx.Node, matrix: torch.Tensor) -> None:
    """Make a linear, an embedding or a constant give y P instead of y, for P f64 [n, n].

    Where n divides the channels, each run of n is mapped.
    """
    if node.op == "get_attr":
        _set(graph, node, _runs(tensor_of(graph, node).to(torch.float64), matrix))
        return
    arguments = bound_arguments(node)
    weight = graph.own_constant(arguments["weight"], node)
    value = tensor_of(graph, weight).to(torch.float64)
    rows = operator_name(node.target) == "aten.embedding"
    _set(graph, weight, _runs(value, matrix) if rows else _runs(value.T, matrix).T)
    if arguments.get("bias") is not None:
        bias = graph.own_constant(arguments["bias"], node)
        _set(graph, bias, _runs(tensor_of(graph, bias).to(torch.float64), matrix))


def map_inputs(graph: Graph, node: fx.Node, matrix: torch.Tensor) -> None:
    """Make a linear right for an input x P, P orthogonal f64 [n, n] (or each run of n): W P takes the place of W."""
    weight = graph.own_constant(bound_arguments(node)["weight"], node)
    _set(graph, weight, _runs(tensor_of(graph, weight).to(torch.float64), matrix))


def fold_affine(graph: Graph, node: fx.Node, gain: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """Move a gain and a bias f[in] of a linear's input into the linear: W (g x + b) = (W g) x + W b."""
    weight = graph.own_constant(bound_arguments(node)["weight"], node)
    value = tensor_of(graph, weight).to(torch.float64)
    if bias is not None:
        add_to_bias(graph, node, value @ bias.to(torch.float64))
    if gain is not None:
        _set(graph, weight, value * gain.to(torch.float64))


def _runs(value: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return value [.., n] P, for each run of n elements of the last axis."""
    return (value.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def _set(graph: Graph, node: fx.Node, value: torch.Tensor) -> None:
    graph.set_constant(node, value.to(tensor_of(graph, node).dtype))

"""What an error of a query or key projection counts in the scores of its head: the output side of BoA's Hessian.

A query q_t of a head meets the head's keys k_s after position has been put into both, q'_t = R_t q_t. An error e of q_t moves the scores by
e^T R_t^T k'_s, so that its square counts e^T (R_t^T C R_t) e with C = sum over s of k'_s k'_s^T; H_out is the mean over positions. Of
keys the same with the queries of all heads that share them (Kim et al. 2024, arXiv 2406.13474, section 3.2). R_t is whatever linear or
nonlinear operators stand between projection and attention: R_t^T is applied by automatic differentiation to the columns of C^(1/2).
Values are those of the float model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from qcompile.graph.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.statistics.regions import product_count
from qcompile.statistics.row_weights import FloatModel
from qcompile.statistics.sweep import Data


def head_grams(graph: Graph, layers: Sequence[fx.Node], data: Data) -> dict[fx.Node, torch.Tensor]:
    """Return H_out [heads, d, d], float64, of the layers that project queries or keys; the others are left out.

    Args:
        graph: with quantizers, which are passed over.
        layers: linears.
        data: batches of the graph's inputs. Covariances are of all of it, the way back of its first batch.
    """
    attentions = {node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == "qc.attention"}
    sides = {(node, side): layer for node in attentions for side in "qk" if (layer := _projection(graph, node, side)) in set(layers)}
    if not sides:
        return {}
    squares = {key: torch.zeros(()).double() for key in ((node, side) for node in attentions for side in "qk")}
    for batch in data.batches(graph):
        with torch.no_grad():
            _Recorder(graph, squares).run(*batch)
    batch = next(iter(data.batches(graph)))
    return {layer: _pull_back(graph, batch, layer, node, side, _met(node, side, squares)) for (node, side), layer in sides.items()}


def _projection(graph: Graph, attention: fx.Node, side: str) -> fx.Node | None:
    """Return the one linear that a side of attention comes from, with no other product between."""
    found: set[fx.Node] = set()
    waiting: list[fx.Node] = [bound_arguments(attention)[side]]
    while waiting:
        node = waiting.pop()
        if product_count(graph, node):
            found.add(node)
        elif isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point():
            waiting += node.all_input_nodes
    linears = [node for node in found if operator_name(node.target) == "aten.linear"]
    return linears[0] if len(found) == 1 == len(linears) else None


class _Recorder(FloatModel):
    """Adds up the squares of each head's queries and keys as attention reads them."""

    def __init__(self, graph: Graph, squares: dict[tuple[fx.Node, str], torch.Tensor]) -> None:
        super().__init__(graph.module)
        self.squares = squares

    def run_node(self, n: fx.Node) -> Any:
        for side, count in (("q", "heads"), ("k", "kv_heads")):
            if (n, side) in self.squares:
                arguments = bound_arguments(n)
                x = (
                    self.env[arguments[side]].double().flatten(0, 1).unflatten(1, (arguments[count], -1)).transpose(0, 1)
                )  # [heads, rows, d]
                self.squares[n, side] = self.squares[n, side] + x.transpose(1, 2) @ x
        return super().run_node(n)


def _met(attention: fx.Node, side: str, squares: dict[tuple[fx.Node, str], torch.Tensor]) -> torch.Tensor:
    """Return what the heads of one side meet, [heads of the side, d, d]."""
    arguments = bound_arguments(attention)
    shared = arguments["heads"] // arguments["kv_heads"]
    if side == "q":
        return squares[attention, "k"].repeat_interleave(shared, 0)
    return squares[attention, "q"].unflatten(0, (-1, shared)).sum(1)


def _pull_back(
    graph: Graph, batch: Sequence[torch.Tensor], layer: fx.Node, attention: fx.Node, side: str, met: torch.Tensor
) -> torch.Tensor:
    """Return the mean over positions of R^T C R for each head."""
    values: dict[str, torch.Tensor] = {}

    class Recorder(FloatModel):
        def run_node(self, n: fx.Node) -> Any:
            if n is attention:
                values["end"] = self.env[bound_arguments(n)[side]]
            value = super().run_node(n)
            if n is layer:
                value = values["begin"] = value.detach().requires_grad_()
            return value

    with torch.enable_grad():
        Recorder(graph.module).run(*batch)
        eigenvalues, vectors = torch.linalg.eigh(met)
        roots = vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)  # [heads, d, columns]
        end, total = values["end"], torch.zeros_like(met)
        for column in roots.unbind(2):
            cotangent = column.flatten().to(end.dtype).expand_as(end)
            (back,) = torch.autograd.grad(end, values["begin"], cotangent, retain_graph=True)
            rows = back.double().flatten(0, -2).unflatten(1, (len(met), -1)).transpose(0, 1)  # [heads, rows, d]
            total += rows.transpose(1, 2) @ rows / rows.shape[1]
    return total

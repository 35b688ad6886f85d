"""Put operators into an order in which little lives at one time.

    %a = qc.conv2d(%x, ..) : u8[1,64,8,8]                  %a = qc.conv2d(%x, ..) : u8[1,64,8,8]
    %b = qc.conv2d(%x, ..) : u8[1,64,8,8]          ->      %c = qc.conv2d(%a, ..) : u8[1,4,8,8]
    %c = qc.conv2d(%a, ..) : u8[1,4,8,8]                   %b = qc.conv2d(%x, ..) : u8[1,64,8,8]
    %d = qc.conv2d(%b, ..) : u8[1,4,8,8]                   %d = qc.conv2d(%b, ..) : u8[1,4,8,8]

No operator changes, so no bit does. ``qcompile.arena.order`` finds the order; a graph that is a chain, or whose order is the best
already, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from qcompile.arena.from_graph import describe_graph
from qcompile.arena.order import order_steps
from qcompile.graph import Graph, Stage
from qcompile.pipeline import BITS, Context, Keeps, Pass


@dataclass(frozen=True)
class OrderOperators(Pass):
    """Order operators so that the most bytes that live at one time are the fewest; the graph's sizes are numbers.

    Attributes:
        inputs: the arena holds the inputs too.
    """

    stage: ClassVar[Stage] = Stage.INTEGER
    keeps: ClassVar[Keeps] = BITS
    needs: ClassVar[tuple[str, ...]] = ("materialize",)

    inputs: bool = False

    def run(self, graph: Graph, context: Context) -> int:
        described = describe_graph(graph, context.target.memory(), inputs=self.inputs)
        order = order_steps(described.work).steps
        if order == tuple(range(len(order))):
            return 0
        _move(graph, [described.nodes[step] for step in order])
        return sum(number != step for number, step in enumerate(order))


def _move(graph: Graph, order: list[fx.Node]) -> None:
    """Move nodes into an order; what they need and is not in it (constants, views) comes right before its first user."""
    end, placed = graph.output, {node for node in graph.nodes if node.op == "placeholder"}

    def put(node: fx.Node) -> None:
        if node not in placed:
            placed.add(node)
            for operand in node.all_input_nodes:
                put(operand)
            end.prepend(node)

    for node in order:
        put(node)
    for node in graph.nodes:
        if node is not end:
            put(node)

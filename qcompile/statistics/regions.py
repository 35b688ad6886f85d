"""Regions: cutting a graph's topological order into runs of nodes, where few values are alive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.text import operator_name

Regions = Sequence[Sequence[fx.Node | str]]

PRODUCTS = ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm")


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def fixed_nodes(graph: Graph) -> set[fx.Node]:
    """Return the nodes whose value depends on constants alone."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and all(x in fixed for x in node.all_input_nodes):
            fixed.add(node)
    return fixed


def assign_regions(graph: Graph, regions: Regions) -> list[list[fx.Node]]:
    """Return every node of the graph in exactly one region, in topological order.

    A node that no region names goes to the first region that reads it; a node may not stand before what it reads, so it moves back
    where that is the case.

    Raises:
        Refused: a region names a node that is not in the graph, or one that another region has.
    """
    names = {name: node for node in graph.nodes for name in (node.name, node_name(node))}
    place: dict[fx.Node, int] = {}
    for number, region in enumerate(regions):
        for item in region:
            node = names.get(item) if isinstance(item, str) else item
            if node is None or node.graph is not graph.module.graph:
                raise Refused("a region names a node that is not in the graph", node=str(item))
            if place.setdefault(node, number) != number:
                raise Refused("the node is in two regions", node=node_name(node))
    for node in reversed(graph.nodes):
        if node not in place:
            place[node] = min((place[user] for user in node.users if user in place), default=max(len(regions) - 1, 0))
    assigned: list[list[fx.Node]] = [[] for _ in range(max(len(regions), 1))]
    for node in graph.nodes:
        place[node] = max([place[node], *(place[x] for x in node.all_input_nodes)])
        assigned[place[node]].append(node)
    return assigned


# ---- cutting --------------------------------------------------------------------------------------------------------------


def constant_bytes(graph: Graph, node: fx.Node) -> int:
    """Return the bytes of the constants that a node reads."""
    return sum(value.nbytes for x in node.all_input_nodes if (value := graph.constant(x)) is not None)


def product_count(graph: Graph, node: fx.Node) -> int:
    """Return 1 for a node that multiplies matrices or convolves, else 0."""
    return int(node.op == "call_function" and operator_name(node.target) in PRODUCTS)


def split_regions(graph: Graph, limit: int = 2**28, cost: Callable[[Graph, fx.Node], int] = constant_bytes) -> list[list[fx.Node]]:
    """Cut the topological order so that each region costs up to about ``limit``, where the fewest bytes of activations are alive.

    Args:
        graph: is not changed.
        limit: by default 256 MiB of constants.
        cost: of one node; ``product_count`` with a small limit gives about one block of a network for each region.
    """
    fixed = fixed_nodes(graph)
    order = [node for node in graph.nodes if node not in fixed and node.op not in ("placeholder", "output")]
    alive = _bytes_alive(order)
    cuts: list[int] = []  # a cut i lies after order[i]
    start, spent, half = 0, 0, 0
    for i, node in enumerate(order):
        added = cost(graph, node) + sum(cost(graph, x) for x in node.all_input_nodes if x in fixed)
        if spent and spent + added > limit:
            cut = min(range(max(half, start), i), key=lambda j: (alive[j], -j))
            cuts.append(cut)
            spent = sum(cost(graph, n) for n in order[cut + 1 : i])
            start, half = cut + 1, i
        spent += added
        if spent * 2 <= limit:
            half = i
    borders = [0, *(cut + 1 for cut in cuts), len(order)]
    return [order[a:b] for a, b in itertools.pairwise(borders)]


def split_after_products(graph: Graph) -> list[list[fx.Node]]:
    """Cut right after every product, so that what a product feeds is seen only when the product has been solved."""
    regions: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op not in ("placeholder", "output", "get_attr"):
            regions[-1].append(node)
            if product_count(graph, node):
                regions.append([])
    return [region for region in regions if region]


def _bytes_alive(order: Sequence[fx.Node]) -> list[int]:
    """Return, for each node, the bytes of the values that are computed by then and still read later."""
    index = {node: i for i, node in enumerate(order)}
    change = [0] * (len(order) + 1)
    for i, node in enumerate(order):
        last = max((index.get(user, len(order) - 1) for user in node.users), default=i)
        change[i] += _value_bytes(node)
        change[last] -= _value_bytes(node)
    alive, total = [], 0
    for delta in change[: len(order)]:
        total += delta
        alive.append(total)
    return alive


def _value_bytes(node: fx.Node) -> int:
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else [values]
    # A symbolic size is asked for its hint only: turning it into an int would pin the symbol to that size.
    return sum(
        t.element_size() * math.prod(s if isinstance(s, int) else int(s.node.hint) for s in t.shape)
        for t in tensors
        if isinstance(t, torch.Tensor)
    )

"""Repeated blocks: the transformer or residual blocks that a network is a stack of.

Blocks are found by the scopes of the source model where its nodes have them (``encoder.layer.0``, ``encoder.layer.1``, ...), else as the
longest run of equal operator sequences, cut where the fewest values cross.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.fx as fx

from qcompile.graph.graph import Graph
from qcompile.graph.text import operator_name


@dataclass(frozen=True, eq=False)
class Block:
    """One of several alike parts of a graph.

    Attributes:
        name: the scope, such as ``encoder.layer.3``, or ``block3``.
        nodes: its operators, in graph order, one unbroken run of them.
        inputs: values from before that it reads, constants left out.
        outputs: its values that are read after it.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


_NUMBERED = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


def repeated_blocks(graph: Graph) -> list[Block]:
    """Return the blocks of a graph in order; empty where nothing repeats."""
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_module")]
    spans = _spans_by_scope(nodes) or _spans_by_operators(nodes)
    return [_block(name, nodes[start:stop]) for name, start, stop in spans]


def sweep_regions(graph: Graph) -> list[list[fx.Node]]:
    """Return all operators cut into what stands before, in, between and after the blocks: the regions of a sweep."""
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_module")]
    place = {node: i for i, node in enumerate(nodes)}
    ends = {border for block in repeated_blocks(graph) for border in (place[block.nodes[0]], place[block.nodes[-1]] + 1)}
    return [nodes[start:stop] for start, stop in itertools.pairwise(sorted({0, len(nodes)} | ends))]


def _block(name: str, nodes: Sequence[fx.Node]) -> Block:
    members = set(nodes)
    inputs = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in members and x.op != "get_attr")
    outputs = [node for node in nodes if any(user not in members for user in node.users)]
    return Block(name, tuple(nodes), tuple(inputs), tuple(outputs))


Span = tuple[str, int, int]


def _spans_by_scope(nodes: Sequence[fx.Node]) -> list[Span]:
    """Return one span for each number of the numbered scope that covers most nodes.

    Nodes without that scope that stand between two of the same block belong to it. Two blocks whose spans overlap are no blocks.
    """
    places: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if match := _NUMBERED.match(node.meta.get("scope", "")):
            places.setdefault(match[0], []).append(i)
    stacks: dict[str, list[str]] = {}
    for scope in places:
        stacks.setdefault(re.sub(r"\d+$", "", scope), []).append(scope)
    stacks = {stack: scopes for stack, scopes in stacks.items() if len(scopes) > 1}
    if not stacks:
        return []
    best = max(stacks, key=lambda stack: sum(len(places[scope]) for scope in stacks[stack]))
    spans = sorted((min(places[scope]), max(places[scope]) + 1, scope) for scope in stacks[best])
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        return []
    return [(scope, start, stop) for start, stop, scope in spans]


def _spans_by_operators(nodes: Sequence[fx.Node]) -> list[Span]:
    """Return the spans of the longest run of equal operator sequences."""
    names = [operator_name(node.target) if node.op == "call_function" else "quantizer" for node in nodes]
    numbers = {name: i for i, name in enumerate(Counter(names))}
    codes = np.array([numbers[name] for name in names], dtype=np.int64)
    best: tuple[int, int, int, int] = (0, 0, 0, 0)  # covered, -period, start, count
    for period in range(2, len(codes) // 2 + 1):
        start, length = _longest_run(codes[:-period] == codes[period:])
        count = length // period + 1
        if length >= period:
            best = max(best, (count * period, -period, start, count))
    covered, period, start, count = best[0], -best[1], best[2], best[3]
    if not covered:
        return []
    _, equal = _longest_run(codes[:-period] == codes[period:])
    slack = equal + period - covered
    shift = min(range(slack + 1), key=lambda s: _crossings(nodes, range(start + s, start + s + covered + 1, period)))
    first = start + shift
    return [(f"block{i}", first + i * period, first + (i + 1) * period) for i in range(count)]


def _longest_run(equal: np.ndarray) -> tuple[int, int]:
    """Return start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.astype(np.int8), [0]])))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    return int(starts[lengths.argmax()]), int(lengths.max())


def _crossings(nodes: Sequence[fx.Node], borders: Sequence[int]) -> int:
    """Return how many values are alive at the borders, all counted together."""
    place = {node: i for i, node in enumerate(nodes)}
    total = 0
    for node, i in place.items():
        last = max((place.get(user, len(nodes)) for user in node.users), default=i)
        total += sum(i < border <= last for border in borders)
    return total

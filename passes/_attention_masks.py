"""What an attention mask means, found by running the part of the graph that makes it.

Exporters spell masks in many ways, none of which a pattern would fit for long. All of them depend on sizes and on a few integer inputs
only, so the subgraph is run on small sizes and random inputs, and its result is held against what a mask can mean: which query sees which
key. An additive mask sees where it adds zero and hides where it adds a large negative number. A window is wider than small sizes; its width
stands in the subgraph as a number, so every number found there is tried as a width, and one trial is longer than all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from qcompile.graph import Graph

aten = torch.ops.aten

HIDES = -9000.0  # an additive mask at or below this hides: exp(-9000) is zero in float32
_SIZES = ((2, 5, 7, 3, 11), (3, 4, 6, 2, 8), (1, 6, 5, 4, 7))  # sizes that symbols take in the trials, in order of the symbols
_SEED = 20
_LONGEST = 16384  # the longest window that is tried: a mask of this many queries and keys takes 256 MB


@dataclass(frozen=True)
class Meaning:
    """What a mask says.

    Attributes:
        causal: query i sees key j only where ``j <= i + keys - queries``.
        window: how many keys, its own the last of them, a causal query sees at most; 0 for all.
        keys: the input [batch, keys] that says which keys are seen by being nonzero, or None where all are.
    """

    causal: bool
    keys: fx.Node | None
    window: int = 0


@dataclass(frozen=True)
class MaskUse:
    """A mask as one attention uses it: the node, whether True (or zero) hides instead of shows, and its scores' type."""

    node: fx.Node
    hides: bool
    shape: tuple[str, ...]  # sizes of the scores [batch, heads, queries, keys] as text


def find_meaning(graph: Graph, masks: list[MaskUse]) -> Meaning | str:
    """Return the one meaning that several masks have together, or the reason why there is none."""
    cone = _cone([mask.node for mask in masks])
    roots = {mask.node for mask in masks}
    if reason := _reads_activations(cone, roots):
        return reason
    values = [node for node in cone if node.op == "placeholder" and (node in roots or _is_read(node, cone))]
    numbers = _numbers(graph, cone)
    if numbers and numbers[-1] > _LONGEST:
        return f"its mask holds the number {numbers[-1]}: a window of this width is too long to try"
    windows = sorted({n + shift for n in numbers for shift in (-1, 0, 1)} - {0})
    spans = [(False, 0), (True, 0), *((True, window) for window in windows)]
    hypotheses = [Meaning(causal, keys, window) for keys in (None, *values) for causal, window in spans]
    for trial in _trials(graph, values, masks[0].shape, numbers):
        try:
            seen = _seen(graph, cone, masks, trial)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            return f"its mask cannot be evaluated: {str(error).splitlines()[0]}"
        if isinstance(seen, str):
            return seen
        hypotheses = [h for h in hypotheses if _agrees(seen, h, trial)]
        if not hypotheses:
            return "its mask is neither a padding of keys nor causal"
    return hypotheses[0]


def _cone(roots: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes that the roots depend on, the roots included, in graph order."""
    found = set(roots)
    for node in reversed(roots[0].graph.nodes):
        if node in found:
            found |= set(node.all_input_nodes)
    return [node for node in roots[0].graph.nodes if node in found]


def _reads_activations(cone: list[fx.Node], roots: set[fx.Node]) -> str:
    for node in cone:
        if node.op == "call_module":
            return "its mask depends on a quantizer"
        value = node.meta["val"]
        if node.op == "placeholder" and value.is_floating_point() and value.ndim > 2 and (node in roots or _is_read(node, cone)):
            return f"its mask depends on the activation %{node.name}"
    return ""


def _numbers(graph: Graph, cone: list[fx.Node]) -> list[int]:
    """Return the whole numbers above 1 in a cone that are smaller than some size may be: one of them may be the width of a window."""
    largest = max((high for _, high in graph.symbols.ranges.values()), default=0)
    found: set[int] = set()
    for node in cone:
        if node.op == "call_function":
            found |= {n for n in (*node.args, *node.kwargs.values()) if isinstance(n, int) and not isinstance(n, bool)}
        elif (value := graph.constant(node)) is not None and value.numel() == 1 and not value.is_floating_point():
            found.add(int(value))
    return sorted(abs(n) for n in found if 1 < abs(n) < largest)


def _is_read(node: fx.Node, cone: list[fx.Node]) -> bool:
    """Say whether the cone reads the values of an input, not only its sizes."""
    return any(user in cone and user.target is not aten.sym_size.int for user in node.users)


# ---- trials ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    sizes: Mapping[str, int]
    inputs: Mapping[fx.Node, torch.Tensor]


def _trials(graph: Graph, values: list[fx.Node], shape: tuple[str, ...], numbers: list[int]) -> Iterator[_Trial]:
    """Yield trials of small sizes, and one of queries and keys longer than every number."""
    generator = torch.Generator().manual_seed(_SEED)
    for sizes in _SIZES:
        symbols = {}
        for (name, (low, high)), size in zip(graph.symbols.ranges.items(), sizes * 4, strict=False):
            symbols[name] = min(max(size, low), high)
        for kind in ("ones", "left", "right", "random"):
            kinds = {node: kind if node in values else "ones" for node in graph.inputs}
            yield _Trial(symbols, {node: _input(graph, node, symbols, kinds[node], generator) for node in graph.inputs})
    if numbers:
        long = {name: numbers[-1] + 3 if name in shape[2:] else 1 for name in graph.symbols.ranges}
        symbols = {name: min(max(long[name], low), high) for name, (low, high) in graph.symbols.ranges.items()}
        yield _Trial(symbols, {node: _input(graph, node, symbols, "ones", generator) for node in graph.inputs})


def _input(graph: Graph, node: fx.Node, symbols: Mapping[str, int], kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return ones and zeros of an input's type: all ones, padding on the left or right, or at random."""
    type = graph.input_types[graph.inputs.index(node)]
    shape = [symbols[size] if isinstance(size, str) else size for size in type.shape]
    ones = torch.ones(shape, dtype=type.dtype)
    if kind == "ones" or not shape:
        return ones
    if kind == "random":
        return torch.randint(0, 2, shape, generator=generator).to(type.dtype)
    count = torch.randint(0, shape[-1], (*shape[:-1], 1), generator=generator)
    place = torch.arange(shape[-1])
    return ones * ((place >= count) if kind == "left" else (place < shape[-1] - count)).to(type.dtype)


def _size(text: str, symbols: Mapping[str, int]) -> int:
    import sympy  # here: half a second that graphs without masks need not pay

    return int(sympy.sympify(text, locals={name: sympy.Integer(size) for name, size in symbols.items()}))


def _run(graph: Graph, cone: list[fx.Node], inputs: Mapping[fx.Node, torch.Tensor]) -> dict[fx.Node, Any]:
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in cone:
            if node.op == "placeholder":
                known[node] = inputs[node]
            elif node.op == "get_attr":
                known[node] = graph.constant(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                known[node] = node.target(*args, **kwargs)
    return known


def _seen(graph: Graph, cone: list[fx.Node], masks: list[MaskUse], trial: _Trial) -> torch.Tensor | str:
    """Return bool [batch, heads, queries, keys]: which query sees which key in this trial, or the reason why none can be told."""
    known = _run(graph, cone, trial.inputs)
    shape = [_size(text, trial.sizes) for text in masks[0].shape]
    seen = torch.ones(shape, dtype=torch.bool)
    for mask in masks:
        value = known[mask.node]
        if value.dtype != torch.bool:
            if not ((value == 0) | (value <= HIDES)).all():
                return "its mask adds other numbers than zero and large negative ones"
            value = value == 0
        seen = seen & (~value if mask.hides else value)
    return seen


def _agrees(seen: torch.Tensor, meaning: Meaning, trial: _Trial) -> bool:
    """Say whether a meaning gives ``seen`` for every query that sees a key; what the others give is nobody's meaning."""
    batch, _, queries, keys = seen.shape
    expected = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if meaning.keys is not None:
        value = trial.inputs[meaning.keys]
        if tuple(value.shape) != (batch, keys):
            return False
        expected = expected & (value != 0).view(batch, 1, 1, keys)
    if meaning.causal:
        last = torch.arange(queries).unsqueeze(1) + keys - queries
        expected = expected & (torch.arange(keys) <= last)
        if meaning.window:
            expected = expected & (torch.arange(keys) > last - meaning.window)
    expected = expected.expand_as(seen)
    rows = expected.any(-1, keepdim=True)
    return bool(((seen == expected) | ~rows).all())

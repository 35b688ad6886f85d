"""Example inputs for a graph whose user gave none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.graph.types import short_dtype

FIRST_SIZE, OTHER_SIZE = 1, 16  # a batch of one, and short sequences


def make_examples(graph: Graph, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return one seeded batch: normal floats, integers that every table they index can take, masks of ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: _size(graph, name) for name in graph.symbols.ranges}
    examples = []
    for node, type in zip(graph.inputs, graph.input_types, strict=True):
        shape = [sizes[size] if isinstance(size, str) else size for size in type.shape]
        if type.dtype.is_floating_point:
            examples.append(torch.randn(shape, generator=generator).to(type.dtype))
        elif type.dtype == torch.bool:
            examples.append(torch.ones(shape, dtype=torch.bool))
        elif type.dtype in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.int16):
            examples.append(
                torch.randint(0, table_rows(graph, node) or 2, shape, generator=generator).to(type.dtype)
                if "mask" not in node.name
                else torch.ones(shape, dtype=type.dtype)
            )
        else:
            raise Refused(f"no example can be made of {short_dtype(type.dtype)}", node=node.name, way_out="give example inputs")
    return tuple(examples)


def _size(graph: Graph, name: str) -> int:
    leading = any(type.shape and type.shape[0] == name for type in graph.input_types)
    low, high = graph.symbols.ranges[name]
    return min(max(FIRST_SIZE if leading else OTHER_SIZE, low), high)


def table_rows(graph: Graph, node: fx.Node) -> int | None:
    """Return how many values an integer input may take, the rows of the smallest table it indexes; None where it indexes none."""
    gathers = [
        user for user in node.users if user.op == "call_function" and operator_name(user.target) in ("aten.embedding", "qc.embedding")
    ]
    rows = [int(bound_arguments(user)["weight"].meta["val"].shape[0]) for user in gathers]
    return min(rows, default=None)


def resize_examples(graph: Graph, examples: Sequence[torch.Tensor], text: str) -> list[torch.Tensor]:
    """Return the examples repeated or cut to other sizes of the symbols, ``batch=1,seq=128``.

    Raises:
        Refused: an unknown symbol, or a size out of its range.
    """
    wanted: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        low, high = graph.symbols.ranges.get(name.strip(), (0, -1))
        if not size.isdigit() or not low <= int(size) <= high:
            raise Refused(
                f"'{part}' is no size of a symbol",
                way_out=f"symbols: {', '.join(f'{n} in {a}..{b}' for n, (a, b) in graph.symbols.ranges.items()) or 'none'}",
            )
        wanted[name.strip()] = int(size)
    resized = []
    for example, type in zip(examples, graph.input_types, strict=True):
        for axis, symbol in enumerate(type.shape):
            if isinstance(symbol, str) and symbol in wanted:
                repeats = [1] * example.ndim
                repeats[axis] = -(-wanted[symbol] // example.shape[axis])
                example = example.repeat(repeats).narrow(axis, 0, wanted[symbol])
        resized.append(example.contiguous())
    return resized

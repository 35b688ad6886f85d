"""Symbolic sizes of a captured model, fixed to numbers: what has no memory to spare plans for one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from qcompile.capture import Captured
from qcompile.errors import Refused
from qcompile.nearest import nearest_name


def parse_sizes(texts: tuple[str, ...]) -> dict[str, int]:
    """Parse ``("batch=1", "tokens=64")``.

    Raises:
        Refused: a text is no NAME=NUMBER.
    """
    sizes = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not (name and equals and number.isdigit() and int(number) > 0):
            raise Refused("this is no size", node=text, way_out="write NAME=NUMBER, such as batch=1")
        sizes[name] = int(number)
    return sizes


def fix_sizes(captured: Captured, sizes: Mapping[str, int]) -> Captured:
    """Return the model with these symbols fixed; its example inputs are cut to them, or repeated up to them.

    Raises:
        Refused: the model has no such symbol, or the size is outside of what it was captured for.
    """
    graph = captured.graph
    for name, size in sizes.items():
        if name not in graph.symbols.ranges:
            known = graph.symbols.ranges
            way_out = nearest_name(name, known) if known else "leave it out: all sizes are numbers"
            raise Refused(f"the model has no size named '{name}'", way_out=way_out)
        low, high = graph.symbols.ranges[name]
        if not low <= size <= high:
            raise Refused(f"the size {name} is between {low} and {high}, not {size}", way_out="give another size")
    examples = [_resized(x, type.shape, sizes) for x, type in zip(captured.example_inputs, graph.input_types, strict=True)]
    return replace(captured, graph=graph.with_sizes(sizes), example_inputs=tuple(examples))


def _resized(x: torch.Tensor, shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> torch.Tensor:
    for axis, size in enumerate(shape):
        wanted = sizes.get(size, x.shape[axis]) if isinstance(size, str) else x.shape[axis]
        if wanted != x.shape[axis]:
            x = x.index_select(axis, torch.arange(wanted) % x.shape[axis])
    return x.contiguous()

"""Places for the values of a sequence in one block of memory, known before anything runs.

Values that live at different times share memory. Sizes may depend on symbols of the inputs' shapes (``batch * tokens * 1536`` bytes):
values whose sizes are multiples of the same product of symbols make a region, in which offsets are multiples of that product too, so
one plan serves every batch and length. Regions follow one another. With constant sizes there is one region and every offset is a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from qcompile.backends.lowering.sequence import VALUE, Sequence
from qcompile.backends.lowering.shapes import Size
from tvm import tirx

ALIGNMENT = 64  # bytes; kernels load whole 512-bit vectors


@dataclass(frozen=True)
class Region:
    """Memory for values whose sizes are multiples of ``unit``: a product of symbols, 1 for constant sizes; ``length`` units of bytes."""

    unit: tuple[Any, ...]
    length: int


@dataclass(frozen=True)
class Place:
    """Where a value lies: ``offset`` units of bytes from the start of a region."""

    region: int
    offset: int


@dataclass(frozen=True)
class Arena:
    """The regions, and the place of every value that is not an output, by its index."""

    regions: tuple[Region, ...]
    places: dict[int, Place]


@dataclass(frozen=True)
class _Lifetime:
    value: int
    length: int
    first: int
    last: int


def plan_arena(sequence: Sequence) -> Arena:
    """Return places such that no two values that live at the same time overlap.

    The largest value is placed first, each at the lowest offset that is free while it lives.
    """
    outputs = {output.index for output in sequence.outputs if output.kind == VALUE}
    lifetimes: dict[int, list[int]] = {}
    for number, call in enumerate(sequence.calls):
        for view in call.arguments:
            if view.kind == VALUE and view.index not in outputs:
                lifetimes.setdefault(view.index, []).append(number)
    grouped: dict[tuple[str, ...], list[_Lifetime]] = {}
    units: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for index, uses in lifetimes.items():
        value = sequence.values[index]
        length, unit = factors(value.shape)
        key = tuple(map(str, unit))
        units.setdefault(key, unit)
        size = -(-length * np.dtype(value.dtype).itemsize // ALIGNMENT) * ALIGNMENT
        grouped.setdefault(key, []).append(_Lifetime(index, size, uses[0], uses[-1]))
    regions: list[Region] = []
    places: dict[int, Place] = {}
    for number, key in enumerate(sorted(grouped)):
        offsets, length = _place(grouped[key])
        regions.append(Region(units[key], length))
        places |= {value: Place(number, offset) for value, offset in offsets.items()}
    return Arena(tuple(regions), places)


def factors(shape: tuple[Size, ...]) -> tuple[int, tuple[Any, ...]]:
    """Return the product of sizes as a number and the factors that are not numbers, in the order of their text."""
    number, rest, waiting = 1, [], list(shape)
    while waiting:
        size = waiting.pop()
        if isinstance(size, int | tirx.IntImm):
            number *= int(size)
        elif isinstance(size, tirx.Mul):
            waiting += [size.a, size.b]
        else:
            rest.append(size)
    return number, tuple(sorted(rest, key=str))


def _place(values: list[_Lifetime]) -> tuple[dict[int, int], int]:
    placed: list[tuple[int, _Lifetime]] = []
    for value in sorted(values, key=lambda v: (-v.length, v.first, v.value)):
        offset = 0
        together = [(start, other) for start, other in placed if other.first <= value.last and value.first <= other.last]
        for start, other in sorted(together, key=lambda entry: entry[0]):
            if offset + value.length <= start:
                break
            offset = max(offset, start + other.length)
        placed.append((offset, value))
    return {value.value: offset for offset, value in placed}, max((offset + value.length for offset, value in placed), default=0)

"""Places for the values of a sequence in one block of memory, known before anything runs.

Values that live at different times share memory. Sizes may depend on symbols of the inputs' shapes (``batch * tokens * 1536`` bytes):
values whose sizes are multiples of the same product of symbols make a region, in which offsets are multiples of that product too, so
one plan serves every batch and length. Regions follow one another. With constant sizes there is one region and every offset is a number.

Where a kernel allows it (``sequence.IN_PLACE``) and reads a value for the last time, its result lies in that value's place.
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


def plan_arena(sequence: Sequence, alignment: int = ALIGNMENT) -> Arena:
    """Return places such that no two values that live at the same time overlap.

    A value that takes the place of another's shares its bytes, and counts as one with it.
    """
    outputs = {output.index for output in sequence.outputs if output.kind == VALUE}
    lifetimes: dict[int, list[int]] = {}
    for number, call in enumerate(sequence.calls):
        for view in call.arguments:
            if view.kind == VALUE and view.index not in outputs:
                lifetimes.setdefault(view.index, []).append(number)
    shared = _shared_places(sequence, lifetimes)
    grouped: dict[tuple[str, ...], list[_Lifetime]] = {}
    units: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for index, uses in lifetimes.items():
        value = sequence.values[index]
        length, unit = factors(value.shape)
        key = tuple(map(str, unit))
        units.setdefault(key, unit)
        size = -(-length * np.dtype(value.dtype).itemsize // alignment) * alignment
        grouped.setdefault(key, []).append(_Lifetime(index, size, uses[0], uses[-1]))
    regions: list[Region] = []
    places: dict[int, Place] = {}
    for number, key in enumerate(sorted(grouped)):
        offsets, length = _place(grouped[key])
        regions.append(Region(units[key], length))
        places |= {value: Place(number, offset) for value, offset in offsets.items()}
    places |= {value: places[first] for value, first in shared.items()}
    return Arena(tuple(regions), places)


def _shared_places(sequence: Sequence, lifetimes: dict[int, list[int]]) -> dict[int, int]:
    """Return the values that take another's place, each with the first that lay there, which gets the uses of all."""
    shared: dict[int, int] = {}
    last = {value: uses[-1] for value, uses in lifetimes.items()}
    for number, call in enumerate(sequence.calls):
        if call.in_place is None:
            continue
        before, result = call.arguments[call.in_place], call.arguments[-1]
        if before.kind != VALUE or before.index not in last or result.index not in last:
            continue
        once = sum(view.kind == VALUE and view.index == before.index for view in call.arguments) == 1
        if once and last[before.index] == number and _bytes(sequence, before.index) == _bytes(sequence, result.index):
            shared[result.index] = shared.get(before.index, before.index)
            lifetimes[shared[result.index]] += lifetimes.pop(result.index)
    return shared


def _bytes(sequence: Sequence, index: int) -> tuple[int, tuple[str, ...]]:
    """Return how much memory a value takes: a number of bytes times a product of symbols."""
    value = sequence.values[index]
    length, unit = factors(value.shape)
    return length * np.dtype(value.dtype).itemsize, tuple(map(str, unit))


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
    """Return offsets and the length of all: the largest value first, each at the lowest offset that is free while it lives.

    Where that takes more than all that lives at one time, the value that reaches highest goes first, and all are placed again.
    """
    least = max((sum(v.length for v in values if v.first <= now <= v.last) for now in {v.first for v in values}), default=0)
    order = sorted(values, key=lambda v: (-v.length, v.first, v.value))
    best: dict[int, int] = {}
    length = 0
    for _ in values:
        placed, reached = _place_in(order)
        if not best or reached < length:
            best, length = placed, reached
        if length == least:
            break
        highest = max(order, key=lambda v: placed[v.value] + v.length)
        order = [highest, *(v for v in order if v is not highest)]
    return best, length


def _place_in(order: list[_Lifetime]) -> tuple[dict[int, int], int]:
    placed: list[tuple[int, _Lifetime]] = []
    for value in order:
        offset = 0
        together = [(start, other) for start, other in placed if other.first <= value.last and value.first <= other.last]
        for start, other in sorted(together, key=lambda entry: entry[0]):
            if offset + value.length <= start:
                break
            offset = max(offset, start + other.length)
        placed.append((offset, value))
    return {value.value: offset for offset, value in placed}, max((offset + value.length for offset, value in placed), default=0)

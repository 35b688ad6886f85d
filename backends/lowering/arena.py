"""Places for the values of a sequence in one block of memory, known before anything runs.

Values that live at different times share memory. Sizes may depend on symbols of the inputs' shapes (``batch * tokens * 1536`` bytes):
values whose sizes are multiples of the same product of symbols make a region, in which offsets are multiples of that product too, so
one plan serves every batch and length. Regions follow one another. With constant sizes there is one region and every offset is a number.

Where a kernel allows it (``sequence.IN_PLACE``) and reads a value for the last time, its result lies in that value's place. A target whose
kernels run from front to back may allow more: a result that overlaps what is read, with a lead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from qcompile.backends.lowering.sequence import VALUE, Call, Sequence, written
from qcompile.backends.lowering.shapes import Size
from tvm import tirx

from qcompile.arena import Block, Overlap, Step, Work, place

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


# For a call, which result may overlap which argument: the positions of both among its buffers, and the lead (``qcompile.arena.Overlap``).
Leads = Callable[[Call], Iterable[tuple[int, int, int]]]


def describe_sequence(sequence: Sequence, leads: Leads = lambda call: ()) -> Work:
    """Return the work of a sequence for a planner: its values by their indices, its calls as steps.

    Sizes are the numbers of bytes, without the symbols that they are multiplied with. Outputs, inputs and constants lie elsewhere.
    """
    outputs = {sequence.located(output).index for output in sequence.outputs if output.kind == VALUE}
    steps = []
    for call, results in zip(sequence.calls, written(sequence), strict=True):
        views = {n: sequence.located(view) for n, view in enumerate(call.arguments) if view.kind == VALUE}
        views = {n: view for n, view in views.items() if view.index not in outputs}
        overlaps = [
            Overlap(views[read].index, views[result].index, lead + views[result].at - views[read].at)
            for read, result, lead in leads(call)
            if read in views and read not in results and result in views and result in results
        ]
        reads = tuple(view.index for n, view in views.items() if n not in results)
        steps.append(Step(call.kernel, reads, tuple(views[n].index for n in results if n in views), overlaps=tuple(overlaps)))
    sizes = tuple(factors(value.shape)[0] * np.dtype(value.dtype).itemsize for value in sequence.values)
    return Work(tuple(f"value {i}" for i in range(len(sizes))), sizes, tuple(steps))


def plan_arena(sequence: Sequence, alignment: int = ALIGNMENT, *, leads: Leads = lambda call: (), exact: bool = False) -> Arena:
    """Return places such that no two values that live at the same time overlap, but as ``leads`` allow for values of constant size.

    A value that takes the place of another's shares its bytes, and counts as one with it. A part of a concatenation lies in it. With
    ``exact`` the smallest regions are searched for (``qcompile.arena.place``).
    """
    work = describe_sequence(sequence, leads)
    lifetimes = {value: list(span) for value, span in work.lifetimes().items()}
    shared = _shared_places(sequence, lifetimes)
    grouped: dict[tuple[str, ...], list[int]] = {}
    units: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for index in lifetimes:
        unit = factors(sequence.values[index].shape)[1]
        units.setdefault(tuple(map(str, unit)), unit)
        grouped.setdefault(tuple(map(str, unit)), []).append(index)
    regions: list[Region] = []
    places: dict[int, Place] = {}
    alone = set(lifetimes) - set(shared) - set(shared.values())
    for number, key in enumerate(sorted(grouped)):
        indices = sorted(grouped[key])
        blocks = [Block(-(-work.sizes[i] // alignment), lifetimes[i][0], lifetimes[i][-1]) for i in indices]
        order = {index: n for n, index in enumerate(indices) if index in alone and not key}
        allowed = [overlap for overlap in work.overlaps() if overlap.read in order and overlap.written in order]
        placed = place(blocks, {(order[o.read], order[o.written]): -(-o.lead // alignment) for o in allowed}, exact=exact)
        regions.append(Region(units[key], placed.size * alignment))
        places |= {index: Place(number, at * alignment) for index, at in zip(indices, placed.offsets, strict=True)}
    places |= {value: places[first] for value, first in shared.items()}
    for part in sequence.parts:
        whole = sequence.located(sequence.values[part])
        if whole.index in places:
            places[part] = Place(places[whole.index].region, places[whole.index].offset + whole.at)
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
        once = before.at == 0 and sum(view.kind == VALUE and view.index == before.index for view in call.arguments) == 1
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

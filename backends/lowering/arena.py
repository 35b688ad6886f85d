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
from qcompile.backends.lowering.sequence import VALUE, Call, Sequence, View, written
from qcompile.backends.lowering.shapes import Size
from tvm import tirx

from qcompile.arena import Overlap, Step, Work, plan_work

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
Leads = Callable[[Call], Iterable[tuple[int, int, int | None]]]


def describe_sequence(sequence: Sequence, leads: Leads = lambda call: ()) -> Work:
    """Return the work of a sequence for a planner: its values by their indices, its calls as steps.

    Sizes are the numbers of bytes, without the symbols that they are multiplied with. Outputs, inputs and constants lie elsewhere.
    """
    outputs = {sequence.located(output).index for output in sequence.outputs if output.kind == VALUE}
    steps = []
    for call, results in zip(sequence.calls, written(sequence), strict=True):
        views = {n: sequence.located(view) for n, view in enumerate(call.arguments) if view.kind == VALUE}
        views = {n: view for n, view in views.items() if view.index not in outputs}
        constant = all(isinstance(size, int) for view in call.arguments for size in view.shape)
        overlaps = []
        for read, result, lead in (*_takes_the_place(sequence, call), *(leads(call) if constant else ())):
            if read in views and read not in results and result in views and result in results:
                a, b = views[read], views[result]  # the lead of values that hold them
                if lead is not None or a.at == b.at:
                    overlaps.append(Overlap(a.index, b.index, None if lead is None else lead + b.at - a.at))
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
    grouped: dict[tuple[str, ...], list[int]] = {}
    units: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for index in work.lifetimes():
        unit = factors(sequence.values[index].shape)[1]
        units.setdefault(tuple(map(str, unit)), unit)
        grouped.setdefault(tuple(map(str, unit)), []).append(index)
    regions: list[Region] = []
    places: dict[int, Place] = {}
    for number, key in enumerate(sorted(grouped)):
        plan = plan_work(work.only(grouped[key]), alignment=alignment, exact=exact)
        regions.append(Region(units[key], plan.bytes))
        places |= {index: Place(number, at) for index, at in plan.offsets.items()}
    for part in sequence.parts:
        whole = sequence.located(sequence.values[part])
        if whole.index in places:
            places[part] = Place(places[whole.index].region, places[whole.index].offset + whole.at)
    return Arena(tuple(regions), places)


def _takes_the_place(sequence: Sequence, call: Call) -> list[tuple[int, int, None]]:
    """Return which argument the result of a call may take the place of, where both are whole values of as many bytes."""
    if call.in_place is None:
        return []
    before, result = call.arguments[call.in_place], call.arguments[-1]
    whole = before.kind == VALUE and before.at == 0 and result.index not in sequence.parts and before.index not in sequence.parts
    return [(call.in_place, len(call.arguments) - 1, None)] if whole and _bytes(sequence, before) == _bytes(sequence, result) else []


def _bytes(sequence: Sequence, view: View) -> tuple[int, tuple[str, ...]]:
    """Return how much memory a value takes: a number of bytes times a product of symbols."""
    value = sequence.values[view.index]
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

"""The plan of an arena: whatever lives at one time lies apart, aligned and inside, for every size that a call may bring."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from qcompile.backends.lowering.arena import ALIGNMENT, Arena, factors, plan_arena
from qcompile.backends.lowering.sequence import CONSTANT, INPUT, VALUE, Call, Sequence, View
from tvm import tirx

BYTES = {"float32": 4, "int64": 8, "uint8": 1, "bool": 1}
BATCH, TOKENS = tirx.Var("batch", "int64"), tirx.Var("tokens", "int64")
SIZES = st.lists(st.sampled_from([1, 2, 3, 16, 77, 384, BATCH, TOKENS, BATCH * TOKENS, TOKENS * 12]), min_size=0, max_size=4).map(tuple)


@st.composite
def sequences(draw: Any) -> Sequence:
    """Calls that each read some values written before, inputs and constants, and write one or two new values."""
    made = Sequence(symbols=[BATCH, TOKENS], inputs=[View(INPUT, 0, (BATCH, TOKENS), "int64")], constants=1)
    for _ in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(made.values), max_size=3)) if made.values else []
        written = []
        for _ in range(draw(st.integers(1, 2))):
            written.append(View(VALUE, len(made.values), draw(SIZES), draw(st.sampled_from(list(BYTES)))))
            made.values.append(written[-1])
        if read and draw(st.booleans()):  # what a kernel in place writes mostly has the size of what it reads
            written[-1] = made.values[-1] = View(VALUE, len(made.values) - 1, read[0].shape, read[0].dtype)
        arguments = (made.inputs[0], View(CONSTANT, 0, (4,), "float32"), *read, *written)
        allowed = draw(st.sampled_from([None, *range(len(arguments) - len(written))])) if len(written) == 1 else None
        made.calls.append(Call("kernel", arguments, in_place=allowed))
    made.outputs = [made.values[i] for i in draw(st.lists(st.integers(0, len(made.values) - 1), min_size=1, max_size=3))]
    return made


def number(size: Any, batch: int, tokens: int) -> int:
    """Return a product of symbols and numbers with its symbols replaced."""
    if isinstance(size, tirx.Mul):
        return number(size.a, batch, tokens) * number(size.b, batch, tokens)
    if isinstance(size, tirx.Var):
        return {"batch": batch, "tokens": tokens}[size.name]
    return int(size)


def spans(sequence: Sequence, arena: Arena, batch: int, tokens: int) -> tuple[dict[int, tuple[int, int]], int]:
    """Return first and last byte of every value in the arena, and the bytes of the arena, for given sizes."""
    units = [math.prod(number(size, batch, tokens) for size in region.unit) for region in arena.regions]
    starts = [sum(unit * region.length for unit, region in zip(units[:i], arena.regions, strict=False)) for i in range(len(units) + 1)]
    found = {}
    for value, place in arena.places.items():
        view = sequence.values[value]
        first = starts[place.region] + units[place.region] * place.offset
        found[value] = (first, first + math.prod(number(s, batch, tokens) for s in view.shape) * BYTES[view.dtype])
        assert found[value][1] <= starts[place.region] + units[place.region] * arena.regions[place.region].length
    return found, starts[-1]


@given(sequence=sequences(), batch=st.integers(0, 5), tokens=st.integers(0, 9))
def test_living_values_lie_apart(sequence: Sequence, batch: int, tokens: int) -> None:
    arena = plan_arena(sequence)
    found, total = spans(sequence, arena, batch, tokens)
    uses: dict[int, list[int]] = {}
    for number_of_call, call in enumerate(sequence.calls):
        for view in call.arguments:
            if view.kind == VALUE:
                uses.setdefault(view.index, []).append(number_of_call)
    outputs = {output.index for output in sequence.outputs}
    assert found.keys() == uses.keys() - outputs, "outputs have memory of their own"
    for value, (first, last) in found.items():
        assert first % ALIGNMENT == 0
        assert last <= total
        for other in found:
            together = uses[other][0] <= uses[value][-1] and uses[value][0] <= uses[other][-1]
            replaces = takes_the_place(sequence, uses, value, other) or takes_the_place(sequence, uses, other, value)
            if other != value and together and not (replaces and found[value] == found[other]):
                assert last <= found[other][0] or found[other][1] <= first, f"values {value} and {other} share bytes"


def takes_the_place(sequence: Sequence, uses: dict[int, list[int]], value: int, other: int) -> bool:
    """Return whether the call that first writes ``value`` may write it over ``other``, which it reads once and nobody reads later."""
    call = sequence.calls[uses[value][0]]
    if call.in_place is None or call.arguments[-1].index != value or uses[other][-1] != uses[value][0]:
        return False
    read = call.arguments[call.in_place]
    return read.kind == VALUE and read.index == other and uses[other].count(uses[value][0]) == 1


def chain(*shapes: tuple[Any, ...]) -> Sequence:
    """Return calls each of which reads what the one before wrote."""
    values = [View(VALUE, i, shape, "float32") for i, shape in enumerate(shapes)]
    before = [View(INPUT, 0, (4,), "float32"), *values]
    calls = [Call("kernel", (source, value)) for source, value in zip(before, values, strict=False)]
    return Sequence(inputs=before[:1], values=values, calls=calls, outputs=values[-1:])


def in_place(calls: list[tuple[list[int], int]], outputs: list[int], size: int = 1000) -> Sequence:
    """Return calls, each of which reads values and writes one that may take the first one's place."""
    values = [View(VALUE, i, (size,), "float32") for i in range(len(calls))]
    made = [Call("kernel", (*(values[i] for i in read), values[written]), in_place=0 if read else None) for read, written in calls]
    return Sequence(values=values, calls=made, outputs=[values[i] for i in outputs])


def test_a_result_takes_the_place_of_what_is_read_for_the_last_time() -> None:
    arena = plan_arena(in_place([([], 0), ([0], 1), ([1], 2), ([2], 3)], [3]))
    assert [region.length for region in arena.regions] == [4032]
    assert arena.places[0] == arena.places[1] == arena.places[2]


def test_what_is_read_again_keeps_its_place() -> None:
    cases = {
        "later": in_place([([], 0), ([0], 1), ([1, 0], 2), ([2], 3)], [3]),
        "in the same call": in_place([([], 0), ([0, 0], 1), ([1], 2)], [2]),
        "after a chain": in_place([([], 0), ([0], 1), ([1], 2), ([2, 1], 3), ([3], 4)], [4]),
    }
    assert {name: len(set(plan_arena(case).places.values())) for name, case in cases.items()} == dict.fromkeys(cases, 2)
    returned = plan_arena(in_place([([], 0), ([0], 1), ([1], 2)], [0, 2]))
    assert returned.places.keys() == {1}, "an output is not written over"


def test_values_move_until_nothing_is_wasted() -> None:
    """Placed largest first, these take 8 places; all that lives at one time takes 6."""
    lengths = {0: (3, 0, 1), 1: (3, 1, 2), 2: (2, 2, 3), 3: (3, 3, 3)}  # of each value: its length, its first and its last call
    uses: dict[int, list[int]] = {now: [] for now in range(4)}
    for value, (_, first, last) in lengths.items():
        for now in range(first, last + 1):
            uses[now].append(value)
    values = [View(VALUE, i, (16 * length,), "float32") for i, (length, _, _) in lengths.items()]
    sequence = Sequence(values=values, calls=[Call("kernel", tuple(values[i] for i in uses[now])) for now in range(4)])
    (region,) = plan_arena(sequence).regions
    assert region.length == 6 * 64


def test_a_chain_takes_two_places() -> None:
    arena = plan_arena(chain((1000,), (1000,), (1000,), (1000,), (1000,)))
    assert [region.length for region in arena.regions] == [2 * 4032]
    assert [arena.places[i].offset for i in range(4)] == [0, 4032, 0, 4032]


def test_one_plan_serves_all_sizes_of_a_product() -> None:
    """Values whose sizes are multiples of batch * tokens share a region; those of batch alone, and constants, have their own."""
    arena = plan_arena(chain((BATCH, TOKENS, 384), (TOKENS * BATCH, 16), (BATCH, 16), (7,), (BATCH * TOKENS * 384,), (1,)))
    assert sorted(" * ".join(map(str, region.unit)) for region in arena.regions) == ["", "batch", "batch * tokens"]
    assert arena.places[0].region == arena.places[1].region == arena.places[4].region
    assert arena.places[0].offset == arena.places[4].offset == 0


def test_factors_of_a_shape() -> None:
    number_of, rest = factors((TOKENS * 12, 4, BATCH))
    assert (number_of, [str(factor) for factor in rest]) == (48, ["batch", "tokens"])
    assert factors(()) == (1, ())

"""Slices are views and parts of a concatenation are written into it; results overlap what is read: one arena of bytes gives the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from qcompile.backends.lowering.arena import Arena, describe_sequence, plan_arena
from qcompile.backends.lowering.pieces import LegalizePieces
from qcompile.backends.lowering.sequence import INPUT, VALUE, Call, NoSequence, Sequence, View, read_sequence
from tvm import relax, te, tirx
from tvm.ir import IRModule

from qcompile.arena import plan_work
from qcompile.arena.overlap import Windows, windows_lead

ROWS, COLUMNS, CHANNELS = 9, 5, 4


def kernel(name: str) -> Any:
    """Return a te function: ``sum``: each row and the next one, one row fewer; ``turn``: every byte times 3 plus 1, cut to a byte."""

    def sum_rows(x: Any) -> Any:
        batch, rows, columns, channels = x.shape
        return te.compute((batch, rows - 1, columns, channels), lambda b, r, c, i: x[b, r, c, i] + x[b, r + 1, c, i], name="sum")

    def turn(x: Any) -> Any:
        return te.compute(x.shape, lambda *index: x(*index) * tirx.const(3, "uint8") + tirx.const(1, "uint8"), name="turn")

    return {"sum": sum_rows, "turn": turn}[name]


def module(build: Any) -> IRModule:
    """Return ``main(x: u8[1,ROWS,COLUMNS,CHANNELS])`` of calls that ``build(builder, x)`` emits."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, ROWS, COLUMNS, CHANNELS], "uint8"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            result = builder.emit_output(build(builder, x))
        builder.emit_func_output(result)
    return builder.finalize()


def patches(builder: Any, x: Any) -> Any:
    """Two patches of rows, each summed twice and turned, then joined, turned and summed again."""
    made = []
    for first, end in ((0, 6), (4, ROWS)):
        part = builder.emit(relax.op.strided_slice(x, [1], [first], [end], assume_inbound=True))
        for name in ("turn", "sum", "sum"):
            part = builder.emit_te(kernel(name), part, primfunc_name_hint=name)
        flat = builder.emit(relax.op.reshape(part, [int(np.prod([int(size) for size in part.ty.shape]))]))
        flat = builder.emit_te(kernel("turn"), flat, primfunc_name_hint="turn")  # a part seen through a reshape
        part = builder.emit(relax.op.reshape(flat, part.ty.shape))
        made.append(part)
    whole = builder.emit(relax.op.concat(made, axis=1))
    for name in ("turn", "sum"):
        whole = builder.emit_te(kernel(name), whole, primfunc_name_hint=name)
    return whole


def expected(x: np.ndarray) -> np.ndarray:
    def turn(y: np.ndarray) -> np.ndarray:
        return y * np.uint8(3) + np.uint8(1)

    def total(y: np.ndarray) -> np.ndarray:
        return y[:, :-1] + y[:, 1:]

    whole = np.concatenate([turn(total(total(turn(x[:, first:end])))) for first, end in ((0, 6), (4, ROWS))], 1)
    return total(turn(whole))


def leads(call: Call) -> list[tuple[int, int, int]]:
    x, y = call.arguments
    if call.kernel.startswith("turn"):
        return [(0, 1, 0)]
    (_, rows, columns, channels), (_, result_rows, _, _) = x.shape, y.shape
    return [(0, 1, windows_lead(Windows((rows, columns), (result_rows, columns), channels, channels, (2, 1))))]


def run(sequence: Sequence, arena: Arena, x: np.ndarray) -> np.ndarray:
    """Run the calls byte by byte, in order, in one arena: every byte is read from it right before it is needed."""
    memory = np.full(sum(region.length for region in arena.regions), 77, np.uint8)
    (output,) = sequence.outputs
    results = np.zeros(output.shape, np.uint8).reshape(-1)

    def bytes_of(view: View) -> np.ndarray:
        place = sequence.located(view)
        length = int(np.prod(view.shape))
        if place.kind == INPUT:
            return x.reshape(-1)[place.at :][:length]
        if place.index == output.index:
            return results[place.at :][:length]
        start = arena.places[place.index].offset + place.at
        assert view.kind != VALUE or view.index == place.index or arena.places[view.index].offset == start - view.at
        return memory[start:][:length]

    for call in sequence.calls:
        source, result = call.arguments
        a, b, row = bytes_of(source), bytes_of(result), COLUMNS * CHANNELS
        for i in range(len(b)):
            b[i] = (int(a[i]) * 3 + 1) % 256 if call.kernel.startswith("turn") else (int(a[i]) + int(a[i + row])) % 256
    return results.reshape(output.shape)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("alignment", [1, 16])
def test_pieces_lie_in_place(overlapping: bool, alignment: int) -> None:
    sequence = read_sequence(LegalizePieces()(module(patches)))
    assert len(sequence.calls) == 10, "slices and the concatenation are no calls"
    assert len(sequence.parts) == 2
    x = np.random.default_rng(0).integers(0, 256, (1, ROWS, COLUMNS, CHANNELS), np.uint8)
    arena = plan_arena(sequence, alignment, exact=True, **({"leads": leads} if overlapping else {}))
    assert np.array_equal(run(sequence, arena, x), expected(x))
    assert all(place.offset % alignment == 0 for value, place in arena.places.items() if value not in sequence.parts)


def test_overlaps_and_parts_save_memory() -> None:
    sequence, row = read_sequence(module(patches)), COLUMNS * CHANNELS
    apart, over = plan_arena(sequence, 1), plan_arena(sequence, 1, leads=leads, exact=True)
    # The whole has 7 rows; the second patch has 5, then 4 and 3. Each of two sums starts one pixel before what it reads.
    assert [region.length for region in apart.regions] == [(7 + 5 + 4) * row]
    assert [region.length for region in over.regions] == [(7 + 5) * row + 2 * CHANNELS]
    plan = plan_work(describe_sequence(sequence, leads), exact=True)
    assert plan.bytes == over.regions[0].length


def test_a_result_overlaps_the_slice_it_reads() -> None:
    """Of a value of 9 rows the last 7 are read, by a slice that begins at its row 2: the 6 rows of the sum lie inside it."""

    def cut(builder: Any, x: Any) -> Any:
        whole = builder.emit_te(kernel("turn"), x, primfunc_name_hint="turn")
        part = builder.emit(relax.op.strided_slice(whole, [1], [2], [ROWS], assume_inbound=True))
        return builder.emit_te(kernel("turn"), builder.emit_te(kernel("sum"), part, primfunc_name_hint="sum"), primfunc_name_hint="turn")

    sequence = read_sequence(module(cut))
    (overlap,) = describe_sequence(sequence, leads).steps[1].overlaps
    assert overlap.lead == CHANNELS - 2 * COLUMNS * CHANNELS
    arena = plan_arena(sequence, 1, leads=leads, exact=True)
    assert [region.length for region in arena.regions] == [ROWS * COLUMNS * CHANNELS]
    x = np.random.default_rng(1).integers(0, 256, (1, ROWS, COLUMNS, CHANNELS), np.uint8)
    turned = x * np.uint8(3) + np.uint8(1)
    assert np.array_equal(run(sequence, arena, x), (turned[:, 2:-1] + turned[:, 3:]) * np.uint8(3) + np.uint8(1))


def test_what_is_not_contiguous_is_refused() -> None:
    cases = {
        "slice": lambda b, x: b.emit_te(kernel("turn"), b.emit(relax.op.strided_slice(x, [2], [1], [3], assume_inbound=True))),
        "concatenation": lambda b, x: b.emit(relax.op.concat([b.emit_te(kernel("turn"), x), b.emit_te(kernel("turn"), x)], axis=2)),
        "alone": lambda b, x: b.emit(relax.op.concat([x, x], axis=1)),
        "part": lambda b, x: b.emit(relax.op.strided_slice(b.emit_te(kernel("turn"), x), [1], [1], [3], assume_inbound=True)),
    }
    reasons = {"slice": "a slice is not", "concatenation": "not contiguous", "alone": "for it alone", "part": "a part of a value"}
    for name, build in cases.items():
        with pytest.raises(NoSequence, match=reasons[name]):
            read_sequence(module(build))


def mixed(builder: Any, x: Any) -> Any:
    """Columns are cut and joined, which takes copies; one part is joined twice; rows are joined for nothing."""
    turned = builder.emit_te(kernel("turn"), x, primfunc_name_hint="turn")
    left = builder.emit(relax.op.strided_slice(turned, [2], [0], [2], assume_inbound=True))
    right = builder.emit(relax.op.strided_slice(turned, [2], [2], [COLUMNS], assume_inbound=True))
    columns = builder.emit(relax.op.concat([right, left], axis=2))
    twice = builder.emit_te(kernel("turn"), columns, primfunc_name_hint="turn")
    doubled = builder.emit(relax.op.concat([twice, twice], axis=1))
    rows = [builder.emit(relax.op.strided_slice(doubled, [1], [at], [at + 3], assume_inbound=True)) for at in (1, 5)]
    return builder.emit(relax.op.concat([builder.emit_te(kernel("turn"), part, primfunc_name_hint="turn") for part in rows], axis=1))


def operators(lowered: IRModule) -> list[str]:
    bindings = [binding.value for block in lowered["main"].body.blocks for binding in block.bindings]
    return [value.op.name for value in bindings if isinstance(value, relax.Call)]


def test_only_what_needs_a_copy_becomes_a_kernel() -> None:
    lowered = LegalizePieces()(module(mixed))
    left = ["relax.strided_slice", "relax.strided_slice", "relax.concat"]
    assert [name for name in operators(lowered) if name != "relax.call_tir"] == left
    sequence = read_sequence(lowered)
    assert len(sequence.calls) == 8
    assert len(sequence.parts) == 2
    plain = operators(LegalizePieces()(module(patches)))
    assert plain.count("relax.concat") == 1
    assert plain.count("relax.strided_slice") == 2
    assert plain.count("relax.call_tir") == 10


def test_pieces_that_are_returned_become_kernels() -> None:
    def cut(builder: Any, x: Any) -> Any:
        return builder.emit(relax.op.strided_slice(builder.emit_te(kernel("turn"), x), [1], [1], [3], assume_inbound=True))

    assert operators(LegalizePieces()(module(cut))) == ["relax.call_tir", "relax.call_tir"]
    assert len(read_sequence(LegalizePieces()(module(cut))).calls) == 2

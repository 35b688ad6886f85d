"""One host function that calls a model's kernels one after another: no virtual machine, no allocation, no copies.

``host_functions`` makes TIR functions. They read one table of 64-bit integers (``Layout``): the sizes of this call, and the addresses
of inputs, outputs, arena and constants.

    calls(table, first, last)     runs the kernels first .. last - 1; all of them are a call of the model, one at a time a profile
    sizes(table)                  writes to the table how many bytes the arena takes, and the shapes of the outputs
    arguments(table, shapes)      writes the shapes of every argument of every call, one after another
    program(place)                writes a text to the address place[0], where it is not 0, and its length to place[1]: what a caller
                                  must know, so that the code describes itself

A kernel costs what building its DLTensors on the stack costs, some 20 ns.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import Any

from qcompile.backends.cpu.program import ARGUMENTS, CALLS, PROGRAM, SIZES, Layout
from qcompile.backends.lowering.arena import Arena
from qcompile.backends.lowering.sequence import CONSTANT, INPUT, VALUE, Sequence, View
from qcompile.backends.lowering.shapes import Size
from tvm import tirx
from tvm.ir import StringImm


def layout_of(sequence: Sequence) -> Layout:
    """Return the table's layout; each value that is returned counts once, however many outputs are views of it."""
    ranks = tuple(len(output.shape) for output in sequence.outputs)
    constants = sequence.constants + len(sequence.literals)
    return Layout(len(sequence.symbols), len(sequence.inputs), len(returned(sequence)), constants, ranks)


def returned(sequence: Sequence) -> list[int]:
    """Return the values behind the outputs, each once, in order; inputs that are updated in place are none of them."""
    return list(dict.fromkeys(output.index for output in sequence.outputs if output.kind == VALUE))


def describe(sequence: Sequence) -> str:
    """Return the text of a sequence's program, in ASCII."""
    values = returned(sequence)
    described = {
        "layout": asdict(layout_of(sequence)),
        "symbols": [symbol.name for symbol in sequence.symbols],
        "outputs": [(values.index(o.index) if o.kind == VALUE else -1 - o.index, o.dtype) for o in sequence.outputs],
        "calls": [(call.kernel, [(view.dtype, len(view.shape)) for view in call.arguments]) for call in sequence.calls],
        "literals": [(str(a.dtype), a.shape, base64.b64encode(a.tobytes()).decode("ascii")) for a in sequence.literals],
    }
    return json.dumps(described)


def host_functions(sequence: Sequence, arena: Arena) -> dict[str, tirx.PrimFunc]:
    """Return the functions by name; the kernels they call stand in the same module under their own names."""
    program = _program(describe(sequence))
    return {CALLS: _calls(sequence, arena), SIZES: _sizes(sequence, arena), ARGUMENTS: _arguments(sequence), PROGRAM: program}


def _calls(sequence: Sequence, arena: Arena) -> tirx.PrimFunc:
    table, first, last = _table(sequence), tirx.Var("first", "int64"), tirx.Var("last", "int64")
    body = _symbols(sequence, table)
    addresses = _Addresses(sequence, arena, table)
    body += addresses.prologue
    for number, call in enumerate(sequence.calls):
        given = [_array(o, addresses.of(o)) if isinstance(o, View) else _long(o) for o in call.operands]
        run = tirx.Evaluate(tirx.call_cpacked(call.kernel, *given))
        body.append(tirx.IfThenElse(tirx.all(first <= _long(number), _long(number) < last), run, None))
    return _function(CALLS, [table, first, last], body)


def _sizes(sequence: Sequence, arena: Arena) -> tirx.PrimFunc:
    table, layout = _table(sequence), layout_of(sequence)
    total: Any = _long(0)
    for region in arena.regions:
        total = total + _product(region.unit) * _long(region.length)
    written = [total, *(_long(size) for output in sequence.outputs for size in output.shape)]
    stores = [tirx.BufferStore(table, value, [_long(layout.bytes + i)]) for i, value in enumerate(written)]
    return _function(SIZES, [table], [*_symbols(sequence, table), *stores])


def _arguments(sequence: Sequence) -> tirx.PrimFunc:
    table = _table(sequence)
    sizes = [size for call in sequence.calls for view in call.arguments for size in view.shape]
    shapes = tirx.decl_buffer((max(len(sizes), 1),), "int64", name="shapes")
    stores = [tirx.BufferStore(shapes, _long(size), [_long(i)]) for i, size in enumerate(sizes)]
    return _function(ARGUMENTS, [table, shapes], [*_symbols(sequence, table), *stores])


def _program(text: str) -> tirx.PrimFunc:
    place = tirx.decl_buffer((2,), "int64", name="place")
    length = tirx.BufferStore(place, _long(len(text)), [_long(1)])
    copy = tirx.call_extern("handle", "memcpy", tirx.reinterpret("handle", place[_long(0)]), StringImm(text), _long(len(text)))
    return _function(PROGRAM, [place], [length, tirx.IfThenElse(place[_long(0)] != _long(0), tirx.Evaluate(copy), None)])


class _Addresses:
    """Addresses of views as int64 expressions, and the statements that compute what they share."""

    def __init__(self, sequence: Sequence, arena: Arena, table: Any) -> None:
        self._sequence, self._layout, self._arena, self._table = sequence, layout_of(sequence), arena, table
        self._outputs = {value: number for number, value in enumerate(returned(sequence))}
        self._regions: list[tuple[Any, Any]] = []
        self.prologue: list[Any] = []
        base: Any = self._entry(self._layout.arena)
        for number, region in enumerate(arena.regions):
            unit, start = tirx.Var(f"unit_{number}", "int64"), tirx.Var(f"region_{number}", "int64")
            self.prologue += [tirx.Bind(unit, _product(region.unit)), tirx.Bind(start, base)]
            self._regions.append((unit, start))
            base = start + unit * _long(region.length)

    def of(self, view: View) -> Any:
        view = self._sequence.located(view)
        start = self._start(view)
        return start + _long(view.at) if view.at else start

    def _start(self, view: View) -> Any:
        if view.kind == INPUT:
            return self._entry(self._layout.first_input + view.index)
        if view.kind == CONSTANT:
            return self._entry(self._layout.first_constant + view.index)
        if view.index in self._outputs:
            return self._entry(self._layout.first_output + self._outputs[view.index])
        place = self._arena.places[view.index]
        unit, start = self._regions[place.region]
        return start + unit * _long(place.offset)

    def _entry(self, index: int) -> Any:
        return self._table[_long(index)]


def _table(sequence: Sequence) -> Any:
    return tirx.decl_buffer((layout_of(sequence).length,), "int64", name="table")


def _symbols(sequence: Sequence, table: Any) -> list[Any]:
    return [tirx.Bind(symbol, table[_long(i)]) for i, symbol in enumerate(sequence.symbols)]


def _array(view: View, address: Any) -> Any:
    shape = tirx.tvm_stack_make_shape(*(_long(size) for size in view.shape))
    return tirx.tvm_stack_make_array(tirx.reinterpret("handle", address), shape, 0, len(view.shape), view.dtype, 0)


def _product(sizes: tuple[Any, ...]) -> Any:
    result: Any = _long(1)
    for size in sizes:
        result = result * size
    return result


def _long(size: Size) -> Any:
    return tirx.const(size, "int64") if isinstance(size, int) else size


def _function(name: str, parameters: list[Any], body: list[Any]) -> tirx.PrimFunc:
    whole = tirx.SeqStmt(body) if len(body) != 1 else body[0]
    return tirx.PrimFunc(parameters, whole).with_attr("global_symbol", name).with_attr("tirx.noalias", True)

"""A Relax function without branches as what it is: kernels called one after another, reading and writing buffers.

``read_sequence`` takes ``main`` as it stands after fusion: bindings of ``call_tir``, views, tuples. What it returns says for every call
which kernel runs and which buffers it is given, and nothing of how memory is found for them: ``arena`` plans that, and a target emits
the calls in its own way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from qcompile.backends.lowering.shapes import Size
from tvm import relax, tirx
from tvm.ir import IRModule, PrimType
from tvm.ir.expr import GenericConst

INPUT, CONSTANT, VALUE = "input", "constant", "value"

# Attribute of a TIR function with one result: the argument that the result may take the memory of. The kernel reads no element of it after
# it wrote the result's element of the same index, and is not compiled as if its arguments lay apart.
IN_PLACE = "qcompile.in_place"


class NoSequence(Exception):
    """The function needs a virtual machine; the message says what for."""


@dataclass(frozen=True)
class View:
    """A buffer as one kernel sees it: which one (the ``index``-th input, constant or value), its shape and dtype, and its first byte."""

    kind: str
    index: int
    shape: tuple[Size, ...]
    dtype: str
    at: int = 0


@dataclass(frozen=True)
class Call:
    """One call of a kernel: what it is given, in order, buffers and sizes; results are the last buffers.

    ``in_place`` is the buffer that the last one may take the memory of, where the kernel allows it (``IN_PLACE``).
    """

    kernel: str
    operands: tuple[View | Size, ...]
    in_place: int | None = None

    @property
    def arguments(self) -> tuple[View, ...]:
        """The buffers alone."""
        return tuple(operand for operand in self.operands if isinstance(operand, View))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes alone."""
        return tuple(operand for operand in self.operands if not isinstance(operand, View))


@dataclass
class Sequence:
    """What a model does in one call.

    Attributes:
        symbols: the sizes that the inputs' shapes decide.
        inputs: in order.
        constants: how many the model was given; ``literals`` follow them.
        literals: constants written in the function itself.
        values: what kernels write, each once, outputs among them.
        calls: in order.
        outputs: in order; two may be views of one value. An input is an output where a kernel updates it in place.
        parts: values that are parts of another one, a concatenation of them: which, and at which byte. They are written straight into it.
    """

    symbols: list[tirx.Var] = field(default_factory=list)
    inputs: list[View] = field(default_factory=list)
    constants: int = 0
    literals: list[np.ndarray] = field(default_factory=list)
    values: list[View] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def located(self, view: View) -> View:
        """Return a view as a place in the value that has memory of its own: the part of a concatenation lies in the whole."""
        while view.kind == VALUE and view.index in self.parts:
            whole, at = self.parts[view.index]
            view = replace(view, index=whole, at=view.at + at)
        return view


def written(sequence: Sequence) -> list[tuple[int, ...]]:
    """Return for each call the positions, among its buffers, of the values that it writes: those that no call was given before.

    A concatenation is written with its parts, so a call that is given it later reads it.
    """
    seen: set[int] = set()
    found = []
    for call in sequence.calls:
        new = tuple(n for n, view in enumerate(call.arguments) if view.kind == VALUE and view.index not in seen)
        for n in new:
            index = call.arguments[n].index
            while index not in seen:
                seen.add(index)
                index = sequence.parts.get(index, (index, 0))[0]
        found.append(new)
    return found


def read_sequence(module: IRModule) -> Sequence:
    """Return the calls of a module's ``main(input_0, .., constants)``.

    A slice that is left as an operator (``relax.strided_slice``) is a view, and a concatenation (``relax.concat``) is written by the calls
    that make its parts: a target leaves those that are contiguous, and makes kernels of others.

    Raises:
        NoSequence: it branches, calls something other than a TIR kernel, sizes depend on data, it returns what no kernel wrote, or a
            slice or a concatenation is not contiguous.
    """
    return _Reader(module).read(module["main"])


class _Reader:
    def __init__(self, module: IRModule) -> None:
        self._module = module
        self._found = Sequence()
        self._values: dict[relax.Var, Any] = {}  # a View, or a list of them for a tuple
        self._literals: dict[tuple[str, tuple[int, ...], bytes], View] = {}
        self._updated: list[View] = []  # what kernels wrote in place

    def read(self, main: relax.Function) -> Sequence:
        count = int(main.attrs["num_input"])
        for parameter in main.params[:count]:
            self._input(parameter)
        for parameter in main.params[count:]:
            fields = list(parameter.ty.fields)
            self._values[parameter] = [View(CONSTANT, i, _shape(f), _dtype(f)) for i, f in enumerate(fields)]
            self._found.constants = len(fields)
        for block in main.body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    raise NoSequence("a size depends on data")
                self._values[binding.var] = self._bound(binding.value)
        returned = self._value(main.body.body)
        self._found.outputs = returned if isinstance(returned, list) else [returned]
        updated = {(view.kind, view.index) for view in self._updated if view.kind == INPUT}
        if any(output.kind != VALUE and (output.kind, output.index) not in updated for output in self._found.outputs):
            raise NoSequence("an input or a constant is returned")
        if any(output.at or output.index in self._found.parts for output in self._found.outputs if output.kind == VALUE):
            raise NoSequence("a part of a value is returned")
        self._check_sizes()
        return self._found

    def _input(self, parameter: relax.Var) -> None:
        shape = _shape(parameter.ty)
        for size in shape:
            if not isinstance(size, int | tirx.Var):
                raise NoSequence(f"the size {size} of an input is to be solved for its symbols")
            if isinstance(size, tirx.Var) and not any(size.same_as(symbol) for symbol in self._found.symbols):
                self._found.symbols.append(size)
        view = View(INPUT, len(self._found.inputs), shape, _dtype(parameter.ty))
        self._found.inputs.append(view)
        self._values[parameter] = view

    def _bound(self, value: relax.Expr) -> Any:
        if not isinstance(value, relax.Call):
            return self._value(value)
        name = getattr(value.op, "name", "")
        if name in ("relax.call_tir", "relax.call_tir_inplace"):
            return self._call(value)
        if name == "relax.reshape":
            source = self._value(value.args[0])
            return replace(source, shape=_shape(value.ty))
        if name == "relax.strided_slice":
            return self._slice(value)
        if name == "relax.concat":
            return self._concatenation(value)
        raise NoSequence(f"it calls {name or value.op}")

    def _call(self, call: relax.Call) -> Any:
        arguments = [self._operand(argument) for argument in call.args[1].fields]
        types = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
        places = [int(i) for i in call.attrs.inplace_indices] if call.op.name == "relax.call_tir_inplace" else [-1] * len(types)
        results = [arguments[place] if place >= 0 else self._new(kind) for place, kind in zip(places, types, strict=True)]
        made = [result for place, result in zip(places, results, strict=True) if place < 0]
        sizes = tuple(_size(size) for size in call.args[2]) if len(call.args) > 2 else ()
        allowed = (self._module[call.args[0]].attrs or {}).get(IN_PLACE)
        in_place = int(allowed) if allowed is not None else None
        self._found.calls.append(Call(call.args[0].name_hint, (*arguments, *made, *sizes), in_place))
        self._updated += [arguments[place] for place in places if place >= 0]
        return results if isinstance(call.ty, relax.TupleType) else results[0]

    def _slice(self, call: relax.Call) -> View:
        source, shape = self._value(call.args[0]), _shape(call.ty)
        axes, begins, _, *rest = ([_size(number) for number in argument.fields] for argument in call.args[1:])
        steps = rest[0] if rest else [1] * len(axes)
        axis, begin = axes[0], begins[0]
        if len(axes) != 1 or steps != [1] or not contiguous_along(source.shape, axis) or not isinstance(begin, int):
            raise NoSequence("a slice is not contiguous")
        length = source.shape[axis]
        first = min(max(begin + length if begin < 0 else begin, 0), length)
        row = math.prod(source.shape[axis + 1 :]) * np.dtype(source.dtype).itemsize
        return replace(source, shape=shape, at=source.at + first * row)

    def _concatenation(self, call: relax.Call) -> View:
        parts, shape = self._value(call.args[0]), _shape(call.ty)
        if not contiguous_along(shape, int(call.attrs.axis) % len(shape)):
            raise NoSequence("a concatenation is not contiguous")
        for part in parts:
            made = part.kind == VALUE and part.at == 0 and math.prod(part.shape) == math.prod(self._found.values[part.index].shape)
            if not made or part.index in self._found.parts or sum(part.index == other.index for other in parts) != 1:
                raise NoSequence("a concatenation is not of values that kernels make for it alone")
        whole, at = self._new(call.ty), 0
        for part in parts:
            self._found.parts[part.index] = (whole.index, at)
            at += math.prod(part.shape) * np.dtype(part.dtype).itemsize
        return whole

    def _operand(self, argument: Any) -> View | Size:
        """Return what a kernel is given; fusion passes sizes that no buffer of the kernel shows as operands."""
        if isinstance(argument.ty, PrimType):
            return _size(argument)
        value = self._value(argument)
        if not isinstance(value, View):
            raise NoSequence("a kernel is given a tuple")
        return value

    def _new(self, kind: Any) -> View:
        self._found.values.append(View(VALUE, len(self._found.values), _shape(kind), _dtype(kind)))
        return self._found.values[-1]

    def _value(self, value: relax.Expr) -> Any:
        if isinstance(value, relax.Var):
            return self._values[value]
        if isinstance(value, relax.Tuple):
            return [self._value(part) for part in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if isinstance(value, GenericConst):
            return self._literal(value.value.numpy())
        raise NoSequence(f"it holds a {type(value).__name__}")

    def _literal(self, array: np.ndarray) -> View:
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._literals:
            self._literals[key] = View(CONSTANT, self._found.constants + len(self._literals), array.shape, str(array.dtype))
            self._found.literals.append(array)
        return self._literals[key]

    def _check_sizes(self) -> None:
        """Hold every size to the symbols of the inputs: others are known only once some kernel has run."""
        known = list(self._found.symbols)
        views = [*self._found.outputs, *(view for call in self._found.calls for view in call.arguments)]
        for size in [*(s for view in views for s in view.shape), *(s for call in self._found.calls for s in call.sizes)]:
            if not isinstance(size, int):
                for variable in tirx.analysis.undefined_vars(size, []):
                    if not any(variable.same_as(symbol) for symbol in known):
                        raise NoSequence(f"the size {size} depends on data")


def contiguous_along(shape: Any, axis: int) -> bool:
    """Say whether runs along an axis follow one another in memory: sizes are numbers, and all axes before it have one element."""
    sizes = [_size(size) for size in shape]
    return all(isinstance(size, int) for size in sizes) and all(size == 1 for size in sizes[:axis])


def _size(size: Any) -> Size:
    return int(size) if isinstance(size, int | tirx.IntImm) else size


def _shape(kind: Any) -> tuple[Size, ...]:
    if not isinstance(kind, relax.TensorType) or kind.shape is None:
        raise NoSequence("a value has no known shape")
    return tuple(_size(size) for size in kind.shape)


def _dtype(kind: Any) -> str:
    return str(kind.dtype)

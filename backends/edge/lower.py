"""From a graph to what is written as C: functions, calls, constants, places in the arena."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from qcompile.backends.edge.boundary import Port, without_boundary
from qcompile.backends.edge.legalize import LEGALIZE, UPDATES, Layer, Lowering
from qcompile.backends.edge.overlaps import overlaps
from qcompile.backends.edge.print_c import Function, print_function
from qcompile.backends.lowering.arena import Arena, plan_arena
from qcompile.backends.lowering.inline import InlineRemaining
from qcompile.backends.lowering.pieces import PIECES, LegalizePieces
from qcompile.backends.lowering.sequence import CONSTANT, INPUT, VALUE, Call, NoSequence, Sequence, View, read_sequence, written
from qcompile.backends.lowering.translate import COMPILE_LOCK, SCHEDULED, translate
from tvm import relax
from tvm.relax import transform

from qcompile.errors import Refused
from qcompile.graph import Graph

ALIGNMENT = 16  # bytes: what the widest vector loads of these processors like, and every C type


@dataclass(frozen=True)
class Constant:
    """An array of flash: its name in C without a prefix, and its elements."""

    name: str
    array: np.ndarray


@dataclass(frozen=True)
class Program:
    """A model, ready to be written.

    Attributes:
        graph: from codes to codes.
        inputs: in order.
        outputs: in order.
        functions: of C, each once.
        sequence: the calls.
        layers: what each call does, in order.
        results: how many of each call's last buffers it writes.
        constants: in the order of the sequence's indices.
        arena: where values lie.
        updated: the inputs that a call writes in place; they are no outputs.
    """

    graph: Graph
    inputs: list[Port]
    outputs: list[Port]
    functions: Mapping[str, Function]
    sequence: Sequence
    layers: list[Layer]
    results: list[int]
    constants: list[Constant]
    arena: Arena
    updated: frozenset[int] = frozenset()

    @property
    def arena_bytes(self) -> int:
        """To the last byte that is written; the rounding of a value's length to the next place is no part of it."""
        values = [self.sequence.values[index] for index in self.arena.places]
        return max(((place(self, v) or 0) + math.prod(map(int, v.shape)) * np.dtype(v.dtype).itemsize for v in values), default=0)

    @property
    def weights_bytes(self) -> int:
        return sum(constant.array.nbytes for constant in self.constants)


def passes() -> list[object]:
    """Return the passes over the Relax module, in order."""
    return [
        transform.DeadCodeElimination(),
        transform.LegalizeOps(skip_ops=["relax.reshape", *PIECES]),
        LegalizePieces(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
        # After fusion, whose functions would hold what lies between their parts on the stack.
        InlineRemaining(),
    ]


def lower(graph: Graph, features: frozenset[str]) -> Program:
    """Return the program of an integer graph with fixed sizes.

    Args:
        graph: is not changed.
        features: of the processor (``processors.Processor``).

    Raises:
        Refused: naming the node that has no form in C.
    """
    stripped, inputs, outputs = without_boundary(graph)
    lowering = Lowering(features)
    with COMPILE_LOCK, tvm.target.Target({"kind": "c"}):
        lowered = translate(stripped.module, legalize=LEGALIZE, tiling=lowering, inline_bytes=0, images_last=True)
        for fallback in lowered.fallbacks:
            if fallback.operator.startswith("qc."):
                raise Refused(f"no edge kernel: {fallback.reason}", node=fallback.node, operator=fallback.operator)
        module = tvm.transform.Sequential(passes())(lowered.module)
        try:
            sequence = read_sequence(module)
        except NoSequence as reason:
            raise Refused(f"the model has no static schedule: {reason}") from reason
        results = [len(positions) for positions in written(sequence)]
        functions: dict[str, Function] = {}
        for call, count in zip(sequence.calls, results, strict=True):
            if call.kernel not in functions:
                buffers, updated = len(call.arguments), (module[call.kernel].attrs or {}).get(UPDATES)
                changed = {*range(buffers - count, buffers), *([int(updated)] if updated is not None else [])}
                functions[call.kernel] = print_function(module[call.kernel], call.kernel, changed)
    layers = _layers(sequence, module, lowering.layers)
    constants = [Constant(_c_name(name), tensor.numpy()) for name, tensor in lowered.constants.items()]
    constants += [Constant(f"literal_{i}", array) for i, array in enumerate(sequence.literals)]
    kept = [port for port, view in zip(outputs, sequence.outputs, strict=True) if view.kind == VALUE]
    updated = frozenset(view.index for view in sequence.outputs if view.kind == INPUT)
    arena = plan_arena(sequence, ALIGNMENT, leads=overlaps, exact=True)
    return Program(stripped, inputs, kept, functions, sequence, layers, results, constants, arena, updated)


def _layers(sequence: Sequence, module: tvm.IRModule, noted: list[Layer]) -> list[Layer]:
    """Return what each call does: edge kernels run in the order in which they were noted, the rest bear the name of their function."""
    waiting = iter(noted)
    return [next(waiting) if SCHEDULED in module[call.kernel].attrs else Layer(call.kernel, call.kernel) for call in sequence.calls]


def _c_name(name: str) -> str:
    return re.sub(r"\W", "_", name)


def constant_bytes(program: Program, call: Call) -> int:
    """Return the bytes of flash that a call reads."""
    read = {view.index for view in call.arguments if view.kind == CONSTANT}
    return sum(program.constants[index].array.nbytes for index in read)


def place(program: Program, view: View) -> int | None:
    """Return the offset of a value in the arena, None for what does not lie there."""
    if view.kind != VALUE or view.index not in program.arena.places:
        return None
    where = program.arena.places[view.index]
    return where.offset + view.at + sum(region.length for region in program.arena.regions[: where.region])


assert relax  # the passes live there

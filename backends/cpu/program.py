"""What a caller of the host functions of ``host`` must know: their names, where what stands in their table, and the code's own text."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import numpy as np

CALLS, SIZES, ARGUMENTS, PROGRAM = "qcompile_calls", "qcompile_sizes", "qcompile_arguments", "qcompile_program"


@dataclass(frozen=True)
class Layout:
    """Where what stands in the table: symbols, inputs, outputs, the arena, constants; then what ``sizes`` writes."""

    symbols: int
    inputs: int
    outputs: int
    constants: int
    ranks: tuple[int, ...]

    @property
    def first_input(self) -> int:
        return self.symbols

    @property
    def first_output(self) -> int:
        return self.first_input + self.inputs

    @property
    def arena(self) -> int:
        return self.first_output + self.outputs

    @property
    def first_constant(self) -> int:
        return self.arena + 1

    @property
    def bytes(self) -> int:
        return self.first_constant + self.constants

    @property
    def first_shape(self) -> int:
        return self.bytes + 1

    @property
    def length(self) -> int:
        return self.first_shape + sum(self.ranks)


@dataclass(frozen=True)
class Program:
    """What a caller of the host functions must know. It is part of the code, as text.

    Attributes:
        layout: of the table.
        symbols: names of the sizes that a call decides, in the table's order.
        outputs: for each output which of the returned values it is a view of, and its dtype; -1 - i for the i-th input, updated in place.
        kernels: the name of the kernel of every call.
        arguments: dtype and rank of every argument of every call.
        literals: the constants that the model's function itself holds; in the table they follow the model's.
    """

    layout: Layout
    symbols: tuple[str, ...]
    outputs: tuple[tuple[int, str], ...]
    kernels: tuple[str, ...]
    arguments: tuple[tuple[tuple[str, int], ...], ...]
    literals: tuple[np.ndarray, ...]


def parse_program(text: bytes) -> Program:
    """Return the program of the text that the host function ``PROGRAM`` gives."""
    read = json.loads(text)
    return Program(
        Layout(**{**read["layout"], "ranks": tuple(read["layout"]["ranks"])}),
        tuple(read["symbols"]),
        tuple((index, dtype) for index, dtype in read["outputs"]),
        tuple(kernel for kernel, _ in read["calls"]),
        tuple(tuple((dtype, rank) for dtype, rank in arguments) for _, arguments in read["calls"]),
        tuple(np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy() for dtype, shape, data in read["literals"]),
    )

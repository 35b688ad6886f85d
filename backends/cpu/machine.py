"""Runs the host functions of ``host``: holds the table of addresses and the arena of one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from struct import Struct
from typing import Any, Protocol

import numpy as np
from qcompile.backends.cpu.pages import allocate
from qcompile.backends.cpu.program import Program


class Functions(Protocol):
    """The host functions of one module. They take arrays i64 as ``bind`` returns them, which keeps the array alive."""

    def bind(self, array: np.ndarray[Any, Any]) -> Any: ...

    def calls(self, table: Any, first: int, last: int) -> None: ...

    def sizes(self, table: Any) -> None: ...

    def arguments(self, table: Any, shapes: Any) -> None: ...


@dataclass(frozen=True)
class Step:
    """One kernel call of a profile: its name, its time, and shape and bytes of every argument, results last."""

    kernel: str
    milliseconds: float
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


class Machine:
    """One thread's table and arena. The memory of a result is new in every call; the arena is kept, and grows where a size needs it.

    Arrays are NumPy's; a subclass may bring others.

    Args:
        functions: of the module.
        program: what stands in the table.
        constants: addresses of the model's and then of the literals, multiples of 64; the caller keeps them alive.
    """

    def __init__(self, functions: Functions, program: Program, constants: Many[int]) -> None:
        layout = program.layout
        self._program, self._layout, self._functions = program, layout, functions
        self._entries = zeros(layout.length)
        self._table = functions.bind(self._entries)
        self._entries[layout.first_constant : layout.bytes] = constants
        self._addresses = Struct(f"{layout.inputs + layout.outputs}q")
        self._sizes: tuple[int, ...] | None = None
        self._arena = allocate(0)
        self._shapes: list[tuple[int, ...]] = []
        # A value is made in the shape of the first output that shows it; the others are views of it.
        self._makers = [next(i for i, (value, _) in enumerate(program.outputs) if value == v) for v in range(layout.outputs)]
        self._dtypes = [self._dtype(program.outputs[i][1]) for i in self._makers]
        self._simple = len(self._makers) == len(program.outputs)

    @property
    def arena_bytes(self) -> int:
        """Return the bytes of memory that values between kernels take, of the largest call so far."""
        return self._arena.size

    def __call__(self, inputs: Many[Any], sizes: tuple[int, ...]) -> tuple[Any, ...]:
        """Run the model; inputs are contiguous and on addresses that are multiples of 64, ``sizes`` the values of the symbols."""
        results = self._bind(inputs, sizes)
        self._functions.calls(self._table, 0, len(self._program.kernels))
        if self._simple:
            return tuple(results)
        return tuple(
            (results[value] if value >= 0 else inputs[-1 - value]).reshape(shape)
            for (value, _), shape in zip(self._program.outputs, self._shapes, strict=True)
        )

    def steps(self, inputs: Many[Any], sizes: tuple[int, ...]) -> list[Step]:
        """Run the model, one kernel after another with a clock between them."""
        kept = self._bind(inputs, sizes)
        run, table, now = self._functions.calls, self._table, time.perf_counter
        empty = min(_timed(lambda: run(table, 0, 0), now) for _ in range(20))  # what calling takes where nothing runs
        spent = [_timed(lambda i=i: run(table, i, i + 1), now) - empty for i in range(len(self._program.kernels))]  # type: ignore[misc]
        del kept
        dimensions = self._dimensions()
        found = []
        for kernel, seconds, arguments in zip(self._program.kernels, spent, self._program.arguments, strict=True):
            shapes = tuple(tuple(next(dimensions) for _ in range(rank)) for _, rank in arguments)
            size = sum(math.prod(s) * np.dtype(dtype).itemsize for s, (dtype, _) in zip(shapes, arguments, strict=True))
            found.append(Step(kernel, max(1e3 * seconds, 0.0), shapes, size))
        return found

    def _dimensions(self) -> Iterator[int]:
        shapes = zeros(max(sum(rank for call in self._program.arguments for _, rank in call), 1))
        self._functions.arguments(self._table, self._functions.bind(shapes))
        return iter(shapes.tolist())

    def _bind(self, inputs: Many[Any], sizes: tuple[int, ...]) -> list[Any]:
        """Write the addresses of this call; return new memory for the results."""
        if sizes != self._sizes:
            self._resize(sizes)
        results = [self._new(self._shapes[i], dtype) for i, dtype in zip(self._makers, self._dtypes, strict=True)]
        addresses = [self._address(array) for array in (*inputs, *results)]
        self._addresses.pack_into(self._entries.data, 8 * self._layout.first_input, *addresses)
        return results

    def _resize(self, sizes: tuple[int, ...]) -> None:
        layout, entries = self._layout, self._entries
        self._sizes = None  # an error below leaves the table half written
        entries[: layout.symbols] = sizes
        self._functions.sizes(self._table)
        if entries[layout.bytes] > self._arena.size:
            self._arena = allocate(int(entries[layout.bytes]))
        entries[layout.arena] = address(self._arena)
        dimensions = iter(entries[layout.first_shape :].tolist())
        self._shapes = [tuple(next(dimensions) for _ in range(rank)) for rank in layout.ranks]
        self._sizes = sizes

    # ---- arrays -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _dtype(name: str) -> Any:
        return np.dtype(name)

    @staticmethod
    def _new(shape: tuple[int, ...], dtype: Any) -> Any:
        return allocate(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    @staticmethod
    def _address(array: Any) -> int:
        return address(array)


def zeros(length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return an array i64[length] of zeros on an address that is a multiple of 64."""
    array = allocate(8 * length).view(np.int64)
    array[:] = 0
    return array


def address(array: np.ndarray[Any, Any]) -> int:
    """Return where an array lies."""
    found: int = array.__array_interface__["data"][0]
    return found


def _timed(run: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    run()
    return now() - start

"""Runs the host functions of ``host``: holds the table of addresses and the arena of one thread."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from struct import Struct
from typing import Any

import numpy as np
import torch
import tvm_ffi
from qcompile.backends.cpu.host import ARGUMENTS, CALLS, PROGRAM, SIZES, Layout, layout_of, returned
from qcompile.backends.cpu.pages import allocate
from qcompile.backends.lowering.sequence import VALUE, Sequence


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


def read_program(module: Any) -> Program | None:
    """Return the program of a runtime module; None where it is code of the Relax virtual machine."""
    module = getattr(module, "mod", module)
    if not module.implements_function(PROGRAM):
        return None
    place = torch.zeros(2, dtype=torch.int64)
    module[PROGRAM](tvm_ffi.from_dlpack(place))
    text = np.empty(int(place[1]), np.uint8)
    place[0] = text.ctypes.data
    module[PROGRAM](tvm_ffi.from_dlpack(place))
    read = json.loads(text.tobytes())
    return Program(
        Layout(**{**read["layout"], "ranks": tuple(read["layout"]["ranks"])}),
        tuple(read["symbols"]),
        tuple((index, dtype) for index, dtype in read["outputs"]),
        tuple(kernel for kernel, _ in read["calls"]),
        tuple(tuple((dtype, rank) for dtype, rank in arguments) for _, arguments in read["calls"]),
        tuple(np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy() for dtype, shape, data in read["literals"]),
    )


@dataclass(frozen=True)
class Step:
    """One kernel call of a profile: its name, its time, and shape and bytes of every argument, results last."""

    kernel: str
    milliseconds: float
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


class Machine:
    """One thread's table and arena. The memory of a result is new in every call; the arena is kept, and grows where a size needs it.

    Args:
        module: the runtime module with the host functions.
        program: what stands in the table.
        constants: the model's and then the literals, on addresses that are multiples of 64; the caller keeps them alive.
    """

    def __init__(self, module: Any, program: Program, constants: Many[torch.Tensor]) -> None:
        layout = program.layout
        self._program, self._layout = program, layout
        self._calls, self._find_sizes, self._find_arguments = (getattr(module, "mod", module)[name] for name in (CALLS, SIZES, ARGUMENTS))
        table = torch.zeros(layout.length, dtype=torch.int64)
        self._table, self._entries = tvm_ffi.from_dlpack(table), table.numpy()
        self._entries[layout.first_constant : layout.bytes] = [constant.data_ptr() for constant in constants]
        self._addresses = Struct(f"{layout.inputs + layout.outputs}q")
        self._sizes: tuple[int, ...] | None = None
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._shapes: list[tuple[int, ...]] = []
        # A value is made in the shape of the first output that shows it; the others are views of it.
        self._makers = [next(i for i, (value, _) in enumerate(program.outputs) if value == v) for v in range(layout.outputs)]
        self._dtypes = [getattr(torch, program.outputs[i][1]) for i in self._makers]
        self._simple = len(self._makers) == len(program.outputs)

    @property
    def arena_bytes(self) -> int:
        """Return the bytes of memory that values between kernels take, of the largest call so far."""
        return self._arena.numel()

    def __call__(self, inputs: Many[torch.Tensor], sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Run the model; inputs are contiguous and on addresses that are multiples of 64, ``sizes`` the values of the symbols."""
        results = self._bind(inputs, sizes)
        self._calls(self._table, 0, len(self._program.kernels))
        if self._simple:
            return tuple(results)
        return tuple(
            (results[value] if value >= 0 else inputs[-1 - value]).view(shape)
            for (value, _), shape in zip(self._program.outputs, self._shapes, strict=True)
        )

    def steps(self, inputs: Many[torch.Tensor], sizes: tuple[int, ...]) -> list[Step]:
        """Run the model, one kernel after another with a clock between them."""
        kept = self._bind(inputs, sizes)
        run, table, now = self._calls, self._table, time.perf_counter
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
        shapes = torch.zeros(max(sum(rank for call in self._program.arguments for _, rank in call), 1), dtype=torch.int64)
        self._find_arguments(self._table, tvm_ffi.from_dlpack(shapes))
        return iter(shapes.tolist())

    def _bind(self, inputs: Many[torch.Tensor], sizes: tuple[int, ...]) -> list[torch.Tensor]:
        """Write the addresses of this call; return new memory for the results."""
        if sizes != self._sizes:
            self._resize(sizes)
        results = [torch.empty(self._shapes[i], dtype=dtype, device="cpu") for i, dtype in zip(self._makers, self._dtypes, strict=True)]
        addresses = [tensor.data_ptr() for tensor in (*inputs, *results)]
        self._addresses.pack_into(self._entries.data, 8 * self._layout.first_input, *addresses)
        return results

    def _resize(self, sizes: tuple[int, ...]) -> None:
        layout, entries = self._layout, self._entries
        self._sizes = None  # an error below leaves the table half written
        entries[: layout.symbols] = sizes
        self._find_sizes(self._table)
        if entries[layout.bytes] > self._arena.numel():
            self._arena = torch.from_numpy(allocate(int(entries[layout.bytes])))
        entries[layout.arena] = self._arena.data_ptr()
        dimensions = iter(entries[layout.first_shape :].tolist())
        self._shapes = [tuple(next(dimensions) for _ in range(rank)) for rank in layout.ranks]
        self._sizes = sizes


def _timed(run: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    run()
    return now() - start

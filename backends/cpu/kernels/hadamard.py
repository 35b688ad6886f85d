"""Blocked Hadamard rotation of the last axis by the fast Walsh-Hadamard transform (dialect ``qc.hadamard``).

A block of n elements takes n log2(n) additions. Steps that pair elements less than sixteen apart are shuffles inside a register;
wider steps pair whole vectors, sixteen vectors (four steps) for each trip through memory where the registers hold them.
"""

from __future__ import annotations

import math
from typing import Any

from qcompile.backends.cpu.kernels.isa import SETS, detect
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Index,
    argument,
    below,
    each_row,
    function,
    load,
    local,
    ramp,
    size,
    splat,
    store,
    store_row,
)  # fmt: skip
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def hadamard(width: int, block: int, isa: str | None = None) -> tirx.PrimFunc:
    """Build ``f(x, out)``: x, out float32 [rows, width]; each run of ``block`` elements is multiplied by the normalised Sylvester matrix.

    ``isa`` is a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``, by default this machine's.

    Raises:
        ValueError: block is no power of two or does not divide width.
    """
    if block < 1 or block & (block - 1) or width % block:
        raise ValueError(f"blocks of {block} are no power of two that divides {width}")
    with function("hadamard") as builder:
        together = 16 if SETS[isa or detect()].parts == 1 else 4  # vectors that the registers hold, with room for their sums
        rows = size("rows")
        x, out = argument("x", (rows, width)), argument("out", (rows, width))
        run = max(block, LANES)  # smaller blocks go several to a register
        values = width if width % LANES == 0 else -(-width // LANES) * LANES

        def row(index: Index) -> None:
            buffer = local(run)
            with T.serial(values // run) as i:
                start = T.Bind(T.cast(i * run, "int64"))
                mask = below(width - start) if width % LANES else None
                _transform(buffer, x, out, (index, start), block, run, mask, together)

        each_row(rows, width, row, threshold=1 << 15)
    return builder.get()


def _transform(buffer: Any, x: Any, out: Any, place: tuple[Index, Index], block: int, run: int, mask: Any, together: int) -> None:
    """Transform ``run`` elements of a row: inside registers on the way in, between vectors after, ``together`` at a time."""
    index, start = place
    registers = run // LANES
    with T.serial(registers) as r:
        value = T.Bind(load(x, mask, index, start + r * LANES))
        step = 1
        while step < min(block, LANES):
            value = T.Bind(_inside(value, step))
            step *= 2
        store(buffer, value * splat(1.0 / math.sqrt(block)), ramp(r * LANES))
    step = 1  # in registers
    while step < registers:
        count = min(together, registers // step)  # vectors that meet in this trip, ``step`` apart
        with T.serial(registers // count) as group:
            first = T.Bind(group // step * (step * count) + group % step)
            held = [T.Bind(buffer[ramp((first + i * step) * LANES)]) for i in range(count)]
            apart = 1
            while apart < count:
                for i in range(count):
                    if not i & apart:
                        low, high = held[i], held[i + apart]
                        held[i], held[i + apart] = T.Bind(low + high), T.Bind(low - high)
                apart *= 2
            for i, value in enumerate(held):
                store(buffer, value, ramp((first + i * step) * LANES))
        step *= count
    with T.serial(registers) as r:
        store_row(out, buffer[ramp(r * LANES)], mask, index, start + r * LANES)


def _inside(value: Any, step: int) -> Any:
    """Return the sums and differences of elements ``step`` apart within one register: a swapped copy plus a copy with signs."""
    swapped = tirx.Shuffle([value], [lane ^ step for lane in range(LANES)])
    signs = tirx.Shuffle([T.float32(-1.0 if lane & step else 1.0) for lane in range(LANES)], list(range(LANES)))
    return swapped + value * signs

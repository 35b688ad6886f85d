"""Blocked Hadamard rotation of the last axis by the fast Walsh-Hadamard transform (dialect ``qc.hadamard``).

A block of n elements takes n log2(n) additions. Steps that pair elements less than sixteen apart are shuffles inside a register;
wider steps pair whole vectors, sixteen vectors (four steps) for each trip through memory where the registers hold them. Where n is
m * 2**i, a small matrix of order m joins m transforms of 2**i (``qcompile.graph.hadamard``): m additions more for each element.
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

from qcompile.graph.hadamard import hadamard_order, paley_matrix


def why_no_hadamard(width: int, block: int) -> str:
    """Return why there is no kernel for blocks of a width, or nothing."""
    order = hadamard_order(block)
    if order is None or width % block:
        return f"no Hadamard matrix of size {block} divides {width}"
    if order > 1 and block // order < LANES:
        return f"blocks of {block} are less than {LANES} times {order}: elements to be joined would share a register"
    return ""


def hadamard(width: int, block: int, isa: str | None = None) -> tirx.PrimFunc:
    """Build ``f(x, out)``: x, out float32 [rows, width]; each run of ``block`` elements is multiplied by ``hadamard_matrix(block)``.

    ``isa`` is a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``, by default this machine's.

    Raises:
        ValueError: see ``why_no_hadamard``.
    """
    if reason := why_no_hadamard(width, block):
        raise ValueError(reason)
    order = hadamard_order(block) or 1
    inner = block // order
    base = paley_matrix(order).tolist()
    with function("hadamard") as builder:
        together = 16 if SETS[isa or detect()].parts == 1 else 4  # vectors that the registers hold, with room for their sums
        rows = size("rows")
        x, out = argument("x", (rows, width)), argument("out", (rows, width))
        run = max(inner, LANES)  # smaller blocks go several to a register
        values = width if width % LANES == 0 else -(-width // LANES) * LANES
        buffer: Any = None

        def begin() -> None:
            nonlocal buffer
            buffer = local(run * order)

        def row(index: Index) -> None:
            with T.serial(values // (run * order)) as i:
                start = T.Bind(T.cast(i * (run * order), "int64"))
                mask = below(width - start) if width % LANES else None
                with T.serial(order) as part:
                    first = T.Bind(T.cast(part * run, "int64"))
                    _transform(buffer, x, (index, start, first), inner, run, mask, together, 1 / math.sqrt(block))
                with T.serial(run // LANES) as r:
                    _join(buffer, out, (index, start), r * LANES, run, mask, base)

        each_row(rows, width, row, begin=begin, threshold=1 << 15)
    return builder.get()


def _transform(
    buffer: Any, x: Any, place: tuple[Index, Index, Index], block: int, run: int, mask: Any, together: int, scale: float
) -> None:  # fmt: skip
    """Transform ``run`` elements of a row into ``buffer``: inside registers on the way in, then between vectors, ``together`` at a time."""
    index, start, offset = place
    registers = run // LANES
    with T.serial(registers) as r:
        value = T.Bind(load(x, mask, index, start + offset + r * LANES))
        step = 1
        while step < min(block, LANES):
            value = T.Bind(_inside(value, step))
            step *= 2
        store(buffer, value * splat(scale), ramp(offset + r * LANES))
    step = 1  # in registers
    while step < registers:
        count = min(together, registers // step)  # vectors that meet in this trip, ``step`` apart
        with T.serial(registers // count) as group:
            first = T.Bind(group // step * (step * count) + group % step)
            held = [T.Bind(buffer[ramp(offset + (first + i * step) * LANES)]) for i in range(count)]
            apart = 1
            while apart < count:
                for i in range(count):
                    if not i & apart:
                        low, high = held[i], held[i + apart]
                        held[i], held[i + apart] = T.Bind(low + high), T.Bind(low - high)
                apart *= 2
            for i, value in enumerate(held):
                store(buffer, value, ramp(offset + (first + i * step) * LANES))
        step *= count


def _join(buffer: Any, out: Any, place: tuple[Index, Index], at: Index, run: int, mask: Any, base: list[list[int]]) -> None:
    """Store one vector of each of the transforms that lie ``run`` apart, joined by ``base``."""
    index, start = place
    parts = [T.Bind(buffer[ramp(at + j * run)]) for j in range(len(base))]
    for i, signs in enumerate(base):
        total = parts[0] if signs[0] > 0 else splat(0.0) - parts[0]
        for part, sign in zip(parts[1:], signs[1:], strict=True):
            total = total + part if sign > 0 else total - part
        store_row(out, total, mask, index, start + i * run + at)


def _inside(value: Any, step: int) -> Any:
    """Return the sums and differences of elements ``step`` apart within one register: a swapped copy plus a copy with signs."""
    swapped = tirx.Shuffle([value], [lane ^ step for lane in range(LANES)])
    signs = tirx.Shuffle([T.float32(-1.0 if lane & step else 1.0) for lane in range(LANES)], list(range(LANES)))
    return swapped + value * signs

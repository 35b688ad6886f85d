"""Blocked Hadamard rotation of the last axis by the fast Walsh-Hadamard transform (dialect ``qc.hadamard``).

A block of n elements takes n log2(n) additions. Steps that pair elements less than sixteen apart are shuffles inside a register;
wider steps pair whole vectors, sixteen vectors (four steps) for each trip through memory where the registers hold them. Where n is
m * 2**i, a small matrix of order m joins m transforms of 2**i: m additions more for each element.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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

Array = np.ndarray[Any, Any]


def hadamard(width: int, block: int, isa: str | None = None, base: Array | None = None) -> tirx.PrimFunc:
    """Build ``f(x, out)``: x, out float32 [rows, width]; each run of ``block`` elements is multiplied by the normalised Hadamard matrix.

    That is Sylvester's matrix S of order ``block``, or with ``base``, a matrix of -1 and 1 of order m (``symmetric_hadamard``), the
    Kronecker product of base and the S of order block / m. ``isa`` is a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``, by default
    this machine's.

    Raises:
        ValueError: block does not divide width, or is no power of two (times m, and then at least 16 times m).
    """
    order = 1 if base is None else len(base)
    inner, rest = divmod(block, order)
    if block < 1 or rest or inner & (inner - 1) or width % block:
        raise ValueError(f"blocks of {block} are no power of two" + f" times {order}" * (order > 1) + f" that divides {width}")
    if order > 1 and inner < LANES:
        raise ValueError(f"blocks of {block} are less than {LANES} times {order}: elements to be joined would share a register")
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


def symmetric_hadamard(order: int) -> Array:
    """Return a symmetric matrix of -1 and 1, int8 [order, order], whose square is order times the identity (Paley 1933, second kind).

    Order is 1, 2 or 2 (q + 1) with a prime q that leaves 1 when divided by 4: 12, 28, 36, 60, 76, 84, ..

    Raises:
        ValueError: there is no such prime.
    """
    if order in (1, 2):
        return np.array([[1, 1], [1, -1]], np.int8)[:order, :order]
    q = order // 2 - 1
    if order % 2 or q % 4 != 1 or any(q % divisor == 0 for divisor in range(2, math.isqrt(q) + 1)) or q < 5:
        raise ValueError(f"no symmetric Hadamard matrix of order {order} by a prime: {q} is none, or does not leave 1 when divided by 4")
    squares = {i * i % q for i in range(1, q)}
    conference = np.ones((q + 1, q + 1), np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = [[0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)]
    identity = np.eye(q + 1, dtype=np.int8)
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]]).astype(np.int8)


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


def _join(buffer: Any, out: Any, place: tuple[Index, Index], at: Index, run: int, mask: Any, base: Array | None) -> None:
    """Store one vector of each of the transforms that lie ``run`` apart, joined by ``base``."""
    index, start = place
    if base is None:
        store_row(out, buffer[ramp(at)], mask, index, start + at)
        return
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

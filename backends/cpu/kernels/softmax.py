"""Softmax over the last axis, float32."""

from __future__ import annotations

import math
from typing import Any

from qcompile.backends.cpu.kernels.partials import SLOTS, Partials
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Index,
    argument,
    each_row,
    each_vector,
    exp2,
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


def softmax(width: int) -> tirx.PrimFunc:
    """Build ``f(x, out)``: x, out float32 [rows, width]; each row is shifted by its maximum, exponentiated and divided by its sum.

    Relative error of an element below 1e-6 + 1e-7 * (maximum - x): the exponential is taken as a power of two.
    """
    with function("softmax") as builder:
        rows = size("rows")
        x, out = argument("x", (rows, width)), argument("out", (rows, width))
        powers: Any = None

        def begin() -> None:
            nonlocal powers
            powers = local(-(-width // LANES) * LANES)

        def row(index: Index) -> None:
            partials = Partials()
            partials.begin("fmax", -math.inf)

            def find(start: Index, mask: Any, slot: int) -> None:
                value = load(x, mask, index, start)
                partials.take(value if mask is None else tirx.Select(mask, value, splat(-math.inf)), slot)

            each_vector(width, find, SLOTS)
            top = T.Bind(partials.result())
            partials.begin("fadd", 0.0)

            def raise_power(start: Index, mask: Any, slot: int) -> None:
                value = T.Bind(exp2((load(x, mask, index, start) - splat(top)) * splat(math.log2(math.e))))
                store(powers, value, ramp(start))
                partials.take(value if mask is None else tirx.Select(mask, value, splat(0.0)), slot)

            each_vector(width, raise_power, SLOTS)
            inverse = T.Bind(T.float32(1.0) / partials.result())
            each_vector(width, lambda start, mask, slot: store_row(out, powers[ramp(start)] * splat(inverse), mask, index, start), SLOTS)

        each_row(rows, width, row, begin=begin, threshold=1 << 15)
    return builder.get()

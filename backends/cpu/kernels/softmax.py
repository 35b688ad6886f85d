"""Softmax over the last axis, float32."""

from __future__ import annotations

import math
from typing import Any

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
    reduce,
    size,
    splat,
    store,
    store_row,
)  # fmt: skip
from tvm import tirx
from tvm.tirx.script.builder import ir as T

_SLOTS = 4


def softmax(width: int) -> tirx.PrimFunc:
    """Build ``f(x, out)``: x, out float32 [rows, width]; each row is shifted by its maximum, exponentiated and divided by its sum.

    Relative error of an element below 1e-6 + 1e-7 * (maximum - x): the exponential is taken as a power of two.
    """
    with function("softmax") as builder:
        rows = size("rows")
        x, out = argument("x", (rows, width)), argument("out", (rows, width))

        def row(index: Index) -> None:
            powers, partial = local(-(-width // LANES) * LANES), local(_SLOTS * LANES)
            for slot in range(_SLOTS):
                store(partial, splat(-math.inf), ramp(slot * LANES))

            def find(start: Index, mask: Any, slot: int) -> None:
                value = load(x, mask, index, start)
                value = value if mask is None else tirx.Select(mask, value, splat(-math.inf))
                store(partial, T.max(partial[ramp(slot * LANES)], value), ramp(slot * LANES))

            each_vector(width, find, _SLOTS)
            parts = [partial[ramp(slot * LANES)] for slot in range(_SLOTS)]
            top = T.Bind(reduce("fmax", T.max(T.max(parts[0], parts[1]), T.max(parts[2], parts[3]))))
            for slot in range(_SLOTS):
                store(partial, splat(0.0), ramp(slot * LANES))

            def raise_power(start: Index, mask: Any, slot: int) -> None:
                value = T.Bind(exp2((load(x, mask, index, start) - splat(top)) * splat(math.log2(math.e))))
                store(powers, value, ramp(start))
                value = value if mask is None else tirx.Select(mask, value, splat(0.0))
                store(partial, partial[ramp(slot * LANES)] + value, ramp(slot * LANES))

            each_vector(width, raise_power, _SLOTS)
            parts = [partial[ramp(slot * LANES)] for slot in range(_SLOTS)]
            inverse = T.Bind(T.float32(1.0) / reduce("fadd", (parts[0] + parts[1]) + (parts[2] + parts[3])))
            each_vector(width, lambda start, mask, slot: store_row(out, powers[ramp(start)] * splat(inverse), mask, index, start), _SLOTS)

        each_row(rows, width, row, threshold=1 << 15)
    return builder.get()

"""Functions of single codes: sums of two, lookups, copies."""

from __future__ import annotations

from qcompile.backends.edge.kernels.builder import clamp, function, let, loop, numbers, pointer, store, widen
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def add(a_dtype: str, b_dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """Build ``f(a, b, count, a_factor, b_factor, rest, shift, out_zero, low, high, y)``: the fixed-point rule of qc.add.

    ``rest`` holds what does not depend on the codes: ``half - a_zero * a_factor - b_zero * b_factor``.
    """
    with function(f"add_{a_dtype}_{b_dtype}_{out_dtype}") as builder:
        a, b = pointer("a", a_dtype), pointer("b", b_dtype)
        count, a_factor, b_factor, rest, shift, out_zero, low, high = numbers("count a_factor b_factor rest shift out_zero low high")
        y = pointer("y", out_dtype)
        with loop("i", count) as i:
            total = let("total", widen(a[i]) * a_factor + widen(b[i]) * b_factor + rest)
            store(y, T.cast(clamp(T.shift_right(total, shift) + out_zero, low, high), out_dtype), i)
    return builder.get()


def lookup(x_dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """Build ``f(x, table, count, y)``: ``y[i] = table[x[i]]``, the code's bits as a number from 0 to 255."""
    with function(f"lookup_{x_dtype}_{out_dtype}") as builder:
        x, table = pointer("x", x_dtype), pointer("table", out_dtype)
        (count,) = numbers("count")
        y = pointer("y", out_dtype)
        with loop("i", count) as i:
            store(y, table[T.bitwise_and(widen(x[i]), T.int32(0xFF))], i)
    return builder.get()

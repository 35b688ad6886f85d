"""Functions of single codes: sums of two, lookups, copies."""

from __future__ import annotations

from qcompile.backends.edge.kernels.builder import clamp, external, function, let, loop, numbers, pointer, store, widen
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def add(a_dtype: str, b_dtype: str, out_dtype: str, quick: bool) -> tirx.PrimFunc:
    """Build ``f(a, b, count, a_factor, b_factor, rest, shift, result.., y)``: the fixed-point rule of qc.add.

    ``rest`` holds what does not depend on the codes: ``half - a_zero * a_factor - b_zero * b_factor``. ``quick``: the bounds are those of
    the type and rest holds the zero point as well, times 2^shift; else result is ``out_zero, low, high``.
    """
    with function(f"add_{a_dtype}_{b_dtype}_{out_dtype}{'_quick' * quick}") as builder:
        a, b = pointer("a", a_dtype), pointer("b", b_dtype)
        count, a_factor, b_factor, rest, shift = numbers("count a_factor b_factor rest shift")
        result = [] if quick else numbers("out_zero low high")
        y = pointer("y", out_dtype)
        with loop("i", count) as i:
            total = let("total", T.shift_right(widen(a[i]) * a_factor + widen(b[i]) * b_factor + rest, shift))
            code = (
                external(f"qc_saturate_{out_dtype.removesuffix('int8') or 's'}8", total) if quick else clamp(total + result[0], *result[1:])
            )
            store(y, T.cast(code, out_dtype), i)
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

"""Softmax of codes in integers."""

from __future__ import annotations

from qcompile.backends.edge.kernels.builder import cell, function, let, loop, numbers, pointer, store, widen
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def softmax(x_dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """Build ``f(x, table, rows, columns, lowest, highest, y)``: the rule of qc.softmax over the last axis; table int32 [256]."""
    with function(f"softmax_{x_dtype}_{out_dtype}") as builder:
        x, table = pointer("x", x_dtype), pointer("table", "int32")
        rows, columns, lowest, highest = numbers("rows columns lowest highest")
        y = pointer("y", out_dtype)
        with loop("row", rows) as row:
            start = let("start", row * columns)
            top, total = cell("top", widen(x[start])), cell("total", T.int32(0))
            with loop("i", columns) as i:
                store(top, T.max(top[0], widen(x[start + i])), 0)
            with loop("i", columns) as i:
                store(total, total[0] + table[top[0] - widen(x[start + i])], 0)
            with loop("i", columns) as i:
                share = tirx.truncdiv(table[top[0] - widen(x[start + i])] * 256 + T.shift_right(total[0], T.int32(1)), total[0])
                store(y, T.cast(T.min(let("share", share) + lowest, highest), out_dtype), start + i)
    return builder.get()

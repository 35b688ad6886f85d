"""Pooling over codes, NHWC: means and maxima of windows."""

from __future__ import annotations

from qcompile.backends.edge.kernels.builder import cell, clamp, external, function, let, loop, numbers, pointer, store, widen
from tvm import tirx
from tvm.tirx.script.builder import ir as T

WINDOWS = "height width channels out_height out_width kernel_height kernel_width stride_y stride_x pad_y pad_x"


def mean_pool(x_dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """Build ``f(x, windows.., x_zero, multiplier, shift, out_zero, low, high, y)``: sums of ``code - x_zero``, requantized.

    Pixels outside the image add nothing; the multiplier holds the division by the window's size.
    """
    with function(f"mean_pool_{x_dtype}_{out_dtype}") as builder:
        x = pointer("x", x_dtype)
        s = dict(zip(WINDOWS.split(), numbers(WINDOWS), strict=True))
        x_zero, multiplier, shift, out_zero, low, high = numbers("x_zero multiplier shift out_zero low high")
        y = pointer("y", out_dtype)
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out, loop("c", s["channels"]) as c:
            total = cell("total", T.int32(0))
            top, left = let("top", line_out * s["stride_y"] - s["pad_y"]), let("left", column_out * s["stride_x"] - s["pad_x"])
            with loop("i", s["kernel_height"]) as i, loop("j", s["kernel_width"]) as j:
                line, column = let("line", top + i), let("column", left + j)
                with T.If(tirx.all(line >= 0, line < s["height"], column >= 0, column < s["width"])), T.Then():
                    store(total, total[0] + widen(x[(line * s["width"] + column) * s["channels"] + c]) - x_zero, 0)
            code = clamp(external("qc_requantize", total[0], multiplier, shift) + out_zero, low, high)
            store(y, T.cast(code, out_dtype), (line_out * s["out_width"] + column_out) * s["channels"] + c)
    return builder.get()


def max_pool(dtype: str) -> tirx.PrimFunc:
    """Build ``f(x, windows.., dilation_y, dilation_x, y)``: the greatest code of each window; padding never wins."""
    with function(f"max_pool_{dtype}") as builder:
        x = pointer("x", dtype)
        s = dict(zip(WINDOWS.split(), numbers(WINDOWS), strict=True))
        dilation_y, dilation_x = numbers("dilation_y dilation_x")
        y = pointer("y", dtype)
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out, loop("c", s["channels"]) as c:
            top = cell("top", T.int32(-128 if dtype == "int8" else 0))
            first_line, first = line_out * s["stride_y"] - s["pad_y"], column_out * s["stride_x"] - s["pad_x"]
            with loop("i", s["kernel_height"]) as i, loop("j", s["kernel_width"]) as j:
                line, column = let("line", first_line + i * dilation_y), let("column", first + j * dilation_x)
                with T.If(tirx.all(line >= 0, line < s["height"], column >= 0, column < s["width"])), T.Then():
                    store(top, T.max(top[0], widen(x[(line * s["width"] + column) * s["channels"] + c])), 0)
            store(y, T.cast(top[0], dtype), (line_out * s["out_width"] + column_out) * s["channels"] + c)
    return builder.get()

"""Pooling over codes, NHWC: means and maxima of windows."""

from __future__ import annotations

from qcompile.backends.edge.kernels.builder import (
    Expression,
    cell,
    clamp,
    external,
    function,
    let,
    loop,
    numbers,
    pointer,
    quotient,
    store,
    widen,
)
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
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out:
            first_line, lines = _inside(line_out * s["stride_y"] - s["pad_y"], s["kernel_height"], s["height"])
            first, columns = _inside(column_out * s["stride_x"] - s["pad_x"], s["kernel_width"], s["width"])
            zeros, out = let("zeros", lines * columns * x_zero), let("out", (line_out * s["out_width"] + column_out) * s["channels"])
            with loop("c", s["channels"]) as c:
                total = cell("total", T.int32(0))
                with loop("i", lines) as i:
                    start = let("start", ((first_line + i) * s["width"] + first) * s["channels"] + c)
                    with loop("j", columns) as j:
                        store(total, total[0] + widen(x[start + j * s["channels"]]), 0)
                code = clamp(external("qc_requantize", total[0] - zeros, multiplier, shift) + out_zero, low, high)
                store(y, T.cast(code, out_dtype), out + c)
    return builder.get()


def _inside(start: Expression, size: Expression, length: Expression, dilation: Expression | int = 1) -> tuple[Expression, Expression]:
    """Return where the part of a window inside an axis of ``length`` begins, and its taps; the window's are ``size``, from ``start`` on."""
    skipped = let("skipped", quotient(T.max(0 - start, 0) + (dilation - 1), dilation))
    end = let("end", T.min(quotient(T.max(length - start, 0) + (dilation - 1), dilation), size))
    return let("first", start + skipped * dilation), let("count", T.max(end - skipped, 0))


def max_pool(dtype: str) -> tirx.PrimFunc:
    """Build ``f(x, windows.., dilation_y, dilation_x, y)``: the greatest code of each window; padding never wins."""
    with function(f"max_pool_{dtype}") as builder:
        x = pointer("x", dtype)
        s = dict(zip(WINDOWS.split(), numbers(WINDOWS), strict=True))
        dilation_y, dilation_x = numbers("dilation_y dilation_x")
        y = pointer("y", dtype)
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out:
            first_line, lines = _inside(line_out * s["stride_y"] - s["pad_y"], s["kernel_height"], s["height"], dilation_y)
            first, columns = _inside(column_out * s["stride_x"] - s["pad_x"], s["kernel_width"], s["width"], dilation_x)
            out = let("out", (line_out * s["out_width"] + column_out) * s["channels"])
            with loop("c", s["channels"]) as c:
                top = cell("top", T.int32(-128 if dtype == "int8" else 0))
                with loop("i", lines) as i:
                    start = let("start", ((first_line + i * dilation_y) * s["width"] + first) * s["channels"] + c)
                    with loop("j", columns) as j:
                        store(top, T.max(top[0], widen(x[start + j * dilation_x * s["channels"]])), 0)
                store(y, T.cast(top[0], dtype), out + c)
    return builder.get()

"""Depthwise convolutions of any kernel, stride and dilation over int8 or uint8 codes, NHWC, with fixed-point results.

Channels lie side by side: processors with vectors take 16 of them at once. Others take them one by one, and what ``planes`` takes is faster
there. Taps outside the image add ``zero * weight``, so that the zero point can be part of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qcompile.backends.edge.kernels.builder import Expression, array, cell, function, let, loop, numbers, pointer, quotient, store, widen
from qcompile.backends.edge.kernels.codes import Codes
from qcompile.backends.edge.kernels.convolution import SIZES
from tvm import tirx
from tvm.tirx.script.builder import ir as T

LANES = 16

Sizes = dict[str, Expression]


@dataclass(frozen=True)
class Depthwise:
    """Which function.

    Attributes:
        signed: inputs are int8, or uint8.
        codes: what is written.
        vectors: 16 channels at a time; channels are a multiple of that.
    """

    signed: bool = True
    codes: Codes = field(default_factory=Codes)
    vectors: bool = False

    @property
    def name(self) -> str:
        return f"depthwise_{'s' if self.signed else 'u'}8_{self.codes.name}{'_vectors' * self.vectors}"

    @property
    def input_dtype(self) -> str:
        return "int8" if self.signed else "uint8"


def depthwise(spec: Depthwise) -> tirx.PrimFunc:
    """Build ``f(x, weight, bias, multiplier, shift, sizes.., x_zero, result.., y, [zeros])``.

    x [height, width, channels] codes; weight int8 [kernel height, kernel width, channels]; y [out height, out width, channels];
    zeros: scratch of ``LANES`` codes, for ``vectors``.
    """
    with function(spec.name) as builder:
        x, weight = pointer("x", spec.input_dtype), pointer("weight", "int8")
        bias, multiplier, shift = pointer("bias", "int32"), pointer("multiplier", "int32"), pointer("shift", "int8")
        names = f"{SIZES} x_zero {spec.codes.numbers}"
        s = dict(zip(names.split(), numbers(names), strict=True))
        y = pointer("y", spec.codes.dtype)
        channels = s["channels"]
        if spec.vectors:
            zeros = pointer("zeros", spec.input_dtype)
            T.evaluate(T.call_extern("void", "qc_fill", T.address_of(zeros[0]), s["x_zero"], LANES))
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out:
            top, left = let("top", line_out * s["stride_y"] - s["pad_y"]), let("left", column_out * s["stride_x"] - s["pad_x"])
            out = let("out", (line_out * s["out_width"] + column_out) * channels)
            if spec.vectors:
                _sixteen(spec, x, weight, bias, multiplier, shift, s, y, zeros, top, left, out)
            else:
                _one(spec, x, weight, bias, multiplier, shift, s, y, top, left, out)
    return builder.get()


def _one(
    spec: Depthwise,
    x: Any,
    weight: Any,
    bias: Any,
    multiplier: Any,
    shift: Any,
    s: Sizes,
    y: Any,
    top: Expression,
    left: Expression,
    out: Expression,
) -> None:
    """Emit the channels of an output pixel one by one."""
    channels = s["channels"]
    with loop("c", channels) as c:
        total = cell("total", bias[c])
        with loop("i", s["kernel_height"]) as i, loop("j", s["kernel_width"]) as j:
            line, column = let("line", top + i * s["dilation_y"]), let("column", left + j * s["dilation_x"])
            value = cell("value", s["x_zero"])
            with T.If(tirx.all(line >= 0, line < s["height"], column >= 0, column < s["width"])), T.Then():
                store(value, widen(x[(line * s["width"] + column) * channels + c]), 0)
            store(total, total[0] + value[0] * widen(weight[(i * s["kernel_width"] + j) * channels + c]), 0)
        store(y, spec.codes.code(total[0], multiplier[c], shift[c], s), out + c)


def _sixteen(
    spec: Depthwise, x: Any, weight: Any, bias: Any, multiplier: Any, shift: Any, s: Sizes, y: Any, zeros: Any, top: Expression,
    left: Expression, out: Expression,
) -> None:  # fmt: skip
    """Emit the channels of an output pixel 16 at a time: of each line the taps left of the image, inside and right of it."""
    channels, kernel_width, dilation = s["channels"], s["kernel_width"], s["dilation_x"]
    before = let("before", T.min(quotient(T.max(0 - left, 0) + dilation - 1, dilation), kernel_width))
    after = let("after", T.max(T.min(quotient(T.max(s["width"] - left, 0) + dilation - 1, dilation), kernel_width), before))
    with loop("part", quotient(channels, LANES)) as part:
        first, sums = let("first", part * LANES), array("sums", LANES)
        with loop("i", LANES) as i:
            store(sums, bias[first + i], i)

        def taps(
            source: Expression, step: Expression, weights: Expression, count: Expression, first: Expression = first, sums: Any = sums
        ) -> None:
            where = T.address_of(weight[weights + first])
            call = T.call_extern(
                "void", f"qc_taps_{spec.input_dtype}", T.address_of(source), step, where, channels, count, T.address_of(sums[0])
            )
            with T.If(count > 0), T.Then():
                T.evaluate(call)

        with loop("i", s["kernel_height"]) as i:
            line, row = let("line", top + i * s["dilation_y"]), let("row", i * kernel_width * channels)
            inside = let("inside", tirx.all(line >= 0, line < s["height"]))
            begin, end = let("begin", T.Select(inside, before, kernel_width)), let("end", T.Select(inside, after, kernel_width))
            taps(zeros[0], 0, row, begin)
            at = (line * s["width"] + left + begin * dilation) * channels + first
            taps(x[at], dilation * channels, row + begin * channels, end - begin)
            taps(zeros[0], 0, row + end * channels, kernel_width - end)
        if spec.codes.quick:
            low, high = (-128, 127) if spec.codes.signed else (0, 255)
            places = [T.address_of(buffer[at]) for buffer, at in ((sums, 0), (multiplier, first), (shift, first), (y, out + first))]
            T.evaluate(T.call_extern("void", "qc_scale_16", *places[:3], s["rest"], low, high, places[3]))
        else:
            with loop("i", LANES) as i:
                store(y, spec.codes.code(sums[i], multiplier[first + i], shift[first + i], s), out + first + i)

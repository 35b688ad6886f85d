"""Depthwise convolutions of any kernel, stride and dilation over int8 or uint8 codes, NHWC, with fixed-point results.

Taps outside the image add ``zero * weight``, so that the zero point can be part of the bias. What ``planes`` takes is faster there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.backends.edge.kernels.builder import cell, function, let, loop, numbers, pointer, store, widen
from qcompile.backends.edge.kernels.codes import Codes
from qcompile.backends.edge.kernels.convolution import SIZES
from tvm import tirx
from tvm.tirx.script.builder import ir as T


@dataclass(frozen=True)
class Depthwise:
    """Which function.

    Attributes:
        signed: inputs are int8, or uint8.
        codes: what is written.
    """

    signed: bool = True
    codes: Codes = field(default_factory=Codes)

    @property
    def name(self) -> str:
        return f"depthwise_{'s' if self.signed else 'u'}8_{self.codes.name}"


def depthwise(spec: Depthwise) -> tirx.PrimFunc:
    """Build ``f(x, weight, bias, multiplier, shift, sizes.., x_zero, result.., y)``.

    x [height, width, channels] codes; weight int8 [kernel height, kernel width, channels]; y [out height, out width, channels].
    """
    with function(spec.name) as builder:
        x, weight = pointer("x", "int8" if spec.signed else "uint8"), pointer("weight", "int8")
        bias, multiplier, shift = pointer("bias", "int32"), pointer("multiplier", "int32"), pointer("shift", "int8")
        names = f"{SIZES} x_zero {spec.codes.numbers}"
        s = dict(zip(names.split(), numbers(names), strict=True))
        y = pointer("y", spec.codes.dtype)
        channels = s["channels"]
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out:
            top, left = let("top", line_out * s["stride_y"] - s["pad_y"]), let("left", column_out * s["stride_x"] - s["pad_x"])
            out = let("out", (line_out * s["out_width"] + column_out) * channels)
            with loop("c", channels) as c:
                total = cell("total", bias[c])
                with loop("i", s["kernel_height"]) as i, loop("j", s["kernel_width"]) as j:
                    line, column = let("line", top + i * s["dilation_y"]), let("column", left + j * s["dilation_x"])
                    value = cell("value", s["x_zero"])
                    with T.If(tirx.all(line >= 0, line < s["height"], column >= 0, column < s["width"])), T.Then():
                        store(value, widen(x[(line * s["width"] + column) * channels + c]), 0)
                    store(total, total[0] + value[0] * widen(weight[(i * s["kernel_width"] + j) * channels + c]), 0)
                store(y, spec.codes.code(total[0], multiplier[c], shift[c], s), out + c)
    return builder.get()

"""Depthwise convolutions over int8 or uint8 codes, NHWC, with fixed-point results.

A task is one output pixel and a few channels. With ``dsp`` four channels come as one word: SXTB16 widens two of them at a time, and SMLABB and
SMLATT multiply the halves of two words. Taps outside the image add ``zero * weight``, so that the zero point can be part of the bias; where all
taps are inside, which is nearly everywhere, none is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcompile.backends.edge.kernels.builder import (
    Expression,
    cell,
    external,
    function,
    let,
    loop,
    numbers,
    pointer,
    quotient,
    store,
    widen,
    word,
)
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
        dsp: four channels at a time; channels are a multiple of four.
    """

    signed: bool = True
    codes: Codes = field(default_factory=Codes)
    dsp: bool = False

    @property
    def name(self) -> str:
        return f"depthwise_{'s' if self.signed else 'u'}8_{self.codes.name}{'_4' * self.dsp}"

    @property
    def together(self) -> int:
        """Channels of one task."""
        return 4 if self.dsp else 1


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
        x_zero = s["x_zero"]
        channels = s["channels"]
        last_y = let("last_y", (s["kernel_height"] - 1) * s["dilation_y"])
        last_x = let("last_x", (s["kernel_width"] - 1) * s["dilation_x"])
        zeros = let("zeros", T.cast(x_zero & 0xFF, "uint32") * T.uint32(0x01010101)) if spec.dsp else x_zero
        with loop("line_out", s["out_height"]) as line_out, loop("column_out", s["out_width"]) as column_out:
            top, left = let("top", line_out * s["stride_y"] - s["pad_y"]), let("left", column_out * s["stride_x"] - s["pad_x"])
            whole = let("whole", tirx.all(top >= 0, left >= 0, top + last_y < s["height"], left + last_x < s["width"]))
            out = let("out", (line_out * s["out_width"] + column_out) * channels)
            with loop("part", quotient(channels, spec.together)) as part:
                first = let("first", part * spec.together)
                sums = [cell(f"sum_{i}", bias[first + i]) for i in range(spec.together)]

                def taps(read: Callable[..., Expression], first: Expression = first, sums: list[Any] = sums) -> None:
                    with loop("i", s["kernel_height"]) as i, loop("j", s["kernel_width"]) as j:
                        line, column = let("line", top + i * s["dilation_y"]), let("column", left + j * s["dilation_x"])
                        at = let("at", (i * s["kernel_width"] + j) * channels + first)
                        _add(spec, read(line, column, first), weight, at, sums)

                def inside(line: Expression, column: Expression, first: Expression) -> Expression:
                    where = (line * s["width"] + column) * channels + first
                    return word(x, where) if spec.dsp else widen(x[where])

                def padded(line: Expression, column: Expression, first: Expression) -> Expression:
                    value = cell("value", zeros, "uint32" if spec.dsp else "int32")
                    with T.If(tirx.all(line >= 0, line < s["height"], column >= 0, column < s["width"])), T.Then():
                        store(value, inside(line, column, first), 0)
                    return value[0]

                with T.If(whole):
                    with T.Then():
                        taps(inside)
                    with T.Else():
                        taps(padded)
                for i, total in enumerate(sums):
                    store(y, spec.codes.code(total[0], multiplier[first + i], shift[first + i], s), out + first + i)
    return builder.get()


def _add(spec: Depthwise, value: Expression, weight: Any, at: Expression, sums: list[Any]) -> None:
    """Emit the products of one tap."""
    if not spec.dsp:
        store(sums[0], sums[0][0] + value * widen(weight[at]), 0)
        return
    codes, weights = let("codes", value), let("weights", word(weight, at))
    low, high = ("qc_sxtb16", "qc_sxtb16_ror8") if spec.signed else ("qc_uxtb16", "qc_uxtb16_ror8")
    for half, (taken, widened) in enumerate(((low, "qc_sxtb16"), (high, "qc_sxtb16_ror8"))):
        a, b = let("a", external(taken, codes, dtype="uint32")), let("b", external(widened, weights, dtype="uint32"))
        for which, multiply in enumerate(("qc_smlabb", "qc_smlatt")):
            total = sums[half + 2 * which]
            store(total, external(multiply, a, b, total[0]), 0)

"""Convolutions and linear layers over int8 or uint8 codes, with fixed-point results.

Pixels are NHWC. The codes under the kernel of a few output pixels are laid out as rows (``im2col``, in the arena), padded codes being the
input's zero point, and multiplied with a few output channels at a time (``products``). A pixel or channel past the end is replaced by the
last one: it is computed twice and stored twice, and no loop has a remainder. The zero point of the input is part of the bias
(``bias - zero * sum of weights``), so the products are those of plain codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.backends.edge.kernels.builder import Expression, function, let, loop, numbers, pointer, quotient, store
from qcompile.backends.edge.kernels.products import Product, block, finish, widen_row
from tvm import tirx
from tvm.tirx.script.builder import ir as T

SIZES = "height width channels out_height out_width out_channels kernel_height kernel_width stride_y stride_x pad_y pad_x dilation_y dilation_x"
RESULT = "out_zero low high"
POINTWISE = f"pixels channels out_channels {RESULT}"  # arguments of a direct convolution


@dataclass(frozen=True)
class Convolution:
    """Which function: all else are its arguments.

    Attributes:
        product: how codes are multiplied.
        direct: the kernel is 1x1 without stride or padding, and channels fill whole steps: inputs are read where they lie.
        out_signed: results are int8, or uint8.
    """

    product: Product
    direct: bool = False
    out_signed: bool = True

    @property
    def name(self) -> str:
        kind = "pointwise" if self.direct else "convolution"
        signs = f"{'s' if self.product.signed else 'u'}8_{'s' if self.out_signed else 'u'}8"
        return f"{kind}_w{self.product.bits}_{signs}_{self.product.pixels}x{self.product.channels}"


def scratch_bytes(spec: Convolution, length: int) -> int:
    """Return the bytes of scratch for rows of ``length`` products, padded."""
    copies = 0 if spec.direct else spec.product.pixels * length
    return copies + (2 * spec.product.pixels * length if spec.product.dsp else 0)


def convolution(spec: Convolution) -> tirx.PrimFunc:
    """Build ``f(x, weight, bias, multiplier, shift, sizes.., length, x_zero, out_zero, low, high, y, scratch)``, or with ``POINTWISE``.

    x [height, width, channels] codes; weight rows packed by ``pack_rows`` over (kernel row, kernel column, channel); bias, multiplier int32,
    shift int8 [out channels]; y [out height, out width, out channels] codes; scratch bytes; length: products of a row, padded.
    """
    product = spec.product
    with function(spec.name) as builder:
        x, weight = pointer("x", product.input_dtype), pointer("weight", "int8")
        bias, multiplier, shift = pointer("bias", "int32"), pointer("multiplier", "int32"), pointer("shift", "int8")
        names = POINTWISE if spec.direct else f"{SIZES} length x_zero {RESULT}"
        s = dict(zip(names.split(), numbers(names), strict=True))
        y, scratch = pointer("y", "int8" if spec.out_signed else "uint8"), pointer("scratch", product.input_dtype)
        length, out_channels = s["channels" if spec.direct else "length"], s["out_channels"]
        pixels = s["pixels"] if spec.direct else let("pixels", s["out_height"] * s["out_width"])
        rows = x if spec.direct else scratch
        with loop("group", quotient(pixels + (product.pixels - 1), product.pixels)) as group:
            places = [let(f"pixel_{i}", T.min(group * product.pixels + i, pixels - 1)) for i in range(product.pixels)]
            starts: list[Expression] = []
            if product.dsp or not spec.direct:
                with loop("i", product.pixels) as i:
                    place = let("place", T.min(group * product.pixels + i, pixels - 1))
                    start = let("start", place * length if spec.direct else (2 * product.pixels * product.dsp + i) * length)
                    if not spec.direct:
                        _gather(x, place, scratch, start, s)
                    if product.dsp:
                        widen_row(product, rows, start, scratch, i * 2 * length, length)
            if product.dsp:
                rows, starts = scratch, [i * 2 * length for i in range(product.pixels)]
            elif spec.direct:
                starts = [let("start", place * length) for place in places]
            else:
                starts = [i * length for i in range(product.pixels)]
            with loop("columns", quotient(out_channels + (product.channels - 1), product.channels)) as columns:
                outs = [let(f"out_{i}", T.min(columns * product.channels + i, out_channels - 1)) for i in range(product.channels)]
                sums = block(product, rows, starts, weight, outs, length)
                for column, out in enumerate(outs):
                    added, factor, by = let("added", bias[out]), let("factor", multiplier[out]), let("by", shift[out])
                    for place, row in zip(places, sums, strict=True):
                        code = finish(row[column][0] + added, factor, by, s["out_zero"], s["low"], s["high"])
                        store(y, T.cast(code, "int8" if spec.out_signed else "uint8"), place * out_channels + out)
    return builder.get()


def _gather(x: Any, place: Expression, rows: Any, start: Expression, s: dict[str, Expression]) -> None:
    """Emit the copy of the codes under an output pixel to ``rows`` from ``start`` on."""
    line_out = let("line_out", quotient(place, s["out_width"]))
    top = let("top", line_out * s["stride_y"] - s["pad_y"])
    left = let("left", (place - line_out * s["out_width"]) * s["stride_x"] - s["pad_x"])
    with loop("i", s["kernel_height"]) as i, loop("j", s["kernel_width"]) as j:
        line, column = let("line", top + i * s["dilation_y"]), let("column", left + j * s["dilation_x"])
        to = let("to", start + (i * s["kernel_width"] + j) * s["channels"])
        with T.If(tirx.all(line >= 0, line < s["height"], column >= 0, column < s["width"])):
            with T.Then():
                source = T.address_of(x[(line * s["width"] + column) * s["channels"]])
                T.evaluate(T.call_extern("void", "qc_copy", T.address_of(rows[to]), source, s["channels"]))
            with T.Else():
                T.evaluate(T.call_extern("void", "qc_fill", T.address_of(rows[to]), s["x_zero"], s["channels"]))

"""Convolutions and linear layers over int8 or uint8 codes, with fixed-point results.

Pixels are NHWC. The codes under the kernel of a few output pixels are laid out as rows (``im2col``, in the arena), padded codes being the
input's zero point, and multiplied with a few output channels at a time (``products``). A pixel past the end is replaced by the last one: it
is computed and stored twice, and no loop has a remainder; of a channel past the end, whose weights are zeros, nothing is stored. The zero
point of the input is part of the bias (``bias - zero * sum of weights``), so the products are those of plain codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qcompile.backends.edge.kernels.builder import Expression, function, let, loop, numbers, pointer, quotient, store
from qcompile.backends.edge.kernels.codes import Codes
from qcompile.backends.edge.kernels.products import Product, block, pairs_block, widen_rows
from tvm import tirx
from tvm.tirx.script.builder import ir as T

SIZES = (
    "height width channels out_height out_width out_channels kernel_height kernel_width stride_y stride_x pad_y pad_x dilation_y dilation_x"
)


@dataclass(frozen=True)
class Convolution:
    """Which function: all else are its arguments.

    Attributes:
        product: how codes are multiplied.
        direct: the kernel is 1x1 without stride or padding, and channels fill whole steps: inputs are read where they lie.
        codes: what is written.
    """

    product: Product
    direct: bool = False
    codes: Codes = field(default_factory=Codes)

    @property
    def name(self) -> str:
        kind = "pointwise" if self.direct else "convolution"
        product = self.product
        signs = f"{'s' if product.signed else 'u'}8_{self.codes.name}"
        return f"{kind}_w{product.bits}_{signs}_{product.pixels}x{product.channels}{'_pairs' * product.pairs}"

    @property
    def numbers(self) -> str:
        """The names of the arguments that are numbers."""
        sizes = "pixels channels out_channels" if self.direct else f"{SIZES} run runs length x_zero"
        return f"{sizes} {self.codes.numbers}"

    def scratch(self, length: int) -> list[tuple[list[int], str]]:
        """Return shape and dtype of the last arguments, for rows of ``length`` products, padded: pairs, then rows of codes."""
        product = self.product
        pairs = [([product.pixels * length // 2], "int32")] if product.pairs else []
        return pairs + ([] if self.direct else [([product.pixels * length], product.input_dtype)])


def convolution(spec: Convolution) -> tirx.PrimFunc:
    """Build ``f(x, weight, bias, multiplier, shift, numbers.., y, scratch..)``.

    x [height, width, channels] codes; weight rows packed by ``pack_rows`` over (kernel row, kernel column, channel); bias, multiplier int32,
    shift int8 [out channels, padded to a multiple of ``product.channels``]; y [out height, out width, out channels] codes. length: products
    of a row, padded; run: kernel columns that lie side by side in the image, ``runs`` times in a kernel row.
    """
    product = spec.product
    with function(spec.name) as builder:
        x, weight = pointer("x", product.input_dtype), pointer("weight", product.weight_dtype)
        bias, multiplier, shift = pointer("bias", "int32"), pointer("multiplier", "int32"), pointer("shift", "int8")
        s = dict(zip(spec.numbers.split(), numbers(spec.numbers), strict=True))
        y = pointer("y", spec.codes.dtype)
        pairs = pointer("pairs", "int32") if product.pairs else None
        rows = x if spec.direct else pointer("rows", product.input_dtype)
        length, out_channels = s["channels" if spec.direct else "length"], s["out_channels"]
        pixels = s["pixels"] if spec.direct else let("pixels", s["out_height"] * s["out_width"])
        with loop("group", quotient(pixels + (product.pixels - 1), product.pixels)) as group:
            places = [let(f"pixel_{i}", T.min(group * product.pixels + i, pixels - 1)) for i in range(product.pixels)]
            starts = [let(f"start_{i}", place * length) if spec.direct else i * length for i, place in enumerate(places)]
            if not spec.direct:
                with loop("i", product.pixels) as i:
                    _gather(x, let("place", T.min(group * product.pixels + i, pixels - 1)), rows, i * length, s)
            offsets = widen_rows(product, rows, starts, pairs, length) if product.pairs else []
            with loop("columns", quotient(out_channels + (product.channels - 1), product.channels)) as columns:
                outs = [let(f"out_{j}", columns * product.channels + j) for j in range(product.channels)]
                added = [let(f"added_{j}", bias[out]) for j, out in enumerate(outs)]
                if product.pairs:
                    sums = pairs_block(product, pairs, offsets, weight, columns, added, length)
                else:
                    sums = block(product, rows, starts, weight, columns, added, length)
                for j, out in enumerate(outs):
                    with T.If(out < out_channels), T.Then():
                        factor, by = let("factor", multiplier[out]), let("by", shift[out])
                        for place, row in zip(places, sums, strict=True):
                            store(y, spec.codes.code(row[j], factor, by, s), place * out_channels + out)
    return builder.get()


def _gather(x: Any, place: Expression, rows: Any, start: Expression, s: dict[str, Expression]) -> None:
    """Emit the copy of the codes under an output pixel to ``rows`` from ``start`` on."""
    line_out = let("line_out", quotient(place, s["out_width"]))
    top = let("top", line_out * s["stride_y"] - s["pad_y"])
    left = let("left", (place - line_out * s["out_width"]) * s["stride_x"] - s["pad_x"])
    with loop("i", s["kernel_height"]) as i, loop("j", s["runs"]) as j:
        line, column = let("line", top + i * s["dilation_y"]), let("column", left + j * s["dilation_x"])
        to = let("to", start + (i * s["kernel_width"] + j * s["run"]) * s["channels"])
        first, end = let("first", T.max(0 - column, 0)), let("end", T.min(s["width"] - column, s["run"]))
        inside = let("inside", tirx.all(line >= 0, line < s["height"], first < end))
        with T.If(tirx.any(tirx.Not(inside), end - first < s["run"])), T.Then():
            T.evaluate(T.call_extern("void", "qc_fill", T.address_of(rows[to]), s["x_zero"], s["run"] * s["channels"]))
        with T.If(inside), T.Then():
            source = T.address_of(x[(line * s["width"] + column + first) * s["channels"]])
            target = T.address_of(rows[to + first * s["channels"]])
            T.evaluate(T.call_extern("void", "qc_copy", target, source, (end - first) * s["channels"]))

"""Depthwise convolutions a channel at a time: its codes are copied to a plane with borders, and its weights to registers.

The copy takes the zero point outside the image, so that no product is tested, and makes codes lie side by side that are ``channels`` apart
in the image (Lin et al., "MCUNet", NeurIPS 2020, section 3.2, copy a channel for the same reason). With ``pairs`` they become 16-bit
numbers and SMLAD takes two neighbours at once; without, they are multiplied one by one. A few columns of the result are made together and
share what they load. A tall image goes through the plane in bands of lines. A group of columns or a band past the end is moved back: it is
computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qcompile.backends.edge.kernels.builder import (
    Expression,
    array,
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
)
from qcompile.backends.edge.kernels.codes import Codes
from tvm import tirx
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]

SIZES = "height width channels out_height out_width stride_y pad_y pad_x x_zero pitch band"
PLANE_BYTES = 2048  # of a band of several lines
WORTH_WHOLE = 2  # how many times the bytes of a whole plane the result must have
MOST_COLUMNS = 5  # whose sums fit in registers
UNROLLED_LINES = 3  # of a kernel; more are a loop


@dataclass(frozen=True)
class Planes:
    """Which function.

    Attributes:
        bits: of a weight: 8, 4 or 2.
        signed: inputs are int8, or uint8.
        pairs: the processor multiplies pairs of 16-bit numbers.
        kernel_height: lines of the kernel.
        kernel_width: columns of the kernel.
        stride: between columns.
        columns: of the result, made together.
        codes: what is written.
    """

    bits: int
    signed: bool
    pairs: bool
    kernel_height: int
    kernel_width: int
    stride: int
    columns: int
    codes: Codes = field(default_factory=Codes)

    @property
    def name(self) -> str:
        signs = f"{'s' if self.signed else 'u'}8_{self.codes.name}"
        kernel = f"{self.kernel_height}x{self.kernel_width}_stride{self.stride}_{self.columns}"
        return f"depthwise_w{self.bits}_{signs}_{kernel}{'_pairs' * self.pairs}"

    @property
    def together(self) -> int:
        """Taps of one product."""
        return 2 if self.pairs else 1

    @property
    def plane_dtype(self) -> str:
        return "int16" if self.pairs else "int8" if self.signed else "uint8"

    @property
    def input_dtype(self) -> str:
        return "int8" if self.signed else "uint8"


def columns_together(out_width: int, most: int = MOST_COLUMNS) -> int:
    """Return how many columns leave the fewest to be computed twice; the more the better."""
    return min(range(1, min(most, out_width) + 1), key=lambda columns: (-out_width % columns if columns > 2 else out_width, -columns))


def plane_sizes(
    spec: Planes, out_height: int, out_width: int, width: int, channels: int, stride_y: int, pad_x: int
) -> tuple[int, int, int]:
    """Return the elements of a line of the plane, the lines of the result in a band, and the elements of the plane."""
    pitch = max((out_width - 1) * spec.stride + spec.kernel_width, pad_x + width)
    most = PLANE_BYTES // (pitch * (2 if spec.pairs else 1))
    band = min(out_height, max(1, (most - spec.kernel_height) // stride_y + 1))
    # A channel that is copied whole lets the result take the place of the image (``overlaps``), which saves more than the plane takes.
    whole = ((out_height - 1) * stride_y + spec.kernel_height) * pitch * (2 if spec.pairs else 1)
    band = out_height if WORTH_WHOLE * whole <= out_height * out_width * channels else band
    return pitch, band, ((band - 1) * stride_y + spec.kernel_height) * pitch + spec.together - 1  # the last pair ends behind it


def pack_channels(weight: Array, bits: int) -> Array:
    """Return codes int8 [channels, taps] as bytes int8 [channels, bytes], the first code in the highest bits."""
    channels, taps = weight.shape
    fields = 8 // bits
    codes = np.zeros((channels, -(-taps // fields), fields), np.uint8)
    codes.reshape(channels, -1)[:, :taps] = weight.astype(np.uint8) & ((1 << bits) - 1)
    shifted = [codes[:, :, f] << (8 - bits * (f + 1)) for f in range(fields)]
    return np.bitwise_or.reduce(shifted).astype(np.uint8).view(np.int8)


def planes(spec: Planes) -> tirx.PrimFunc:
    """Build ``f(x, weight, bias, multiplier, shift, sizes.., result.., y, plane)``.

    x [height, width, channels] codes; weight of ``pack_channels``; bias, multiplier int32, shift int8 [channels];
    y [out height, out width, channels]; plane: scratch of ``plane_sizes``.
    """
    with function(spec.name) as builder:
        x, weight = pointer("x", spec.input_dtype), pointer("weight", "int8")
        bias, multiplier, shift = pointer("bias", "int32"), pointer("multiplier", "int32"), pointer("shift", "int8")
        names = f"{SIZES} {spec.codes.numbers}"
        s = dict(zip(names.split(), numbers(names), strict=True))
        y, plane = pointer("y", spec.codes.dtype), pointer("plane", spec.plane_dtype)
        lines = let("lines", (s["band"] - 1) * s["stride_y"] + spec.kernel_height)
        with loop("i", lines * s["pitch"] + spec.together - 1) as i:
            store(plane, T.cast(s["x_zero"], spec.plane_dtype), i)
        with loop("c", s["channels"]) as c:
            taps = _load_taps(spec, weight, c)
            added, factor, by = let("added", bias[c]), let("factor", multiplier[c]), let("by", shift[c])
            with loop("part", quotient(s["out_height"] + s["band"] - 1, s["band"])) as part:
                first = let("first", T.min(part * s["band"], s["out_height"] - s["band"]))
                _copy_band(spec, x, plane, first * s["stride_y"] - s["pad_y"], lines, c, s)
                with loop("line", s["band"]) as line, loop("group", quotient(s["out_width"] + spec.columns - 1, spec.columns)) as group:
                    column = let("column", T.min(group * spec.columns, s["out_width"] - spec.columns))
                    start = let("start", line * s["stride_y"] * s["pitch"] + column * spec.stride)
                    sums = [cell(f"sum_{t}", added) for t in range(spec.columns)]
                    if spec.kernel_height <= UNROLLED_LINES:
                        for i in range(spec.kernel_height):
                            _line(spec, plane, start + i * s["pitch"], taps, i, sums)
                    else:
                        with loop("i", spec.kernel_height) as i:
                            _line(spec, plane, let("from", start + i * s["pitch"]), taps, i, sums)
                    out = let("out", ((first + line) * s["out_width"] + column) * s["channels"] + c)
                    for t, total in enumerate(sums):
                        store(y, spec.codes.code(total[0], factor, by, s), out + t * s["channels"])
    return builder.get()


def _load_taps(spec: Planes, weight: Any, c: Expression) -> Any:
    """Emit the loads of a channel's weights: int32, or uint32 pairs, [kernel height, kernel width / together]."""
    fields, width = 8 // spec.bits, spec.kernel_width
    parts = -(-width // spec.together)
    first = let("first_weight", c * -(-spec.kernel_height * width // fields))
    taps = array("taps", spec.kernel_height * parts, "uint32" if spec.pairs else "int32")

    def tap(i: int, j: int) -> Expression:
        byte = widen(weight[first + (i * width + j) // fields])
        if fields == 1:
            return byte
        top = external("qc_top_bits", byte, (i * width + j) % fields * spec.bits, spec.bits)
        return T.shift_right(top, T.int32(8 - spec.bits))

    for i in range(spec.kernel_height):
        for part in range(parts):
            j = part * spec.together
            value = tap(i, j)
            if spec.pairs:
                value = external("qc_pair", value, tap(i, j + 1) if j + 1 < width else 0, dtype="uint32")
            store(taps, value, i * parts + part)
    return taps


def _copy_band(spec: Planes, x: Any, plane: Any, top: Expression, lines: Expression, c: Expression, s: dict[str, Expression]) -> None:
    """Emit the copy of a channel of some lines to the plane, from line ``top`` of the image on."""
    with loop("i", lines) as i:
        line, to = let("line", top + i), let("to", i * s["pitch"] + s["pad_x"])
        with T.If(tirx.all(line >= 0, line < s["height"])):
            with T.Then():
                source = let("source", line * s["width"] * s["channels"] + c)
                with loop("j", s["width"]) as j:
                    store(plane, T.cast(x[source + j * s["channels"]], spec.plane_dtype), to + j)
            with T.Else(), loop("j", s["width"]) as j:
                store(plane, T.cast(s["x_zero"], spec.plane_dtype), to + j)


def _line(spec: Planes, plane: Any, start: Expression, taps: Any, i: Expression, sums: list[Any]) -> None:
    """Emit the products of line ``i`` of the kernel; what several columns read is loaded once."""
    parts = -(-spec.kernel_width // spec.together)
    weights = [let(f"tap_{part}", taps[i * parts + part]) for part in range(parts)]
    for offset in sorted({t * spec.stride + part * spec.together for t in range(spec.columns) for part in range(parts)}):
        if spec.pairs:
            value = let("pair", external("qc_load_word", T.address_of(plane[start + offset]), dtype="uint32"))
        else:
            value = let("code", widen(plane[start + offset]))
        for t, total in enumerate(sums):
            part, rest = divmod(offset - t * spec.stride, spec.together)
            if 0 <= part < parts and not rest:
                both = weights[part]
                store(total, external("qc_smlad", value, both, total[0]) if spec.pairs else total[0] + value * both, 0)

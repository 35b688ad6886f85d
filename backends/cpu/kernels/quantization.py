"""Codes from floats and back: static and per-token dynamic quantization, dequantization, rows of a quantized table.

All of it equals ``qcompile.formats.quantize`` bit for bit: IEEE division, round half to even, saturation, zero point added after rounding.
Tensors are flat [count] where one scale serves all, [rows, width] where each row (token) has its own.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.bfloat16 import narrowed, widened
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.code_sums import values_of
from qcompile.backends.cpu.kernels.isa import detect
from qcompile.backends.cpu.kernels.partials import Partials
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Index,
    argument,
    below,
    each_element,
    each_row,
    each_vector,
    function,
    load,
    load_part,
    ramp,
    serial_or_parallel,
    size,
    splat,
    store,
    store_row,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import ACTIVATIONS, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcompile.formats import Scheme
from qcompile.formats.quantize import SMALLEST_SCALE


def code_dtype(scheme: Scheme) -> str:
    """Return the dtype of one code, ``int8``, ``uint8`` or ``bfloat16``."""
    if not scheme.format.scaled:
        return "bfloat16"
    return "int8" if scheme.format.lowest < 0 else "uint8"


def code_range(scheme: Scheme) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    return int(scheme.format.lowest), int(scheme.format.highest)


class _Rounding:
    """Rounding to the codes of one scale and zero point, whose constants each task computes for itself."""

    def __init__(self, scale: Any, zero_point: Any, scheme: Scheme, isa: str | None) -> None:
        self.arguments, self.isa = (scale, zero_point, *code_range(scheme)), isa or detect()

    def begin(self) -> None:
        scale, zero_point, lowest, highest = self.arguments
        self.codes = CodeRounding(scale[0], zero_point[0], lowest, highest, isa=self.isa).codes


def quantize_static(scheme: Scheme, isa: str | None = None) -> tirx.PrimFunc:
    """Build ``f(x, scale, zero_point, codes)``: x float32 [count], scale float32 [1], zero_point int32 [1], codes int8 or uint8 [count].

    ``isa`` is a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``, by default this machine's.
    """
    with function("quantize_static") as builder:
        count = size("count")
        x, scale, zero = argument("x", (count,)), argument("scale", (1,)), argument("zero_point", (1,), "int32")
        codes = argument("codes", (count,), code_dtype(scheme))

        rounding = _Rounding(scale, zero, scheme, isa)

        def body(start: Index, mask: Any) -> None:
            code = rounding.codes(load(x, mask, start))
            store_row(codes, T.cast(code, f"{codes.dtype}x{LANES}"), mask, start)

        each_element(count, body, begin=rounding.begin)
    return builder.get()


def round_to_bfloat16() -> tirx.PrimFunc:
    """Build ``f(x, codes)``: x float32 [count], codes int16 [count], the bits of bfloat16."""
    with function("round_to_bfloat16") as builder:
        count = size("count")
        x, codes = argument("x", (count,)), argument("codes", (count,), "int16")
        each_element(count, lambda start, mask: store_row(codes, narrowed(load(x, mask, start)), mask, start))
    return builder.get()


def widen_bfloat16() -> tirx.PrimFunc:
    """Build ``f(codes, out)``: codes int16 [count], the bits of bfloat16, and out float32 [count]."""
    with function("widen_bfloat16") as builder:
        count = size("count")
        codes, out = argument("codes", (count,), "int16"), argument("out", (count,))
        each_element(count, lambda start, mask: store_row(out, widened(load(codes, mask, start)), mask, start))
    return builder.get()


def quantize_image(channels: int, pixels: int, scheme: Scheme, isa: str | None = None) -> tirx.PrimFunc:
    """Build ``f(x, scale, zero_point, codes)``: images float32 [batch, channels, pixels] to codes [batch, pixels, channels].

    scale float32 [1], zero_point int32 [1]. Sixteen pixels at a time; the last ones overlap those before.

    Raises:
        ValueError: there are not two to four channels, or fewer than sixteen pixels.
    """
    if not 2 <= channels <= 4 or pixels < LANES:
        raise ValueError(f"no kernel quantizes images of {channels} channels and {pixels} pixels")
    dtype, per_task = code_dtype(scheme), 512
    with function("quantize_image") as builder:
        batch = size("batch")
        x, scale = argument("x", (batch, channels, pixels)), argument("scale", (1,))
        zero, codes = argument("zero_point", (1,), "int32"), argument("codes", (batch, pixels, channels), dtype)
        flat = T.decl_buffer((batch * (pixels * channels),), dtype, data=codes.data)
        rounding, tasks = _Rounding(scale, zero, scheme, isa), -(-pixels // (per_task * LANES))

        def task(index: Index) -> None:
            rounding.begin()
            image, first = T.Bind(index // tasks), T.Bind(index % tasks * (per_task * LANES))
            with T.serial(T.min(-(-pixels // LANES) - index % tasks * per_task, per_task)) as i:
                start = T.Bind(T.min(first + i * LANES, pixels - LANES))
                whole = splat(T.int32(0))
                for channel in range(channels):
                    code = T.bitwise_and(rounding.codes(x[image, channel, ramp(start)]), splat(T.int32(255)))
                    whole = T.Bind(T.bitwise_or(whole, T.shift_left(code, splat(T.int32(8 * channel)))))
                parts = [pixel * 4 + channel for pixel in range(LANES) for channel in range(channels)]
                joined = tirx.Shuffle([T.reinterpret(f"{dtype}x{4 * LANES}", whole)], parts)
                store(flat, joined, ramp((image * pixels + start) * channels, channels * LANES))

        serial_or_parallel(batch * tasks, batch * (pixels * channels), task, 1 << 16)
    return builder.get()


def quantize_dynamic(width: int, scheme: Scheme, isa: str | None = None) -> tirx.PrimFunc:
    """Build ``f(x, codes, scale, zero_point)``: x float32 and codes [rows, width], scale float32 and zero_point int32 [rows].

    Each row (token) takes its scale from its own range, as ``choose_scale``; symmetric schemes write zero points of 0.

    Raises:
        ValueError: the format has no positive value to map the range to, or stored scales are not float32.
    """
    lowest, highest = code_range(scheme)
    if highest < 1 or scheme.scale_format != "f32":
        raise ValueError(f"no dynamic quantization kernel for '{scheme}'")
    with function("quantize_dynamic") as builder:
        rows = size("rows")
        x = argument("x", (rows, width))
        codes = argument("codes", (rows, width), code_dtype(scheme))
        scales, zeros = argument("scale", (rows,)), argument("zero_point", (rows,), "int32")

        def body(row: Index) -> None:
            scale, zero = _row_scale(x, row, width, scheme)
            store(scales, scale, row)
            store(zeros, zero, row)
            rounding = CodeRounding(scale, zero, lowest, highest, isa=isa or detect())

            def write(start: Index, mask: Any, slot: int) -> None:
                code = rounding.codes(load(x, mask, row, start))
                store_row(codes, T.cast(code, f"{codes.dtype}x{LANES}"), mask, row, start)

            each_vector(width, write)

        each_row(rows, width, body)
    return builder.get()


def _row_scale(x: Any, row: Index, width: int, scheme: Scheme) -> tuple[Any, Any]:
    """Emit the range of one row; return its scale and zero point (``choose_scale``, operation by operation)."""
    lowest, highest = code_range(scheme)
    low, high = Partials(), Partials()
    low.begin("fmin", 0.0)  # zero belongs to every affine range, and changes no symmetric one
    high.begin("fmax", 0.0)

    def widen(start: Index, mask: Any, slot: int) -> None:
        value = T.Bind(load(x, mask, row, start))
        low.take(value, slot)
        high.take(value, slot)

    each_vector(width, widen)
    bottom, top = T.Bind(low.result()), T.Bind(high.result())
    smallest = T.float32(SMALLEST_SCALE)
    if scheme.symmetric:
        return T.Bind(T.max(T.max(T.float32(0.0) - bottom, top) / T.float32(highest), smallest)), T.int32(0)
    scale = T.Bind(T.max(rounded(top - bottom) / T.float32(highest - lowest), smallest))
    zero = T.nearbyint(rounded(T.float32(lowest) - bottom / scale))
    return scale, T.Bind(T.cast(T.max(T.min(zero, T.float32(highest)), T.float32(lowest)), "int32"))


def dequantize(scheme: Scheme) -> tirx.PrimFunc:
    """Build ``f(codes, scale, zero_point, out)``: codes int8 or uint8 and out float32 [count], scale float32 and zero_point int32 [1]."""
    with function("dequantize") as builder:
        count = size("count")
        codes = argument("codes", (count,), code_dtype(scheme))
        scale, zero = argument("scale", (1,)), argument("zero_point", (1,), "int32")
        out = argument("out", (count,))

        def body(start: Index, mask: Any) -> None:
            value = T.cast(load(codes, mask, start), f"int32x{LANES}") - splat(zero[0])
            store_row(out, T.cast(value, f"float32x{LANES}") * splat(scale[0]), mask, start)

        each_element(count, body)
    return builder.get()


# ---- rows of a table ------------------------------------------------------------------------------------------------------


def embedding(width: int, bits: int, *, signed: bool = True, scales: str = "row", group: int = 0, affine: bool = False) -> tirx.PrimFunc:
    """Build ``f(indices, weight[, scale][, zero_point], out)``: rows of a table, dequantized.

    indices int64 [count], negative ones count from the end as in PyTorch; out float32 [count, width]. weight, in the packing of
    ``qcompile.formats.packing``: 8 bits int8 or uint8 [rows, width], 1 to 7 bits uint8 [rows, ceil(width * bits / 8)], 16 or 32 bits for a
    table [rows, width] without scales, int16 (the bits of bfloat16) or float32. ``scales``: "tensor" for [1], "row" for [rows], "group" for
    [rows, ceil(width / group)]; zero_point int32 of the same shape where ``affine``. An index outside the table reads its nearest row.

    Raises:
        ValueError: a group is no multiple of 16.
    """
    if scales == "group" and group % LANES:
        raise ValueError(f"groups of {group} do not hold whole vectors of {LANES}")
    with function("embedding") as builder:
        count, rows = size("count"), size("rows")
        indices = argument("indices", (count,), "int64")
        dtype = {8: "int8" if signed else "uint8", 16: "int16", 32: "float32"}.get(bits, "uint8")
        weight = argument("weight", (rows, width if bits >= 8 else -(-width * bits // 8)), dtype)
        shape = {"tensor": (1,), "row": (rows,), "group": (rows, -(-width // group) if group else 1)}[scales]
        scale = argument("scale", shape) if bits <= 8 else None
        zero = argument("zero_point", shape, "int32") if affine else None
        out = argument("out", (count, width))

        def body(i: Index) -> None:
            wrapped = T.Bind(indices[i] + tirx.Select(indices[i] < T.int64(0), rows, T.int64(0)))
            row = T.Bind(T.max(T.min(wrapped, rows - 1), T.int64(0)))

            def write(start: Index, mask: Any, slot: int) -> None:
                if scale is None:
                    value = load(weight, mask, row, start)
                    store_row(out, widened(value) if bits == 16 else value, mask, i, start)
                    return
                where = {"tensor": (0,), "row": (row,), "group": (row, start // group if group else 0)}[scales]
                value = _unpacked(weight, row, start, mask, bits, signed, width)
                value = value if zero is None else value - splat(zero[where])
                store_row(out, T.cast(value, f"float32x{LANES}") * splat(scale[where]), mask, i, start)

            each_vector(width, write)

        each_row(count, width, body)
    return builder.get()


def _unpacked(weight: Any, row: Index, start: Index, mask: Any, bits: int, signed: bool, width: int) -> Any:
    """Return int32 lanes with sixteen codes of a packed row from element ``start``; sixteen codes fill 2 * bits whole bytes."""
    if bits == 8:
        return T.cast(load(weight, mask, row, start), f"int32x{LANES}")
    total, used = 2 * bits, -(-(width % LANES) * bits // 8)
    whole = weight[row, ramp(start * bits // 8, total)] if mask is None else load_part(
        weight, below(used, lanes=total), row, ramp(start * bits // 8, total), lanes=total)  # fmt: skip
    packed = T.Bind(whole)
    first = [lane * bits // 8 for lane in range(LANES)]
    second = [min(byte + 1, total - 1) for byte in first]
    copies = [packed] * -(-LANES // total)  # a shuffle may not return more lanes than it is given
    low, high = (T.cast(tirx.Shuffle(copies, bytes), f"int32x{LANES}") for bytes in (first, second))
    pair = T.bitwise_or(low, T.shift_left(high, splat(T.int32(8))))
    # A code may straddle two bytes: bring its top bit to bit 31, then shift down with or without the sign.
    up = tirx.Shuffle([T.int32(32 - bits - lane * bits % 8) for lane in range(LANES)], list(range(LANES)))
    top = T.shift_left(pair, up)
    if signed:
        return T.shift_right(top, splat(T.int32(32 - bits)))
    return T.bitwise_and(T.shift_right(top, splat(T.int32(32 - bits))), splat(T.int32((1 << bits) - 1)))


# ---- sums of quantized tensors --------------------------------------------------------------------------------------------


def quantized_add(
    a: str, b: str, out: Scheme | None, activation: str = "none", isa: str | None = None, *, values: bool = False
) -> tirx.PrimFunc:
    """Build ``f(a, a_scale, a_zero_point, b, b_scale, b_zero_point, out_scale, out_zero_point, values, codes)`` (dialect ``qc.add``).

    a, b and the results are flat [count] of one layout; the first two have the dtypes named ("int8" or "uint8"), codes that of ``out``.
    Scales float32 [1], zero points int32 [1]. Dequantize both, add, activate: the float32 ``values``, only where they are asked for;
    quantize: the codes, with their scale and zero point, only where there is a scheme ``out``.
    """
    with function("quantized_add") as builder:
        count = size("count")
        terms = []
        for name, dtype in (("a", a), ("b", b)):
            codes, scale = argument(name, (count,), dtype), argument(f"{name}_scale", (1,))
            terms.append((codes, scale, argument(f"{name}_zero_point", (1,), "int32")))
        grid = (argument("out_scale", (1,)), argument("out_zero_point", (1,), "int32")) if out is not None else None
        sums = argument("values", (count,)) if values else None
        result = argument("codes", (count,), code_dtype(out)) if out is not None else None
        rounding = _Rounding(*grid, out, isa) if grid is not None and out is not None else None

        def body(start: Index, mask: Any) -> None:
            first, second = (values_of(load(codes, mask, start), scale[0], zero[0]) for codes, scale, zero in terms)
            total = T.Bind(rounded(ACTIVATIONS[activation](first + second)))
            if sums is not None:
                store_row(sums, total, mask, start)
            if rounding is not None:
                store_row(result, T.cast(rounding.codes(total), f"{result.dtype}x{LANES}"), mask, start)

        each_element(count, body, begin=rounding.begin if rounding is not None else lambda: None)
    return builder.get()

"""Rows of x as a linear kernel reads them: 4-byte words in whole chunks, padded with zero, their bytes with or without sign."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.cpu.kernels.bfloat16 import widened
from qcompile.backends.cpu.kernels.matmul_panel import Arguments
from qcompile.backends.cpu.kernels.matmul_spec import CHUNK, Linear
from qcompile.backends.cpu.kernels.vector import Expr, hold, spread
from tvm.script.ir_builder import tirx as T


@dataclass
class PackedInput:
    """A local copy of some rows of x.

    Attributes:
        buffer: int32 words of four codes or two bfloat16, or float32.
        chunk_stride: words from one chunk of a row to its next.
        signed: codes are kept as signed bytes (uint8 ones less 128); else as unsigned bytes (int8 ones plus 128).
    """

    buffer: Expr
    chunk_stride: int
    signed: bool = False

    def codes(self, spec: Linear) -> int:
        """Return the elements of x in a word."""
        return 1 if str(self.buffer.dtype) == "float32" else spec.word_codes


def added_zero(spec: Linear, *, signed: bool) -> int:
    """Return what packing adds to the codes of x, and so to their zero point, for them to be bytes of that kind."""
    if not spec.integer or (spec.x == "int8") == signed:
        return 0
    return -128 if signed else 128


def pack_row(spec: Linear, arguments: Arguments, packed: PackedInput, row: Expr, start: Expr) -> None:
    """Copy one row of x to ``packed`` from word ``start`` on."""
    size = packed.codes(spec)
    words = spec.code_words * spec.word_codes // size
    whole, tail = divmod(spec.in_features, CHUNK * size)
    row = hold(T.cast(row, "int64"))
    with T.serial(0, whole) as chunk:
        value = arguments.x[row, T.ramp(chunk * (CHUNK * size), 1, CHUNK * size)]
        T.buffer_store(packed.buffer, _as_words(spec, value, packed), [T.ramp(start + chunk * packed.chunk_stride, 1, CHUNK)])
    if words * size != spec.in_features:
        zero = spread(T.cast(0, packed.buffer.dtype), CHUNK)
        for chunk in range(whole, -(-words // CHUNK)):
            T.buffer_store(packed.buffer, zero, [T.ramp(start + chunk * packed.chunk_stride, 1, CHUNK)])
    if tail:
        _pack_tail(spec, arguments, packed, row, start + whole * packed.chunk_stride)


def _as_words(spec: Linear, value: Expr, packed: PackedInput) -> Expr:
    """Return one vector of x as 16 words; adding 128 to a byte, or taking it off, flips its top bit."""
    if packed.codes(spec) == 1:
        return widened(value) if spec.x == "bfloat16" else value
    words = T.reinterpret("int32x16", value)
    if added_zero(spec, signed=packed.signed):
        words = T.bitwise_xor(words, T.broadcast(T.reinterpret("int32", T.uint32(0x80808080)), CHUNK))
    return words


def _pack_tail(spec: Linear, arguments: Arguments, packed: PackedInput, row: Expr, start: Expr) -> None:
    """Copy the last elements of a row, fewer than a vector, and fill the last word with zero codes."""
    size = packed.codes(spec)
    first, count = spec.in_features // (CHUNK * size) * (CHUNK * size), spec.in_features % (CHUNK * size)
    if size == 1:
        with T.serial(0, count) as i:
            value = arguments.x[row, first + i]
            T.buffer_store(packed.buffer, widened(value) if spec.x == "bfloat16" else value, [start + i])
        return
    if size == 2:
        with T.serial(0, -(-count // 2)) as i:
            low = T.bitwise_and(T.cast(arguments.x[row, first + i * 2], "int32"), T.int32(0xFFFF))
            T.buffer_store(packed.buffer, low, [start + i])
        with T.serial(0, count // 2) as i:
            high = T.shift_left(T.cast(arguments.x[row, first + i * 2 + 1], "int32"), T.int32(16))
            T.buffer_store(packed.buffer, T.bitwise_or(packed.buffer[start + i], high), [start + i])
        return
    flip = T.uint8(128 if added_zero(spec, signed=packed.signed) else 0)

    def word(base: Expr, filled: int) -> Expr:
        parts = [T.bitwise_xor(T.reinterpret("uint8", arguments.x[row, base + j]), flip) for j in range(filled)]
        shifted = [T.shift_left(T.cast(part, "int32"), T.int32(8 * j)) for j, part in enumerate(parts)]
        total = shifted[0]
        for part in shifted[1:]:
            total = T.bitwise_or(total, part)
        return total

    with T.serial(0, count // 4) as i:
        T.buffer_store(packed.buffer, word(first + i * 4, 4), [start + i])
    if count % 4:
        T.buffer_store(packed.buffer, word(first + count // 4 * 4, count % 4), [start + count // 4])

"""Products of bytes for every instruction set: sixteen sums of four products each, exact.

x comes as sixteen words of four bytes, unsigned or signed as ``InstructionSet.signed_x`` says; weights are always signed. No set may
saturate: the sum of four products (up to 4 * 255 * 128) and the running sum are int32, and a running sum wraps as two's complement.

| set | instructions for 16 sums of 4 products |
| --- | --- |
| amx, avx512bf16, avx512vnni | 1 vpdpbusd |
| avxvnni | 2 vpdpbusd |
| avx512 | 2 vpmaddwd, 2 vpaddd |
| avx2 | 4 vpmaddwd, 4 vpaddd |
| i8mm | 4 usdot |
| sve | 2 usdot of 256 bits |
| dotprod | 4 sdot |
| neon | 8 smull, 8 saddlp, 4 addp, 4 add |

``vpmaddubsw`` would halve the work of avx2 and avx512, but it saturates: 255 * 127 * 2 does not fit int16. So even and odd bytes are
widened to int16, where ``vpmaddwd`` is exact; widening weights is shared by all rows of a register block.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.vector import spread
from tvm import tirx
from tvm.script.ir_builder import tirx as T

Expr = Any
_LANES = 16


def add_byte_products(isa: str, total: Expr, x: Expr, weight: Expr) -> Expr:
    """Return total + the four products of each lane: total int32x16, x int32x16 (words of four bytes), weight int8x64."""
    if isa in (instruction_sets.AVX512_VNNI, instruction_sets.AVX512_BF16, instruction_sets.AMX):
        return _call("llvm.x86.avx512.vpdpbusd.512", "int32x16", total, T.reinterpret("uint8x64", x), weight)
    if isa == instruction_sets.AVX512:
        return total + _by_words(x, weight, _LANES)
    if isa == instruction_sets.PORTABLE:
        return _plain(total, x, weight)
    width = instruction_sets.SETS[isa].register_lanes
    part = _PARTS[isa]
    return _join([part(_cut(total, i, width), _cut(x, i, width), _cut(weight, i, 4 * width)) for i in range(_LANES // width)])


def signed_byte(word: Expr, j: int) -> Expr:
    """Return byte j of each int32 lane with its sign."""
    return T.shift_right(T.shift_left(word, spread(T.int32(24 - 8 * j), _LANES)), spread(T.int32(24), _LANES))


def _call(name: str, dtype: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(name), *arguments)


def _cut(vector: Expr, index: int, lanes: int) -> Expr:
    """Return part ``index`` of a vector: a register of its own, at no cost."""
    return tirx.Shuffle([vector], list(range(index * lanes, (index + 1) * lanes)))


def _join(parts: list[Expr]) -> Expr:
    """Return vectors one behind another."""
    while len(parts) > 1:
        lanes = 2 * int(parts[0].ty.dtype.lanes)
        parts = [tirx.Shuffle(parts[i : i + 2], list(range(lanes))) for i in range(0, len(parts), 2)]
    return parts[0]


def _by_words(x: Expr, weight: Expr, lanes: int) -> Expr:
    """Return the four products of each of 8 or 16 lanes, by two exact sums of int16 pairs: bytes 0 and 2, bytes 1 and 3."""
    words = 2 * lanes
    x16, w16 = T.reinterpret(f"uint16x{words}", x), T.reinterpret(f"int16x{words}", weight)
    eight, eight_unsigned = spread(T.int16(8), words), spread(T.uint16(8), words)
    even = (T.bitwise_and(x16, spread(T.uint16(255), words)), T.shift_right(T.shift_left(w16, eight), eight))
    odd = (T.shift_right(x16, eight_unsigned), T.shift_right(w16, eight))
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == _LANES else "llvm.x86.avx2.pmadd.wd"
    sums = [_call(name, f"int32x{lanes}", T.reinterpret(f"int16x{words}", a), b) for a, b in (even, odd)]
    return sums[0] + sums[1]


def _avx2(total: Expr, x: Expr, weight: Expr) -> Expr:
    return total + _by_words(x, weight, 8)


def _avx_vnni(total: Expr, x: Expr, weight: Expr) -> Expr:
    return _call("llvm.x86.avx512.vpdpbusd.256", "int32x8", total, T.reinterpret("uint8x32", x), weight)


def _i8mm(total: Expr, x: Expr, weight: Expr) -> Expr:
    return _call("llvm.aarch64.neon.usdot", "int32x4", total, T.reinterpret("int8x16", x), weight)


def _sve(total: Expr, x: Expr, weight: Expr) -> Expr:
    """A vector of 256 bits is one scalable register there (``InstructionSet.vector_bits``), so putting it in and out is no instruction."""

    def scalable(vector: Expr, dtype: str, lanes: int) -> Expr:
        nothing = tirx.Broadcast(tirx.const(0, dtype), lanes * T.vscale())
        return _call("llvm.vector.insert", f"{dtype}xvscalex{lanes}", nothing, vector, T.int64(0))

    given = (scalable(total, "int32", 4), scalable(T.reinterpret("int8x32", x), "int8", 16), scalable(weight, "int8", 16))
    return _call("llvm.vector.extract", "int32x8", _call("llvm.aarch64.sve.usdot", "int32xvscalex4", *given), T.int64(0))


def _dotprod(total: Expr, x: Expr, weight: Expr) -> Expr:
    return _call("llvm.aarch64.neon.sdot", "int32x4", total, T.reinterpret("int8x16", x), weight)


def _neon(total: Expr, x: Expr, weight: Expr) -> Expr:
    """Eight products are int16 (at most 128 * 128), pairs of them int32: two of -128 * -128 would not fit int16."""
    x = T.reinterpret("int8x16", x)
    products = [_call("llvm.aarch64.neon.smull", "int16x8", _cut(x, i, 8), _cut(weight, i, 8)) for i in (0, 1)]
    pairs = [_call("llvm.aarch64.neon.saddlp", "int32x4", product) for product in products]
    return total + _call("llvm.aarch64.neon.addp", "int32x4", *pairs)


def _plain(total: Expr, x: Expr, weight: Expr) -> Expr:
    weight = T.reinterpret("int32x16", weight)
    for j in range(4):
        unsigned = T.bitwise_and(T.shift_right(x, spread(T.int32(8 * j), _LANES)), spread(T.int32(255), _LANES))
        total = total + unsigned * signed_byte(weight, j)
    return total


_PARTS = {
    instruction_sets.AVX2: _avx2,
    instruction_sets.AVX_VNNI: _avx_vnni,
    instruction_sets.SVE: _sve,
    instruction_sets.I8MM: _i8mm,
    instruction_sets.DOTPROD: _dotprod,
    instruction_sets.NEON: _neon,
}

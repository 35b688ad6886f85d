"""bfloat16 in vectors: rounding to it, halves of words as float32, and products of pairs.

TVM lowers bfloat16 to float32 before LLVM sees a call, so bits are passed as int16, two in a 32-bit word, and the instruction that
multiplies pairs (``vdpbf16ps``) cannot be called as an intrinsic. It is reached by a few lines of LLVM's own language, imported beside
the kernel: a function of int32 vectors that LLVM puts in the place of its call. Which processors it serves is
``InstructionSet.pairs``; elsewhere two halves of a word become float32 by a shift and a mask, and two multiply-adds follow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from qcompile.backends.cpu.kernels.vector import Expr, lanes_of, spread, vector_type
from tvm.tirx.script.builder import ir as T

from qcompile.formats.bfloat16 import NAN

_NAME = "qcompile_dpbf16ps"
_SOURCE = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @{_NAME}(<16 x float> %total, <16 x i32> %x, <16 x i32> %weight) alwaysinline nounwind {{
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %weight to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %total, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}}
"""


def stored_dtype(dtype: str) -> str:
    """Return the dtype that values of a dtype have in memory: bfloat16 are the bits of int16."""
    return "int16" if dtype == "bfloat16" else dtype


def imported(wanted: bool) -> AbstractContextManager[Any]:
    """Return the frame of a kernel's body that calls ``add_pairs``; of another, one that does nothing."""
    return T.attr(T.int32(0), "pragma_import_llvm", _SOURCE) if wanted else nullcontext()


def add_pairs(total: Expr, x: Expr, weight: Expr) -> Expr:
    """Return float32x16 ``total`` plus both products of each pair; x and weight int32x16, two bfloat16 in each word.

    Each of the two sums is rounded to nearest by itself, the second product's first; denormal numbers count as zero.
    """
    return T.call_extern("float32x16", _NAME, total, x, weight)


def half(words: Expr, e: int) -> Expr:
    """Return the first or second bfloat16 of each int32 lane as float32."""
    lanes = lanes_of(words)
    bits = T.bitwise_and(words, spread(T.int32(-0x10000), lanes)) if e else T.shift_left(words, spread(T.int32(16), lanes))
    return T.reinterpret(vector_type("float32", lanes), bits)


def widened(bits: Expr) -> Expr:
    """Return int16 lanes, the bits of bfloat16, as float32."""
    return half(T.cast(bits, vector_type("int32", lanes_of(bits))), 0)


def narrowed(y: Expr) -> Expr:
    """Return float32 lanes rounded to bfloat16 as ``qcompile.formats.bfloat16`` says, as int16 lanes."""
    lanes = lanes_of(y)

    def all_lanes(value: int) -> Expr:
        return spread(T.int32(value), lanes)

    bits = T.Bind(T.reinterpret(vector_type("int32", lanes), y))
    odd = T.bitwise_and(T.shift_right(bits, all_lanes(16)), all_lanes(1))
    upper = T.Bind(T.shift_right(bits + odd + all_lanes(0x7FFF), all_lanes(16)))
    small = T.bitwise_and(upper, all_lanes(0x7F80)) < all_lanes(0x80)
    flushed = T.Select(small, T.bitwise_and(upper, all_lanes(-0x8000)), upper)
    is_nan = T.bitwise_and(bits, all_lanes(0x7FFFFFFF)) > all_lanes(0x7F800000)
    return T.cast(T.Select(is_nan, all_lanes(NAN), flushed), vector_type("int16", lanes))

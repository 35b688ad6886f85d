"""Products of pairs of bfloat16 in vectors (``vdpbf16ps``).

TVM lowers bfloat16 to float32 before LLVM sees a call, so the instruction cannot be called as an intrinsic. It is reached by a few lines of
LLVM's own language, imported beside the kernel: a function of int32 vectors that LLVM puts in the place of its call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from qcompile.backends.cpu.kernels.registers import Expression
from tvm.tirx.script.builder import ir as T

FEATURE = "avx512bf16"  # LLVM's name of what a processor must have

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


def imported() -> AbstractContextManager[Any]:
    """Return the frame of a kernel's body that calls ``add_pairs``."""
    frame: AbstractContextManager[Any] = T.attr(T.int32(0), "pragma_import_llvm", _SOURCE)
    return frame


def add_pairs(total: Expression, x: Expression, weight: Expression) -> Expression:
    """Return float32x16 ``total`` plus both products of each pair; x and weight int32x16, two bfloat16 in each word.

    Each of the two sums is rounded to nearest by itself, the second product's first; denormal numbers count as zero.
    """
    return T.call_extern("float32x16", _NAME, total, x, weight)

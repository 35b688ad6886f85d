"""Sixty-four codes at once, where a register holds 64 bytes: four vectors of float32 become one of bytes, bit for bit as ``CodeRounding``.

Packing with saturation narrows two registers into one and clamps for nothing, but works within 128-bit lanes: the bytes 4 k to 4 k + 3 of
lane L are those of vector k, elements 4 L to 4 L + 3. ``unpacked_order`` gives the order that a kernel keeps its elements in for the bytes
to come out in theirs.

Activations that clamp commute with rounding to codes, which is monotone, so they become bounds of the codes: two instructions for 64.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.registers import LANES, splat
from qcompile.backends.cpu.kernels.vector import ACTIVATIONS, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

BYTES = 64
VECTORS = BYTES // LANES
_CLAMPS = {"none": (False, False), "relu": (True, False), "relu6": (True, True)}  # whether zero and six are bounds
_NEAREST = 4  # rounding to the nearest integer, ties to even, and no other


def unpacked_order() -> list[int]:
    """Return which byte each of the 4 x 16 elements becomes."""
    return [16 * lane + 4 * vector + i for vector in range(VECTORS) for lane in range(4) for i in range(4)]


def by_vector(packed: Any) -> Any:
    """Return packed bytes vector after vector: sixteen of the first, then sixteen of the second."""
    words = T.reinterpret(f"float32x{LANES}", packed)
    turned = tirx.Shuffle([words], [4 * lane + vector for vector in range(VECTORS) for lane in range(4)])
    return T.reinterpret(packed.ty.dtype, rounded(turned))  # the fence: else LLVM permutes once for each part that is read


class ByteCodes:
    """Turns floats into the codes of one scale and zero point after an activation; its scalars are computed where it is constructed.

    Args:
        scale, zero_point: scalar expressions, float32 and int32.
        dtype, lowest, highest: of the codes.
        activation: a name of ``vector.ACTIVATIONS``.
        isa: an instruction set whose registers hold 64 bytes.
        easy: the scale is known to be (``code_rounding.is_easy``).
    """

    def __init__(
        self, scale: Any, zero_point: Any, dtype: str, code_range: tuple[int, int], activation: str, isa: str, *, easy: bool
    ) -> None:
        self._rounding = CodeRounding(scale, zero_point, *code_range, isa=isa, easy=easy)
        self._dtype = dtype
        name = activation.removeprefix("add_")
        from_zero, to_six = _CLAMPS.get(name, (False, False))
        self._activation = ACTIVATIONS["none" if name in _CLAMPS else name]
        self._low = T.Bind(self._rounding.codes(T.float32(0.0))) if from_zero else T.int32(code_range[0])
        self._high = T.Bind(self._rounding.codes(T.float32(6.0))) if to_six else T.int32(code_range[1])
        self._zero = T.Bind(T.cast(zero_point, "int16"))

    def bytes(self, values: list[Any]) -> Any:
        """Return 64 codes of four vectors float32x16, in packed order; emits statements."""
        whole = [T.Bind(self._integers(self._activation(value))) for value in values]
        low_words, high_words = (T.Bind(_add_saturated(_pack_words(whole[i], whole[i + 1]), splat(self._zero, 2 * LANES))) for i in (0, 2))
        codes = T.Bind(_pack_bytes(low_words, high_words, self._dtype))
        low, high = (splat(T.cast(bound, self._dtype), BYTES) for bound in (self._low, self._high))
        return T.Bind(T.min(T.max(codes, low), high))

    def _integers(self, y: Any) -> Any:
        """Return int32 lanes with the quotient rounded; below the lowest code it may be anything that is still below."""
        y = T.Bind(T.min(splat(self._rounding.high), y))  # beyond int32 the conversion gives the lowest integer, whichever the sign
        quotient = self._rounding.quotient(y)
        nothing, all_lanes = splat(T.int32(0)), T.int16(-1)
        return _call("llvm.x86.avx512.mask.cvtps2dq.512", f"int32x{LANES}", quotient, nothing, all_lanes, T.int32(_NEAREST))


def _call(name: str, dtype: str, *arguments: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(name), *arguments)


def _pack_words(low: Any, high: Any) -> Any:
    return _call("llvm.x86.avx512.packssdw.512", f"int16x{2 * LANES}", low, high)


def _add_saturated(a: Any, b: Any) -> Any:
    return _call("llvm.sadd.sat", a.ty.dtype, a, b)


def _pack_bytes(low: Any, high: Any, dtype: str) -> Any:
    name = "llvm.x86.avx512.packsswb.512" if dtype == "int8" else "llvm.x86.avx512.packuswb.512"
    return T.reinterpret(f"{dtype}x{BYTES}", _call(name, f"int8x{BYTES}", low, high))

"""Float to code, bit for bit ``clamp(round_half_even(y / scale) + zero_point)``, without a division for each element.

A 512-bit division costs as much as a product over 128 int8 inputs, so codes at the end of a small convolution would cost more than
the convolution. The quotient is built from the correctly rounded reciprocal r of the scale, computed once:

    q0 = y r,   q1 = q0 + (y - s q0) r,   q2 = q1 + (y - s q1) r        (each step one fused multiply-add)

q1 is within one unit in the last place of y / s, and then q2 is y / s correctly rounded (Markstein 1990, theorem on the final step of
division). It needs scales of 2**-100 to 2**100: below, residuals underflow; ``qcompile.formats.quantize`` makes none smaller.

It takes two operations where the scale allows (``is_easy``): with the reciprocal in two floats, r + d = 1 / s to 47 bits,

    q = fma(y, r, y d)       z = y r + y d before its rounding is y / s (1 + e), |e| < 3 * 2**-48

Rounded to float32, z and y / s differ only if a midpoint m of two floats lies between them, and rounded to integers only if one of the two
is a tie h = k / 2, k odd. Codes have |h| < 2**10. Let s = b 2**E with b of 24 bits, y = a 2**F, and M = k 2**t +- 1 the midpoint as an
integer of 25 bits, so t >= 15. Then a 2**G = b M + D for an integer D with |D| <= b M 3 * 2**-48 < 6, and G >= 23. So b = +-D modulo 2**15:
no scale whose last 15 bits are further than 6 from zero is ever rounded otherwise. Powers of two are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels.isa import SETS
from qcompile.backends.cpu.kernels.vector import lanes_of, rounded, spread, vector_type
from tvm.tirx.script.builder import ir as T

_ROUNDING = 1.5 * 2.0**23  # as in ``vector.round_to_int``
_ROUNDING_BITS = 0x4B400000
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}
_LOW_BITS, _NEAR = 15, 6


def is_easy(scale: float) -> bool:
    """Return whether the quick quotient gives the right code of every float at this scale."""
    bits = int(np.float32(scale).view(np.uint32)) & ((1 << 23) - 1)
    low = bits & ((1 << _LOW_BITS) - 1)
    return bits == 0 or _NEAR < low < (1 << _LOW_BITS) - _NEAR


class CodeRounding:
    """The scalars that turn floats into codes of one scale and zero point, computed where it is constructed.

    Args:
        scale, zero_point: scalar expressions, float32 and int32.
        lowest, highest: range of the codes.
        isa: sets without a fused multiply-add divide.
        easy: the scale is known to be (``is_easy``).
    """

    def __init__(self, scale: Any, zero_point: Any, lowest: int, highest: int, isa: str, *, easy: bool = False) -> None:
        self.fused = SETS[isa].fused
        self.scale = T.Bind(scale)
        self.reciprocal = T.Bind(T.float32(1.0) / self.scale) if self.fused else None
        self._rest: Any = None
        if easy and self.fused:
            self._rest = T.Bind(rounded(_fma(T.float32(0.0) - self.scale, self.reciprocal, T.float32(1.0)) * self.reciprocal))
        # Division is monotone and gives back low and high at these bounds, so clamping y before it clamps the codes.
        self.low = T.Bind(rounded(T.cast(T.int32(lowest) - zero_point, "float32") * self.scale))
        self.high = T.Bind(rounded(T.cast(T.int32(highest) - zero_point, "float32") * self.scale))
        self.offset = T.Bind(zero_point - T.int32(_ROUNDING_BITS))

    def codes(self, y: Any) -> Any:
        """Return int32 lanes with the codes of float32 lanes y; emits statements."""
        lanes = lanes_of(y)
        return T.reinterpret(vector_type("int32", lanes), self._shifted(y)) + spread(self.offset, lanes)

    def values(self, y: Any) -> Any:
        """Return float32 lanes with what the codes of y stand for, (code - zero point) * scale; emits statements."""
        lanes = lanes_of(y)
        return rounded(rounded(self._shifted(y) - spread(T.float32(_ROUNDING), lanes)) * spread(self.scale, lanes))

    def _shifted(self, y: Any) -> Any:
        """Return the quotient held to the codes and rounded to an integer, with the integer in the low bits of the mantissa."""
        lanes = lanes_of(y)
        y = T.Bind(T.max(spread(self.low, lanes), T.min(spread(self.high, lanes), y)))
        return rounded(self.quotient(y) + spread(T.float32(_ROUNDING), lanes))

    def quotient(self, y: Any) -> Any:
        """Return y / scale, correctly rounded, or where the scale is easy what rounds to the same integer; emits statements."""
        lanes = lanes_of(y)
        if not self.fused:
            return y / spread(self.scale, lanes)
        if self._rest is not None:
            return _fma(y, spread(self.reciprocal, lanes), rounded(y * spread(self._rest, lanes)))
        reciprocal, negative = spread(self.reciprocal, lanes), spread(T.float32(0.0) - self.scale, lanes)
        quotient = T.Bind(rounded(y * reciprocal))
        for _ in range(2):
            residual = _fma(negative, quotient, y)
            quotient = T.Bind(_fma(residual, reciprocal, quotient))
        return rounded(quotient)


def _fma(a: Any, b: Any, c: Any) -> Any:
    return T.call_llvm_pure_intrin(c.ty.dtype, "llvm.fma", a, b, c)

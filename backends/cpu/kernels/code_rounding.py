"""Float to code, bit for bit ``clamp(round_half_even(y / scale) + zero_point)``, without a division for each element.

A 512-bit division costs as much as a product over 128 int8 inputs, so codes at the end of a small convolution would cost more than
the convolution. The quotient is built from the correctly rounded reciprocal r of the scale, computed once:

    q0 = y r,   q1 = q0 + (y - s q0) r,   q2 = q1 + (y - s q1) r        (each step one fused multiply-add)

q1 is within one unit in the last place of y / s, and then q2 is y / s correctly rounded (Markstein 1990, theorem on the final step of
division). It needs scales of 2**-100 to 2**100: below, residuals underflow; ``qcompile.formats.quantize`` makes none smaller.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.isa import SETS
from qcompile.backends.cpu.kernels.vector import lanes_of, rounded, spread, vector_type
from tvm.tirx.script.builder import ir as T

_ROUNDING = 1.5 * 2.0**23  # as in ``vector.round_to_int``
_ROUNDING_BITS = 0x4B400000
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


class CodeRounding:
    """The scalars that turn floats into codes of one scale and zero point, computed where it is constructed.

    Args:
        scale, zero_point: scalar expressions, float32 and int32.
        lowest, highest: range of the codes.
        isa: sets without a fused multiply-add divide.
    """

    def __init__(self, scale: Any, zero_point: Any, lowest: int, highest: int, isa: str) -> None:
        self.fused = SETS[isa].fused
        self.scale = T.Bind(scale)
        self.reciprocal = T.Bind(T.float32(1.0) / self.scale) if self.fused else None
        # Division is monotone and gives back low and high at these bounds, so clamping y before it clamps the codes.
        self.low = T.Bind(rounded(T.cast(T.int32(lowest) - zero_point, "float32") * self.scale))
        self.high = T.Bind(rounded(T.cast(T.int32(highest) - zero_point, "float32") * self.scale))
        self.offset = T.Bind(zero_point - T.int32(_ROUNDING_BITS))

    def codes(self, y: Any) -> Any:
        """Return int32 lanes with the codes of float32 lanes y; emits statements."""
        lanes = lanes_of(y)
        y = T.Bind(T.max(spread(self.low, lanes), T.min(spread(self.high, lanes), y)))
        bits = T.reinterpret(vector_type("int32", lanes), rounded(self.quotient(y) + spread(T.float32(_ROUNDING), lanes)))
        return bits + spread(self.offset, lanes)

    def quotient(self, y: Any) -> Any:
        """Return y / scale, correctly rounded; emits statements."""
        lanes = lanes_of(y)
        if not self.fused:
            return y / spread(self.scale, lanes)
        reciprocal, negative = spread(self.reciprocal, lanes), spread(T.float32(0.0) - self.scale, lanes)
        quotient = T.Bind(rounded(y * reciprocal))
        for _ in range(2):
            residual = _fma(negative, quotient, y)
            quotient = T.Bind(_fma(residual, reciprocal, quotient))
        return rounded(quotient)


def _fma(a: Any, b: Any, c: Any) -> Any:
    return T.call_llvm_pure_intrin(c.ty.dtype, "llvm.fma", a, b, c)

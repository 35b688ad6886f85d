"""From int32 sums to codes: the rule of ``requantize`` in ``qcompile.graph.fixed_point``, the zero point, the bounds."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.edge.kernels.builder import Expression, clamp, external, widen
from tvm.tirx.script.builder import ir as T

LEAST_QUICK_SHIFT = 33


@dataclass(frozen=True)
class Codes:
    """What a kernel writes.

    Attributes:
        signed: int8, or uint8.
        quick: all shifts are over 32, so that the upper word of the product is enough, and the bounds are those of the type, so that
            processors have an instruction for them. Shifts are then given less 33, and ``rest``, twice the zero point plus one, stands for
            zero point and bounds.
    """

    signed: bool = True
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{'s' if self.signed else 'u'}8{'_quick' * self.quick}"

    @property
    def dtype(self) -> str:
        return "int8" if self.signed else "uint8"

    @property
    def numbers(self) -> str:
        """The names of the arguments that ``code`` takes."""
        return "rest" if self.quick else "out_zero low high"

    def code(self, total: Expression, multiplier: Expression, shift: Expression, sizes: dict[str, Expression]) -> Expression:
        """Return the code of a sum; ``sizes`` holds ``numbers``."""
        if self.quick:
            scaled = external("qc_scale", total, multiplier, widen(shift), sizes["rest"])
            return T.cast(external(f"qc_saturate_{'s' if self.signed else 'u'}8", scaled), self.dtype)
        rounded = external("qc_requantize", total, multiplier, widen(shift)) + sizes["out_zero"]
        return T.cast(clamp(rounded, sizes["low"], sizes["high"]), self.dtype)

"""Sums of quantized tensors (dialect ``qc.add``): what a kernel does with its codes and others of their shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.backends.cpu.kernels.code_rounding import RANGES
from qcompile.backends.cpu.kernels.registers import splat
from qcompile.backends.cpu.kernels.vector import ACTIVATIONS, lanes_of, rounded, vector_type
from tvm.tirx.script.builder import ir as T


@dataclass(frozen=True)
class CodeSum:
    """What becomes of codes that a kernel computes: other codes of the same shape are added to them.

    Attributes:
        addend: dtype of the other codes, ``int8`` or ``uint8``; they have a scale and a zero point of their own.
        activation: of the sum, a name of ``vector.ACTIVATIONS``.
        output: dtype of the sum's codes, with a third scale and zero point; None where nothing reads codes.
        lowest, highest: range of these codes, by default that of their dtype.
        values: the float32 sum is a result too, before the codes.
    """

    addend: str
    activation: str = "none"
    output: str | None = None
    lowest: int | None = None
    highest: int | None = None
    values: bool = False

    def __post_init__(self) -> None:
        if self.addend not in RANGES or self.activation not in ACTIVATIONS or self.output not in (None, *RANGES):
            raise ValueError(f"{self} names an unknown dtype or activation")
        if self.output is None and not self.values:
            raise ValueError(f"{self} has no result")

    @property
    def range(self) -> tuple[int, int]:
        """The lowest and highest code."""
        low, high = RANGES[str(self.output)]
        return low if self.lowest is None else self.lowest, high if self.highest is None else self.highest


def values_of(codes: Any, scale: Any, zero_point: Any) -> Any:
    """Return float32 lanes (code - zero_point) * scale from lanes of codes; scale and zero point are scalars."""
    lanes = lanes_of(codes)
    centered = T.cast(codes, vector_type("int32", lanes)) - splat(zero_point, lanes)
    return rounded(T.cast(centered, vector_type("float32", lanes)) * splat(scale, lanes))

"""What a matrix product does to a finished sum: scales, bias, activation, residual, codes, in the dialect's order."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.cpu.kernels.bfloat16 import stored_dtype
from qcompile.backends.cpu.kernels.vector import ACTIVATIONS, Expr, lanes_of, rounded, to_codes, vector_type
from tvm.script.ir_builder import tirx as T

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum of a matrix product.

    Attributes:
        bias: dtype of the bias, ``float32`` or ``int32`` (added to the integer sum), or ``none``.
        activation: a name of ``qcompile.graph.dialect.ACTIVATIONS``; those starting with ``add_`` act after the residual.
        residual: a float32 tensor of the result's shape is added.
        output: dtype of the result: ``float32``, ``bfloat16``, or ``int8`` or ``uint8`` for codes (one scale, one int32 zero point).
        lowest, highest: range of the codes, by default that of their dtype.
    """

    bias: str = "none"
    activation: str = "none"
    residual: bool = False
    output: str = "float32"
    lowest: int | None = None
    highest: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bias", self.bias, ("none", "float32", "int32")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("output", self.output, ("float32", "bfloat16", *_RANGES)),
        ):
            if value not in known:
                raise ValueError(f"epilogue {name} is '{value}'; known are {', '.join(known)}")

    @property
    def codes(self) -> bool:
        """Whether the result is codes of a scale."""
        return self.output in _RANGES

    @property
    def dtype(self) -> str:
        """The dtype of the result in memory."""
        return stored_dtype(self.output)

    @property
    def range(self) -> tuple[int, int]:
        """The lowest and highest code."""
        low, high = _RANGES[self.output]
        return low if self.lowest is None else self.lowest, high if self.highest is None else self.highest

    def apply(self, y: Expr, bias: Expr | None, residual: Expr | None, out_scale: Expr | None, out_zero: Expr | None) -> Expr:
        """Return lanes of ``output``'s dtype from float32 lanes y that hold the scaled sum.

        ``bias`` is float32 lanes (an int32 bias was added to the sum before), ``residual`` float32 lanes, ``out_scale`` and
        ``out_zero`` scalars.
        """
        activation, late = ACTIVATIONS[self.activation], self.activation.startswith("add_")
        if bias is not None:
            y = rounded(y) + bias
        if not late:
            y = activation(y)
        if residual is not None:
            y = rounded(y) + residual
        if late:
            y = activation(y)
        if not self.codes:
            return y
        codes = to_codes(y, out_scale, out_zero, *self.range)
        return T.cast(codes, vector_type(self.output, lanes_of(codes)))

"""Keys and values of attention as they lie in memory: floats, or codes with scales, as a quantized cache keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.backends.cpu.kernels.registers import LANES, Expression, Index, argument, below, load_part, ramp, splat
from tvm import tirx
from tvm.tirx.script.builder import ir as T


@dataclass(frozen=True)
class Stored:
    """How rows of a cache hold codes.

    Attributes:
        bits: 8, or 4: two codes in a byte, the first one in its low half.
        signed: two's complement codes.
        per_head: a scale for each token and head; else one for each token.
        affine: there are zero points, int32, of the shape of the scales.
    """

    bits: int = 8
    signed: bool = True
    per_head: bool = True
    affine: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of the memory."""
        return "int8" if self.signed and self.bits == 8 else "uint8"


class Rows:
    """The argument ``name`` [batch, keys, heads * d] in float32, or in codes, ``heads * d * bits / 8`` bytes of a row.

    Its scales ``{name}_scale`` float32 [batch, keys, heads or 1], and zero points, are declared apart: they are later arguments.
    """

    def __init__(self, name: str, sizes: tuple[Index, Index], heads: int, d: int, stored: Stored | None) -> None:
        self._name, self._sizes, self._heads, self._d, self.stored = name, sizes, heads, d, stored
        if stored and d % LANES:
            raise ValueError(f"codes of {d} channels of a head are not whole vectors")
        width = heads * d * (stored.bits if stored else 8) // 8
        self._data = argument(name, (*sizes, width), stored.dtype if stored else "float32")
        self._scale: Any = None
        self._zero: Any = None

    def declare_scales(self) -> None:
        """Declare the arguments of scales and zero points, if there are any."""
        if self.stored is None:
            return
        shape = (*self._sizes, self._heads if self.stored.per_head else 1)
        self._scale = argument(f"{self._name}_scale", shape)
        self._zero = argument(f"{self._name}_zero_point", shape, "int32") if self.stored.affine else None

    def scalar(self, b: Index, key: Index, head: Index, c: Index) -> Expression:
        """Return one element of float rows."""
        return self._data[b, key, head * self._d + c]

    def scale(self, b: Index, key: Index, head: Index) -> Expression:
        """Return what a row of a head is to be multiplied by; 1 for floats."""
        return T.float32(1.0) if self._scale is None else self._scale[self._place(b, key, head)]

    def zero(self, b: Index, key: Index, head: Index) -> Expression | None:
        """Return what is to be subtracted of the codes that ``vector`` gives, float32, or None."""
        if self.stored is None:
            return None
        raised = 8.0 if self.stored.signed and self.stored.bits == 4 else 0.0  # vector gives such codes raised by 8
        if self._zero is None:
            return T.float32(raised) if raised else None
        return T.cast(self._zero[self._place(b, key, head)], "float32") + T.float32(raised)

    def vector(self, b: Index, key: Index, head: Index, c: Index, width: int) -> Expression:
        """Return sixteen channels of a head from channel ``c`` on, neither scaled nor less the zero point, float32."""
        start = head * self._d + c
        if self.stored is None:
            whole = width == LANES
            return self._data[b, key, ramp(start)] if whole else load_part(self._data, below(width), b, key, ramp(start))
        if self.stored.bits == 8:
            return T.cast(self._data[b, key, ramp(start)], f"float32x{LANES}")
        half = LANES // 2
        pairs = T.Bind(self._data[b, key, ramp(start // 2, half)])
        low, high = pairs & splat(T.uint8(15), half), pairs >> splat(T.uint8(4), half)
        codes = tirx.Shuffle([low, high], [place for i in range(half) for place in (i, half + i)])
        codes = codes ^ splat(T.uint8(8)) if self.stored.signed else codes
        return T.cast(codes, f"float32x{LANES}")

    def _place(self, b: Index, key: Index, head: Index) -> tuple[Index, Index, Index]:
        assert self.stored is not None
        return b, key, head if self.stored.per_head else T.int64(0)

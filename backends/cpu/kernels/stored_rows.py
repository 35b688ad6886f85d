"""Keys and values of attention as they lie in memory: floats, or codes with scales, as a quantized cache keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.backends.cpu.kernels.registers import LANES, Expression, Index, argument, below, load_part, ramp, splat
from qcompile.backends.cpu.kernels.vector import rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

VECTORS = 256  # in a table: a code is one byte


@dataclass(frozen=True)
class Stored:
    """How rows of a cache hold codes.

    Attributes:
        bits: 2 to 8, end to end, least significant bit first.
        signed: two's complement codes.
        per_head: a scale for each token and head; else one for each token.
        affine: there are zero points, int32, of the shape of the scales.
        turned: the codes are those of keys before rotary positions, which turn the first so many channels of each head.
        coupled: so many channels, 2, 4 or 8, share a code of a byte, a place in a table of vectors; 0: each has a code of its own.
    """

    bits: int = 8
    signed: bool = True
    per_head: bool = True
    affine: bool = False
    turned: int = 0
    coupled: int = 0

    @property
    def dtype(self) -> str:
        """The dtype of the memory."""
        return "int8" if self.signed and self.bits == 8 else "uint8"

    def why_not(self, d: int) -> str:
        """Return why heads of d channels cannot be read, or nothing."""
        if self.coupled and LANES % self.coupled:
            return f"runs of {self.coupled} channels do not divide a vector"
        if d % LANES:
            return f"codes of {d} channels of a head are not whole vectors"
        return f"pairs of {self.turned} turned channels are not whole vectors apart" if self.turned % (2 * LANES) else ""


class Rows:
    """The argument ``name`` [batch, keys, heads * d] in float32, or in codes, ``heads * d * bits / 8`` bytes of a row.

    Codes of coupled channels are ``heads * d / coupled`` bytes of a row, with ``{name}_table`` [heads * d / coupled, 256, coupled] float32.
    Its scales ``{name}_scale`` float32 [batch, keys, heads or 1], and zero points, are declared apart: they are later arguments. After
    them stand ``{name}_cos`` and ``{name}_sin`` [1, at least keys, turned], where the rows are to be turned.
    """

    def __init__(self, name: str, sizes: tuple[Index, Index], heads: int, d: int, stored: Stored | None) -> None:
        self._name, self._sizes, self._heads, self._d, self.stored = name, sizes, heads, d, stored
        if stored and (reason := stored.why_not(d)):
            raise ValueError(reason)
        width = heads * d * (stored.bits if stored else 8) // 8 // ((stored and stored.coupled) or 1)
        self.data = argument(name, (*sizes, width), stored.dtype if stored else "float32")
        self._table: Any = None
        self._scale: Any = None
        self._zero: Any = None
        self._angles: tuple[Any, ...] = ()

    def declare_scales(self) -> None:
        """Declare the arguments that follow where there are codes: scales and zero points, or the table of vectors; angles."""
        if self.stored is None:
            return
        shape = (*self._sizes, self._heads if self.stored.per_head else 1)
        if coupled := self.stored.coupled:
            self._table = argument(f"{self._name}_table", (self._heads * self._d // coupled, VECTORS, coupled))
        else:
            self._scale = argument(f"{self._name}_scale", shape)
            self._zero = argument(f"{self._name}_zero_point", shape, "int32") if self.stored.affine else None
        if self.stored.turned:
            angles = (1, self._sizes[1], self.stored.turned)
            self._angles = tuple(argument(f"{self._name}_{part}", angles) for part in ("cos", "sin"))

    def scalar(self, b: Index, key: Index, head: Index, c: Index) -> Expression:
        """Return one element of float rows."""
        return self.data[b, key, head * self._d + c]

    def scale(self, b: Index, key: Index, head: Index) -> Expression:
        """Return what a row of a head is to be multiplied by; 1 for floats."""
        return T.float32(1.0) if self._scale is None else self._scale[self._place(b, key, head)]

    def zero(self, b: Index, key: Index, head: Index) -> Expression | None:
        """Return what is to be subtracted of what ``vector`` gives, float32, or None."""
        return None if self.stored is None or self.stored.turned else self._zero_of_codes(b, key, head)

    def vector(self, b: Index, key: Index, head: Index, c: int, width: int) -> Expression:
        """Return sixteen channels of a head from channel ``c`` on, neither scaled nor less the zero point, float32."""
        if self.stored is None:
            start, whole = head * self._d + c, width == LANES
            return self.data[b, key, ramp(start)] if whole else load_part(self.data, below(width), b, key, ramp(start))
        return self._turned(b, key, head, c) if self.stored.turned else self._codes(b, key, head, c)

    def _turned(self, b: Index, key: Index, head: Index, c: int) -> Expression:
        """Return channels less the zero point, turned by the angles of their key: the zero point is not the same for both of a pair."""
        assert self.stored is not None
        zero, turned = self._zero_of_codes(b, key, head), self.stored.turned

        def centered(channel: int) -> Expression:
            codes = self._codes(b, key, head, channel)
            return codes if zero is None else codes - splat(zero)

        if c >= turned:
            return centered(c)
        cos, sin = (angle[0, key, ramp(c)] for angle in self._angles)
        other = centered(c + turned // 2) if c < turned // 2 else centered(c - turned // 2)
        product = rounded(other * sin)
        return centered(c) * cos - product if c < turned // 2 else centered(c) * cos + product

    def _zero_of_codes(self, b: Index, key: Index, head: Index) -> Expression | None:
        """Return the zero point of what ``_codes`` gives."""
        assert self.stored is not None
        # Signed codes of less than a byte come raised, so that none is below zero.
        raised = float(1 << (self.stored.bits - 1)) if self.stored.signed and self.stored.bits < 8 else 0.0
        if self._zero is None:
            return T.float32(raised) if raised else None
        return T.cast(self._zero[self._place(b, key, head)], "float32") + T.float32(raised)

    def _codes(self, b: Index, key: Index, head: Index, c: int) -> Expression:
        """Return sixteen codes as float32; sixteen codes of b bits are 2 b bytes, of which each lane takes the one or two it lies in."""
        assert self.stored is not None
        bits = self.stored.bits
        if self.stored.coupled:
            return self._vectors(b, key, head * self._d + c, self.stored.coupled)
        if bits == 8:
            return T.cast(self.data[b, key, ramp(head * self._d + c)], f"float32x{LANES}")
        chunk = T.Bind(self.data[b, key, ramp((head * self._d + c) * bits // 8, 2 * bits)])
        places = [lane * bits // 8 for lane in range(LANES)]
        chunks = [chunk] * -(-LANES // (2 * bits))  # a shuffle gives no more lanes than it takes
        word = T.cast(tirx.Shuffle(chunks, places), f"uint32x{LANES}")
        if 8 % bits:
            later = tirx.Shuffle(chunks, [min(place + 1, 2 * bits - 1) for place in places])
            word = word | (T.cast(later, f"uint32x{LANES}") << splat(T.uint32(8)))
        shifts = T.ramp(T.uint32(0), T.uint32(bits), LANES) & splat(T.uint32(7))
        codes = (word >> shifts) & splat(T.uint32((1 << bits) - 1))
        codes = codes ^ splat(T.uint32(1 << (bits - 1))) if self.stored.signed else codes
        return T.cast(T.reinterpret(f"int32x{LANES}", codes), f"float32x{LANES}")

    def _vectors(self, b: Index, key: Index, channel: Index, coupled: int) -> Expression:
        """Return sixteen channels from the vectors that their codes name; ``coupled`` floats lie side by side."""
        first = channel // coupled
        runs = [first + i for i in range(LANES // coupled)]
        parts = [T.Bind(self._table[run, T.cast(self.data[b, key, run], "int64"), ramp(0, coupled)]) for run in runs]
        return tirx.Shuffle(parts, list(range(LANES)))

    def _place(self, b: Index, key: Index, head: Index) -> tuple[Index, Index, Index]:
        assert self.stored is not None
        return b, key, head if self.stored.per_head else T.int64(0)

"""Narrow codes of a weight, as they come from packed byte planes: whole bytes in a register."""

from __future__ import annotations

from collections.abc import Callable

from qcompile.backends.cpu.kernels.lookup import byte_lookup, float_lookup
from qcompile.backends.cpu.kernels.matmul_spec import TRITS, Linear
from qcompile.backends.cpu.kernels.vector import Expr, rounded, spread
from tvm.script.ir_builder import tirx as T


def load_planes(spec: Linear, weight: Expr, column_block: Expr, step: Expr, j: int) -> list[list[Expr]]:
    """Return the packed vectors of one step of words for vector j of the columns, plane after plane."""
    planes, position = [], 0
    for width in spec.planes:
        count = spec.step * width // 8
        spots = [T.ramp((position + v) * spec.columns * 4 + j * 64, 1, 64) for v in range(count)]
        planes.append([T.Bind(T.reinterpret("uint8x64", weight[column_block, step, spot])) for spot in spots])
        position += count
    return planes


def step_codes(spec: Linear, planes: list[list[Expr]]) -> list[Expr]:
    """Return the stored codes of every word of a step as bytes."""
    if spec.ternary:
        return [_digit(q) for q in ternary_remainders(planes)[:-1]]
    return [_word_codes(spec, planes, w) for w in range(spec.step)]


def ternary_remainders(planes: list[list[Expr]]) -> list[Expr]:
    """Return six vectors of bytes q, q[i + 1] = 3 q[i] mod 256: what passes 256 is the code of word i, plus one.

    The compiler must not see through them: it would multiply by 9, 27, .. instead, and there is no product of bytes.
    """
    found = [planes[0][0]]
    for _ in range(TRITS):
        q = found[-1]
        hidden = rounded(T.reinterpret("float32x16", q + q + q))
        found.append(T.Bind(T.reinterpret("uint8x64", hidden)))
    return found


def _digit(q: Expr) -> Expr:
    """Return 3 q / 256 rounded down: how many of 86 and 171 a byte reaches."""
    one, none = spread(T.uint8(1), 64), spread(T.uint8(0), 64)
    high = T.Select(q >= spread(T.uint8(171), 64), spread(T.uint8(2), 64), one)
    return T.Bind(T.Select(q >= spread(T.uint8(86), 64), high, none))


def _word_codes(spec: Linear, planes: list[list[Expr]], w: int) -> Expr:
    """Return the stored codes of word w of a step as bytes, put together from its planes."""
    code, low = None, 0
    for width, vectors in zip(spec.planes, planes, strict=True):
        each = 8 // width
        part, shift = vectors[w // each], w % each * width
        if shift:
            part = T.shift_right(part, spread(T.uint8(shift), 64))
        if shift + width < 8:
            part = T.bitwise_and(part, spread(T.uint8((1 << width) - 1), 64))
        if low:
            part = T.shift_left(part, spread(T.uint8(low), 64))
        code, low = part if code is None else T.bitwise_or(code, part), low + width
    return code


def make_lookup(spec: Linear, table: Expr | None, *, raised: bool = False) -> Callable[[Expr], Expr] | None:
    """Return what codes mean by the layer's table, bytes for bytes or floats for the low bits of 32-bit lanes; None where it has none.

    ``raised``: bytes get 128 added, to be without sign.
    """
    if not spec.codebook:
        return None
    return byte_lookup(spec.isa, table, 0, 0, raised=raised) if spec.integer else float_lookup(spec.isa, table, 0, 0)

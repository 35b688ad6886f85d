"""Narrow codes of a weight, as they come from packed byte planes: whole bytes in a register."""

from __future__ import annotations

from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.vector import Expr, spread
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


def word_codes(spec: Linear, planes: list[list[Expr]], w: int) -> Expr:
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

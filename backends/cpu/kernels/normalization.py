"""Layer norm and RMS norm over the last axis, with the additions around them: a residual before, codes after.

Two passes over a row that lies in the first-level cache: mean, then the mean square of the differences (no cancellation as in
E[x**2] - E[x]**2), then the result. Float order is free here; the codes are the dialect's ``quantize`` of the float32 that is returned,
bit for bit.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.bfloat16 import narrowed, stored_dtype
from qcompile.backends.cpu.kernels.code_rounding import RANGES, CodeRounding
from qcompile.backends.cpu.kernels.isa import detect
from qcompile.backends.cpu.kernels.partials import SLOTS, Partials
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Index,
    argument,
    each_row,
    each_vector,
    function,
    load,
    local,
    ramp,
    size,
    splat,
    store,
    store_row,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def layer_norm(
    width: int, epsilon: float, *, affine: bool = True, rms: bool = False, residual: bool = False, codes: str = "", total: bool = False,
    isa: str | None = None,
) -> tirx.PrimFunc:  # fmt: skip
    """Build ``f(x[, residual][, weight[, bias]][, scale, zero_point], out[, codes][, total])``.

    x, residual, out float32 [rows, width]; weight and bias float32 [width], both where ``affine`` (``rms`` has a weight only).
    ``codes`` is "", "int8" or "uint8": then also codes [rows, width] of out with scale float32 [1] and zero_point int32 [1]; or
    "bfloat16", which has neither.
    ``total`` asks for x + residual [rows, width] as another result (the residual stream of pre-norm blocks).

        out = (s - mean(s)) / sqrt(mean((s - mean(s))**2) + epsilon) * weight + bias,   s = x + residual
        out = s / sqrt(mean(s**2) + epsilon) * weight                                   with ``rms``
    """
    with function("rms_norm" if rms else "layer_norm") as builder:
        norm = _Norm(width, epsilon, affine, rms, residual, codes, total)
        each_row(norm.rows, width, norm.row, begin=lambda: norm.begin(codes, isa or detect()), threshold=1 << 15)
    return builder.get()


class _Norm:
    """The arguments of one normalization and the statements of a row."""

    def __init__(self, width: int, epsilon: float, affine: bool, rms: bool, residual: bool, codes: str, total: bool) -> None:
        self.width, self.epsilon, self.rms = width, epsilon, rms
        self.rounding: CodeRounding | None = None
        self.values: Any = None
        self.rows = size("rows")
        shape = (self.rows, width)
        self.x = argument("x", shape)
        self.residual = argument("residual", shape) if residual else None
        self.weight = argument("weight", (width,)) if affine else None
        self.bias = argument("bias", (width,)) if affine and not rms else None
        self.scale = argument("scale", (1,)) if codes in RANGES else None
        self.zero_point = argument("zero_point", (1,), "int32") if codes in RANGES else None
        self.out = argument("out", shape)
        self.codes = argument("codes", shape, stored_dtype(codes)) if codes else None
        self.total = argument("total", shape) if total else None

    def begin(self, codes: str, isa: str) -> None:
        """Compute and allocate what all rows of a task share."""
        self.values = local(-(-self.width // LANES) * LANES)
        if codes in RANGES:
            self.rounding = CodeRounding(self.scale[0], self.zero_point[0], *RANGES[codes], isa=isa)

    def row(self, row: Index) -> None:
        """Normalize one row."""
        values, sums = self.values, Partials()

        def read(start: Index, mask: Any, slot: int) -> None:
            value = load(self.x, mask, row, start)
            if self.residual is not None:
                value = value + load(self.residual, mask, row, start)
            value = T.Bind(value)
            store(values, value, ramp(start))
            if self.total is not None:
                store_row(self.total, value, mask, row, start)
            sums.take(value * value if self.rms else value, slot)

        sums.begin("fadd", 0.0)
        each_vector(self.width, read, SLOTS)
        mean = T.Bind(sums.result() / T.float32(self.width))
        if not self.rms:
            sums.begin("fadd", 0.0)

            def spread(start: Index, mask: Any, slot: int) -> None:
                difference = T.Bind(values[ramp(start)] - splat(mean))
                square = difference * difference
                sums.take(square if mask is None else tirx.Select(mask, square, splat(0.0)), slot)

            each_vector(self.width, spread, SLOTS)
        square = sums.result() / T.float32(self.width) if not self.rms else mean
        factor = T.Bind(T.float32(1.0) / T.sqrt(square + T.float32(self.epsilon)))

        def write(start: Index, mask: Any, slot: int) -> None:
            value = values[ramp(start)]
            value = (value if self.rms else value - splat(mean)) * splat(factor)
            if self.weight is not None:
                value = value * load(self.weight, mask, start)
            if self.bias is not None:
                value = value + load(self.bias, mask, start)
            value = T.Bind(rounded(value))
            store_row(self.out, value, mask, row, start)
            if self.codes is not None:
                code = T.cast(self.rounding.codes(value), f"{self.codes.dtype}x{LANES}") if self.rounding is not None else narrowed(value)
                store_row(self.codes, code, mask, row, start)

        each_vector(self.width, write, SLOTS)

"""Linear layers whose weights are 4-bit indices into tables of sixteen values, one table for all, for each column or for each group.

A shuffle inside a register looks sixty-four bytes up at once, and takes one table for all of them. So lanes are elements of k of one
column (in ``matmul`` they are columns): any column, and any group of k, may have a table of its own, and x is read as it lies. Sums of the
lanes are added at the end of a row. Indices pass through registers only, so the same code serves one row, which reads them from memory,
and many.

int8 values: y = (float32(acc) * scale[n]) * x_scale, acc = sum over k of (x - x_zero) * table[index], exact. float32 values: y = the sum
over groups of scale[n, group] times the sum over k of x * table[index], products and sums in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.byte_products import add_byte_products
from qcompile.backends.cpu.kernels.lookup import LEVELS, byte_lookup, float_lookup
from qcompile.backends.cpu.kernels.matmul_rows import ceildiv, dispatch
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Expression,
    Index,
    argument,
    below,
    fold,
    function,
    load_part,
    local,
    ramp,
    size,
    splat,
    store,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import hold, register, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]

STEP = 128  # indices of one column in a vector of 64 bytes
COLUMNS = 8  # whose indices lie side by side, one stream for few rows
_TASK_ROWS = 64
_TOP_BITS = 0x80808080


@dataclass(frozen=True)
class CodebookLinear:
    """A linear layer with looked-up weights, x [m, in_features] with any m.

    Attributes:
        in_features, out_features: k and n.
        x: dtype of the input: ``uint8`` or ``int8`` codes with one scale (values are int8), or ``float32`` (values are float32).
        x_affine: the codes have a zero point (an argument); without, it is 0.
        tables: ``tensor``, ``channel`` or ``group``: what has a table of its own.
        group: inputs that share a table, and a scale where values are float32: a multiple of 128; 0: the whole row.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``.
        x_per_token: scale and zero point of the codes are [m], not [1].
    """

    in_features: int
    out_features: int
    x: str = "uint8"
    x_affine: bool = False
    tables: str = "tensor"
    group: int = 0
    isa: str = field(default_factory=instruction_sets.detect)
    x_per_token: bool = False

    def __post_init__(self) -> None:
        instruction_sets.check(self.isa)
        if self.x not in ("float32", "int8", "uint8") or self.tables not in ("tensor", "channel", "group"):
            raise ValueError(f"no kernel for x as '{self.x}' and a table for each '{self.tables}'")
        if self.group % STEP or (self.tables == "group" and not self.group):
            raise ValueError(f"groups of {self.group} are no multiple of {STEP}")

    @property
    def integer(self) -> bool:
        return self.x != "float32"

    @property
    def x_shift(self) -> int:
        """What is added to the codes of x for them to be bytes of the kind that products take: 0, or 128 either way."""
        signed = instruction_sets.SETS[self.isa].signed_x
        return 0 if not self.integer or signed == (self.x == "int8") else -128 if signed else 128

    @property
    def steps(self) -> int:
        return -(-self.in_features // STEP)

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group) if self.group else 1

    @property
    def padded_columns(self) -> int:
        return -(-self.out_features // COLUMNS) * COLUMNS

    @property
    def table_shape(self) -> tuple[int, int, int]:
        return (1 if self.tables == "tensor" else self.padded_columns, self.groups if self.tables == "group" else 1, LEVELS)

    @property
    def scale_shape(self) -> tuple[int, int]:
        return (self.padded_columns, 1 if self.integer else self.groups)

    @property
    def totals(self) -> int:
        """Sums of sixteen lanes that the registers hold beside what a product needs."""
        return {1: 16, 2: 2, 4: 4}[min(instruction_sets.SETS[self.isa].parts, 4)]


def pack_codebook(spec: CodebookLinear, indices: Array, tables: Array, scale: Array) -> list[Array]:
    """Return the constants of ``codebook_linear(spec)`` in its argument order: indices, tables, sums (int8 values only), scale.

    indices uint8 [n, k] below 16; tables int8 or float32 [1 or n, 1 or groups, 16]; scale float32 [n], or [n, groups] of float32 values.
    Sixty-four bytes hold 128 indices of a column. Of bytes, index b is the low half of byte b and index 64 + b its high half; of floats,
    index 16 j + i is the j-th half byte of the i-th 32-bit lane.
    """
    n, k = indices.shape
    padded = np.zeros((spec.padded_columns, spec.steps * STEP), np.uint8)
    padded[:n, :k] = indices
    if spec.integer:
        halves = padded.reshape(-1, spec.steps, 2, 64)
        packed = halves[:, :, 0] | halves[:, :, 1] << 4
    else:
        lanes = padded.reshape(-1, spec.steps, 4, 2, LANES)
        packed = (lanes[:, :, :, 0] | lanes[:, :, :, 1] << 4).transpose(0, 1, 3, 2).reshape(-1, spec.steps, 64)
    blocks = packed.reshape(-1, COLUMNS, spec.steps, 64).transpose(0, 2, 1, 3).reshape(-1, spec.steps, COLUMNS * 64)

    def columns(values: Array, shape: tuple[int, ...]) -> Array:
        result = np.zeros(shape, values.dtype)
        result[: len(values)] = values.reshape(len(values), *shape[1:])
        return result

    constants = [np.ascontiguousarray(blocks), columns(tables, spec.table_shape)]
    if spec.integer:
        constants.append(columns(decode(spec, indices, tables).sum(1, dtype=np.int32), (spec.padded_columns,)))
    return [*constants, columns(scale.astype(np.float32), spec.scale_shape)]


def decode(spec: CodebookLinear, indices: Array, tables: Array) -> Array:
    """Return the values [n, k] that the indices mean."""
    n, k = indices.shape
    column, group = np.arange(n)[:, None], np.arange(k)[None] // (spec.group or k)
    return tables[column if spec.tables != "tensor" else 0, group if spec.tables == "group" else 0, indices]


def codebook_linear(spec: CodebookLinear) -> tirx.PrimFunc:
    """Build ``f(x[, x_scale][, x_zero_point], indices, tables[, sums], scale, out)``.

    x [m, k]; x_scale float32 and x_zero_point int32, [1] or [m], where x has them; the arrays of ``pack_codebook``; out float32 [m, n].
    """
    with function("codebook_linear") as builder:
        product = _Product(spec)
        row_parts = (product.m + _TASK_ROWS - 1) // _TASK_ROWS
        parts = min(instruction_sets.thread_count(), spec.padded_columns // COLUMNS)
        with T.parallel(row_parts * parts) as index:
            product.task(index, parts)
    return builder.get()


class _Product:
    """The arguments of one function and the statements of its tasks."""

    def __init__(self, spec: CodebookLinear) -> None:
        self.spec, self.m = spec, size("m")
        self.dtype = "int32" if spec.integer else "float32"
        self.x = argument("x", (self.m, spec.in_features), spec.x)
        parameters = (self.m if spec.x_per_token else 1,)
        self.x_scale = argument("x_scale", parameters) if spec.integer else None
        self.x_zero = argument("x_zero_point", parameters, "int32") if spec.x_affine else None
        blocks = spec.padded_columns // COLUMNS
        self.indices = argument("indices", (blocks, spec.steps, COLUMNS * 64), "uint8")
        self.tables = argument("tables", spec.table_shape, "int8" if spec.integer else "float32")
        self.sums = argument("sums", (spec.padded_columns,), "int32") if spec.integer else None
        self.scale = argument("scale", spec.scale_shape)
        self.out = argument("out", (self.m, spec.out_features))
        self.words = spec.steps * (STEP // 4 if spec.integer else STEP)  # of four bytes, of a packed row

    def task(self, index: Index, parts: int) -> None:
        """Compute some rows of some columns."""
        blocks = self.spec.padded_columns // COLUMNS
        per_part = -(-blocks // parts)
        self.first_row = hold(T.cast(T.truncdiv(index, parts), "int64") * _TASK_ROWS)
        self.rows = hold(T.min(T.int64(_TASK_ROWS), self.m - self.first_row))
        self.packed = local(_TASK_ROWS * self.words, self.dtype)
        self._pack()
        most = self.spec.totals
        variants = tuple(count for count in (1, 2, 4, 8) if count <= most)
        first = hold(T.cast(T.truncmod(index, parts), "int64") * per_part)
        with T.serial(T.max(T.min(T.int64(per_part), blocks - first), T.int64(0))) as b:
            block = hold(first + b)
            with T.serial(ceildiv(self.rows, T.int64(variants[-1]))) as row_block:
                row = hold(row_block * variants[-1])
                dispatch(hold(self.rows - row), variants, lambda count: self._block(block, row, count))

    def _pack(self) -> None:
        """Copy the task's rows of x, bytes shifted, padded with zeros to whole steps."""
        spec, lanes = self.spec, 64 if self.spec.integer else LANES
        whole, rest = divmod(spec.in_features, lanes)
        with T.serial(self.rows) as i:
            row = self.first_row + i

            def copy(chunk: Index, mask: Expression | None) -> None:
                where = (row, ramp(chunk * lanes, lanes))
                value = self.x[where] if mask is None else load_part(self.x, mask, *where, lanes=lanes)
                if spec.x_shift:
                    flipped = T.bitwise_xor(T.reinterpret("int32x16", value), splat(T.reinterpret("int32", T.uint32(_TOP_BITS))))
                    value = T.reinterpret("int8x64", flipped)
                    value = value if mask is None else tirx.Select(mask, value, splat(T.int8(0), 64))
                store(self.packed, T.reinterpret(f"{self.dtype}x16", value), ramp(i * self.words + chunk * LANES))

            with T.serial(whole) as chunk:
                copy(chunk, None)
            if rest:
                copy(whole, below(rest, lanes=lanes))
            for chunk in range(whole + (rest > 0), self.words // LANES):
                store(self.packed, splat(T.cast(0, self.dtype)), ramp(i * self.words + chunk * LANES))

    def _block(self, block: Index, row: Index, count: int) -> None:
        """Compute ``count`` rows, the last repeating, of a block of columns: as many at a time as the registers hold."""
        spec, columns = self.spec, max(min(COLUMNS, self.spec.totals // count), 1)
        rows = [hold(T.min(row + i, self.rows - 1)) for i in range(count)]
        totals = [[register(self.dtype, LANES) for _ in range(columns)] for _ in range(count)]
        grouped = not spec.integer and spec.groups > 1
        sums = [[register("float32", LANES) for _ in range(columns)] for _ in range(count)] if grouped else totals
        with T.serial(COLUMNS // columns) as turn:
            first = hold(block * COLUMNS + turn * columns)
            self._clear(sums)
            self._clear(totals)
            with T.serial(spec.groups) as g:
                tables = [self._table(first + c, g) for c in range(1 if spec.tables == "tensor" else columns)] * columns
                steps = spec.group // STEP if spec.groups > 1 else spec.steps
                with T.serial(T.min(steps, spec.steps - g * steps)) as s:
                    self._step(totals, tables, rows, (block, g * steps + s, turn * columns))
                if grouped:
                    for i in range(count):
                        for c in range(columns):
                            scaled = totals[i][c][ramp(0)] * splat(self.scale[first + c, g])
                            store(sums[i][c], sums[i][c][ramp(0)] + scaled, ramp(0))
                    self._clear(totals)
            for i in range(count):
                for c in range(columns):
                    with T.If(tirx.all(row + i < self.rows, first + c < spec.out_features)), T.Then():
                        where = (self.first_row + row + i, first + c)
                        store(self.out, self._result(sums[i][c][ramp(0)], *where, grouped), *where)

    def _clear(self, totals: list[list[Any]]) -> None:
        for kept in (kept for row in totals for kept in row):
            store(kept, splat(T.cast(0, self.dtype)), ramp(0))

    def _table(self, column: Index, group: Index) -> Callable[[Expression], Expression]:
        """Return the lookup in the table of a column and group: sixty-four bytes, or sixteen floats by the low bits of 32-bit lanes."""
        spec = self.spec
        place = (0 if spec.tables == "tensor" else column, group if spec.tables == "group" else 0)
        if spec.integer:
            return byte_lookup(spec.isa, self.tables, *place)
        return float_lookup(spec.isa, self.tables, *place)

    def _step(self, totals: list[list[Any]], tables: list[Any], rows: list[Index], place: tuple[Index, ...]) -> None:
        """Add the products of 128 elements of k."""
        block, step, offset = place
        spec, columns = self.spec, len(totals[0])
        vectors = [T.Bind(self.indices[block, step, ramp((offset + c) * 64, 64)]) for c in range(columns)]
        if not spec.integer:
            vectors = [T.Bind(T.reinterpret("int32x16", vector)) for vector in vectors]
        for part in range(2 if spec.integer else 8):
            weights = [T.Bind(tables[c](self._part(vector, part))) for c, vector in enumerate(vectors)]
            at = step * (STEP // 4 if spec.integer else STEP) + part * LANES
            for i, row in enumerate(rows):
                x = T.Bind(self.packed[ramp(row * self.words + at)])
                for c, weight in enumerate(weights):
                    kept = totals[i][c]
                    total = add_byte_products(spec.isa, kept[ramp(0)], x, weight) if spec.integer else kept[ramp(0)] + x * weight
                    store(kept, total, ramp(0))

    def _part(self, vector: Expression, part: int) -> Expression:
        """Return the indices of one part of a step: bytes below 16, or 32-bit lanes whose low four bits count."""
        if not self.spec.integer:
            return T.Bind(T.shift_right(vector, splat(T.int32(4 * part)))) if part else vector
        if part:
            return T.Bind(T.shift_right(vector, splat(T.uint8(4), 64)))
        return T.Bind(T.bitwise_and(vector, splat(T.uint8(15), 64)))

    def _result(self, total: Expression, row: Index, column: Index, scaled: bool) -> Expression:
        summed, token = fold(total, operator.add), row if self.spec.x_per_token else 0
        if not self.spec.integer:
            return summed if scaled else summed * self.scale[column, 0]
        zero = (self.x_zero[token] if self.x_zero is not None else T.int32(0)) + T.int32(self.spec.x_shift)
        y = rounded(T.cast(summed - zero * self.sums[column], "float32") * self.scale[column, 0])
        return y * self.x_scale[token]

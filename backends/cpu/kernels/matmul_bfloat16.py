"""Linear layers with bfloat16 weights, x float32 or bfloat16: half the bytes of float32 weights, sums in float32.

Meaning: y[m, n] = sum over k of x[m, k] * w[n, k] + bias[n]. A product of two bfloat16 is exact in float32 (8-bit significands); with
float32 x each product is rounded at most once. The order of the sums is free: a result is within (k + 8) * 2**-24 of the sum of the
absolute values of its terms. Denormal numbers count, but in tile registers and products of pairs, which take them for zero.

A 32-bit word holds the weights of two k of one column: tile registers (``tdpbf16ps``) multiply such words by pairs of x, 8192 products in
16 cycles, vectors (``vdpbf16ps``) 32 in one instruction; elsewhere the two halves become float32 by a shift and a mask, which is nothing
beside reading them from memory. TVM lowers bfloat16 to float32 before LLVM sees a call, so bits are passed as int16.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels import bfloat16_products, tiles
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul_rows import ceildiv, dispatch
from qcompile.backends.cpu.kernels.matmul_spec import CHUNK, FLOAT_TILES, TILED
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Expression,
    Index,
    argument,
    below,
    function,
    load,
    local,
    ramp,
    size,
    splat,
    store,
    store_row,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import hold, register
from tvm import tirx
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]

_TASK_ROWS = 64


def has_tiles() -> bool:
    """Return whether code made for this machine may multiply bfloat16 in tile registers."""
    return "amx-bf16" in instruction_sets.features_of(instruction_sets.target_description())


def has_pairs() -> bool:
    """Return whether code made for this machine may multiply pairs of bfloat16 in vectors."""
    return bfloat16_products.FEATURE in instruction_sets.features_of(instruction_sets.target_description())


@dataclass(frozen=True)
class Bfloat16Linear:
    """A linear layer with bfloat16 weights.

    Attributes:
        in_features, out_features: k and n.
        x: dtype of the input, ``float32`` or ``bfloat16``.
        bias: there is a float32 bias (an argument).
        tiles: multiply in tile registers where x is bfloat16.
        pairs: else, multiply pairs in vectors where x is bfloat16.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``; it selects the block sizes.
    """

    in_features: int
    out_features: int
    x: str = "float32"
    bias: bool = False
    tiles: bool = field(default_factory=has_tiles)
    pairs: bool = field(default_factory=has_pairs)
    isa: str = field(default_factory=instruction_sets.detect)

    def __post_init__(self) -> None:
        instruction_sets.check(self.isa)
        if self.x not in ("float32", "bfloat16"):
            raise ValueError(f"x is '{self.x}'; known are float32, bfloat16")

    @property
    def tiled(self) -> bool:
        return self.tiles and self.x == "bfloat16"

    @property
    def paired(self) -> bool:
        return self.pairs and self.x == "bfloat16" and not self.tiled

    @property
    def words(self) -> int:
        """Words of a column of weights, whole tiles where they go into tiles."""
        words = -(-self.in_features // 2)
        return -(-words // CHUNK) * CHUNK if self.tiled else words

    @property
    def columns(self) -> int:
        """Columns of a register block and of a panel."""
        return LANES * (TILED if self.tiled else FLOAT_TILES[self.isa]).vectors

    @property
    def blocks(self) -> int:
        return -(-self.out_features // self.columns)


def pack_bfloat16(spec: Bfloat16Linear, weight: Array, bias: Array | None = None) -> list[Array]:
    """Return the constants of ``bfloat16_linear(spec)``: panels int32 [blocks, words, columns], and the bias.

    weight int16 [n, k]: the bits of bfloat16; bias float32 [n].
    """
    n, k = weight.shape
    padded = np.zeros((spec.blocks * spec.columns, spec.words * 2), np.int16)
    padded[:n, :k] = weight
    words = padded.view(np.int32).reshape(spec.blocks, spec.columns, spec.words)
    constants = [np.ascontiguousarray(words.transpose(0, 2, 1))]
    if spec.bias and bias is not None:
        constants.append(np.pad(bias.astype(np.float32), (0, len(padded) - n)))
    return constants


def bfloat16_linear(spec: Bfloat16Linear) -> tirx.PrimFunc:
    """Build ``f(x, weight[, bias], out)``: x [m, k] float32, or the bits of bfloat16 as int16; arrays of ``pack_bfloat16``; out float32."""
    with function("bfloat16_linear") as builder:
        product = _Product(spec)
        parts = min(instruction_sets.thread_count(), spec.blocks)
        with bfloat16_products.imported() if spec.paired else nullcontext():
            with T.parallel((product.m + _TASK_ROWS - 1) // _TASK_ROWS * parts) as index:
                product.task(index, parts)
    return builder.get()


class _Product:
    """The arguments of one function and the statements of its tasks."""

    def __init__(self, spec: Bfloat16Linear) -> None:
        self.spec, self.m = spec, size("m")
        self.vectors = spec.columns // LANES
        self.x = argument("x", (self.m, spec.in_features), "float32" if spec.x == "float32" else "int16")
        self.weight = argument("weight", (spec.blocks, spec.words, spec.columns), "int32")
        self.bias = argument("bias", (spec.blocks * spec.columns,)) if spec.bias else None
        self.out = argument("out", (self.m, spec.out_features))

    def task(self, index: Index, parts: int) -> None:
        """Compute some rows of some columns."""
        spec = self.spec
        per_part = -(-spec.blocks // parts)
        self.first_row = hold(T.cast(T.truncdiv(index, parts), "int64") * _TASK_ROWS)
        self.rows = hold(T.min(T.int64(_TASK_ROWS), self.m - self.first_row))
        words = spec.tiled or spec.paired
        self.packed = local(_TASK_ROWS * spec.words * (1 if words else 2), "int32" if words else "float32")
        with T.serial(self.rows) as i:
            (self._pack_words if spec.tiled else self._pack_pairs if spec.paired else self._pack_floats)(i)
        if spec.tiled:
            self.sums = local(TILED.rows * spec.columns)
            tiles.configure()
        most = TILED.rows if spec.tiled else FLOAT_TILES[spec.isa].rows
        variants = (tiles.ROWS, most) if spec.tiled else tuple(count for count in (1, 2, 4, 8) if count <= most)
        emit = self._tile_block if spec.tiled else self._block
        first = hold(T.cast(T.truncmod(index, parts), "int64") * per_part)
        with T.serial(T.max(T.min(T.int64(per_part), spec.blocks - first), T.int64(0))) as b:
            block = hold(first + b)
            with T.serial(ceildiv(self.rows, T.int64(variants[-1]))) as row_block:
                row = hold(row_block * variants[-1])
                dispatch(hold(self.rows - row), variants, lambda count: emit(block, row, count))
        if spec.tiled:
            tiles.release()

    # ---- in vectors ----

    def _pack_floats(self, i: Index) -> None:
        """Copy a row of x as floats; an odd k gets a zero."""
        k, row, start = self.spec.in_features, self.first_row + i, i * (self.spec.words * 2)
        with T.serial(k) as e:
            value = self.x[row, e]
            if self.spec.x == "bfloat16":
                value = T.reinterpret("float32", T.shift_left(T.cast(value, "int32"), T.int32(16)))
            store(self.packed, value, start + e)
        if k % 2:
            store(self.packed, T.float32(0), start + k)

    def _pack_pairs(self, i: Index) -> None:
        """Copy a row of x as words of two bfloat16; an odd k gets a zero."""
        k, row = self.spec.in_features, self.first_row + i

        def half(e: Index) -> Expression:
            return T.bitwise_and(T.cast(self.x[row, e], "int32"), T.int32(0xFFFF))

        with T.serial(k // 2) as pair:
            high = T.shift_left(half(pair * 2 + 1), T.int32(16))
            store(self.packed, T.bitwise_or(half(pair * 2), high), i * self.spec.words + pair)
        if k % 2:
            store(self.packed, half(k - 1), i * self.spec.words + k // 2)

    def _block(self, block: Index, row: Index, count: int) -> None:
        """Compute ``count`` rows, the last repeating, of a block of columns."""
        spec = self.spec
        starts = [hold(T.min(row + i, self.rows - 1) * (spec.words * (1 if spec.paired else 2))) for i in range(count)]
        totals = [[register("float32", LANES) for _ in range(self.vectors)] for _ in range(count)]
        for kept in (kept for each in totals for kept in each):
            store(kept, splat(0.0), ramp(0))
        with T.serial(spec.words) as pair:
            words = [T.Bind(self.weight[block, pair, ramp(j * LANES)]) for j in range(self.vectors)]
            for start, row_totals in zip(starts, totals, strict=True) if spec.paired else ():
                x = T.Bind(splat(self.packed[start + pair]))
                for kept, word in zip(row_totals, words, strict=True):
                    store(kept, bfloat16_products.add_pairs(kept[ramp(0)], x, word), ramp(0))
            for e in range(0 if spec.paired else 2):
                weights = [T.Bind(_half(word, e)) for word in words]
                for start, row_totals in zip(starts, totals, strict=True):
                    x = T.Bind(splat(self.packed[start + pair * 2 + e]))
                    for kept, weight in zip(row_totals, weights, strict=True):
                        store(kept, kept[ramp(0)] + x * weight, ramp(0))
        for i, row_totals in enumerate(totals):
            with T.If(row + i < self.rows), T.Then():
                self._finish(block, row + i, [kept[ramp(0)] for kept in row_totals])

    # ---- in tile registers ----

    def _pack_words(self, i: Index) -> None:
        """Copy a row of x as words of two bfloat16, [chunk of 16 words][row][word], with zeros up to a whole chunk."""
        row, (whole, rest) = self.first_row + i, divmod(self.spec.in_features, 2 * CHUNK)

        def copy(chunk: Index, mask: Expression | None) -> None:
            value = load(self.x, mask, row, chunk * (2 * CHUNK), lanes=2 * CHUNK)
            store(self.packed, T.reinterpret("int32x16", value), ramp((chunk * _TASK_ROWS + i) * CHUNK))

        with T.serial(whole) as chunk:
            copy(chunk, None)
        if rest:
            copy(whole, below(rest, lanes=2 * CHUNK))

    def _tile_block(self, block: Index, row: Index, count: int) -> None:
        """Compute ``count`` rows, those after the last being of no account, of a block of columns."""
        columns, row_tiles = self.spec.columns, range(count // tiles.ROWS)
        product = tiles.Block(len(row_tiles), self.vectors, signed=False)
        product.product = "tdpbf16ps"
        product.zero()
        with T.serial(self.spec.words // CHUNK) as chunk:
            x = [T.address_of(self.packed[(chunk * _TASK_ROWS + row + i * tiles.ROWS) * CHUNK]) for i in row_tiles]
            weight = [T.address_of(self.weight[block, chunk * CHUNK, j * LANES]) for j in range(self.vectors)]
            product.multiply_add(x, CHUNK * 4, weight, columns * 4)
        spots = [[T.address_of(self.sums[i * tiles.ROWS * columns + j * LANES]) for j in range(self.vectors)] for i in row_tiles]
        product.store(spots, columns * 4)
        with T.serial(T.min(T.int64(count), self.rows - row)) as i:
            self._finish(block, row + i, [self.sums[ramp(i * columns + j * LANES)] for j in range(self.vectors)])

    def _finish(self, block: Index, row: Index, totals: list[Expression]) -> None:
        """Add the bias and store the columns of a row that exist."""
        n = self.spec.out_features
        for j, total in enumerate(totals):
            column = hold(block * self.spec.columns + j * LANES)
            result = T.Bind(total if self.bias is None else total + self.bias[ramp(column)])
            with T.If(column < n), T.Then():
                store_row(self.out, result, None if n % LANES == 0 else below(n - column), self.first_row + row, column)


def _half(words: Expression, e: int) -> Expression:
    """Return the first or second bfloat16 of each word as float32."""
    bits = T.bitwise_and(words, splat(T.int32(-0x10000))) if e else T.shift_left(words, splat(T.int32(16)))
    return T.reinterpret("float32x16", bits)

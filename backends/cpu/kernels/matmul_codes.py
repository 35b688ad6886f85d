"""Batched product of two arrays of codes (dialect ``qc.matmul``): a [batch, m, k] @ b [batch, k, n], exact, every size known at the call.

One task owns some rows of one batch entry. Its rows of a are packed side by side, as in ``matmul``; b is packed into panels
``[words][vectors][16 columns]`` of four codes of k each, so that a transposed b costs only in the copy. Products are those of linear
layers (``byte_products``, ``tiles``), which want a without sign and b with (or both with): packing flips top bits, and the zero points
are taken back at the end, from sums that packing counts:

    sum (a - za)(b - zb) = sum a b - za sum b - zb sum a + k za zb
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels import tiles
from qcompile.backends.cpu.kernels.byte_products import add_byte_products
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.matmul_rows import ceildiv, dispatch
from qcompile.backends.cpu.kernels.matmul_spec import CHUNK, LANES, TILED, TILES, Tile
from qcompile.backends.cpu.kernels.registers import (
    Expression,
    Index,
    argument,
    below,
    fold,
    function,
    load_part,
    local,
    ramp,
    serial_or_parallel,
    size,
    splat,
    store,
    store_row,
    transpose,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import hold, register, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

_TASK_ROWS, _TILED_TASK_ROWS = 128, 256  # packing b must stay small beside its product, which tile registers make eight times as fast
_ONES, _TOP_BITS = 0x01010101, 0x80808080


@dataclass(frozen=True)
class CodeMatmul:
    """A batched product of codes with one scale for each side.

    Attributes:
        a, b: dtypes of the codes, int8 or uint8.
        a_affine, b_affine: the side has a zero point (an argument); without, it is 0.
        transposed: b is [batch, n, k].
        shared: b has one batch entry, used by all of a.
        codes: dtype of the result's codes; empty: the result is float32.
        lowest, highest: range of the result's codes.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``.
    """

    a: str = "uint8"
    b: str = "int8"
    a_affine: bool = False
    b_affine: bool = False
    transposed: bool = False
    shared: bool = False
    codes: str = ""
    lowest: int = -128
    highest: int = 127
    isa: str = field(default_factory=instruction_sets.detect)

    def __post_init__(self) -> None:
        for name in (self.a, self.b, self.codes or "int8"):
            if name not in ("int8", "uint8"):
                raise ValueError(f"codes are int8 or uint8, not {name}")

    @property
    def tiled(self) -> bool:
        """Whether products are made in tile registers."""
        return instruction_sets.SETS[instruction_sets.check(self.isa)].tiles

    @property
    def tile(self) -> Tile:
        """The block sizes in use."""
        return TILED if self.tiled else TILES[self.isa]

    @property
    def a_shift(self) -> int:
        """What is added to the codes of a for them to be bytes of the kind that products take: 0, or 128 either way."""
        signed = instruction_sets.SETS[self.isa].signed_x
        return 0 if signed == (self.a == "int8") else -128 if signed else 128

    @property
    def b_shift(self) -> int:
        """What is added to the codes of b for them to have a sign."""
        return -128 if self.b == "uint8" else 0


def code_matmul(spec: CodeMatmul) -> tirx.PrimFunc:
    """Build ``f(a, a_scale[, a_zero_point], b, b_scale[, b_zero_point][, out_scale, out_zero_point], out)``.

    a [batch, m, k]; b [batch, k, n], [1, ..] where ``shared``, [.., n, k] where ``transposed``; out [batch, m, n]. Scales are float32 [1],
    zero points int32 [1]. k is at most 33,000: sums are int32.
    """
    with function("code_matmul") as builder:
        product = _Product(spec)
        serial_or_parallel(product.batch * product.row_parts, product.batch * product.m * product.k * product.n, product.task)
    return builder.get()


class _Product:
    """The arguments of one function and the statements of its tasks."""

    def __init__(self, spec: CodeMatmul) -> None:
        self.spec, self.tile = spec, spec.tile
        self.columns, self.stretch = spec.tile.vectors * LANES, spec.tile.words
        self.task_rows = (_TILED_TASK_ROWS if spec.tiled else _TASK_ROWS) // spec.tile.rows * spec.tile.rows
        self.batch, self.m, self.k, self.n = (size(name) for name in ("batch", "m", "k", "n"))
        self.a = argument("a", (self.batch, self.m, self.k), spec.a)
        self.a_scale = argument("a_scale", (1,))
        self.a_zero = argument("a_zero_point", (1,), "int32") if spec.a_affine else None
        entries = 1 if spec.shared else self.batch
        self.b = argument("b", (entries, self.n, self.k) if spec.transposed else (entries, self.k, self.n), spec.b)
        self.b_scale = argument("b_scale", (1,))
        self.b_zero = argument("b_zero_point", (1,), "int32") if spec.b_affine else None
        self.out_scale = argument("out_scale", (1,)) if spec.codes else None
        self.out_zero = argument("out_zero_point", (1,), "int32") if spec.codes else None
        self.out = argument("out", (self.batch, self.m, self.n), spec.codes or "float32")
        self.row_parts = (self.m + self.task_rows - 1) // self.task_rows
        self.needs_column_sums, self.needs_row_sums = spec.a_affine or spec.a_shift != 0, spec.b_affine or spec.b_shift != 0

    def task(self, index: Index) -> None:
        """Compute some rows of one batch entry."""
        spec, stretch = self.spec, self.stretch
        parts = hold(ceildiv(self.m, T.int64(self.task_rows)))
        self.entry = hold(T.truncdiv(T.cast(index, "int64"), parts))
        self.first_row = hold(T.truncmod(T.cast(index, "int64"), parts) * self.task_rows)
        self.rows = hold(T.min(T.int64(self.task_rows), self.m - self.first_row))
        chunks = hold(ceildiv(self.k, T.int64(4 * CHUNK)))
        self.words = hold(chunks * CHUNK if spec.tiled else ceildiv(self.k, T.int64(4)))
        self.packed = local(self.task_rows * stretch, "int32")
        self.panel = local(stretch * self.columns * 4, "int8")
        self.sums = local(self.task_rows * self.columns, "int32")
        self.row_sums = local(self.task_rows, "int32")
        self.column_sums = [register("int32", LANES) for _ in range(self.tile.vectors)]
        self.rounding = CodeRounding(self.out_scale[0], self.out_zero[0], spec.lowest, spec.highest, spec.isa) if spec.codes else None
        if spec.tiled:
            tiles.configure()
        with T.serial(ceildiv(self.n, T.int64(self.columns))) as block:
            self._column_block(block)
        if spec.tiled:
            tiles.release()

    def _column_block(self, block: Index) -> None:
        column = hold(T.cast(block, "int64") * self.columns)
        for total in self.column_sums:
            store(total, splat(T.int32(0)), ramp(0))
        self._part(T.int64(0), block, column, keep=False)
        with T.serial(1, ceildiv(self.words, T.int64(self.stretch))) as part:
            self._part(hold(T.cast(part, "int64") * self.stretch), block, column, keep=True)
        self._finish(column)

    def _part(self, first: Index, block: Index, column: Index, *, keep: bool) -> None:
        """Add the products of one stretch of k, from word ``first`` on; packed rows of a serve all columns where k is one stretch."""
        words = hold(T.min(T.int64(self.stretch), self.words - first))
        chunks = hold(ceildiv(words, T.int64(CHUNK)))
        with T.If(tirx.any(block == 0, self.words > self.stretch)), T.Then():
            self._pack_rows(first, chunks, block, keep)
        if self.spec.transposed:
            self._fill_transposed(first, chunks, column)
        else:
            with T.serial(words) as word:
                self._fill_word(first, word, column)
        if self.needs_column_sums:
            with T.serial(words) as word:
                for j, total in enumerate(self.column_sums):
                    store(total, self._multiply_add(total[ramp(0)], splat(T.int32(_ONES)), self._vector(word, j)), ramp(0))
        tile_rows = self.tile.rows
        variants = (tiles.ROWS, tile_rows) if self.spec.tiled else (1, tile_rows)
        emit = self._multiply_tiles if self.spec.tiled else self._multiply
        with T.serial(ceildiv(self.rows, T.int64(tile_rows))) as row_block:
            left = hold(self.rows - row_block * tile_rows)
            dispatch(left, variants, lambda count: emit(row_block, words, count, keep))

    # ---- packing ----

    def _bytes(self, buffer: Any, shift: int, mask: Expression | None, *index: Index) -> Expression:
        """Return sixteen words of codes along the last axis, shifted; those outside the mask are zero."""
        where = (*index[:-1], ramp(index[-1], 4 * CHUNK))
        words = T.reinterpret("int32x16", buffer[where] if mask is None else load_part(buffer, mask, *where, lanes=4 * CHUNK))
        if shift:
            words = T.bitwise_xor(words, splat(T.reinterpret("int32", T.uint32(_TOP_BITS))))
            if mask is not None:
                bytes_ = T.reinterpret("int8x64", words)
                words = T.reinterpret("int32x16", tirx.Select(mask, bytes_, splat(T.int8(0), 4 * CHUNK)))
        return T.Bind(words)

    def _pack_rows(self, first: Index, chunks: Index, block: Index, keep: bool) -> None:
        """Pack a's rows of the task, [row block][chunk][rows][16 words]; the last repeats up to a whole block."""
        tile_rows, total = self.tile.rows, register("int32", LANES)
        with T.serial(ceildiv(self.rows, T.int64(tile_rows)) * tile_rows) as i:
            row = hold(self.first_row + T.min(i, self.rows - 1))
            start = hold(T.truncdiv(i, tile_rows) * (self.stretch * tile_rows) + T.truncmod(i, tile_rows) * CHUNK)
            if self.needs_row_sums:
                store(total, splat(T.int32(0)), ramp(0))

            def pack(chunk: Index, mask: Expression | None, row: Index = row, start: Index = start) -> None:
                words = self._bytes(self.a, self.spec.a_shift, mask, self.entry, row, (first + chunk * CHUNK) * 4)
                store(self.packed, words, ramp(start + chunk * (tile_rows * CHUNK)))
                if self.needs_row_sums:
                    store(total, self._multiply_add(total[ramp(0)], words, splat(T.int8(1), 64)), ramp(0))

            self._each_chunk(first, chunks, pack)
            if self.needs_row_sums:
                with T.If(block == 0), T.Then():
                    before = self.row_sums[i] if keep else T.int32(0)
                    store(self.row_sums, before + fold(total[ramp(0)], operator.add), i)

    def _each_chunk(self, first: Index, chunks: Index, body: Any) -> None:
        """Emit ``body(chunk, mask)`` for chunks of k from word ``first`` on; the mask is None but for one that passes the end of k."""
        whole = hold(T.min(chunks, T.truncdiv(self.k - first * 4, 4 * CHUNK)))
        with T.serial(whole) as chunk:
            body(chunk, None)
        with T.If(whole < chunks), T.Then():
            body(whole, below(self.k - (first + whole * CHUNK) * 4, lanes=4 * CHUNK))

    def _fill_word(self, first: Index, word: Index, column: Index) -> None:
        """Pack four rows of b, a word of each column; elements beyond either end are zero."""
        b_entry = T.int64(0) if self.spec.shared else self.entry
        k = hold((first + word) * 4)
        flip = splat(T.int32(128))

        def codes(e: int, j: int, mask: Expression | None) -> Expression:
            where = (b_entry, k + e if mask is None else T.min(k + e, self.k - 1), ramp(column + j * LANES))
            found = self.b[where] if mask is None else load_part(self.b, mask, *where)
            found = T.cast(T.reinterpret("uint8x16", found), "int32x16")
            found = T.bitwise_xor(found, flip) if self.spec.b_shift else found
            return found if mask is None else tirx.Select(mask, found, splat(T.int32(0)))

        def pack(ragged: bool) -> None:
            for j in range(self.tile.vectors):
                total = None
                for e in range(4):
                    inside = below(T.if_then_else(k + e < self.k, self.n - column - j * LANES, T.int64(0))) if ragged else None
                    part = T.shift_left(codes(e, j, inside), splat(T.int32(8 * e)))
                    total = part if total is None else T.bitwise_or(total, part)
                store(self.panel, T.reinterpret("int8x64", total), ramp((word * self.columns + j * LANES) * 4, 64))

        with T.If(tirx.all(k + 4 <= self.k, column + self.columns <= self.n)):
            with T.Then():
                pack(ragged=False)
            with T.Else():
                pack(ragged=True)

    def _fill_transposed(self, first: Index, chunks: Index, column: Index) -> None:
        """Pack columns that lie along k: sixteen words of sixteen columns are transposed; columns after the last repeat it."""
        b_entry = T.int64(0) if self.spec.shared else self.entry

        def pack(chunk: Index, mask: Expression | None) -> None:
            for j in range(self.tile.vectors):
                places = [T.min(column + j * LANES + c, self.n - 1) for c in range(LANES)]
                found = [self._bytes(self.b, self.spec.b_shift, mask, b_entry, c, (first + chunk * CHUNK) * 4) for c in places]
                for w, words in enumerate(transpose(found)):
                    spot = ramp(((chunk * CHUNK + w) * self.columns + j * LANES) * 4, 64)
                    store(self.panel, T.reinterpret("int8x64", words), spot)

        self._each_chunk(first, chunks, pack)

    # ---- products ----

    def _vector(self, word: Index, j: int) -> Expression:
        return self.panel[ramp((word * self.columns + j * LANES) * 4, 64)]

    def _multiply_add(self, total: Expression, x: Expression, weight: Expression) -> Expression:
        return add_byte_products(self.spec.isa, total, x, weight)

    def _multiply(self, row_block: Index, words: Index, count: int, keep: bool) -> None:
        """Add (``keep``) or store the product of ``count`` rows by the panel to their sums."""
        tile_rows, vectors = self.tile.rows, self.tile.vectors
        first_sum = row_block * (tile_rows * self.columns)
        spots = [[ramp(first_sum + i * self.columns + j * LANES) for j in range(vectors)] for i in range(count)]
        totals = [[register("int32", LANES) for _ in range(vectors)] for _ in range(count)]
        for i in range(count):
            for j in range(vectors):
                store(totals[i][j], self.sums[spots[i][j]] if keep else splat(T.int32(0)), ramp(0))
        start = hold(row_block * (self.stretch * tile_rows))

        def step(chunk: Index, w: Index) -> None:
            weights = [T.Bind(self._vector(chunk * CHUNK + w, j)) for j in range(vectors)]
            for i in range(count):
                x = T.Bind(splat(self.packed[start + chunk * (tile_rows * CHUNK) + i * CHUNK + w]))
                for j in range(vectors):
                    store(totals[i][j], self._multiply_add(totals[i][j][ramp(0)], x, weights[j]), ramp(0))

        whole = hold(T.truncdiv(words, CHUNK))
        with T.serial(whole) as chunk, T.serial(CHUNK) as w:
            step(chunk, w)
        with T.serial(T.truncmod(words, CHUNK)) as w:
            step(whole, w)
        for i in range(count):
            for j in range(vectors):
                store(self.sums, totals[i][j][ramp(0)], spots[i][j])

    def _multiply_tiles(self, row_block: Index, words: Index, count: int, keep: bool) -> None:
        """As ``_multiply``, in tile registers."""
        row_tiles, vectors = range(count // tiles.ROWS), self.tile.vectors
        product = tiles.Block(len(row_tiles), vectors, "uint8")
        first_sum, pitch = row_block * (self.tile.rows * self.columns), tiles.ROWS * self.columns
        spots = [[T.address_of(self.sums[first_sum + i * pitch + j * LANES]) for j in range(vectors)] for i in row_tiles]
        if keep:
            product.load(spots, self.columns * 4)
        else:
            product.zero()
        start = hold(row_block * (self.stretch * self.tile.rows))
        with T.serial(T.truncdiv(words, CHUNK)) as chunk:
            at = start + chunk * (self.tile.rows * CHUNK)
            x = [T.address_of(self.packed[at + i * (tiles.ROWS * CHUNK)]) for i in row_tiles]
            weight = [T.address_of(self.panel[(chunk * CHUNK * self.columns + j * LANES) * 4]) for j in range(vectors)]
            product.multiply_add(x, CHUNK * 4, weight, self.columns * 4)
        product.store(spots, self.columns * 4)

    # ---- results ----

    def _finish(self, column: Index) -> None:
        """Take the zero points back, scale, and store the columns that exist."""
        spec = self.spec
        a_zero = hold((self.a_zero[0] if self.a_zero is not None else T.int32(0)) + T.int32(spec.a_shift))
        b_zero = hold((self.b_zero[0] if self.b_zero is not None else T.int32(0)) + T.int32(spec.b_shift))
        both = hold(T.cast(self.k, "int32") * a_zero * b_zero)
        scales = [hold(self.b_scale[0]), hold(self.a_scale[0])]
        with T.serial(self.rows) as i:
            row_term = hold(both - b_zero * self.row_sums[i]) if self.needs_row_sums else None
            for j in range(self.tile.vectors):
                total = self.sums[ramp(i * self.columns + j * LANES)]
                if self.needs_column_sums:
                    total = total - splat(a_zero) * self.column_sums[j][ramp(0)]
                if row_term is not None:
                    total = total + splat(row_term)
                y = T.cast(total, "float32x16")
                for scale in scales:
                    y = rounded(y * splat(scale))
                y = T.Bind(y)
                result = y if self.rounding is None else T.Bind(T.cast(self.rounding.codes(y), f"{spec.codes}x16"))
                first, where = hold(column + j * LANES), (self.entry, self.first_row + i)
                with T.If(first + LANES <= self.n):
                    with T.Then():
                        store_row(self.out, result, None, *where, first)
                    with T.Else():
                        store_row(self.out, result, below(self.n - first), *where, first)

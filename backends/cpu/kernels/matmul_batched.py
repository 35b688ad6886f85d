"""Batched float32 product of two activations, a [batch, m, k] @ b [batch, k, n], every size known or not.

One task owns some rows of one batch entry. Panels of b, 128 steps of k by some vectors of columns, are copied side by side and padded
with zeros, so that ragged sizes and a transposed b cost only in the copy; a is read where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul_spec import FLOAT_TILES, LANES, Tile
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, spread
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

_TASK_BLOCKS = 11  # row blocks of a task: their sums stay in the first-level cache
_WIDE = Tile(12, 2, 128)  # 32 columns divide the head sizes 64, 96 and 128
_TILES = {name: _WIDE if found.parts == 1 else FLOAT_TILES[name] for name, found in instruction_sets.SETS.items()}


@dataclass(frozen=True)
class BatchedMatmul:
    """A batched float32 product.

    Attributes:
        rows, inner, columns: m, k, n; None where only the call knows.
        transposed: b is [batch, n, k].
        shared: b has one batch entry, used by all of a.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``; it selects the block sizes.
        tile: block sizes; None: those of the instruction set.
    """

    rows: int | None = None
    inner: int | None = None
    columns: int | None = None
    transposed: bool = False
    shared: bool = False
    isa: str = field(default_factory=instruction_sets.detect)
    tile: Tile | None = None

    @property
    def blocks(self) -> Tile:
        """The block sizes in use."""
        return self.tile or _TILES[instruction_sets.check(self.isa)]


def batched_matmul(spec: BatchedMatmul) -> tirx.PrimFunc:
    """Return the kernel; its arguments are a [batch, m, k], b [batch or 1, k, n] (or [.., n, k]), the result [batch, m, n]."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("batched_matmul")
            T.func_attr({"tirx.noalias": True})
            batch = T.int64()
            m, k, n = (T.int64() if size is None else size for size in (spec.rows, spec.inner, spec.columns))
            a = T.match_buffer(T.arg("a_handle", T.handle()), (batch, m, k), "float32")
            b_shape = (n, k) if spec.transposed else (k, n)
            b = T.match_buffer(T.arg("b_handle", T.handle()), (1 if spec.shared else batch, *b_shape), "float32")
            y = T.match_buffer(T.arg("y_handle", T.handle()), (batch, m, n), "float32")
            for name, buffer in (("a", a), ("b", b), ("y", y)):
                IRBuilder.name(name, buffer)
            _emit_tasks(spec, _Operands(a, b, y, batch, *(T.Bind(T.cast(size, "int32")) for size in (m, k, n))))
    return builder.get()


@dataclass
class _Operands:
    """Buffers and sizes of one kernel."""

    a: Expr
    b: Expr
    y: Expr
    batch: Expr
    m: Expr
    k: Expr
    n: Expr


def _emit_tasks(spec: BatchedMatmul, operands: _Operands) -> None:
    tile = spec.blocks
    columns, stretch, task_rows = tile.vectors * LANES, tile.words, tile.rows * _TASK_BLOCKS
    parts = hold(T.truncdiv(operands.m + task_rows - 1, task_rows))
    with T.parallel(0, T.cast(operands.batch, "int32") * parts) as task:
        entry = hold(T.cast(T.truncdiv(task, parts), "int64"))
        first_row = hold(T.truncmod(task, parts) * task_rows)
        rows = hold(T.min(task_rows, operands.m - first_row))
        panel = T.alloc_buffer((stretch * columns,), "float32")
        sums = T.alloc_buffer((task_rows * columns,), "float32")
        with T.serial(0, T.truncdiv(operands.n + columns - 1, columns)) as block:
            first_column = hold(block * columns)
            with T.serial(0, task_rows * tile.vectors) as i:
                T.buffer_store(sums, spread(T.float32(0), LANES), [T.ramp(i * LANES, 1, LANES)])
            with T.serial(0, T.truncdiv(operands.k + stretch - 1, stretch)) as part:
                first = hold(part * stretch)
                depth = hold(T.min(stretch, operands.k - first))
                _emit_copy(spec, operands, panel, entry, first, depth, first_column)
                with T.serial(0, T.truncdiv(rows + tile.rows - 1, tile.rows)) as row_block:
                    left = hold(rows - row_block * tile.rows)
                    row = hold(first_row + row_block * tile.rows)
                    for count, low in ((tile.rows, 1), (1, 0)):
                        with T.If(left > 1 if low else left == 1):
                            with T.Then():
                                _emit_block(spec, operands, panel, sums, entry, row, left, first, depth, row_block, count)
            _emit_store(spec, operands, sums, entry, first_row, rows, first_column)


def _emit_copy(spec: BatchedMatmul, operands: _Operands, panel: Expr, entry: Expr, first: Expr, depth: Expr, column: Expr) -> None:
    """Copy a panel of b; the columns beyond n are filled with zeros."""
    columns = spec.blocks.vectors * LANES
    held = hold(T.min(columns, operands.n - column))
    b_entry = T.int64(0) if spec.shared else entry

    def element(i: Expr, c: Expr) -> Expr:
        return operands.b[b_entry, column + c, first + i] if spec.transposed else operands.b[b_entry, first + i, column + c]

    if spec.transposed:  # each row of b is read along k
        with T.If(held < columns):
            with T.Then():
                with T.serial(0, depth * spec.blocks.vectors) as i:
                    T.buffer_store(panel, spread(T.float32(0), LANES), [T.ramp(i * LANES, 1, LANES)])
        with T.serial(0, held) as c:
            with T.serial(0, depth) as i:
                T.buffer_store(panel, element(i, c), [i * columns + c])
        return
    with T.serial(0, depth) as i:
        with T.If(held == columns):
            with T.Then():
                for j in range(spec.blocks.vectors):
                    value = operands.b[b_entry, first + i, T.ramp(column + j * LANES, 1, LANES)]
                    T.buffer_store(panel, value, [T.ramp(i * columns + j * LANES, 1, LANES)])
            with T.Else():
                for j in range(spec.blocks.vectors):
                    T.buffer_store(panel, spread(T.float32(0), LANES), [T.ramp(i * columns + j * LANES, 1, LANES)])
                with T.serial(0, held) as c:
                    T.buffer_store(panel, element(i, c), [i * columns + c])


def _emit_block(
    spec: BatchedMatmul, operands: _Operands, panel: Expr, sums: Expr, entry: Expr, row: Expr, left: Expr,
    first: Expr, depth: Expr, row_block: Expr, count: int,
) -> None:  # fmt: skip
    """Add the product of ``count`` rows and a panel to their sums; rows beyond the last repeat it, their sums are not stored."""
    tile = spec.blocks
    columns, lanes = tile.vectors * LANES, T.ramp(0, 1, LANES)
    total = [[register("float32", LANES) for _ in range(tile.vectors)] for _ in range(count)]
    rows = [hold(T.cast(row + T.min(i, left - 1), "int64")) for i in range(count)]
    first_sum = row_block * tile.rows * columns
    spots = [(total[i][j], T.ramp(first_sum + i * columns + j * LANES, 1, LANES)) for i in range(count) for j in range(tile.vectors)]
    for kept, spot in spots:
        T.buffer_store(kept, sums[spot], [lanes])
    with T.serial(0, depth) as i:
        weights = [T.Bind(panel[T.ramp(i * columns + j * LANES, 1, LANES)]) for j in range(tile.vectors)]
        for r in range(count):
            value = T.Bind(spread(operands.a[entry, rows[r], first + i], LANES))
            for j in range(tile.vectors):
                T.buffer_store(total[r][j], total[r][j][lanes] + value * weights[j], [lanes])
    for kept, spot in spots:
        T.buffer_store(sums, kept[lanes], [spot])


def _emit_store(spec: BatchedMatmul, operands: _Operands, sums: Expr, entry: Expr, first_row: Expr, rows: Expr, column: Expr) -> None:
    columns = spec.blocks.vectors * LANES
    with T.serial(0, rows) as r:
        row = hold(T.cast(first_row + r, "int64"))
        with T.If(column + columns <= operands.n):
            with T.Then():
                for j in range(spec.blocks.vectors):
                    value = sums[T.ramp(r * columns + j * LANES, 1, LANES)]
                    T.buffer_store(operands.y, value, [entry, row, T.ramp(column + j * LANES, 1, LANES)])
            with T.Else():
                with T.serial(0, operands.n - column) as c:
                    T.buffer_store(operands.y, sums[r * columns + c], [entry, row, column + c])

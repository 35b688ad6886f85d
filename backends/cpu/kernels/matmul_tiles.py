"""Linear layers of many rows in tile registers (``tiles``): for each block of columns, blocks of two tiles of rows.

x is read where it lies, 16 rows a row length apart, where its rows are whole tiles; else a task copies its rows once. Tiles of a last
block overlap those before instead of passing the end. Sums start at what takes back the zero point of x, plus an int32 bias, one row of
them read into all rows of a tile, so that a finished sum needs no correction. k is cut into stretches whose panel of weights
stays in the first-level cache for all rows. Sums of weights in groups leave the tiles after each group, to be scaled and added as
floats: of small groups one tile at a time, so that storing, multiplying and adding of different groups overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.cpu.kernels import tiles
from qcompile.backends.cpu.kernels.bfloat16 import stored_dtype
from qcompile.backends.cpu.kernels.matmul_finish import Sums, finish_rows
from qcompile.backends.cpu.kernels.matmul_input import PackedInput, pack_row
from qcompile.backends.cpu.kernels.matmul_panel import Arguments, make_panel
from qcompile.backends.cpu.kernels.matmul_rows import ceildiv, dispatch
from qcompile.backends.cpu.kernels.matmul_spec import CHUNK, LANES, Linear
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, rounded, spread
from tvm.script.ir_builder import tirx as T

_PREFETCHING_BLOCKS = 4
_TILE = tiles.ROWS * LANES  # sums
_BLOCK_GROUP = 128  # least weights of a group that is worth loading a tile of x for two of weights


@dataclass
class _Input:
    """Rows of codes that tiles are loaded from.

    Attributes:
        buffer: flat, of codes or of words.
        first: element of the first row of the task.
        pitch: elements from one row to the next.
        width: bytes of an element.
    """

    buffer: Expr
    first: Expr
    pitch: int
    width: int

    def address(self, row: Expr, word: Expr) -> Expr:
        """Return the address of a word of k of one of the task's rows."""
        return T.address_of(self.buffer[self.first + T.cast(row, "int64") * self.pitch + T.cast(word * (4 // self.width), "int64")])


def emit_tiled_task(spec: Linear, arguments: Arguments, first_row: Expr, rows: Expr, first_block: Expr, blocks: Expr) -> None:
    """Emit one task: at least one row, and some blocks of columns one after another."""
    arguments.begin_task(spec)
    tiles.configure(T.min(tiles.ROWS, rows), spec.tile_depth)
    task = _Task(spec, arguments, first_row, rows)
    with T.serial(0, blocks) as b:
        task.columns(hold(first_block + b))
    tiles.release()


class _Task:
    """The rows of one task and the statements of a block of columns."""

    def __init__(self, spec: Linear, arguments: Arguments, first_row: Expr, rows: Expr) -> None:
        self.spec, self.arguments, self.first_row, self.rows = spec, arguments, first_row, rows
        self.height = hold(T.min(tiles.ROWS, rows))  # of a tile
        self.blocks = hold(ceildiv(rows, spec.tile.rows))
        self.x = _input(spec, arguments, first_row, rows)
        self.panel = make_panel(spec, arguments)
        self.parts = -(-spec.words // spec.stretch)
        whole = self.parts == 1 and not spec.group
        self.kept = 1 if whole else spec.task_rows // spec.tile.rows  # blocks of sums
        self.sums = T.alloc_buffer((self.kept * spec.tile.rows * spec.columns,), spec.sum_dtype)
        self.by_tile = 0 < spec.group < _BLOCK_GROUP
        if spec.group:  # of a block, or of a group of a tile and of the one before
            self.products = T.alloc_buffer((2 * _TILE if self.by_tile else spec.tile.rows * spec.columns,), "int32")
        self.starts = _starts(spec)
        if self.starts:
            self.start = T.alloc_buffer((max(spec.stretch // spec.group_words if spec.group else 1, 1) * spec.columns,), "int32")

    def columns(self, column_block: Expr) -> None:
        """Emit all products and results of one block of columns."""
        spec = self.spec
        with T.serial(0, self.parts) as part:
            first = hold(part * spec.stretch)
            words = hold(T.min(spec.stretch, spec.words - first))
            self.panel.fill(column_block, first, words)
            self._emit_start(column_block, words)
            with T.serial(0, self.blocks) as block:
                left = hold(self.rows - block * spec.tile.rows)
                place = _Place(column_block, block, part, first, words)
                dispatch(left, spec.row_variants, lambda count: self._multiply(place, count // tiles.ROWS))
                with T.If(part == self.parts - 1), T.Then():
                    self._finish(column_block, block, left)

    def _first_sum(self, block: Expr) -> Expr:
        return 0 if self.kept == 1 else block * (self.spec.tile.rows * self.spec.columns)

    def _tile_row(self, block: Expr, i: Expr | int) -> Expr:
        """Return the first row, counted from the task's, of tile i of a block: the last one ends with the task's last row."""
        return T.min(block * self.spec.tile.rows + i * tiles.ROWS, self.rows - self.height)

    def _emit_start(self, column_block: Expr, words: Expr) -> None:
        """Emit where the sums of a stretch's groups, or those of the whole row, start."""
        spec, arguments = self.spec, self.arguments
        if not self.starts:
            return
        groups = T.truncdiv(words, spec.group_words) if spec.group else 1
        with T.serial(0, groups) as g:
            for j in range(spec.tile.vectors):
                lanes = T.ramp(column_block * spec.columns + j * LANES, 1, LANES)
                spot = T.ramp(g * spec.columns + j * LANES, 1, LANES)
                value = arguments.bias[lanes] if spec.epilogue.bias == "int32" else spread(T.int32(0), LANES)
                if spec.x_affine and not spec.x_per_token:
                    sums = self.panel.sums[spot] if spec.group else arguments.sums[lanes]
                    value = value - spread(arguments.x_zero[0], LANES) * sums
                T.buffer_store(self.start, value, [spot])

    # ---- products ----

    def _multiply(self, place: _Place, count: int) -> None:
        """Emit the product of ``count`` tiles of rows by a stretch of a panel."""
        spec, vectors = self.spec, self.spec.tile.vectors
        if self.by_tile:
            self._multiply_by_tile(place, count)
            return
        block = tiles.Block(count, vectors, spec.x)
        rows, columns = [hold(self._tile_row(place.block, i)) for i in range(count)], list(range(vectors))
        target = self.products if spec.group else self.sums
        base = 0 if spec.group else self._first_sum(place.block)
        spots = [[T.address_of(target[base + (i * tiles.ROWS * vectors + j) * LANES]) for j in columns] for i in range(count)]
        if spec.group:
            self._multiply_groups(place, block, rows, spots)
            return
        with T.If(place.part == 0):
            with T.Then():
                self._begin(block, 0, columns)
            with T.Else():
                block.load(spots, spec.columns * 4)
        self._steps(place, block, rows, columns, 0, place.words)
        block.store(spots, spec.columns * 4)

    def _begin(self, block: tiles.Block, group: Expr, columns: list[Expr]) -> None:
        if self.starts:
            block.start([T.address_of(self.start[group * self.spec.columns + j * LANES]) for j in columns])
        else:
            block.zero()

    def _steps(
        self, place: _Place, block: tiles.Block, rows: list[Expr], columns: list[Expr], first: Expr, words: Expr, prefetching: Expr = True
    ) -> None:  # fmt: skip
        """Emit the products with some vectors of columns over some words of the stretch, whole tiles of k."""
        spec, size = self.spec, self.spec.tile_depth // 4
        with T.serial(0, T.truncdiv(words, size)) as step:
            word = hold(first + step * size)
            self._prefetch(place, T.truncdiv(first, size) + step, prefetching)
            x = [self.x.address(row, place.first + word) for row in rows]
            weight = [self.panel.tile(place.column_block, place.first, word, j) for j in columns]
            block.multiply_add(x, self.x.pitch * self.x.width, weight, spec.columns * 4)

    def _prefetch(self, place: _Place, step: Expr, wanted: Expr) -> None:
        """Ask for the next stretch of packed weights: the first blocks of rows for a share each, or a first touch would stall all of it.

        Shares are read in order, for the processor's own prefetching to run ahead of them.
        """
        spec = self.spec
        tile_bytes = spec.tile_depth * spec.columns * min(spec.bits, 8) // 8
        stretch = min(spec.stretch, spec.words) // spec.step * spec.step_bytes
        row_bytes = spec.weight_shape[1] * spec.weight_shape[2]
        lines = max(tile_bytes // 64 // _PREFETCHING_BLOCKS, 1)
        flat = T.decl_buffer((spec.column_blocks * row_bytes,), "int8", data=self.arguments.weight.data)
        turn = place.block * (stretch // tile_bytes) + step
        with T.If(T.And(place.block < _PREFETCHING_BLOCKS, wanted)), T.Then():
            ahead = T.cast((place.part + 1) * stretch + turn * (lines * 64), "int64")
            start = hold(T.cast(place.column_block, "int64") * row_bytes + ahead)
            for line in range(lines):
                tiles.prefetch(T.address_of(flat[start + line * 64]))

    def _multiply_groups(self, place: _Place, block: tiles.Block, rows: list[Expr], spots: list[list[Expr]]) -> None:
        """Emit the products group by group, each scaled and added to the float sums."""
        spec, columns = self.spec, list(range(self.spec.tile.vectors))
        first_sum = self._first_sum(place.block)
        with T.If(place.part == 0), T.Then(), T.serial(0, block.row_tiles * tiles.ROWS * spec.tile.vectors) as i:
            T.buffer_store(self.sums, spread(T.float32(0), LANES), [T.ramp(first_sum + i * LANES, 1, LANES)])
        size = spec.group_words
        with T.serial(0, T.truncdiv(place.words, size)) as g:
            self._begin(block, g, columns)
            self._steps(place, block, rows, columns, g * size, size)
            block.store(spots, spec.columns * 4)
            scales = [T.Bind(self._scale(place, g, j)) for j in columns]
            for i, row in enumerate(rows):
                with T.serial(0, self.height) as r:
                    for j, scale in enumerate(scales):
                        spot = (i * tiles.ROWS + r) * spec.columns + j * LANES
                        running = T.ramp(first_sum + spot, 1, LANES)
                        scaled = self._scaled(g, row + r, j, self.products[T.ramp(spot, 1, LANES)], scale)
                        T.buffer_store(self.sums, self.sums[running] + scaled, [running])

    def _scale(self, place: _Place, g: Expr, j: Expr) -> Expr:
        """Return the scales of vector j of the columns, of a group counted from the stretch's first."""
        group = hold(T.truncdiv(place.first, self.spec.group_words) + g)
        return self.arguments.scale[place.column_block, group, T.ramp(j * LANES, 1, LANES)]

    def _scaled(self, g: Expr, row: Expr, j: Expr, exact: Expr, scale: Expr) -> Expr:
        """Return the sums of a group of one of the task's rows as floats times their scales."""
        if self.spec.x_affine and self.spec.x_per_token:
            zero = self.arguments.x_zero[T.cast(self.first_row + row, "int64")]
            exact = exact - spread(zero, LANES) * self.panel.sums[T.ramp(g * self.spec.columns + j * LANES, 1, LANES)]
        return rounded(T.cast(exact, "float32x16") * scale)

    def _multiply_by_tile(self, place: _Place, count: int) -> None:
        """Emit the products of ``count`` tiles of rows by those of columns, one by one."""
        spec, first_sum = self.spec, self._first_sum(place.block)
        with T.serial(0, count) as i, T.serial(0, spec.tile.vectors) as j:
            row = hold(self._tile_row(place.block, i))
            self._multiply_tile(place, row, hold(j), hold(first_sum + i * (tiles.ROWS * spec.columns) + j * LANES), prefetching=i + j == 0)

    def _multiply_tile(self, place: _Place, row: Expr, j: Expr, first_sum: Expr, *, prefetching: Expr) -> None:
        """Emit the products of one tile of rows by vector j of the columns; its float sums stay in registers.

        A turn stores the sums of one group, begins the product of the second after it in the same tile register, and scales the group
        before. So nothing waits for what was only just begun: a product is in its tile after 52 cycles, and a tile in memory after 16
        more (measured on one core, groups of 32: 600 million products a millisecond, 370 where each step waits for the one before).
        """
        spec, lanes, size = self.spec, T.ramp(0, 1, LANES), self.spec.group_words
        blocks = [tiles.Block(1, 1, spec.x, first=parity) for parity in range(2)]
        groups = hold(T.truncdiv(place.words, size))
        spots = [T.ramp(first_sum + r * spec.columns, 1, LANES) for r in range(tiles.ROWS)]
        totals = [register("float32", LANES) for _ in spots]
        for total, spot in zip(totals, spots, strict=True):
            start = T.if_then_else(place.part == 0, spread(T.float32(0), LANES), self.sums[spot])
            T.buffer_store(total, start, [lanes])

        def begin(g: Expr, parity: int) -> None:
            with T.If(g < groups), T.Then():
                self._begin(blocks[parity], g, [j])
                self._steps(place, blocks[parity], [row], [j], hold(g * size), size, prefetching=prefetching)

        def turn(g: Expr, parity: int) -> None:
            with T.If(g < groups), T.Then():
                blocks[parity].store([[T.address_of(self.products[parity * _TILE])]], LANES * 4)
            begin(g + 2, parity)
            with T.If(T.And(g > 0, g <= groups)), T.Then():
                self._add_group(place, row, j, hold(g - 1), (1 - parity) * _TILE, totals)

        for parity in range(2):
            begin(T.int32(parity), parity)
        with T.serial(0, T.truncdiv(groups, 2) + 1) as pair:
            for parity in range(2):
                turn(hold(pair * 2 + parity), parity)
        for total, spot in zip(totals, spots, strict=True):
            T.buffer_store(self.sums, total[lanes], [spot])

    def _add_group(self, place: _Place, row: Expr, j: Expr, g: Expr, product: int, totals: list[Expr]) -> None:
        """Add a group's scaled products to the totals of a tile's rows; those past its height are without meaning."""
        lanes, scale = T.ramp(0, 1, LANES), T.Bind(self._scale(place, g, j))
        for r, total in enumerate(totals):
            exact = self.products[T.ramp(product + r * LANES, 1, LANES)]
            T.buffer_store(total, total[lanes] + self._scaled(g, T.min(row + r, self.rows - 1), j, exact, scale), [lanes])

    # ---- results ----

    def _finish(self, column_block: Expr, block: Expr, left: Expr) -> None:
        """Emit the results of a block of rows; an overlapping tile's first rows were finished with the tile before."""
        spec = self.spec
        exact = not (spec.x_affine and spec.x_per_token)
        sums, first_sum = Sums(self.sums, 0, exact=exact), self._first_sum(block)
        with T.serial(0, T.min(spec.tile.rows // tiles.ROWS, ceildiv(left, tiles.ROWS))) as i:
            row = hold(self._tile_row(block, i))
            done = hold(block * spec.tile.rows + i * tiles.ROWS - row)
            at = hold(first_sum + (i * tiles.ROWS + done) * spec.columns)
            finish_rows(spec, self.arguments, sums, at, self.first_row + row + done, column_block, hold(self.height - done))


@dataclass
class _Place:
    """Where a block stands: its columns, its rows, and its stretch of k."""

    column_block: Expr
    block: Expr
    part: Expr
    first: Expr  # word of the stretch
    words: Expr


def _starts(spec: Linear) -> bool:
    """Return whether sums start at other values than zero."""
    return spec.epilogue.bias == "int32" or (spec.integer and spec.x_affine and not spec.x_per_token)


def _input(spec: Linear, arguments: Arguments, first_row: Expr, rows: Expr) -> _Input:
    """Return the task's rows, copied where they are no whole tiles."""
    if spec.reads_x:
        dtype, width = stored_dtype(spec.x), 4 // spec.word_codes
        flat = T.decl_buffer((T.cast(arguments.m, "int64") * spec.in_features,), dtype, data=arguments.x.data)
        return _Input(flat, T.cast(first_row, "int64") * spec.in_features, spec.in_features, width)
    pitch = (spec.chunks | 1) * CHUNK  # an odd number of cache lines, so that rows do not share cache sets
    packed = T.alloc_buffer((spec.task_rows * pitch,), "int32")
    copy = PackedInput(packed, CHUNK, spec.x == "int8")
    with T.serial(0, rows) as i:
        pack_row(spec, arguments, copy, first_row + i, i * pitch)
    return _Input(packed, T.int64(0), pitch, 4)

"""Linear layers of any bit width as one TIR kernel: x [m, k] times a packed weight, then the dialect's epilogue.

One task packs its rows of x side by side, ``[row block][k / 16 words][rows][16 words]``, so that the register block reads them from one
stream without cache conflicts. Then, for each block of columns and each stretch of k, the panel of weights ``[words][vectors][16 columns]``
meets every row block while it lies in the first-level cache. A word is 4 bytes: four codes that one lane multiplies and adds
(``byte_products``), two bfloat16 (``bfloat16``), or one float. Sums of integers are exact: x is made unsigned (or signed, as the
instruction set multiplies) by flipping its top bit, weights are signed, and both shifts are taken back by column sums (see
``matmul_finish``). Where there are tile registers, tasks of integers are those of ``matmul_tiles`` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.cpu.kernels.bfloat16 import imported, stored_dtype
from qcompile.backends.cpu.kernels.lookup import LEVELS
from qcompile.backends.cpu.kernels.matmul_finish import Sums, finish_row
from qcompile.backends.cpu.kernels.matmul_input import PackedInput, pack_row
from qcompile.backends.cpu.kernels.matmul_panel import Arguments, Panel, make_panel, multiply_add
from qcompile.backends.cpu.kernels.matmul_rows import ceildiv, dispatch, emit_few_rows
from qcompile.backends.cpu.kernels.matmul_spec import CHUNK, LANES, Linear
from qcompile.backends.cpu.kernels.matmul_tiles import emit_tiled_task
from qcompile.backends.cpu.kernels.tiles import prefetch
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, rounded, spread
from qcompile.backends.lowering.sequence import IN_PLACE
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

_ROW_STEP = 4  # rows of a task are a multiple: the register block has a variant for such a remainder
_FEW_OPERATIONS = 2 << 20  # below this many multiply-adds, waking another thread costs more than it saves
_ROW_COST = 8  # of a byte of x against one of 8-bit weights: x lies in the cache of the core that made it, weights in one that all share
_SHARED_BYTES = 1 << 20  # weights up to this size stay in each core's second-level cache: then rows are split, not columns


def linear(spec: Linear, *, easy: bool = False) -> tirx.PrimFunc:
    """Return the kernel of a linear layer. ``easy``: the scale of the result is known to be (``code_rounding.is_easy``).

    Its arguments are, in this order and only where the layer has them: x [m, k]; x_scale float32 [1] or [m]; x_zero_point
    int32 [1] or [m]; the arrays of ``pack.pack_linear``; residual float32 [m, n]; out_scale float32 [1]; out_zero_point int32 [1];
    the result [m, n], which may lie in the residual's place, or one for each of ``spec.parts``.
    """
    in_place = spec.epilogue.residual and spec.epilogue.output == "float32"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("linear")
            T.func_attr({"tirx.noalias": not in_place})
            arguments = _declare(spec)
            arguments.easy_scale = easy
            with imported(spec.pairs):
                _emit(spec, arguments)
    kernel = builder.get()
    # Each result is finished once, from the one element of the residual that it may replace (``matmul_finish``).
    return kernel.with_attr(IN_PLACE, len(kernel.params) - 2) if in_place else kernel


def _declare(spec: Linear) -> Arguments:
    m = T.int64()
    IRBuilder.name("m", m)

    def buffer(name: str, shape: tuple[Expr | int, ...], dtype: str) -> Expr:
        matched = T.match_buffer(T.arg(f"{name}_handle", T.handle()), shape, dtype)
        IRBuilder.name(name, matched)
        return matched

    k, n, per_column = spec.in_features, spec.out_features, (spec.padded_columns,)
    granule = (m,) if spec.x_per_token else (1,)
    found = {"x": buffer("x", (m, k), stored_dtype(spec.x))}
    if spec.integer:
        found["x_scale"] = buffer("x_scale", granule, "float32")
        if spec.x_affine:
            found["x_zero"] = buffer("x_zero_point", granule, "int32")
    found["weight"] = buffer("weight", spec.weight_shape, "float32" if spec.bits == 32 else "int8")
    if spec.has_sums:
        found["sums"] = buffer("weight_sums", per_column, "int32")
    if spec.scaled:
        found["scale"] = buffer("weight_scale", spec.scale_shape, "float32")
    if spec.weight_affine:
        found["weight_zero"] = buffer("weight_zero_point", spec.scale_shape, "uint8")
    if spec.epilogue.bias != "none":
        found["bias"] = buffer("bias", per_column, spec.epilogue.bias)
    if spec.codebook:
        found["table"] = buffer("table", (1, 1, LEVELS), "int8" if spec.integer else "float32")
    if spec.epilogue.residual:
        found["residual"] = buffer("residual", (m, n), "float32")
    if spec.epilogue.codes:
        found["out_scale"] = buffer("out_scale", (1,), "float32")
        found["out_zero"] = buffer("out_zero_point", (1,), "int32")
    results = [buffer(f"y{i}", (m, part.columns), spec.epilogue.dtype) for i, part in enumerate(spec.results)]
    return Arguments(m, results=results, **found)


def _emit(spec: Linear, arguments: Arguments) -> None:
    """Emit the body for few rows and the one for many; both read the same packed weight."""
    m = hold(T.cast(arguments.m, "int32"))
    if not spec.few_rows:
        _emit_tasks(spec, arguments, m)
        return
    with T.If(T.And(m >= 1, m <= spec.few_rows[-1])):  # no rows are no tasks of the other body
        with T.Then():
            emit_few_rows(spec, arguments, m)
        with T.Else():
            _emit_tasks(spec, arguments, m)


# ---- tasks ----------------------------------------------------------------------------------------------------------------


def _emit_tasks(spec: Linear, arguments: Arguments, m: Expr) -> None:
    """Cut rows and columns into tasks, as many as a multiple of the threads, and emit the body of one."""
    tile, n_blocks = spec.tile, spec.column_blocks
    threads = tile.threads
    tasks = ceildiv(m, spec.task_rows)
    few = m * (spec.in_features * spec.out_features // 1024) < _FEW_OPERATIONS // 1024
    columns = T.Select(few, 1, min(threads, n_blocks))
    if spec.tiled:  # every task reads its rows of x and its columns of weights: whichever costs more is read once
        # Fewer bits cost unpacking too: as much as their bytes, at least.
        x_cost = m * (32 // spec.word_codes) * (_ROW_COST if spec.bits >= 8 else 1)
        by_rows = hold(T.And(x_cost > spec.out_features * spec.bits, m >= tile.rows * threads))
        tasks = T.Select(T.And(T.Not(few), by_rows), ceildiv(tasks, threads) * threads, tasks)
        columns = T.Select(by_rows, 1, columns)
    elif spec.words * spec.padded_columns * 4 <= _SHARED_BYTES:
        tasks = hold(T.max(tasks, T.Select(m >= 2 * tile.rows * threads, threads, 1)))
        tasks = T.Select(tasks > 1, ceildiv(tasks, threads) * threads, tasks)
        columns = T.Select(tasks > 1, 1, columns)
    row_tasks, column_tasks = hold(tasks), hold(columns)
    task_rows = hold(ceildiv(ceildiv(m, row_tasks), _ROW_STEP) * _ROW_STEP)
    task_blocks = hold(ceildiv(n_blocks, column_tasks))
    with T.parallel(0, row_tasks * column_tasks) as task:
        first_row = hold(T.truncdiv(task, column_tasks) * task_rows)
        first_block = hold(T.truncmod(task, column_tasks) * task_blocks)
        rows = hold(T.max(T.min(task_rows, m - first_row), 0))
        blocks = hold(T.max(T.min(task_blocks, n_blocks - first_block), 0))
        if spec.tiled:
            with T.If(rows > 0), T.Then():
                emit_tiled_task(spec, arguments, first_row, rows, first_block, blocks)
        else:
            _emit_task(spec, arguments, first_row, rows, first_block, blocks)


def _emit_task(spec: Linear, arguments: Arguments, first_row: Expr, rows: Expr, first_block: Expr, blocks: Expr) -> None:
    """Emit one task: pack its rows of x, then finish its blocks of columns one after another."""
    tile, stretch = spec.tile, spec.stretch
    arguments.begin_task(spec)
    packed = T.alloc_buffer((spec.task_rows * spec.chunks * CHUNK,), "int32" if spec.integer or spec.pairs else "float32")
    _emit_pack(spec, arguments, packed, first_row, rows)
    row_blocks = hold(ceildiv(rows, tile.rows))
    whole = spec.words <= stretch
    sums = T.alloc_buffer(((tile.rows if whole else spec.task_rows) * spec.columns,), spec.sum_dtype)
    finished = Sums(sums, spec.x_shift)
    panel = make_panel(spec, arguments)

    def row_block(block: Expr, column_block: Expr, first_word: Expr, words: Expr, keep: bool) -> None:
        left = hold(rows - block * tile.rows)
        first_sum = 0 if whole else block * (tile.rows * spec.columns)
        place = _Place(column_block, block, first_row + block * tile.rows, left, first_word, words, first_sum)
        dispatch(left, spec.row_variants, lambda count: _emit_product(spec, arguments, packed, panel, sums, place, count, keep))

    def finish(block: Expr, column_block: Expr) -> None:
        first_sum = 0 if whole else block * (tile.rows * spec.columns)
        with T.serial(0, T.min(tile.rows, rows - block * tile.rows)) as i:
            finish_row(spec, arguments, finished, first_sum + i * spec.columns, first_row + block * tile.rows + i, column_block)

    def columns(column_block: Expr) -> None:
        panel.fill(column_block, 0, min(stretch, spec.words))
        if whole:
            with T.serial(0, row_blocks) as block:
                row_block(block, column_block, 0, spec.words, keep=False)
                finish(block, column_block)
            return
        with T.serial(0, row_blocks) as block:
            row_block(block, column_block, 0, stretch, keep=False)
        with T.serial(1, -(-spec.words // stretch)) as part:
            first = hold(part * stretch)
            words = hold(T.min(stretch, spec.words - first))
            panel.fill(column_block, first, words)
            with T.serial(0, row_blocks) as block:
                row_block(block, column_block, first, words, keep=True)
        with T.serial(0, row_blocks) as block:
            finish(block, column_block)

    with T.serial(0, blocks) as b:
        columns(hold(first_block + b))


def _emit_pack(spec: Linear, arguments: Arguments, packed: Expr, first_row: Expr, rows: Expr) -> None:
    """Copy rows of x into ``packed``; the last block repeats the last row up to a whole block."""
    tile_rows = spec.tile.rows
    copy = PackedInput(packed, tile_rows * CHUNK, spec.signed_x)
    with T.serial(0, ceildiv(rows, tile_rows)) as block:
        with T.serial(0, tile_rows) as i:
            start = hold(block * (spec.chunks * tile_rows * CHUNK) + i * CHUNK)
            pack_row(spec, arguments, copy, first_row + T.min(block * tile_rows + i, rows - 1), start)


# ---- the register block ---------------------------------------------------------------------------------------------------


@dataclass
class _Place:
    """Where a register block stands."""

    column_block: Expr
    block: Expr  # of rows
    first_row: Expr
    rows: Expr  # that are left from first_row on, perhaps more than the block holds
    first_word: Expr
    words: Expr
    first_sum: Expr


def _emit_product(
    spec: Linear, arguments: Arguments, packed: Expr, panel: Panel, sums: Expr, place: _Place, count: int, keep: bool
) -> None:  # fmt: skip
    """Add (``keep``) or store the product of ``count`` rows by one panel to ``sums``."""
    tile, dtype = spec.tile, "int32" if spec.integer else "float32"
    lanes, zero = T.ramp(0, 1, LANES), spread(T.int32(0) if spec.integer else T.float32(0), LANES)
    total = [[register(dtype, LANES) for _ in range(tile.vectors)] for _ in range(count)]
    spots = [(i, j, T.ramp(place.first_sum + i * spec.columns + j * LANES, 1, LANES)) for i in range(count) for j in range(tile.vectors)]
    row_stride = tile.rows * CHUNK
    start = hold(place.block * (spec.chunks * row_stride) + T.truncdiv(place.first_word, CHUNK) * row_stride)

    def step(offset: Expr, word: Expr) -> None:
        weights = [T.Bind(panel.vector(place.column_block, place.first_word, word, j)) for j in range(tile.vectors)]
        if count == tile.rows and not spec.unpacks:
            _prefetch_next_panel(spec, arguments, place.column_block, place.first_word + word)
        for i in range(count):
            value = T.Bind(spread(packed[start + offset + i * CHUNK], LANES))
            for j in range(tile.vectors):
                T.buffer_store(total[i][j], multiply_add(spec, total[i][j][lanes], value, weights[j]), [lanes])

    def run(words: Expr, first: Expr, offset: Expr) -> None:
        """Emit the steps over some words, the first one at ``offset`` in packed x."""
        with T.serial(0, T.truncdiv(words, CHUNK)) as chunk:
            with T.serial(0, CHUNK) as w:
                step(offset + chunk * row_stride + w, first + chunk * CHUNK + w)
        if spec.words % CHUNK:
            with T.serial(0, T.truncmod(words, CHUNK)) as w:
                step(offset + T.truncdiv(words, CHUNK) * row_stride + w, first + T.truncdiv(words, CHUNK) * CHUNK + w)

    if not (spec.group and spec.integer):
        for i, j, spot in spots:
            T.buffer_store(total[i][j], sums[spot] if keep else zero, [lanes])
        run(place.words, 0, 0)
        for i, j, spot in spots:
            T.buffer_store(sums, total[i][j][lanes], [spot])
        return
    if not keep:
        for _, _, spot in spots:
            T.buffer_store(sums, spread(T.float32(0), LANES), [spot])
    size = spec.group_words
    with T.serial(0, T.truncdiv(place.words, size)) as g:
        for i, j, _ in spots:
            T.buffer_store(total[i][j], zero, [lanes])
        if size % CHUNK:  # several groups in one chunk
            first = hold(g * size)
            with T.serial(0, size) as w:
                step(T.truncdiv(first, CHUNK) * row_stride + T.truncmod(first, CHUNK) + w, first + w)
        else:
            run(size, g * size, g * (size // CHUNK) * row_stride)
        group = T.truncdiv(place.first_word, size) + g
        for i, j, spot in spots:
            granule = place.first_row + T.min(i, place.rows - 1) if spec.x_per_token else 0
            exact = total[i][j][lanes] - panel.excess(g, j, granule) if spec.shifted else total[i][j][lanes]
            scale = arguments.scale[place.column_block, group, T.ramp(j * LANES, 1, LANES)]
            T.buffer_store(sums, sums[spot] + rounded(T.cast(exact, "float32x16") * scale), [spot])


def _prefetch_next_panel(spec: Linear, arguments: Arguments, column_block: Expr, word: Expr) -> None:
    """Ask for the word one panel ahead; panels lie one behind another, so this also reaches into the next block of columns.

    A first touch from memory would stall a fifth of the time at 128 rows. After the last panel the hint is void.
    """
    ahead = min(spec.tile.words, spec.words)
    for j in range(spec.tile.vectors):
        address = T.address_of(arguments.weight[column_block, word + ahead, j * (LANES if spec.bits == 32 else 64)])
        prefetch(address)

"""The end of a linear kernel's row: from finished sums to results in the dialect's order, ragged last columns included."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qcompile.backends.cpu.kernels.bfloat16 import narrowed
from qcompile.backends.cpu.kernels.byte_codes import VECTORS, by_vector
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_panel import Arguments
from qcompile.backends.cpu.kernels.matmul_spec import LANES, Linear
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, rounded, spread
from tvm import tirx
from tvm.script.ir_builder import tirx as T


@dataclass
class Sums:
    """A local buffer of finished sums, a block of columns for each row.

    Attributes:
        buffer: int32 sums over k of (x + added)(w - w_zero), or float32 where x is float or the weight in groups.
        added: what packing added to the codes of x.
        exact: zero points, and an int32 bias, are in the sums already.
    """

    buffer: Expr
    added: int
    exact: bool = False


def finish_rows(spec: Linear, arguments: Arguments, sums: Sums, first_sum: Expr, row: Expr, column_block: Expr, count: Expr) -> None:
    """Turn ``count`` rows of a block of columns into results; codes of whole blocks 64 at a time, where registers hold so many bytes."""

    def each(first: Expr, count: Expr) -> None:
        with T.serial(0, count) as i:
            finish_row(spec, arguments, sums, first_sum + (first + i) * spec.columns, row + first + i, column_block)

    def packed() -> None:
        step = VECTORS // spec.tile.vectors
        with T.serial(0, T.truncdiv(count, step)) as i:
            _store_bytes(spec, arguments, sums, first_sum + i * (step * spec.columns), row + i * step, column_block)
        each(T.truncdiv(count, step) * step, T.truncmod(count, step))

    whole, ragged = divmod(spec.out_features, spec.columns)
    if arguments.bytes is None or not whole:
        each(0, count)
    elif not ragged:
        packed()
    else:
        with T.If(column_block < whole):
            with T.Then():
                packed()
            with T.Else():
                each(0, count)


def _store_bytes(spec: Linear, arguments: Arguments, sums: Sums, first_sum: Expr, row: Expr, column_block: Expr) -> None:
    """Store the codes of the next rows, four vectors together."""
    vectors, values = spec.tile.vectors, []
    rows = [hold(T.cast(row + i, "int64")) for i in range(VECTORS // vectors)]
    for i, row64 in enumerate(rows):
        for j in range(vectors):
            column = column_block * spec.columns + j * LANES
            total = sums.buffer[T.ramp(first_sum + i * spec.columns + j * LANES, 1, LANES)]
            if spec.integer and not spec.group and not sums.exact:
                total = _exact_sum(spec, arguments, total, sums.added, row64, column)
            y, bias = _scaled(spec, arguments, total, row64, column)
            values.append(y if bias is None else rounded(y) + bias)
    codes = T.Bind(by_vector(arguments.bytes.bytes(values)))
    for i, row64 in enumerate(rows):
        part = tirx.Shuffle([codes], list(range(i * spec.columns, (i + 1) * spec.columns)))
        T.buffer_store(arguments.results[0], part, [row64, T.ramp(column_block * spec.columns, 1, spec.columns)])


@dataclass(frozen=True)
class _Result:
    """A result [m, columns], and which packed column is its first."""

    y: Expr
    columns: int
    first: int
    epilogue: Epilogue


def finish_row(spec: Linear, arguments: Arguments, sums: Sums, first_sum: Expr, row: Expr, column_block: Expr) -> None:
    """Turn the finished sums of one row and one block of columns, from ``first_sum`` on, into results."""
    found, block = [], 0
    for y, part in zip(arguments.results, spec.results, strict=True):
        epilogue = dataclasses.replace(spec.epilogue, activation=part.activation)
        found.append((block, _Result(y, part.columns, block * spec.columns, epilogue)))
        block += -(-part.columns // spec.columns)

    def choose(results: list[tuple[int, _Result]]) -> None:
        if len(results) == 1:
            _finish_row(spec, arguments, results[0][1], sums, first_sum, row, column_block)
            return
        with T.If(column_block < results[1][0]):
            with T.Then():
                choose(results[:1])
            with T.Else():
                choose(results[1:])

    choose(found)


def _finish_row(
    spec: Linear, arguments: Arguments, result: _Result, sums: Sums, first_sum: Expr, row: Expr, column_block: Expr
) -> None:  # fmt: skip
    n = result.first + result.columns
    row64 = hold(T.cast(row, "int64"))
    for j in range(spec.tile.vectors):
        column = hold(column_block * spec.columns + j * LANES)
        total = sums.buffer[T.ramp(first_sum + j * LANES, 1, LANES)]
        if spec.integer and not spec.group and not sums.exact:
            total = _exact_sum(spec, arguments, total, sums.added, row64, column)
        if n % LANES == 0:
            if n % spec.columns == 0:
                _store(spec, arguments, result, total, row64, column)
            else:
                with T.If(column < n):
                    with T.Then():
                        _store(spec, arguments, result, total, row64, column)
            continue
        with T.If(column + LANES <= n):
            with T.Then():
                _store(spec, arguments, result, total, row64, column)
            with T.Else():
                _store_ragged(spec, arguments, result, total, row64, column)


def _exact_sum(spec: Linear, arguments: Arguments, total: Expr, added: int, row: Expr, column: Expr) -> Expr:
    """Return the int32 sum over k of (x - x_zero)(w - w_zero), plus an int32 bias, from that over (x + added)(w - w_zero).

    It is total - (x_zero + added) sum w, with the columns' sums of w - w_zero packed.
    """
    lanes = T.ramp(column, 1, LANES)
    if spec.x_affine:
        zero = arguments.x_zero[row if spec.x_per_token else 0]
        total = total - spread(zero + T.int32(added), LANES) * arguments.sums[lanes]
    elif added:
        total = total - spread(T.int32(added), LANES) * arguments.sums[lanes]
    return total + arguments.bias[lanes] if spec.epilogue.bias == "int32" else total


def _store(spec: Linear, arguments: Arguments, result: _Result, total: Expr, row: Expr, column: Expr) -> None:
    lanes = T.ramp(column - result.first, 1, LANES)
    residual = arguments.residual[row, lanes] if arguments.residual is not None else None
    T.buffer_store(result.y, _finished(spec, arguments, result.epilogue, total, residual, row, column), [row, lanes])


def _store_ragged(spec: Linear, arguments: Arguments, result: _Result, total: Expr, row: Expr, column: Expr) -> None:
    """Store the last, partly filled vector of a row, element by element."""
    y = register(spec.epilogue.dtype, LANES)
    start, inside = column - result.first, result.first + result.columns - column
    residual, lanes = None, T.ramp(0, 1, LANES)
    if arguments.residual is not None:
        found = register("float32", LANES)
        T.buffer_store(found, spread(T.float32(0), LANES), [lanes])
        with T.serial(0, inside) as i:
            T.buffer_store(found, arguments.residual[row, start + i], [i])
        residual = found[lanes]
    T.buffer_store(y, _finished(spec, arguments, result.epilogue, total, residual, row, column), [lanes])
    with T.serial(0, inside) as i:
        T.buffer_store(result.y, y[i], [row, start + i])


def _scaled(spec: Linear, arguments: Arguments, total: Expr, row: Expr, column: Expr) -> tuple[Expr, Expr | None]:
    """Return 16 sums times their scales, and the bias that is still to be added."""
    lanes = T.ramp(column, 1, LANES)
    bias = arguments.bias[lanes] if spec.epilogue.bias == "float32" else None
    y = T.cast(total, "float32x16")
    if spec.scaled and not spec.group:
        y = rounded(y * arguments.scale[lanes])
    if spec.integer:
        y = rounded(y * spread(arguments.x_scale[row if spec.x_per_token else 0], LANES))
    return y, bias


def _finished(
    spec: Linear, arguments: Arguments, epilogue: Epilogue, total: Expr, residual: Expr, row: Expr, column: Expr
) -> Expr:  # fmt: skip
    """Return 16 results from 16 finished sums; those of integers are exact."""
    y, bias = _scaled(spec, arguments, total, row, column)
    y = dataclasses.replace(epilogue, output="float32").apply(y, bias, residual, None, None)
    if epilogue.output == "bfloat16":
        return narrowed(rounded(y))
    return y if arguments.rounding is None else T.cast(arguments.rounding.codes(rounded(y)), f"{epilogue.output}x{LANES}")

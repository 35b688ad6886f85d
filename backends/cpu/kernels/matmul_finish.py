"""The end of a linear kernel's row: from finished sums to results in the dialect's order, ragged last columns included."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qcompile.backends.cpu.kernels.matmul_panel import Arguments
from qcompile.backends.cpu.kernels.matmul_spec import LANES, Linear
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, rounded, spread
from tvm.script.ir_builder import tirx as T


@dataclass
class Sums:
    """A local buffer of finished sums, a block of columns for each row.

    Attributes:
        buffer: int32 sums over k of (x + added)(w - w_zero), or float32 where x is float or the weight in groups.
        added: what packing added to the codes of x.
    """

    buffer: Expr
    added: int


def finish_row(spec: Linear, arguments: Arguments, sums: Sums, first_sum: Expr, row: Expr, column_block: Expr) -> None:
    """Turn the finished sums of one row and one block of columns, from ``first_sum`` on, into results."""
    n = spec.out_features
    row64 = hold(T.cast(row, "int64"))
    for j in range(spec.tile.vectors):
        column = hold(column_block * spec.columns + j * LANES)
        total = sums.buffer[T.ramp(first_sum + j * LANES, 1, LANES)]
        if spec.integer and not spec.group:
            total = _exact_sum(spec, arguments, total, sums.added, row64, column)
        if n % LANES == 0:
            if n % spec.columns == 0:
                _store(spec, arguments, total, row64, column)
            else:
                with T.If(column < n):
                    with T.Then():
                        _store(spec, arguments, total, row64, column)
            continue
        with T.If(column + LANES <= n):
            with T.Then():
                _store(spec, arguments, total, row64, column)
            with T.Else():
                _store_ragged(spec, arguments, total, row64, column)


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


def _store(spec: Linear, arguments: Arguments, total: Expr, row: Expr, column: Expr) -> None:
    lanes = T.ramp(column, 1, LANES)
    residual = arguments.residual[row, lanes] if arguments.residual is not None else None
    T.buffer_store(arguments.y, _result(spec, arguments, total, residual, row, column), [row, lanes])


def _store_ragged(spec: Linear, arguments: Arguments, total: Expr, row: Expr, column: Expr) -> None:
    """Store the last, partly filled vector of a row, element by element."""
    y = register(spec.epilogue.output, LANES)
    inside = spec.out_features - column
    residual, lanes = None, T.ramp(0, 1, LANES)
    if arguments.residual is not None:
        found = register("float32", LANES)
        T.buffer_store(found, spread(T.float32(0), LANES), [lanes])
        with T.serial(0, inside) as i:
            T.buffer_store(found, arguments.residual[row, column + i], [i])
        residual = found[lanes]
    T.buffer_store(y, _result(spec, arguments, total, residual, row, column), [lanes])
    with T.serial(0, inside) as i:
        T.buffer_store(arguments.y, y[i], [row, column + i])


def _result(spec: Linear, arguments: Arguments, total: Expr, residual: Expr | None, row: Expr, column: Expr) -> Expr:
    """Return 16 results from 16 finished sums; those of integers are exact."""
    lanes = T.ramp(column, 1, LANES)
    granule = row if spec.x_per_token else 0
    epilogue, bias = spec.epilogue, arguments.bias[lanes] if arguments.bias is not None else None
    y = T.cast(total, "float32x16")
    if spec.bits < 32 and not spec.group:
        y = rounded(y * arguments.scale[lanes])
    if spec.integer:
        y = rounded(y * spread(arguments.x_scale[granule], LANES))
    y = dataclasses.replace(epilogue, output="float32").apply(y, None if epilogue.bias == "int32" else bias, residual, None, None)
    return y if arguments.rounding is None else T.cast(arguments.rounding.codes(rounded(y)), f"{epilogue.output}x{LANES}")

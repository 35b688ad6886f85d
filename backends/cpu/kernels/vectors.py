"""Codes of coupled channels: the nearest vector of a table for each run of channels (dialect ``qc.vector_codes``)."""

from __future__ import annotations

from qcompile.backends.cpu.kernels.registers import (
    LANES,
    argument,
    fold,
    function,
    ramp,
    serial_or_parallel,
    size,
    splat,
    store,
)  # fmt: skip
from qcompile.backends.cpu.kernels.stored_rows import VECTORS
from qcompile.backends.cpu.kernels.vector import register, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def vector_codes(width: int, coupled: int) -> tirx.PrimFunc:
    """Build ``f(x, table, codes)``: x float32 [rows, width], table float32 [width / coupled, coupled, 256], codes uint8 [rows, runs].

    Lanes are vectors of the table, which stands transposed for that. Squares are rounded before they are added, as in the dialect, and of
    equal distances the first place counts: codes agree bit for bit.
    """
    runs = width // coupled
    with function("vector_codes") as builder:
        rows = size("rows")
        x, table = argument("x", (rows, width)), argument("table", (runs, coupled, VECTORS))
        codes = argument("codes", (rows, runs), "uint8")

        def row(index: tirx.Var) -> None:
            with T.serial(runs) as run:
                channels = [T.Bind(splat(x[index, run * coupled + i])) for i in range(coupled)]
                least, block = register("float32", LANES), register("int32", LANES)
                store(least, splat(float("inf")), ramp(0))
                store(block, splat(T.int32(0)), ramp(0))
                with T.serial(VECTORS // LANES) as b:
                    distance = None
                    for i, channel in enumerate(channels):
                        difference = T.Bind(channel - table[run, i, ramp(b * LANES)])
                        square = rounded(difference * difference)
                        distance = square if distance is None else rounded(distance + square)
                    distance = T.Bind(distance)
                    held = T.Bind(least[ramp(0)])
                    store(block, tirx.Select(distance < held, splat(T.cast(b, "int32")), block[ramp(0)]), ramp(0))
                    store(least, tirx.Select(distance < held, distance, held), ramp(0))
                smallest = T.Bind(fold(least[ramp(0)], T.min))
                places = T.Bind(block[ramp(0)] * splat(T.int32(LANES)) + ramp(T.int32(0)))
                first = fold(tirx.Select(least[ramp(0)] <= splat(smallest), places, splat(T.int32(VECTORS - 1))), T.min)
                store(codes, T.cast(first, "uint8"), index, run)

        serial_or_parallel(rows, rows * width * VECTORS, row)
    return builder.get()

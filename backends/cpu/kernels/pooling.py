"""Pooling over NHWC images: maximum and mean of windows, mean of the whole image."""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Index,
    argument,
    each_vector,
    function,
    load,
    local,
    ramp,
    serial_or_parallel,
    size,
    splat,
    store,
    store_row,
)  # fmt: skip
from tvm import tirx
from tvm.tirx.script.builder import ir as T

_LOWEST = {"float32": -3.4028234663852886e38, "int8": -128, "uint8": 0}


def mean_image(channels: int, height: int, width: int) -> tirx.PrimFunc:
    """Build ``f(x, out)``: x float32 [batch, height, width, channels] to its mean over the image, out float32 [batch, channels]."""
    with function("mean_image") as builder:
        batch = size("batch")
        x, out = argument("x", (batch, height, width, channels)), argument("out", (batch, channels))

        def image(index: Index) -> None:
            def channel(start: Index, mask: Any, slot: int) -> None:
                total = local(LANES)
                store(total, splat(0.0), ramp(0))
                with T.serial(height) as y, T.serial(width) as column:
                    store(total, total[ramp(0)] + load(x, mask, index, y, column, start), ramp(0))
                store_row(out, total[ramp(0)] / splat(float(height * width)), mask, index, start)

            each_vector(channels, channel)

        serial_or_parallel(batch, batch * (height * width * channels), image, 1 << 17)
    return builder.get()


def max_pool(
    channels: int, height: int, width: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1), dtype: str = "float32",
) -> tirx.PrimFunc:  # fmt: skip
    """Build ``f(x, out)``: x [batch, height, width, channels] to out [batch, out_height, out_width, channels], float32, int8 or uint8.

    Codes of one scale are ordered as their values are, so their maximum is the code of the maximum. Padding never wins.
    """
    rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1
                     for n, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True))  # fmt: skip
    with function("max_pool") as builder:
        batch = size("batch")
        x = argument("x", (batch, height, width, channels), dtype)
        out = argument("out", (batch, rows, columns, channels), dtype)
        lowest = T.float32(_LOWEST[dtype]) if dtype == "float32" else T.cast(T.int32(int(_LOWEST[dtype])), dtype)

        def row(index: Index) -> None:
            image, y = T.Bind(index // rows), T.Bind(index % rows)
            with T.serial(columns) as column:

                def channel(start: Index, mask: Any, slot: int) -> None:
                    top = local(LANES, dtype)
                    store(top, splat(lowest), ramp(0))
                    with T.serial(kernel[0]) as i, T.serial(kernel[1]) as j:
                        from_y = T.Bind(y * stride[0] - padding[0] + i * dilation[0])
                        from_x = T.Bind(T.cast(column * stride[1] - padding[1] + j * dilation[1], "int64"))
                        with T.If(tirx.all(from_y >= 0, from_y < height, from_x >= 0, from_x < width)), T.Then():
                            store(top, T.max(top[ramp(0)], load(x, mask, image, from_y, from_x, start)), ramp(0))
                    store_row(out, top[ramp(0)], mask, image, y, column, start)

                each_vector(channels, channel)

        serial_or_parallel(batch * rows, batch * (rows * columns * kernel[0] * kernel[1] * channels), row, 1 << 18)
    return builder.get()

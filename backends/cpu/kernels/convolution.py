"""2-d convolution over NHWC images as one TIR kernel, int8 or float32, then the dialect's epilogue.

One task packs the im2col rows of its output pixels, ``[pixel][kernel row, kernel column, channel]``, into a local buffer; in NHWC a
kernel row of a pixel is one run of bytes. Then each panel of weights ``[words][columns]`` meets every block of rows. A word is 4 bytes:
four codes that one lane multiplies and adds (``byte_products``), or one float. Integer sums are exact: x is made unsigned (or
signed, see ``Convolution.x_shift``), weights are signed, and zero points are taken back by sums of weights and of rows (see
``Arguments.start``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels.convolution_arguments import Arguments, multiply_add
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.convolution_tiles import tiled_convolution
from qcompile.backends.cpu.kernels.registers import (
    Index,
    below,
    function,
    long,
    ramp,
    serial_or_parallel,
    splat,
    store,
)  # fmt: skip
from qcompile.backends.cpu.kernels.runs import copy_run, fill_run
from tvm import tirx
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]


def convolution(spec: Convolution, *, easy: bool = False) -> tirx.PrimFunc:
    """Return the kernel of a convolution of any groups. ``easy``: the scales of codes that it makes are (``code_rounding.is_easy``).

    Its arguments are, in this order and only where the layer has them:

    x [batch, height, width, channels]; x_scale float32 [1]; x_zero_point int32 [1] (``spec.x_affine``); the arrays of
    ``pack_convolution``; residual float32 [batch, out_height, out_width, out_channels]; out_scale float32 [1]; out_zero_point
    int32 [1]; where ``spec.sum`` adds other codes: these, of the residual's shape, their scale float32 [1] and zero point int32 [1], and
    those of the sum's codes; the results (``spec.results``), of the residual's shape.
    """
    if spec.tiled:
        return tiled_convolution(spec, easy=easy)
    with function("convolution") as builder:
        kernel = _Kernel(spec, easy)
        rows = kernel.task_blocks * spec.tile[0]
        row_tasks = (kernel.pixels + (rows - 1)) // rows
        kernel.loop(row_tasks * kernel.column_tasks)
    return builder.get()


def pack_convolution(
    spec: Convolution, weight: Array, scale: Array | None = None, zero_point: Array | None = None, bias: Array | None = None
) -> list[Array]:
    """Return the constants of ``convolution(spec)`` in its argument order: weight, sums, scale, zero points, bias where they exist.

    weight [out_channels, channels / groups, kernel rows, kernel columns]: one code for each element (int8 or uint8), or float32.
    scale float32, zero_point int32: [out_channels] or one for all. bias [out_channels] of the epilogue's bias dtype.

    Raises:
        ValueError: the shape does not agree with ``spec``, or a bias or zero point is missing.
    """
    if weight.shape != (spec.out_channels, spec.group_channels, *spec.kernel):
        raise ValueError(f"a weight of shape {weight.shape} does not fit {spec}")
    shift = 128 if weight.dtype == np.uint8 else 0  # weights are multiplied as signed bytes
    codes = weight.astype(np.int32) - shift if spec.integer else weight
    rows = codes.transpose(0, 2, 3, 1).reshape(spec.groups, spec.group_outputs, spec.depth)
    runs, depth = (spec.plan.runs, spec.plan.run) if spec.tiled else (1, spec.depth)
    shape = (spec.groups, spec.column_blocks * spec.columns, runs, spec.words * spec.word // runs)
    padded = np.zeros(shape, np.int8 if spec.integer else np.float32)
    padded[:, : spec.group_outputs, :, :depth] = rows.reshape(spec.groups, spec.group_outputs, runs, depth)
    panels = padded.reshape(spec.groups * spec.column_blocks, spec.columns, spec.words, spec.word).transpose(0, 2, 1, 3)
    arrays = [np.ascontiguousarray(panels.reshape(spec.weight_shape))]
    zeros = np.broadcast_to(_required(zero_point, "zero points") - shift, (spec.out_channels,)) if spec.weight_affine else None
    if spec.has_sums:
        sums = rows.reshape(spec.out_channels, -1).sum(1)
        arrays.append(_columns(spec, sums if zeros is None else sums - spec.depth * zeros, np.int32))
    if spec.integer:
        arrays.append(_columns(spec, np.broadcast_to(_required(scale, "a scale"), (spec.out_channels,)), np.float32))
    if zeros is not None:
        arrays.append(_columns(spec, zeros, np.int32))
    if spec.epilogue.bias != "none":
        arrays.append(_columns(spec, _required(bias, "a bias"), np.dtype(spec.epilogue.bias)))
    return arrays


def _required(value: Array | None, name: str) -> Array:
    if value is None:
        raise ValueError(f"this convolution has {name}")
    return value


def _columns(spec: Convolution, values: Array, dtype: Any) -> Array:
    padded = np.zeros((spec.groups, spec.column_blocks * spec.columns), dtype)
    padded[:, : spec.group_outputs] = values.reshape(spec.groups, -1)
    return padded.reshape(-1)


# Multiply-adds that one thread does in about 40 us, the cost of waking another: a network of many small convolutions ran at a third of its
# one-thread speed when each of them was split.
INTEGER_SERIAL_WORK = 1 << 23
FLOAT_SERIAL_WORK = 1 << 21


class _Kernel(Arguments):
    """The arguments of one convolution and the statements of its tasks."""

    def __init__(self, spec: Convolution, easy: bool) -> None:
        super().__init__(spec, spec.weight_shape, spec.padded_columns, easy=easy)
        self.task_blocks, self.column_tasks = spec.tasks

    def loop(self, tasks: Index) -> None:
        """Run the tasks, on one thread where there is little work."""
        spec = self.spec
        threshold = INTEGER_SERIAL_WORK if spec.integer else FLOAT_SERIAL_WORK
        if spec.pixels * spec.depth * spec.out_channels > threshold:  # no need to look at the batch
            with T.parallel(tasks) as index:
                self.task(index)
        else:
            serial_or_parallel(tasks, self.pixels * (spec.depth * spec.out_channels), self.task, threshold)

    def task(self, index: Index) -> None:
        """Compute the output pixels and panels of one task."""
        spec, rows = self.spec, self.task_blocks * self.spec.tile[0]
        first = T.Bind(index // self.column_tasks * rows)
        count = T.Bind(T.min(long(rows), self.pixels - first))
        part = T.Bind(index % self.column_tasks)
        panels = -(-spec.column_blocks // self.column_tasks)
        self.packed = T.alloc_buffer((rows * spec.pitch * spec.word,), "uint8" if spec.integer else "float32")
        self.row_sums = T.alloc_buffer((rows,), "int32") if spec.weight_affine else None
        self.acc = T.alloc_buffer((spec.tile[0] * spec.columns,), self.dtype)
        self.begin_task()
        with T.serial(spec.groups) as group:
            with T.serial(count) as row:
                self._pack(first + row, row, group)
            with T.serial(T.max(T.min(long(panels), spec.column_blocks - part * panels), T.int64(0))) as p:
                panel = T.Bind(group * spec.column_blocks + part * panels + p)
                start = [T.Bind(self.start(ramp(panel * spec.columns + j * LANES))) for j in range(spec.tile[1])]
                with T.serial((count + spec.tile[0] - 1) // spec.tile[0]) as block:
                    left = T.Bind(count - block * spec.tile[0])
                    self._product(panel, block, start)
                    with T.serial(T.min(long(spec.tile[0]), left)) as i:
                        self._finish(panel, group, first, block, i)

    # ---- im2col ----

    def _pack(self, pixel: Index, row: Index, group: Index) -> None:
        """Write the im2col row of one output pixel: a run for each kernel row that lies inside the image, else tap by tap."""
        spec = self.spec
        if spec.pointwise:
            self._copy(T.Bind(row * (spec.pitch * spec.word)), spec.group_channels, pixel * spec.channels + group * spec.group_channels)
            self._end_row(row)
            return
        image = T.Bind(pixel // spec.pixels)
        top = T.Bind(pixel // spec.out_width % spec.out_height * spec.stride[0] - spec.padding[0])
        left = T.Bind(pixel % spec.out_width * spec.stride[1] - spec.padding[1])
        channel = T.Bind(group * spec.group_channels)
        base = T.Bind(row * (spec.pitch * spec.word))
        run = spec.kernel[1] * spec.group_channels
        reach = spec.dilation[1] * (spec.kernel[1] - 1)
        padded, zero = any(spec.padding), T.Bind(self.zero())
        joined = spec.groups == 1 and spec.dilation[1] == 1  # the taps of a kernel row follow one another in memory

        def address(y: Index, x: Index) -> Index:
            return ((image * spec.height + y) * spec.width + x) * spec.channels + channel

        def row_inside(y: Index, to: Index) -> None:
            if joined:
                self._copy(to, run, address(y, left))
                return
            for tap in range(spec.kernel[1]):
                self._copy(to + tap * spec.group_channels, spec.group_channels, address(y, left + tap * spec.dilation[1]))

        def row_at_border(y: Index, to: Index) -> None:
            with T.serial(spec.kernel[1]) as tap:
                x = T.Bind(left + tap * spec.dilation[1])
                inside = tirx.all(y >= 0, y < spec.height, x >= 0, x < spec.width)
                _either(
                    inside,
                    lambda: self._copy(to + tap * spec.group_channels, spec.group_channels, address(y, x)),
                    lambda: fill_run(self.packed, to + tap * spec.group_channels, zero, spec.group_channels),
                )

        with T.serial(spec.kernel[0]) as tap:
            y = T.Bind(top + tap * spec.dilation[0])
            to = T.Bind(base + tap * run)
            if not padded:
                row_inside(y, to)
            else:
                inside = tirx.all(y >= 0, y < spec.height, left >= 0, left + reach < spec.width)
                _either(inside, lambda: row_inside(y, to), lambda: row_at_border(y, to))
        self._end_row(row)

    def _end_row(self, row: Index) -> None:
        """Fill the last word of an im2col row and sum its codes where weights have zero points."""
        spec = self.spec
        base = T.Bind(row * (spec.pitch * spec.word))
        for element in range(spec.depth, spec.words * spec.word):
            store(self.packed, T.uint8(0), base + element)
        if self.row_sums is not None:
            store(self.row_sums, T.int32(0), row)
            with T.serial(spec.depth) as i:
                byte = self.packed[base + i]
                store(self.row_sums, self.row_sums[row] + T.cast(T.reinterpret("int8", byte) if spec.signed_x else byte, "int32"), row)

    def _copy(self, to: Index, count: int, start: Index) -> None:
        """Copy a run of x from a flat address, as bytes of the kind that is multiplied."""
        copy_run(self.packed, to, self.flat_x, start, count, 128 if self.spec.x_shift else 0)

    # ---- the register block ----

    def _product(self, panel: Index, block: Index, start: list[Any]) -> None:
        """Multiply one block of rows by one panel into ``acc`` [row][column]."""
        spec = self.spec
        rows, vectors = spec.tile
        acc = T.alloc_buffer((rows * spec.columns,), self.dtype, scope="local")
        for i in range(rows * vectors):
            store(acc, start[i % vectors], ramp(i * LANES))
        base = T.Bind(block * (rows * spec.pitch))
        lanes = LANES * spec.word
        words = T.decl_buffer((self.task_blocks * rows * spec.pitch,), self.dtype, data=self.packed.data)
        with T.serial(spec.words) as word:
            columns = [T.Bind(self.weight[panel, word, ramp(j * lanes, lanes)]) for j in range(vectors)]
            for i in range(rows):
                value = T.Bind(splat(words[base + i * spec.pitch + word]))
                for j, column in enumerate(columns):
                    spot = ramp((i * vectors + j) * LANES)
                    store(acc, multiply_add(acc[spot], value, column, spec.isa), spot)
        for i in range(rows * vectors):
            store(self.acc, acc[ramp(i * LANES)], ramp(i * LANES))

    # ---- the end of a row ----

    def _finish(self, panel: Index, group: Index, first: Index, block: Index, i: Index) -> None:
        """Turn the finished sums of one pixel and one panel into results."""
        spec = self.spec
        row = T.Bind(block * spec.tile[0] + i)
        place = T.Bind((first + row) * spec.out_channels + group * spec.group_outputs)
        for j in range(spec.tile[1]):
            column = T.Bind((panel - group * spec.column_blocks) * spec.columns + j * LANES)
            total = self.acc[ramp(i * spec.columns + j * LANES)]
            lanes = ramp(panel * spec.columns + j * LANES)
            if self.row_sums is not None:
                total = total - splat(self.row_sums[row]) * self.weight_zero[lanes]
            self._store_part(T.Bind(self.scaled(total, lanes)), lanes, place, column)

    def _store_part(self, total: Any, lanes: Any, place: Index, column: Index) -> None:
        """Store those of sixteen columns that exist."""
        outputs = self.spec.group_outputs
        if outputs % self.spec.columns == 0:
            self.store_result(total, lanes, place + column, None)
            return
        with T.If(column < outputs), T.Then():
            if outputs % LANES == 0:
                self.store_result(total, lanes, place + column, None)
                return
            _either(
                column + LANES <= outputs,
                lambda: self.store_result(total, lanes, place + column, None),
                lambda: self.store_result(total, lanes, place + column, below(outputs - column)),
            )


def _either(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()

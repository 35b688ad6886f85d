"""Depthwise convolution over NHWC images as one TIR kernel, int8 or float32, then the dialect's epilogue.

Where a register holds 64 bytes, int8 goes to ``depthwise_words``. Here lanes are channels, in chunks of sixteen; the last chunk overlaps
the one before instead of reaching past the end. A task is one output row: for each chunk it copies the input rows under the kernel, padded,
into a local buffer (a few per cent of the time), so that the sums know no border. For int8, the pixels under four taps are interleaved
byte by byte, and one product of bytes (``byte_products``) multiplies and adds four taps of sixteen channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels.convolution_arguments import Arguments, multiply_add
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.depthwise_words import depthwise_words, interleave, pack_words, takes_words
from qcompile.backends.cpu.kernels.isa import AMX, AVX512_VNNI
from qcompile.backends.cpu.kernels.registers import (
    SERIAL_WORK,
    Index,
    below,
    function,
    load_part,
    ramp,
    serial_or_parallel,
    splat,
    store,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import spread, vector_type
from tvm import tirx
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]


def depthwise(spec: Convolution, *, easy: bool = False) -> tirx.PrimFunc:
    """Return the kernel of a convolution with one input and one output channel in each group; arguments as ``convolution``'s.

    ``easy``: the scale of the result is known to be (``code_rounding.is_easy``).

    Raises:
        ValueError: groups have more than one channel.
    """
    if not spec.groups == spec.channels == spec.out_channels:
        raise ValueError(f"{spec} is not depthwise")
    spec = _without_tiles(spec)
    if takes_words(spec):
        return depthwise_words(spec, easy=easy)
    with function("depthwise") as builder:
        kernel = _Kernel(spec, easy)
        tasks = kernel.batch * spec.out_height
        if spec.pixels * spec.taps * spec.channels > SERIAL_WORK:
            with T.parallel(tasks) as task:
                kernel.task(task)
        else:
            serial_or_parallel(tasks, kernel.pixels * (spec.taps * spec.channels), kernel.task)
    return builder.get()


def _without_tiles(spec: Convolution) -> Convolution:
    """Return the convolution for the vector registers alone: tiles have no use for one channel at a time."""
    return dataclasses.replace(spec, isa=AVX512_VNNI) if spec.isa == AMX else spec


def pack_depthwise(
    spec: Convolution, weight: Array, scale: Array | None = None, zero_point: Array | None = None, bias: Array | None = None
) -> list[Array]:
    """Return the constants of ``depthwise(spec)`` in its argument order; parameters as ``pack_convolution``'s.

    Raises:
        ValueError: the weight's shape does not agree with ``spec``, or a scale, zero point or bias is missing.
    """
    spec, channels = _without_tiles(spec), spec.channels
    if weight.shape != (channels, 1, *spec.kernel):
        raise ValueError(f"a weight of shape {weight.shape} does not fit {spec}")
    missing = (spec.integer and scale is None, spec.weight_affine and zero_point is None, spec.epilogue.bias != "none" and bias is None)
    if any(missing):
        raise ValueError(f"{spec} needs {', '.join(n for n, m in zip(('a scale', 'zero points', 'a bias'), missing, strict=True) if m)}")
    shift = 128 if weight.dtype == np.uint8 else 0  # weights are multiplied as signed bytes
    taps = weight.reshape(channels, *spec.kernel).astype(np.int32 if spec.integer else np.float32) - shift
    packed, order = pack_words(spec, taps) if takes_words(spec) else _pack_taps(spec, taps.reshape(channels, -1))

    def ordered(values: Any, dtype: Any) -> Array:
        return np.ascontiguousarray(np.broadcast_to(np.asarray(values), (channels,))[order], dtype)

    arrays = [packed]
    zeros = np.broadcast_to(zero_point - shift, (channels,)) if zero_point is not None and spec.weight_affine else None
    if spec.has_sums:
        sums = taps.reshape(channels, -1).sum(1)
        arrays.append(ordered(sums if zeros is None else sums - spec.taps * zeros, np.int32))
    if spec.integer:
        arrays.append(ordered(scale, np.float32))
    if zeros is not None:
        arrays.append(ordered(zeros, np.int32))
    if spec.epilogue.bias != "none":
        arrays.append(ordered(bias, np.dtype(spec.epilogue.bias)))
    return arrays


def _chunks(spec: Convolution) -> list[int]:
    """Return the first channel of each chunk of sixteen; fewer than 16 channels are one chunk, partly empty."""
    return [*range(0, spec.channels - LANES + 1, LANES), *([max(0, spec.channels - LANES)] if spec.channels % LANES else [])]


def _groups(spec: Convolution) -> int:
    """Return the vectors of weights for sixteen channels: four taps each for int8, one for float."""
    return -(-spec.taps // spec.word)


def _pack_taps(spec: Convolution, taps: Array) -> tuple[Array, Array]:
    """Return the weights chunk after chunk, each [group of taps][16 channels][taps of a group], flat; and the order of channels."""
    groups, length = _groups(spec), max(LANES, spec.channels)
    padded = np.zeros((length, groups * spec.word), np.int8 if spec.integer else np.float32)
    padded[: spec.channels, : spec.taps] = taps
    parts = [padded[first : first + LANES].reshape(LANES, groups, spec.word).transpose(1, 0, 2).reshape(-1) for first in _chunks(spec)]
    return np.concatenate(parts), np.minimum(np.arange(length), spec.channels - 1)


class _Kernel(Arguments):
    """The arguments of one depthwise convolution and the statements of its tasks."""

    def __init__(self, spec: Convolution, easy: bool) -> None:
        weights = len(_chunks(spec)) * LANES * _groups(spec) * spec.word
        super().__init__(spec, (weights,), max(LANES, spec.channels), easy=easy)
        self.columns = spec.width + 2 * spec.padding[1]

    def task(self, index: Index) -> None:
        """Compute one output row, chunk of channels by chunk."""
        spec = self.spec
        self.begin_task()
        place = (T.Bind(index // spec.out_height), T.Bind(index % spec.out_height))
        with T.serial(len(_chunks(spec))) as i:
            packed = T.Bind(T.cast(i * LANES, "int64"))
            first = T.Bind(T.min(packed, T.int64(max(0, spec.channels - LANES))))
            self._chunk(place, first, packed * (_groups(spec) * spec.word))

    def _chunk(self, place: tuple[Index, ...], first: Index, weights: Index) -> None:
        """Compute one row of outputs for the channels from ``first`` on; their weights start at ``weights``."""
        spec = self.spec
        image, row = place
        lanes = ramp(first)
        start = T.Bind(self.start(lanes))
        mask = below(spec.channels) if spec.channels < LANES else None
        rows = self._copy_rows(image, row, first)
        with T.serial(spec.out_width) as column:
            spot = T.Bind(((image * spec.out_height + row) * spec.out_width + column) * spec.channels + first)
            base = T.Bind(T.cast(column * (spec.stride[1] * LANES), "int64"))
            self.store_result(T.Bind(self.scaled(self._sum((rows, base), lanes, start, weights), lanes)), lanes, spot, mask)

    def _copy_rows(self, image: Index, row: Index, first: Index) -> Any:
        """Return a buffer [kernel row][padded column][channel of the chunk] with the unsigned codes (or floats) under one output row."""
        spec = self.spec
        rows = T.alloc_buffer((spec.kernel[0] * self.columns * LANES,), "uint8" if spec.integer else "float32")
        with T.serial(spec.kernel[0]) as tap:
            y = T.Bind(row * spec.stride[0] - spec.padding[0] + tap * spec.dilation[0])
            inside = T.Bind(tirx.all(y >= 0, y < spec.height))
            base = T.Bind(T.cast(tap * (self.columns * LANES), "int64"))
            for column in (*range(spec.padding[1]), *range(self.columns - spec.padding[1], self.columns)):
                store(rows, splat(self.zero()), ramp(base + column * LANES))
            start = T.Bind(base + spec.padding[1] * LANES)
            with T.If(inside):
                with T.Then(), T.serial(spec.width) as x:
                    where = ramp(((image * spec.height + y) * spec.width + x) * spec.channels + first)
                    store(rows, self._read(where), ramp(start + x * LANES))
                with T.Else(), T.serial(spec.width) as x:
                    store(rows, splat(self.zero()), ramp(start + x * LANES))
        return rows

    def _read(self, where: Any) -> Any:
        value = self.flat_x[where] if self.spec.channels >= LANES else load_part(self.flat_x, below(self.spec.channels), where)
        if not self.spec.x_shift:
            return value
        return T.bitwise_xor(T.reinterpret(vector_type("uint8", LANES), value), spread(T.uint8(128), LANES))

    def _under(self, place: tuple[Any, Index], tap: int) -> Any:
        """Return the chunk's channels under one tap."""
        spec = self.spec
        offset = tap // spec.kernel[1] * self.columns + tap % spec.kernel[1] * spec.dilation[1]
        return T.Bind(place[0][ramp(place[1] + offset * LANES)])

    def _sum(self, place: tuple[Any, Index], lanes: Any, start: Any, weights: Index) -> Any:
        """Return the finished sums of one pixel in sixteen channels."""
        spec = self.spec
        total, pixels_sum = start, splat(T.int32(0))
        for group in range(_groups(spec)):
            taps = range(group * spec.word, min(spec.taps, (group + 1) * spec.word))
            pixels = [self._under(place, tap) for tap in taps]
            # Taps that only fill the group have zero weights: any pixel serves.
            word = T.Bind(interleave([*pixels, *[pixels[0]] * (4 - len(pixels))])) if spec.integer else pixels[0]
            weight = self.weight[ramp(weights + group * (LANES * spec.word), LANES * spec.word)]
            total = T.Bind(multiply_add(total, word, weight, spec.isa))
            if self.weight_zero is not None:
                ones = T.reinterpret("int8x64", splat(T.int32(sum(1 << 8 * i for i in range(len(taps))))))
                pixels_sum = T.Bind(multiply_add(pixels_sum, word, ones, spec.isa))
        return total if self.weight_zero is None else total - pixels_sum * self.weight_zero[lanes]

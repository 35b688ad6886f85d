"""Depthwise convolution over NHWC images as one TIR kernel, int8 or float32, then the dialect's epilogue.

Lanes are channels, in chunks; the last chunk overlaps the one before instead of reaching past the end. A task is one output row: for each
chunk it copies the input rows under the kernel, padded, into a local buffer (a few per cent of the time), so that the sums know no border.
For int8, the pixels under four taps are interleaved byte by byte, and one product of bytes (``byte_products``) multiplies and adds four
taps of sixteen channels; where a register holds 64 bytes, chunks of 64 channels are interleaved together, which halves the shuffles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels.convolution_arguments import Arguments, multiply_add
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.isa import SETS
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
_WIDE = 64


def depthwise(spec: Convolution) -> tirx.PrimFunc:
    """Return the kernel of a convolution with one input and one output channel in each group; arguments as ``convolution``'s.

    Raises:
        ValueError: groups have more than one channel.
    """
    if not spec.groups == spec.channels == spec.out_channels:
        raise ValueError(f"{spec} is not depthwise")
    with function("depthwise") as builder:
        kernel = _Kernel(spec)
        tasks = kernel.batch * spec.out_height
        if spec.pixels * spec.taps * spec.channels > SERIAL_WORK:
            with T.parallel(tasks) as task:
                kernel.task(task)
        else:
            serial_or_parallel(tasks, kernel.pixels * (spec.taps * spec.channels), kernel.task)
    return builder.get()


def pack_depthwise(
    spec: Convolution, weight: Array, scale: Array | None = None, zero_point: Array | None = None, bias: Array | None = None
) -> list[Array]:
    """Return the constants of ``depthwise(spec)`` in its argument order; parameters as ``pack_convolution``'s.

    Raises:
        ValueError: the weight's shape does not agree with ``spec``, or a scale, zero point or bias is missing.
    """
    channels = spec.channels
    if weight.shape != (channels, 1, *spec.kernel):
        raise ValueError(f"a weight of shape {weight.shape} does not fit {spec}")
    missing = (spec.integer and scale is None, spec.weight_affine and zero_point is None, spec.epilogue.bias != "none" and bias is None)
    if any(missing):
        raise ValueError(f"{spec} needs {', '.join(n for n, m in zip(('a scale', 'zero points', 'a bias'), missing, strict=True) if m)}")
    shift = 128 if weight.dtype == np.uint8 else 0  # weights are multiplied as signed bytes
    taps = weight.reshape(channels, spec.taps).astype(np.int32 if spec.integer else np.float32) - shift
    arrays = [_pack_taps(spec, taps)]
    zeros = np.broadcast_to(zero_point - shift, (channels,)) if zero_point is not None and spec.weight_affine else None
    if spec.has_sums:
        arrays.append(_channels(taps.sum(1) if zeros is None else taps.sum(1) - spec.taps * zeros, np.int32))
    if spec.integer:
        arrays.append(_channels(np.broadcast_to(np.asarray(scale), (channels,)), np.float32))
    if zeros is not None:
        arrays.append(_channels(zeros, np.int32))
    if spec.epilogue.bias != "none":
        arrays.append(_channels(np.asarray(bias), np.dtype(spec.epilogue.bias)))
    return arrays


def _channels(values: Array, dtype: Any) -> Array:
    padded = np.zeros(max(LANES, len(values)), dtype)
    padded[: len(values)] = values
    return padded


def _chunks(spec: Convolution) -> list[tuple[int, int]]:
    """Return (first channel, channels) of each chunk; fewer than 16 channels are one chunk, partly empty.

    For int8, chunks have 64 channels where a register holds 64 bytes, and 16 for the rest; for float, 16.
    """
    channels, whole_register = spec.channels, SETS[spec.isa].parts == 1
    wide = channels // _WIDE if spec.integer and whole_register else 0
    chunks = [(i * _WIDE, _WIDE) for i in range(wide)]
    chunks += [(first, LANES) for first in range(wide * _WIDE, channels - LANES + 1, LANES)]
    return chunks if channels % LANES == 0 else [*chunks, (max(0, channels - LANES), LANES)]


def _groups(spec: Convolution) -> int:
    """Return the vectors of weights for sixteen channels: four taps each for int8, one for float."""
    return -(-spec.taps // spec.word)


def _pack_taps(spec: Convolution, taps: Array) -> Array:
    """Return the weights chunk after chunk, each [group of taps][vector][16 channels][taps of a group], flat."""
    groups, parts = _groups(spec), []
    padded = np.zeros((max(LANES, spec.channels), groups * spec.word), np.int8 if spec.integer else np.float32)
    padded[: spec.channels, : spec.taps] = taps
    for first, width in _chunks(spec):
        chunk = padded[first : first + width].reshape(width, groups, spec.word).transpose(1, 0, 2)  # [group, channel, tap]
        if width == _WIDE and spec.integer:  # channels in the order that ``_interleave`` leaves them: see there
            chunk = chunk.reshape(groups, 4, 4, 4, spec.word).transpose(0, 2, 1, 3, 4)
        parts.append(chunk.reshape(-1))
    return np.ascontiguousarray(np.concatenate(parts))


class _Kernel(Arguments):
    """The arguments of one depthwise convolution and the statements of its tasks."""

    def __init__(self, spec: Convolution) -> None:
        elements = sum(width for _, width in _chunks(spec)) * _groups(spec) * spec.word
        super().__init__(spec, (elements,), max(LANES, spec.channels))

    def task(self, index: Index) -> None:
        """Compute one output row, chunk of channels by chunk."""
        spec, chunks = self.spec, _chunks(self.spec)
        self.begin_task()
        place = (T.Bind(index // spec.out_height), T.Bind(index % spec.out_height))
        for width, before in ((_WIDE, 0), (LANES, sum(w for _, w in chunks if w == _WIDE))):
            run = [first for first, w in chunks if w == width]
            if run:
                with T.serial(len(run)) as i:
                    packed = T.Bind(T.cast(i * width + before, "int64"))
                    first = T.Bind(T.min(packed, T.int64(max(0, spec.channels - LANES))) if run[-1] % LANES else packed)
                    self._chunk(place, first, packed * (_groups(spec) * spec.word), width)

    def _chunk(self, place: tuple[Index, ...], first: Index, weights: Index, width: int) -> None:
        """Compute one row of outputs for the channels from ``first`` on; their weights start at ``weights``."""
        spec = self.spec
        image, row = place
        starts = [T.Bind(self.start(ramp(first + j * LANES))) for j in range(width // LANES)]
        mask = below(spec.channels) if spec.channels < LANES else None
        rows = self._copy_rows(image, row, first, width)
        with T.serial(spec.out_width) as column:
            spot = T.Bind(((image * spec.out_height + row) * spec.out_width + column) * spec.channels + first)
            base = T.Bind(T.cast(column * (spec.stride[1] * width), "int64"))
            for j, total in enumerate(self._sums((rows, base), first, starts, weights, width)):
                lanes = ramp(first + j * LANES)
                self.store_result(T.Bind(self.scaled(total, lanes)), lanes, spot + j * LANES, mask)

    def _copy_rows(self, image: Index, row: Index, first: Index, width: int) -> Any:
        """Return a buffer [kernel row][padded column][channel of the chunk] with the unsigned codes (or floats) under one output row."""
        spec = self.spec
        columns = spec.width + 2 * spec.padding[1]
        rows = T.alloc_buffer((spec.kernel[0] * columns * width,), "uint8" if spec.integer else "float32")
        with T.serial(spec.kernel[0]) as tap:
            y = T.Bind(row * spec.stride[0] - spec.padding[0] + tap * spec.dilation[0])
            inside = T.Bind(tirx.all(y >= 0, y < spec.height))
            base = T.Bind(T.cast(tap * (columns * width), "int64"))
            for column in (*range(spec.padding[1]), *range(columns - spec.padding[1], columns)):
                store(rows, splat(self.zero(), width), ramp(base + column * width, width))
            start = T.Bind(base + spec.padding[1] * width)
            with T.If(inside):
                with T.Then(), T.serial(spec.width) as x:
                    where = ramp(((image * spec.height + y) * spec.width + x) * spec.channels + first, width)
                    store(rows, self._read(where, width), ramp(start + x * width, width))
                with T.Else(), T.serial(spec.width) as x:
                    store(rows, splat(self.zero(), width), ramp(start + x * width, width))
        return rows

    def _read(self, where: Any, width: int) -> Any:
        value = self.flat_x[where] if self.spec.channels >= LANES else load_part(self.flat_x, below(self.spec.channels), where)
        if not self.spec.x_shift:
            return value
        return T.bitwise_xor(T.reinterpret(vector_type("uint8", width), value), spread(T.uint8(128), width))

    def _under(self, place: tuple[Any, Index], tap: int, width: int) -> Any:
        """Return the chunk's channels under one tap."""
        spec = self.spec
        columns = spec.width + 2 * spec.padding[1]
        offset = tap // spec.kernel[1] * columns + tap % spec.kernel[1] * spec.dilation[1]
        return T.Bind(place[0][ramp(place[1] + offset * width, width)])

    def _sums(self, place: tuple[Any, Index], first: Index, starts: list[Any], weights: Index, width: int) -> list[Any]:
        """Return the finished sums of one pixel and chunk, vectors of sixteen channels in order."""
        spec, vectors = self.spec, width // LANES
        totals, sums = _transpose_lanes(starts), [splat(T.int32(0))] * vectors
        for group in range(_groups(spec)):
            taps = range(group * spec.word, min(spec.taps, (group + 1) * spec.word))
            pixels = [self._under(place, tap, width) for tap in taps]
            # Taps that only fill the group have zero weights: any pixel serves.
            words = _interleave([*pixels, *[pixels[0]] * (4 - len(pixels))], width) if spec.integer else pixels
            for j, word in enumerate(words):
                weight = self.weight[ramp(weights + (group * vectors + j) * (LANES * spec.word), LANES * spec.word)]
                totals[j] = T.Bind(multiply_add(totals[j], word, weight, spec.isa))
                if self.weight_zero is not None:
                    ones = T.reinterpret("int8x64", splat(T.int32(sum(1 << 8 * i for i in range(len(taps))))))
                    sums[j] = T.Bind(multiply_add(sums[j], word, ones, spec.isa))
        totals = _transpose_lanes(totals)
        if self.weight_zero is None:
            return totals
        zeros = [self.weight_zero[ramp(first + j * LANES)] for j in range(vectors)]
        return [total - pixels * zero for total, pixels, zero in zip(totals, _transpose_lanes(sums), zeros, strict=True)]


def _interleave(pixels: list[Any], width: int) -> list[Any]:
    """Return int32 words, each the bytes of four pixels in one channel.

    Sixteen channels give one vector in order. Of 64 channels, vector k holds in its 128-bit lane L the channels 16 L + 4 k to + 3: the
    order of byte and word unpacking, which stays inside lanes.
    """
    if width == LANES:
        mixed = [tirx.Shuffle(pixels, [tap * LANES + channel for channel in range(LANES) for tap in range(4)])]
    else:

        def unpack(a: Any, b: Any, half: int, unit: int) -> Any:
            count = 8 // unit  # units of one lane that go to this half
            picks = [(lane * 16 + (half * count + i) * unit, u) for lane in range(4) for i in range(count) for u in range(unit)]
            indices = []
            for i in range(0, len(picks), unit):
                indices += [base + u for base, u in picks[i : i + unit]] + [_WIDE + base + u for base, u in picks[i : i + unit]]
            return T.Bind(tirx.Shuffle([a, b], indices))

        pairs = [[unpack(pixels[i], pixels[i + 1], half, 1) for i in (0, 2)] for half in (0, 1)]
        mixed = [unpack(pairs[half][0], pairs[half][1], part, 2) for half in (0, 1) for part in (0, 1)]
    return [T.Bind(T.reinterpret("int32x16", value)) for value in mixed]


def _transpose_lanes(vectors: list[Any]) -> list[Any]:
    """Transpose four vectors as a 4 x 4 matrix of 128-bit lanes; a single vector stays as it is."""
    if len(vectors) == 1:
        return list(vectors)
    values = [T.Bind(value) for value in vectors]

    def pick(a: Any, b: Any, lanes: tuple[int, ...]) -> Any:
        return T.Bind(tirx.Shuffle([a, b], [lane * 4 + i for lane in lanes for i in range(4)]))

    low = [pick(values[0], values[1], (0, 4, 1, 5)), pick(values[2], values[3], (0, 4, 1, 5))]
    high = [pick(values[0], values[1], (2, 6, 3, 7)), pick(values[2], values[3], (2, 6, 3, 7))]
    return [pick(pair[0], pair[1], lanes) for pair in (low, high) for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))]

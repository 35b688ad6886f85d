"""Depthwise int8 convolution over NHWC images where a register holds 64 bytes: products of words of four image rows.

A byte product (``byte_products``) multiplies and adds four bytes of each of sixteen channels: here the bytes that one channel has in
four rows under one another. A task is a block of output rows that all read the same words, with weights moved down and zeros around
them: 2 rows of a 3x3 kernel read rows 0 to 3, 4 rows of a 5x5 kernel rows 0 to 7. It makes the words once, in a local buffer
``[padded column][word][channel]`` that knows no border; then a sum is one load and one product for each kernel column and word. Wide
images are cut into strips, so that the words stay in the first-level cache.

Where the result is codes, chunks have 64 channels: the byte and word unpacking that makes the words stays inside 128-bit lanes, and so
does the packing of the results, which undoes it (``byte_codes``). What is left over runs in chunks of sixteen, four pixels at a time; the
last one overlaps the one before instead of reaching past the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels.byte_codes import BYTES, VECTORS, by_vector, unpacked_order
from qcompile.backends.cpu.kernels.convolution_arguments import Arguments, multiply_add
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.isa import SETS
from qcompile.backends.cpu.kernels.registers import Index, below, function, load_part, ramp, serial_or_parallel, store, store_part
from qcompile.backends.cpu.kernels.vector import rounded, spread
from tvm import tirx
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]
_WORD = 4
_WORD_BYTES = 16 << 10  # of words in a local buffer; the weights and the rows they are made of want the other half of the cache
_PIXELS = {BYTES: 2, LANES: VECTORS}  # pixels side by side that share words and weights, by width of a chunk
_HELD_WEIGHTS = 14  # vectors of weights that stay in registers beside sums and the scalars of rounding
_MOST_PRODUCTS = 27  # of one sum, all written out: a kernel of 9x9
_SERIAL_CYCLES = 1 << 16  # of the cost below: some 25 us, which repay waking another thread


def takes_words(spec: Convolution) -> bool:
    """Return whether this kernel computes a depthwise convolution."""
    known = spec.integer and SETS[spec.isa].parts == 1 and spec.dilation == (1, 1) and not spec.weight_affine
    return known and Plan(spec).words * spec.kernel[1] <= _MOST_PRODUCTS


@dataclass(frozen=True)
class Plan:
    """How the rows, columns and channels of one convolution are cut."""

    spec: Convolution

    @property
    def words(self) -> int:
        """Words of four image rows under a kernel column."""
        return -(-self.spec.kernel[0] // _WORD)

    @property
    def block(self) -> int:
        """Output rows that read the same words."""
        return (self.words * _WORD - self.spec.kernel[0]) // self.spec.stride[0] + 1

    @property
    def blocks(self) -> int:
        """Blocks of an image."""
        return -(-self.spec.out_height // self.block)

    @cached_property
    def strip(self) -> int:
        """Output columns of a task: as many as have words for the first-level cache."""
        most = max(1, _WORD_BYTES // (self.words * self.widest * _WORD * self.spec.stride[1]))
        return -(-self.spec.out_width // -(-self.spec.out_width // most))

    @property
    def strips(self) -> int:
        return -(-self.spec.out_width // self.strip)

    @property
    def columns(self) -> int:
        """Padded image columns under a strip."""
        return (self.strip - 1) * self.spec.stride[1] + self.spec.kernel[1]

    @cached_property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """First channel and width of each chunk, those of 64 before those of 16."""
        channels = self.spec.channels
        wide = channels // BYTES if self.spec.bytewise else 0
        narrow = -(-(channels - wide * BYTES) // LANES)
        last = max(0, channels - LANES)
        return (*((i * BYTES, BYTES) for i in range(wide)), *((min(wide * BYTES + i * LANES, last), LANES) for i in range(narrow)))

    @property
    def widest(self) -> int:
        return max(width for _, width in self.chunks)

    def run(self, width: int) -> tuple[int, int, int]:
        """Return first channel, place among the packed channels, and number of the chunks of a width."""
        firsts = [first for first, w in self.chunks if w == width]
        place = 0 if width == BYTES else sum(w for _, w in self.chunks if w == BYTES)
        return (firsts[0] if firsts else 0), place, len(firsts)

    @property
    def starts(self) -> int:
        """Where in the buffer of words the starts of a chunk's sums lie."""
        return self.columns * self.words * self.widest

    @cached_property
    def order(self) -> Array:
        """The channel at each place of the packed channels; places past the last channel repeat it."""
        inside = {BYTES: np.array(unpacked_order()), LANES: np.arange(LANES)}
        return np.minimum(np.concatenate([first + inside[width] for first, width in self.chunks]), self.spec.channels - 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights of each packed channel: [row of the block][word][kernel column][row of the word]."""
        return self.block * self.words * self.spec.kernel[1] * _WORD

    def row_bytes(self, width: int) -> int:
        """Bytes of weights of one row of the block in a chunk."""
        return self.words * self.spec.kernel[1] * width * _WORD

    @property
    def cycles(self) -> int:
        """A rough cost of one image: products, rounding and the making of words for 64 results, two instructions in a cycle."""
        vectors = self.words * (self.spec.kernel[1] * VECTORS + 24 * self.spec.stride[1] // self.block) + 40
        return self.spec.pixels * len(self.order) // BYTES * vectors // 2


def pack_words(spec: Convolution, taps: Array) -> tuple[Array, Array]:
    """Return the weights flat, chunk after chunk, and the channel at each place of arrays with one value for each channel.

    taps int32 [channels, kernel rows, kernel columns]. A chunk is [row of the block][word][kernel column][channel][row of the word].
    """
    plan, (rows, columns), parts, place = Plan(spec), spec.kernel, [], 0
    for _, width in plan.chunks:
        moved = np.zeros((plan.block, width, plan.words * _WORD, columns), np.int8)
        for row in range(plan.block):
            moved[row, :, row * spec.stride[0] : row * spec.stride[0] + rows] = taps[plan.order[place : place + width]]
        words = moved.reshape(plan.block, width, plan.words, _WORD, columns).transpose(0, 2, 4, 1, 3)
        parts.append(words.reshape(-1))
        place += width
    return np.concatenate(parts), plan.order


def depthwise_words(spec: Convolution, *, easy: bool = False) -> tirx.PrimFunc:
    """Return the kernel; arguments as ``depthwise``'s. ``easy``: the scale of the result is known to be (``code_rounding.is_easy``)."""
    with function("depthwise") as builder:
        kernel = _Kernel(spec, easy)
        tasks = kernel.batch * (kernel.plan.blocks * kernel.plan.strips)
        if kernel.plan.cycles > _SERIAL_CYCLES:
            with T.parallel(tasks) as task:
                kernel.task(task)
        else:
            serial_or_parallel(tasks, kernel.batch * kernel.plan.cycles, kernel.task, _SERIAL_CYCLES)
    return builder.get()


class _Kernel(Arguments):
    """The arguments of one depthwise convolution and the statements of its tasks."""

    def __init__(self, spec: Convolution, easy: bool) -> None:
        self.plan = Plan(spec)
        super().__init__(spec, (len(self.plan.order) * self.plan.weight_bytes,), len(self.plan.order), easy=easy)

    def task(self, index: Index) -> None:
        """Compute a block of output rows in a strip of columns, chunk of channels by chunk."""
        spec, plan = self.spec, self.plan
        self.image = T.Bind(index // (plan.blocks * plan.strips))
        self.row = T.Bind(index // plan.strips % plan.blocks * plan.block)
        # The last strip overlaps the one before.
        self.column = T.Bind(T.min(index % plan.strips * plan.strip, spec.out_width - plan.strip)) if plan.strips > 1 else T.int64(0)
        self.begin_task(bytewise=spec.bytewise)
        rows = [self._source_row(i) for i in range((plan.block - 1) * spec.stride[0] + spec.kernel[0])]
        # Behind the words of the widest chunk: where its sums start.
        words = T.alloc_buffer(((plan.columns * plan.words + 1) * plan.widest,), "int32")
        for width in (BYTES, LANES):
            first, place, count = plan.run(width)
            if count:
                with T.serial(count) as i:
                    channel = T.Bind(T.cast(T.min(first + i * width, max(0, spec.channels - width)), "int64"))
                    packed = T.Bind(T.cast(place + i * width, "int64"))
                    for k in range(width // LANES):
                        store(words, self.start(ramp(packed + k * LANES)), ramp(plan.starts + k * LANES))
                    self._make_words(words, rows, channel, width)
                    with T.serial(T.min(plan.block, spec.out_height - self.row)) as row:
                        self._row(words, row, channel, packed, width)

    # ---- words ----

    def _source_row(self, offset: int) -> tuple[Index, Any, Any]:
        """Return where an image row starts, and the masks that keep its bytes or, outside the image, put the code of zero instead."""
        spec = self.spec
        y = T.Bind(self.row * spec.stride[0] + (offset - spec.padding[0]))
        inside = tirx.all(y >= 0, y < spec.height)
        nearest = T.max(T.min(y, spec.height - 1), 0)
        start = T.Bind(T.cast((self.image * spec.height + nearest) * (spec.width * spec.channels), "int64"))
        return start, T.Bind(tirx.Select(inside, T.uint8(255), T.uint8(0))), T.Bind(tirx.Select(inside, T.uint8(0), self.zero()))

    def _make_words(self, words: Any, rows: list[tuple[Index, Any, Any]], channel: Index, width: int) -> None:
        """Write the words of one chunk under a strip."""
        spec, plan = self.spec, self.plan
        left = T.Bind(T.cast(spec.padding[1] - self.column * spec.stride[1], "int64"))  # where the image starts
        # Columns of the strip that are in the image; a strip may lie in the padding, left or right of it.
        first, last = (T.Bind(T.max(T.min(edge, T.int64(plan.columns)), T.int64(0))) for edge in (left, left + spec.width))
        step = plan.words * width
        zero = T.Bind(T.reinterpret(f"int32x{LANES}", spread(self.zero(), BYTES)))
        for start, count in ((0, first), (last, plan.columns - last)):
            with T.serial(count * (step // LANES)) as i:
                store(words, zero, ramp(start * step + i * LANES))
        for word in range(plan.words):
            under = rows[word * _WORD : (word + 1) * _WORD]
            with T.serial(last - first) as i:
                pixel = T.Bind((first + i - left) * spec.channels + channel)
                to = T.Bind((first + i) * step + word * width)
                pixels = [T.Bind(self._masked(row, pixel, width)) for row in under]
                pixels += [pixels[0]] * (_WORD - len(pixels))  # rows that no weight reads: any bytes serve
                for k, vector in enumerate(_unpack(pixels) if width == BYTES else [interleave(pixels)]):
                    store(words, vector, ramp(to + k * LANES))

    def _masked(self, row: tuple[Index, Any, Any], pixel: Index, width: int) -> Any:
        start, keep, fill = row
        where = ramp(start + pixel, width)
        value = self.flat_x[where] if self.spec.channels >= LANES else load_part(self.flat_x, below(self.spec.channels), where)
        if self.spec.x_shift:
            value = T.bitwise_xor(T.reinterpret(f"uint8x{width}", value), spread(T.uint8(128), width))
        return T.bitwise_or(T.bitwise_and(value, spread(keep, width)), spread(fill, width))

    # ---- sums ----

    def _sums(self, words: Any, place: tuple[Index, Index], starts: Index, pixels: int, vectors: int) -> list[Any]:
        """Return the sums of some pixels side by side and vectors of channels: words and weights are read from ``place`` on."""
        spec, plan = self.spec, self.plan
        begin = [T.Bind(words[ramp(starts + k * LANES)]) for k in range(vectors)]
        totals = [begin[k] for _ in range(pixels) for k in range(vectors)]
        width, kernel = vectors * LANES, spec.kernel[1]
        for column in range(kernel):
            for word in range(plan.words):
                for k in range(vectors):
                    tap = T.Bind(self.weight[ramp(place[1] + ((word * kernel + column) * width + k * LANES) * _WORD, BYTES)])
                    for pixel in range(pixels):
                        offset = ((column + pixel * spec.stride[1]) * plan.words + word) * width + k * LANES
                        i = pixel * vectors + k
                        totals[i] = T.Bind(multiply_add(totals[i], words[ramp(place[0] + offset)], tap, spec.isa))
        return totals

    def _row(self, words: Any, row: Index, channel: Index, packed: Index, width: int) -> None:
        """Compute one output row of a chunk, some pixels at a time; the last ones overlap those before."""
        spec, plan, vectors = self.spec, self.plan, width // LANES
        pixels = min(_PIXELS[width], plan.strip)
        mask = below(spec.channels) if spec.channels < LANES else None
        with T.serial(-(-plan.strip // pixels)) as group:
            column = T.Bind(T.cast(T.min(group * pixels, plan.strip - pixels), "int64"))
            nothing = self._nothing(column, vectors)
            first, weights = column * (spec.stride[1] * plan.words * width), packed * plan.weight_bytes + row * plan.row_bytes(width)
            totals = self._sums(words, (T.Bind(first), T.Bind(weights + nothing)), T.Bind(plan.starts + nothing), pixels, vectors)
            line = (self.image * spec.out_height + self.row + row) * spec.out_width + self.column + column
            spots = [T.Bind(line * spec.channels + channel + i * spec.channels) for i in range(pixels)]
            places = [ramp(packed + nothing + k * LANES) for _ in range(pixels) for k in range(vectors)]
            if self.bytes is None:
                for total, place, spot in zip(totals, places, spots, strict=True):
                    self.store_result(T.Bind(self.scaled(total, place)), place, spot, mask)
            else:
                addends = self._addends(spots, vectors, mask)
                values = [self.before_bytes(*each) for each in zip(totals, places, addends, strict=True)]
                self._store_codes(values, spots, mask)

    def _nothing(self, column: Index, vectors: int) -> Index:
        """Return a zero that LLVM does not know to be the same for all columns.

        It would load all weights of a row before the first column, and spill those that no register holds to addresses that are no
        multiples of 64, where every load takes two.
        """
        if vectors * self.plan.words * self.spec.kernel[1] <= _HELD_WEIGHTS:
            return T.int64(0)
        return T.Bind(T.cast(rounded(T.cast(column, "float32")), "int64") - column)

    def _addends(self, spots: list[Index], vectors: int, mask: Any) -> list[Any]:
        """Return the codes that are added to each vector of some pixels, in the order of the vector's channels."""
        if self.flat_addend is None:
            return [None] * (len(spots) * vectors)
        if vectors == 1:
            wheres = [ramp(spot) for spot in spots]
            return [T.Bind(self.flat_addend[w] if mask is None else load_part(self.flat_addend, mask, w)) for w in wheres]
        # The order of unpacking is undone by itself: both exchange four lanes for four vectors.
        whole = [T.Bind(by_vector(self.flat_addend[ramp(spot, BYTES)])) for spot in spots]
        return [tirx.Shuffle([each], list(range(k * LANES, (k + 1) * LANES))) for each in whole for k in range(vectors)]

    def _store_codes(self, values: list[Any], spots: list[Index], mask: Any) -> None:
        """Store the codes of some pixels, each of four vectors of channels or of one."""
        if len(values) == VECTORS * len(spots):
            for i, spot in enumerate(spots):
                store(self.flat_codes, self.bytes.bytes(values[i * VECTORS : (i + 1) * VECTORS]), ramp(spot, BYTES))
            return
        codes = T.Bind(by_vector(self.bytes.bytes([*values, *[values[0]] * (VECTORS - len(values))])))
        for i, spot in enumerate(spots):
            part = tirx.Shuffle([codes], list(range(i * LANES, (i + 1) * LANES)))
            if mask is None:
                store(self.flat_codes, part, ramp(spot))
            else:
                store_part(self.flat_codes, part, mask, ramp(spot))


def interleave(pixels: list[Any]) -> Any:
    """Return int32 words in order, each the bytes of four rows in one of sixteen channels.

    One register takes the four rows; its words are transposed, and then the bytes inside lanes. Left to itself LLVM makes it twice as
    many instructions, so fences stand between the steps.
    """
    rows = rounded(T.reinterpret(f"float32x{LANES}", tirx.Shuffle(pixels, list(range(BYTES)))))
    parts = rounded(tirx.Shuffle([rows], [4 * row + part for part in range(4) for row in range(_WORD)]))
    inside = [16 * part + 4 * row + i for part in range(4) for i in range(4) for row in range(_WORD)]
    return T.reinterpret(f"int32x{LANES}", tirx.Shuffle([T.reinterpret(f"uint8x{BYTES}", parts)], inside))


def _unpack(pixels: list[Any]) -> list[Any]:
    """Return the words of 64 channels in the order of ``byte_codes.unpacked_order``, by unpacking bytes and then pairs of bytes."""

    def unpack(a: Any, b: Any, half: int, unit: int) -> Any:
        count = 8 // unit  # units of one lane that go to this half
        indices: list[int] = []
        for lane in range(4):
            for i in range(count):
                first = lane * 16 + (half * count + i) * unit
                indices += [*range(first, first + unit), *range(BYTES + first, BYTES + first + unit)]
        return T.Bind(tirx.Shuffle([a, b], indices))

    pairs = [[unpack(pixels[i], pixels[i + 1], half, 1) for i in (0, 2)] for half in (0, 1)]
    return [T.reinterpret(f"int32x{LANES}", unpack(pairs[half][0], pairs[half][1], part, 2)) for half in (0, 1) for part in (0, 1)]

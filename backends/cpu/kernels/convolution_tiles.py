"""Dense convolutions of codes in tile registers (``tiles``), cut as ``TilePlan`` says.

A task takes some output rows (or pixels) and some panels of weights. For each panel it multiplies its tiles two by two: at each run of the
kernel and each step of it, sixteen neighbouring pixels are one tile, loaded from the image, or from the task's padded copy of it,
with the stride between pixels. Sums start at what takes back the zero point of x, plus an int32 bias: a tile's rows all read the same
sixteen numbers. The last tile of a line overlaps the one before: some pixels are computed, and stored, twice.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels import tiles
from qcompile.backends.cpu.kernels.byte_codes import VECTORS, by_vector
from qcompile.backends.cpu.kernels.convolution_arguments import Arguments
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.registers import Index, below, function, long, ramp, serial_or_parallel, store
from qcompile.backends.cpu.kernels.runs import copy_run, fill_run
from tvm import tirx
from tvm.tirx.script.builder import ir as T

# Products and results that one thread makes in the time that waking another takes.
_SERIAL_WORK = 1 << 23
_RESULT_WORK = 128  # multiply-adds that take the time of turning a sum into a result


def tiled_convolution(spec: Convolution, *, easy: bool) -> tirx.PrimFunc:
    """Return the kernel; arguments as ``convolution``'s. ``easy``: the scale of the result is known to be (``code_rounding.is_easy``)."""
    with function("convolution") as builder:
        kernel = _Kernel(spec, easy)
        tasks = kernel.bands * spec.tasks[1]
        work = (spec.depth + _RESULT_WORK) * spec.pixels * spec.out_channels
        if work > _SERIAL_WORK:  # no need to look at the batch
            with T.parallel(tasks) as index:
                kernel.task(index)
        else:
            serial_or_parallel(tasks, kernel.batch * work, kernel.task, _SERIAL_WORK)
    return builder.get()


class _Kernel(Arguments):
    """The arguments of one convolution and the statements of its tasks."""

    def __init__(self, spec: Convolution, easy: bool) -> None:
        super().__init__(spec, spec.weight_shape, spec.padded_columns, easy=easy)
        self.plan = spec.plan
        per_task = spec.tasks[0]
        if self.plan.flat:
            self.bands = (self.pixels + (per_task * self.plan.rows - 1)) // (per_task * self.plan.rows)
        else:
            self.bands = self.batch * -(-self.plan.lines // per_task)
        self.unit = self.plan.block * self.plan.rows * spec.columns
        self.group = min(VECTORS // self.plan.vectors, self.plan.rows)
        self.groups = self.plan.block * -(-self.plan.rows // self.group)

    def task(self, index: Index) -> None:
        """Compute the output pixels and panels of one task.

        Its units, a block of tiles by a panel each, follow one another. While the tiles of a unit are multiplied, the vector units turn the
        sums of the unit before into codes: one would wait for the other otherwise.
        """
        spec, plan = self.spec, self.plan
        self.begin_task(bytewise=spec.bytewise and self.group * plan.vectors == VECTORS)
        part, band = T.Bind(index // self.bands), T.Bind(index % self.bands)
        self.source = (_Gathered if plan.gathers else _Pixels if plan.flat else _Lines)(self, band)
        panels = -(-spec.column_blocks // spec.tasks[1])
        first_panel = T.Bind(part * panels)
        self.acc = T.alloc_buffer((2 * self.unit,), "int32")
        self.before = T.alloc_buffer((2 + plan.block,), "int64")  # panel, groups and first pixels of the unit before
        self.turn = T.alloc_buffer((1,), "int32")
        self.begin = T.alloc_buffer((panels * spec.columns,), "int32")
        # A last part may have fewer panels, or none: the last panel is then computed again.
        last = long(spec.column_blocks - 1)
        with T.serial(panels) as p:
            first = T.Bind(T.min(first_panel + p, last) * spec.columns)
            for j in range(plan.vectors):
                store(self.begin, self.start(ramp(first + j * LANES)), ramp(p * spec.columns + j * LANES))
        store(self.before, T.int64(0), 1)
        store(self.turn, T.int32(0), 0)
        tiles.configure(plan.rows, plan.depth)
        with T.serial(panels) as p, T.serial((self.source.count + (plan.block - 1)) // plan.block) as block:
            self._unit(T.Bind(T.min(first_panel + p, last)), p, block)
        self._finish(T.Bind(self.unit - self.turn[0]), T.int64(0), self.before[1])
        tiles.release()

    # ---- products ----

    def _unit(self, panel: Index, p: Index, block: Index) -> None:
        """Multiply a block of tiles of pixels by one panel, the task's p-th, into ``acc`` [tile][pixel][column]; finish the unit before."""
        spec, plan = self.spec, self.plan
        product = tiles.Block(plan.block, plan.vectors, "int8" if spec.signed_x else "uint8")
        if spec.x_affine or spec.epilogue.bias == "int32":
            product.start([T.address_of(self.begin[p * spec.columns + j * LANES]) for j in range(plan.vectors)])
        else:
            product.zero()
        places = [self.source.place(T.min(block * plan.block + i, self.source.count - 1)) for i in range(plan.block)]
        here = T.Bind(self.turn[0])
        other, left = T.Bind(self.unit - here), T.Bind(self.before[1])
        during = self.groups - self.groups // 3  # the others follow the stores of this unit's sums: reading those at once would wait
        each = -(-during // (plan.runs * plan.steps))
        words = plan.depth // 4
        with T.serial(plan.runs) as run, T.serial(plan.steps) as step:
            turn = T.Bind(long(run * plan.steps + step))
            offset = T.Bind(self.source.offset(run) + step * plan.depth)
            x = [T.address_of(self.source.buffer[place + offset]) for place, _ in places]
            weight = [T.address_of(self.weight[panel, turn * words, j * tiles.DEPTH]) for j in range(plan.vectors)]
            product.multiply_add(x, self.source.stride, weight, plan.vectors * tiles.DEPTH)
            self._finish(other, T.Bind(turn * each), T.Bind(T.min(T.min(turn * each + each, during), left)))
        at = [[here + (i * plan.rows * spec.columns + j * LANES) for j in range(plan.vectors)] for i in range(plan.block)]
        product.store([[T.address_of(self.acc[spot]) for spot in row] for row in at], spec.columns * 4)
        self._finish(other, long(during), left)
        for i, value in enumerate((panel, T.int64(self.groups), *(pixel for _, pixel in places))):
            store(self.before, value, i)
        store(self.turn, other, 0)

    # ---- results ----

    def _finish(self, sums: Index, first: Index, end: Index) -> None:
        """Turn some groups of rows of the unit before, whose sums start at ``sums``, into results; a tile's last group overlaps."""
        spec, plan = self.spec, self.plan
        tile_groups = self.groups // plan.block
        with T.serial(T.max(end - first, T.int64(0))) as i:
            group = T.Bind(first + i)
            row = T.Bind(T.min(group % tile_groups * self.group, long(plan.rows - self.group)))
            panel = T.Bind(self.before[0])
            at = T.Bind(sums + (group // tile_groups * plan.rows + row) * spec.columns)
            place = T.Bind((self.before[2 + group // tile_groups] + row) * spec.out_channels + panel * spec.columns)
            whole, ragged = divmod(spec.out_channels, spec.columns)
            if self.bytes is None or not whole:
                self._store_rows(panel, at, place)
            elif not ragged:
                self._store_bytes(panel, at, place)
            else:
                with T.If(panel < whole):
                    with T.Then():
                        self._store_bytes(panel, at, place)
                    with T.Else():
                        self._store_rows(panel, at, place)

    def _store_rows(self, panel: Index, at: Index, place: Index) -> None:
        """Store the results of a group of pixels one by one."""
        for i in range(self.group):
            self._store_row(panel, T.Bind(at + i * self.spec.columns), T.Bind(place + i * self.spec.out_channels))

    def _store_row(self, panel: Index, at: Index, place: Index) -> None:
        """Store one pixel's results, those of columns that exist."""
        spec = self.spec
        for j in range(self.plan.vectors):
            lanes, column = ramp(panel * spec.columns + j * LANES), T.Bind(panel * spec.columns + j * LANES)
            total = T.Bind(self.scaled(self.acc[ramp(at + j * LANES)], lanes))
            if spec.out_channels % spec.columns == 0:
                self.store_result(total, lanes, place + j * LANES, None)
                continue
            with T.If(column + LANES <= spec.out_channels):
                with T.Then():
                    self.store_result(total, lanes, place + j * LANES, None)
                with T.Else(), T.If(column < spec.out_channels), T.Then():
                    self.store_result(total, lanes, place + j * LANES, below(spec.out_channels - column))

    def _store_bytes(self, panel: Index, at: Index, place: Index) -> None:
        """Store the codes of the next pixels, four vectors together."""
        spec, vectors, values = self.spec, self.plan.vectors, []
        for i in range(VECTORS):
            lanes = ramp(panel * spec.columns + i % vectors * LANES)
            where = ramp(place + (i // vectors * spec.out_channels + i % vectors * LANES))
            addend = self.flat_addend[where] if self.flat_addend is not None else None
            values.append(self.before_bytes(self.acc[ramp(at + i * LANES)], lanes, addend))
        codes = T.Bind(by_vector(self.bytes.bytes(values)))
        for i in range(VECTORS // vectors):
            part = tirx.Shuffle([codes], list(range(i * spec.columns, (i + 1) * spec.columns)))
            store(self.flat_codes, part, ramp(place + i * spec.out_channels, spec.columns))


class _Pixels:
    """Tiles of pixels as they come: output pixels are input pixels.

    Attributes:
        count: tiles of the task.
        buffer: flat, what tiles are loaded from.
        stride: bytes from one pixel to the next.
    """

    def __init__(self, kernel: _Kernel, band: Index) -> None:
        spec, plan = kernel.spec, kernel.plan
        per_task, total = spec.tasks[0], kernel.pixels
        self.plan, self.stride = plan, spec.channels
        self.first = T.Bind(band * per_task)
        self.count = T.Bind(T.min(long(per_task), (total + (plan.rows - 1)) // plan.rows - self.first))
        self.last = T.Bind(total - plan.rows)
        self.base: Any = T.int64(0)
        self.buffer = kernel.flat_x
        if plan.copies:
            self.base = T.Bind(T.min(self.first * plan.rows, self.last))
            pixels = T.Bind(T.min((self.first + self.count) * plan.rows, total) - self.base)
            self.buffer = T.alloc_buffer(((per_task + 1) * plan.rows * spec.channels + tiles.DEPTH,), spec.x)
            with T.serial(pixels) as i:
                copy_run(self.buffer, i * spec.channels, kernel.flat_x, (self.base + i) * spec.channels, spec.channels)

    def place(self, tile: Index) -> tuple[Index, Index]:
        """Return where the bytes of a tile start, and its first output pixel."""
        pixel = T.Bind(T.min((self.first + tile) * self.plan.rows, self.last))
        return T.Bind((pixel - self.base) * self.stride), pixel

    def offset(self, run: Index) -> Index:
        """Return how far a run lies behind the first one."""
        return run * 0


class _Lines:
    """Tiles of the pixels of one output row each; as ``_Pixels``."""

    def __init__(self, kernel: _Kernel, band: Index) -> None:
        spec, plan = kernel.spec, kernel.plan
        self.spec, self.plan, self.stride = spec, plan, spec.stride[1] * spec.channels
        per_task = spec.out_height if plan.gathers else spec.tasks[0]
        per_image = -(-spec.out_height // per_task)
        self.image = T.Bind(band // per_image)
        self.row = T.Bind(band % per_image * per_task)
        self.lines = T.Bind(T.min(long(per_task), spec.out_height - self.row))
        self.count = T.Bind(self.lines * plan.line_tiles)
        self.pitch = (plan.padded_width if plan.copies else spec.width) * spec.channels
        self.buffer, self.base = kernel.flat_x, T.Bind((self.image * spec.height + self.row * spec.stride[0]) * self.pitch)
        if plan.copies:
            self.base = T.int64(0)
            self.buffer = T.alloc_buffer((plan.band_bytes(per_task) + tiles.DEPTH,), spec.x)
            self._copy(kernel)

    def _copy(self, kernel: _Kernel) -> None:
        """Copy the image rows under the task's lines, with their padding."""
        spec = self.spec
        zero = T.Bind(T.cast(kernel.zero(), spec.x) if spec.x == "uint8" else T.reinterpret("int8", kernel.zero()))
        left, inner = spec.padding[1] * spec.channels, spec.width * spec.channels
        rows = (self.lines - 1) * spec.stride[0] + (spec.dilation[0] * (spec.kernel[0] - 1) + 1)
        with T.serial(rows) as i:
            y = T.Bind(self.row * spec.stride[0] + i - spec.padding[0])
            to = T.Bind(i * self.pitch)
            with T.If(tirx.all(y >= 0, y < spec.height)):
                with T.Then():
                    if left:
                        fill_run(self.buffer, to, zero, left)
                        fill_run(self.buffer, to + (left + inner), zero, left)
                    copy_run(self.buffer, to + left, kernel.flat_x, (self.image * spec.height + y) * inner, inner)
                with T.Else(), T.serial(self.pitch) as byte:
                    store(self.buffer, zero, to + byte)

    def place(self, tile: Index) -> tuple[Index, Index]:
        spec, plan = self.spec, self.plan
        line, column = T.Bind(tile // plan.line_tiles), T.Bind(tile % plan.line_tiles * plan.rows)
        first = T.Bind(T.min(column, long(plan.line - plan.rows)))
        pixel = T.Bind((self.image * spec.out_height + self.row + line) * spec.out_width + first)
        return T.Bind(self.base + line * (spec.stride[0] * self.pitch) + first * self.stride), pixel

    def offset(self, run: Index) -> Index:
        spec = self.spec
        row = spec.dilation[0] * self.pitch
        if self.plan.joined:
            return run * row
        return run // spec.kernel[1] * row + run % spec.kernel[1] * (spec.dilation[1] * spec.channels)


class _Gathered:
    """Tiles of the pixels of an image whose rows are too short for a tile: their runs are copied pixel after pixel. As ``_Pixels``."""

    def __init__(self, kernel: _Kernel, image: Index) -> None:
        spec, plan = kernel.spec, kernel.plan
        self.spec, self.plan, self.image, self.count = spec, plan, image, long(plan.image_tiles)
        lines = _Lines(kernel, image)
        self.width = plan.steps * plan.depth  # of a run
        self.stride = (-(-plan.runs * self.width // tiles.DEPTH) | 1) * tiles.DEPTH  # odd, so that rows do not share cache sets
        self.buffer = T.alloc_buffer((spec.pixels * self.stride,), spec.x)
        with T.serial(spec.out_height) as y, T.serial(spec.out_width) as x, T.serial(plan.runs) as run:
            start = lines.base + y * (spec.stride[0] * lines.pitch) + x * lines.stride + lines.offset(run)
            copy_run(self.buffer, (y * spec.out_width + x) * self.stride + run * self.width, lines.buffer, start, plan.run)

    def place(self, tile: Index) -> tuple[Index, Index]:
        first = T.Bind(T.min(tile * self.plan.rows, long(self.spec.pixels - self.plan.rows)))
        return T.Bind(first * self.stride), T.Bind(self.image * self.spec.pixels + first)

    def offset(self, run: Index) -> Index:
        return run * self.width

"""Linear layers of one to eight rows: the packed weight is read once, as a stream, and never written anywhere.

With so few rows the time is that of reading the weight from memory, so everything else must fit beside it: about 22 vector
instructions for each 64 bytes on the machine this was measured on. Codes go from the packed vector straight into products:

- integers: ``vpdpbusd`` takes one operand without sign and one with. Narrow codes are stored without sign and are the first, x is the
  second, and the zero points of both are taken back once for each group. 8-bit codes have a sign: then x has none.
- floats: four bits of each 32-bit lane are one 4-bit code, two 2-bit codes or four 1-bit codes. By one shuffle they choose a float from
  a table of sixteen: the code's value, to be multiplied by its x, or the finished products of two or four x, made once for all columns.
"""

from __future__ import annotations

from collections.abc import Callable

from qcompile.backends.cpu.kernels.bfloat16 import add_pairs, half
from qcompile.backends.cpu.kernels.matmul_finish import Sums, finish_row
from qcompile.backends.cpu.kernels.matmul_input import PackedInput, added_zero, pack_row
from qcompile.backends.cpu.kernels.matmul_panel import Arguments, multiply_add
from qcompile.backends.cpu.kernels.matmul_planes import load_planes, make_lookup, step_codes, ternary_remainders
from qcompile.backends.cpu.kernels.matmul_spec import CHUNK, LANES, Linear
from qcompile.backends.cpu.kernels.matmul_stream import prefetch_turn
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, rounded, spread
from tvm.script.ir_builder import tirx as T

_ALONE_BYTES = 128 << 10  # weights up to this size are read sooner than another thread wakes
_ONES = 0x01010101


def ceildiv(a: Expr, b: Expr) -> Expr:
    """Return a / b rounded up."""
    return T.truncdiv(a + b - 1, b)


def dispatch(left: Expr, variants: tuple[int, ...], emit: Callable[[int], None]) -> None:
    """Emit the smallest of the ascending ``variants`` of a row count that holds ``left`` rows."""
    if len(variants) == 1:
        emit(variants[0])
        return
    with T.If(left > variants[-2]):
        with T.Then():
            emit(variants[-1])
        with T.Else():
            dispatch(left, variants[:-1], emit)


def emit_few_rows(spec: Linear, arguments: Arguments, m: Expr) -> None:
    """Emit the product of all m rows, at most the last of ``spec.few_rows``; tasks split the columns."""
    size = spec.code_words * spec.padded_columns * min(spec.bits, 8) // 2 if spec.bits < 32 else spec.words * spec.padded_columns
    tasks = 1 if size <= _ALONE_BYTES else min(spec.tile.threads, spec.column_blocks)
    per_task = -(-spec.column_blocks // tasks)
    with T.parallel(0, tasks) as task:
        first = hold(task * per_task)
        blocks = hold(T.max(T.min(per_task, spec.column_blocks - first), 0))
        dispatch(m, spec.few_rows, lambda count: _emit_blocks(spec, arguments, m, count, first, blocks))


def _emit_blocks(spec: Linear, arguments: Arguments, m: Expr, count: int, first: Expr, blocks: Expr) -> None:
    """Emit some blocks of columns one after another for ``count`` rows; those past the last repeat it."""
    product = (_IntegerRows if spec.integer else _FloatRows)(spec, arguments, m, count)
    product.end = hold(first + blocks)
    product.prepare()
    arguments.begin_task(spec)
    sums = T.alloc_buffer((count * spec.columns,), spec.sum_dtype)
    with T.serial(0, blocks) as b:
        column_block = hold(first + b)
        product.block(column_block, sums)
        with T.serial(0, m) as i:
            finish_row(spec, arguments, Sums(sums, product.added), i * spec.columns, i, column_block)


class _Rows:
    """What integer and float products share: packed rows, sums of x, the loop over groups.

    ``totals[i][j]`` are registers with the sums of the current group: row i, vector j of columns. A group is the whole row where
    the weight has no groups.
    """

    def __init__(self, spec: Linear, arguments: Arguments, m: Expr, count: int) -> None:
        self.spec, self.arguments, self.m, self.count = spec, arguments, m, count
        self.end: Expr = spec.column_blocks  # of the column blocks of a task
        self.stride = -(-spec.few_words // CHUNK) * CHUNK
        self.dtype = "int32" if spec.integer else "float32"
        self.steps = spec.steps
        self.group_steps = self.steps // spec.groups
        self.packed = T.alloc_buffer((count * self.stride,), "int32" if spec.pairs else self.dtype)
        self.signed = spec.integer and (spec.bits < 8 or spec.signed_x)
        self.added = added_zero(spec, signed=self.signed)
        self.chains = 2 if count == 1 else 1  # of sums, or the latency of an addition would be longer than the time to read
        self.totals = [[[register(self.dtype, LANES) for _ in range(self.chains)] for _ in range(spec.tile.vectors)] for _ in range(count)]
        self.needs_sums = spec.bits < 8 and (spec.integer or spec.weight_affine)
        if self.needs_sums:
            self.sums = T.alloc_buffer((count * spec.groups,), self.dtype)

    def zero(self) -> Expr:
        return spread(T.int32(0) if self.spec.integer else T.float32(0), LANES)

    def prepare(self) -> None:
        """Emit what depends on x alone."""
        packed = PackedInput(self.packed, CHUNK, self.signed)
        for i in range(self.count):
            pack_row(self.spec, self.arguments, packed, T.min(i, self.m - 1), i * self.stride)
        if self.needs_sums:
            self._emit_sums()

    def _emit_sums(self) -> None:
        """Store the sum of each group of each row's packed elements."""
        spec, size = self.spec, self.spec.words // self.spec.groups
        lanes = min(size & -size, LANES)
        total = register(self.dtype, lanes)
        here, kind = T.ramp(0, 1, lanes), "add" if spec.integer else "fadd"
        start = [] if spec.integer else [T.float32(0)]
        with T.serial(0, self.count * spec.groups) as g:
            first = hold(T.truncdiv(g, spec.groups) * self.stride + T.truncmod(g, spec.groups) * size)
            T.buffer_store(total, spread(T.int32(0) if spec.integer else T.float32(0), lanes), [here])
            with T.serial(0, size // lanes) as part:
                value = self.packed[T.ramp(first + part * lanes, 1, lanes)]
                if spec.integer:
                    for j in range(4):
                        byte = T.shift_right(T.shift_left(value, spread(T.int32(24 - 8 * j), lanes)), spread(T.int32(24), lanes))
                        T.buffer_store(total, total[here] + byte, [here])
                else:
                    T.buffer_store(total, total[here] + value, [here])
            reduced = total[0] if lanes == 1 else T.call_llvm_pure_intrin(self.dtype, f"llvm.vector.reduce.{kind}", *start, total[here])
            T.buffer_store(self.sums, reduced, [g])

    def block(self, column_block: Expr, sums: Expr) -> None:
        """Emit the products with one block of columns; ``sums`` [count, columns] receives them."""
        spec, lanes = self.spec, T.ramp(0, 1, LANES)
        places = [(i, j) for i in range(self.count) for j in range(spec.tile.vectors)]
        spots = {(i, j): T.ramp(i * spec.columns + j * LANES, 1, LANES) for i, j in places}
        if spec.group:
            running = {place: register("float32", LANES) for place in places}
            for total in running.values():
                T.buffer_store(total, spread(T.float32(0), LANES), [lanes])
            with T.serial(0, spec.groups) as g:
                prefetch_turn(self.arguments.scale, column_block * spec.groups + g, self.end * spec.groups, spec.tile.vectors)
                self._group(column_block, g)
                for (i, j), total in running.items():
                    scale = self.arguments.scale[column_block, g, T.ramp(j * LANES, 1, LANES)]
                    scaled = T.cast(self._finished(column_block, g, i, j), "float32x16") * scale
                    T.buffer_store(total, total[lanes] + (rounded(scaled) if spec.integer else scaled), [lanes])
            for place, total in running.items():
                T.buffer_store(sums, total[lanes], [spots[place]])
            return
        self._group(column_block, 0)
        for i, j in places:
            T.buffer_store(sums, self._finished(column_block, 0, i, j), [spots[i, j]])

    def _group(self, column_block: Expr, g: Expr) -> None:
        lanes = T.ramp(0, 1, LANES)
        for row in self.totals:
            for chains in row:
                for total in chains:
                    T.buffer_store(total, self.zero(), [lanes])
        rest = self.spec.code_words % self.spec.step if self.spec.ternary else 0
        with T.serial(0, self.group_steps - (rest > 0)) as s:
            self._step(column_block, g * self.group_steps + s)
        if rest:
            self._step(column_block, T.int32(self.steps - 1), rest)

    def _chain(self, i: int, j: int, turn: int) -> Expr:
        """Return the register of a sum whose turn it is; additions to one wait for each other."""
        return self.totals[i][j][turn % self.chains]

    def _total(self, i: int, j: int) -> Expr:
        lanes = T.ramp(0, 1, LANES)
        first, *others = (total[lanes] for total in self.totals[i][j])
        for other in others:
            first = first + other
        return first

    def _load(self, column_block: Expr, step: Expr) -> list[list[list[Expr]]]:
        """Return the packed vectors of a step, [vector of columns][plane][vector of the plane], and ask for those to come."""
        spec = self.spec
        prefetch_turn(
            self.arguments.weight,
            column_block * self.steps + step,
            self.end * self.steps,
            spec.tile.vectors * (spec.step * spec.bits // 8),
            line=64,
        )
        return [load_planes(spec, self.arguments.weight, column_block, step, j) for j in range(spec.tile.vectors)]

    def _step(self, column_block: Expr, step: Expr, words: int = 0) -> None:
        """Emit the products of one step; of its first ``words``, if not 0."""
        raise NotImplementedError

    def _finished(self, column_block: Expr, g: Expr, i: int, j: int) -> Expr:
        raise NotImplementedError


class _IntegerRows(_Rows):
    """Sums of products of codes, exact."""

    def __init__(self, spec: Linear, arguments: Arguments, m: Expr, count: int) -> None:
        super().__init__(spec, arguments, m, count)
        self.sums_weight = spec.group > 0 and (spec.x_affine or self.added != 0)
        if self.sums_weight:
            self.weight_sums = [register("int32", LANES) for _ in range(spec.tile.vectors)]
        # For one row, codes are not worth taking out of their byte. Remainders fill a byte: the operand without sign.
        self.carries = spec.ternary and count == 1 and not spec.signed_x
        rows = range(spec.tile.vectors if self.carries else 0)
        self.carried = [[register("int32", LANES) for _ in range(self.chains)] for _ in rows]

    def _group(self, column_block: Expr, g: Expr) -> None:
        for total in (self.weight_sums if self.sums_weight else []) + [kept for row in self.carried for kept in row]:
            T.buffer_store(total, self.zero(), [T.ramp(0, 1, LANES)])
        super()._group(column_block, g)

    def _step(self, column_block: Expr, step: Expr, words: int = 0) -> None:
        spec, lanes = self.spec, T.ramp(0, 1, LANES)
        planes = self._load(column_block, step)
        if self.carries:
            self._add_remainders(planes, step, words or spec.step)
            return
        table = make_lookup(spec, self.arguments.table, raised=spec.code_zero > 0) or (lambda code: code)
        every = [step_codes(spec, plane) for plane in planes]
        for w in range(words or spec.step):
            codes = [T.Bind(T.reinterpret("int8x64", table(each[w]))) for each in every]
            for i in range(self.count):
                x = T.Bind(spread(self.packed[i * self.stride + step * spec.step + w], LANES))
                for j, code in enumerate(codes):
                    total = self._chain(i, j, w)
                    T.buffer_store(total, self._multiply_add(total[lanes], x, code), [lanes])
            if self.sums_weight:
                for total, code in zip(self.weight_sums, codes, strict=True):
                    ones = spread(T.int32(_ONES), LANES)
                    T.buffer_store(total, self._multiply_add(total[lanes], ones, code), [lanes])

    def _add_remainders(self, planes: list[list[list[Expr]]], step: Expr, words: int) -> None:
        """Add products with five codes of a byte without taking them out.

        3 q[w] = 256 (code + 1) + q[w + 1], so sum x (code + 1) = (3 sum x q[w] - sum x q[w + 1]) / 256: see ``_total``.
        """
        lanes = T.ramp(0, 1, LANES)
        remainders = [[T.Bind(T.reinterpret("int8x64", q)) for q in ternary_remainders(plane)] for plane in planes]
        for w in range(words):
            x = T.Bind(spread(self.packed[step * self.spec.step + w], LANES))
            for j, each in enumerate(remainders):
                for total, q in ((self._chain(0, j, w), each[w]), (self.carried[j][w % self.chains], each[w + 1])):
                    T.buffer_store(total, self._multiply_add(total[lanes], x, q), [lanes])

    def _total(self, i: int, j: int) -> Expr:
        total = super()._total(i, j)
        if not self.carries:
            return total
        total = total * spread(T.int32(3), LANES)
        for carried in self.carried[j]:
            total = total - carried[T.ramp(0, 1, LANES)]
        return T.shift_right(total, spread(T.int32(8), LANES))

    def _multiply_add(self, total: Expr, x: Expr, code: Expr) -> Expr:
        if self.spec.bits < 8:
            return multiply_add(self.spec, total, T.reinterpret("int32x16", code), T.reinterpret("int8x64", x))
        return multiply_add(self.spec, total, x, code)

    def _finished(self, column_block: Expr, g: Expr, i: int, j: int) -> Expr:
        """Return the sum over a group of (x - x_zero)(w - w_zero), or over the row of (x + added)(w - w_zero).

        With p packed x, v stored codes, z and y their zero points, n elements: sum (p - z)(v - y) = sum p v - y (sum p - n z) - z sum v.
        """
        spec, total = self.spec, self._total(i, j)
        zero = T.int32(self.added)
        if spec.x_affine:
            zero = self.arguments.x_zero[T.min(i, self.m - 1) if spec.x_per_token else 0] + zero
        if self.needs_sums:
            x_sum = self.sums[i * spec.groups + g]
            if self.sums_weight:
                x_sum = x_sum - zero * spec.group
            total = total - self._weight_zero(column_block, g, j) * spread(x_sum, LANES)
        if self.sums_weight:
            total = total - spread(zero, LANES) * self.weight_sums[j][T.ramp(0, 1, LANES)]
        return total

    def _weight_zero(self, column_block: Expr, g: Expr, j: int) -> Expr:
        spec = self.spec
        if not spec.weight_affine:
            return spread(T.int32(spec.code_zero), LANES)
        lanes = T.ramp(j * LANES + (0 if spec.group else column_block * spec.columns), 1, LANES)
        return T.cast(self.arguments.weight_zero[(column_block, g, lanes) if spec.group else lanes], "int32x16")


class _FloatRows(_Rows):
    """Sums of products of floats and codes; the group's scale, or the column's, follows."""

    def __init__(self, spec: Linear, arguments: Arguments, m: Expr, count: int) -> None:
        super().__init__(spec, arguments, m, count)
        self.center = (1 << (spec.bits - 1) if spec.weight_affine else spec.code_zero) if spec.bits < 8 else 0
        if spec.table_floats:
            self.tables = T.alloc_buffer((count * spec.table_floats,), "float32")
            self.step_floats = spec.table_floats // self.steps

    def _lookups(self, planes: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
        """Return, for each four bits of a step: plane, vector of the plane, bit of the lane, first x of the step, place of its table."""
        found, tables = [], 0
        for p, width in enumerate(planes):
            for v in range(self.spec.step * width // 8):
                for nibble in range(8):
                    element, half = divmod(nibble, 2)
                    word = v * (8 // width) + half * (4 // width)
                    found.append((p, v, nibble * 4, word * 4 + element, tables))
                    tables += width < 4
        return found

    def _field(self, plane: int, e: int) -> Expr:
        """Return, for each of the sixteen values of four bits, what code e in them adds to a weight."""
        width = self.spec.planes[plane]
        low = sum(self.spec.planes[:plane])
        bits = T.bitwise_and(T.shift_right(T.ramp(0, 1, 16), spread(T.int32(e * width), 16)), spread(T.int32((1 << width) - 1), 16))
        value = T.shift_left(bits, spread(T.int32(low), 16))
        if plane == len(self.spec.planes) - 1:  # the zero goes to the highest bits, whose table then holds both signs
            value = value - spread(T.int32(self.center), 16)
        return T.cast(value, "float32x16")

    def prepare(self) -> None:
        super().prepare()
        spec = self.spec
        if not spec.table_floats:
            return
        with T.serial(0, self.count) as i, T.serial(0, self.steps) as s:
            for plane, _, _, first, place in self._lookups(spec.planes):
                width = spec.planes[plane]
                if width >= 4:
                    continue
                total = None
                for e in range(4 // width):
                    x = self.packed[i * self.stride + s * (spec.step * 4) + first + e * 4]
                    term = self._field(plane, e) * spread(x, LANES)
                    total = term if total is None else total + term
                T.buffer_store(self.tables, total, [T.ramp(i * spec.table_floats + s * self.step_floats + place * 16, 1, 16)])

    def _step(self, column_block: Expr, step: Expr, words: int = 0) -> None:
        spec = self.spec
        if spec.bits >= 16:
            (self._float_step if spec.bits == 32 else self._half_step)(column_block, step)
            return
        planes = self._load(column_block, step)
        if spec.bits == 8:
            self._byte_step(step, [p[0][0] for p in planes])
            return
        lanes = T.ramp(0, 1, LANES)
        vectors = [[[T.Bind(T.reinterpret("int32x16", v)) for v in plane] for plane in p] for p in planes]
        values = self.arguments.table[0, 0, T.ramp(0, 1, 16)] if spec.codebook else None
        fixed = {p: T.Bind(self._field(p, 0) if values is None else values) for p, width in enumerate(spec.planes) if width == 4}
        for turn, (plane, v, bit, first, place) in enumerate(self._lookups(spec.planes)):
            index = [vectors[j][plane][v] for j in range(spec.tile.vectors)]
            if bit:
                index = [T.Bind(T.shift_right(lane, spread(T.int32(bit), LANES))) for lane in index]
            if plane in fixed:
                values = [T.Bind(_look_up(fixed[plane], lane)) for lane in index]
                for i in range(self.count):
                    x = T.Bind(spread(self.packed[i * self.stride + step * (spec.step * 4) + first], LANES))
                    for j, value in enumerate(values):
                        total = self._chain(i, j, turn)
                        T.buffer_store(total, total[lanes] + x * value, [lanes])
                continue
            for i in range(self.count):
                table = T.Bind(self.tables[T.ramp(i * spec.table_floats + step * self.step_floats + place * 16, 1, 16)])
                for j, lane in enumerate(index):
                    total = self._chain(i, j, turn)
                    T.buffer_store(total, total[lanes] + _look_up(table, lane), [lanes])

    def _byte_step(self, step: Expr, vectors: list[Expr]) -> None:
        words = [T.Bind(T.reinterpret("int32x16", v)) for v in vectors]
        for e in range(4):
            shifted = [T.shift_left(word, spread(T.int32(24 - 8 * e), LANES)) if e < 3 else word for word in words]
            values = [T.Bind(T.cast(T.shift_right(word, spread(T.int32(24), LANES)), "float32x16")) for word in shifted]
            self._add_products(step * 4 + e, values, e)

    def _float_step(self, column_block: Expr, step: Expr) -> None:
        prefetch_turn(self.arguments.weight, column_block * self.steps + step, self.end * self.steps, self.spec.tile.vectors)
        vectors = [self.arguments.weight[column_block, step, T.ramp(j * LANES, 1, LANES)] for j in range(self.spec.tile.vectors)]
        self._add_products(step, [T.Bind(v) for v in vectors], 0)

    def _half_step(self, column_block: Expr, step: Expr) -> None:
        spec, lanes = self.spec, T.ramp(0, 1, LANES)
        prefetch_turn(self.arguments.weight, column_block * self.steps + step, self.end * self.steps, spec.tile.vectors, line=64)
        loaded = [self.arguments.weight[column_block, step, T.ramp(j * 64, 1, 64)] for j in range(spec.tile.vectors)]
        words = [T.Bind(T.reinterpret("int32x16", vector)) for vector in loaded]
        if not spec.pairs:
            for e in range(2):
                self._add_products(step * 2 + e, [T.Bind(half(word, e)) for word in words], e)
            return
        for i in range(self.count):
            x = T.Bind(spread(self.packed[i * self.stride + step], LANES))
            for j, word in enumerate(words):
                total = self._chain(i, j, 0)
                T.buffer_store(total, add_pairs(total[lanes], x, word), [lanes])

    def _add_products(self, k: Expr, values: list[Expr], turn: int) -> None:
        lanes = T.ramp(0, 1, LANES)
        for i in range(self.count):
            x = T.Bind(spread(self.packed[i * self.stride + k], LANES))
            for j, value in enumerate(values):
                total = self._chain(i, j, turn)
                T.buffer_store(total, total[lanes] + x * value, [lanes])

    def _finished(self, column_block: Expr, g: Expr, i: int, j: int) -> Expr:
        spec, total = self.spec, self._total(i, j)
        if not spec.weight_affine:
            return total
        lanes = T.ramp(j * LANES + (0 if spec.group else column_block * spec.columns), 1, LANES)
        zero = self.arguments.weight_zero[(column_block, g, lanes) if spec.group else lanes]
        off = T.cast(T.cast(zero, "int32x16") - spread(T.int32(self.center), LANES), "float32x16")
        return total - off * spread(self.sums[i * spec.groups + g], LANES)


def _look_up(table: Expr, index: Expr) -> Expr:
    """Return the float that the low four bits of each lane choose."""
    permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512")
    return T.call_llvm_pure_intrin("float32x16", permute, table, index)

"""Panels of weights as the register block reads them: straight from the packed array, or unpacked from narrow codes."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.cpu.kernels.bfloat16 import add_pairs, half
from qcompile.backends.cpu.kernels.byte_codes import ByteCodes
from qcompile.backends.cpu.kernels.byte_products import add_byte_products, signed_byte
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.matmul_planes import load_planes, make_lookup, step_codes
from qcompile.backends.cpu.kernels.matmul_spec import LANES, Linear
from qcompile.backends.cpu.kernels.vector import Expr, hold, register, spread
from tvm.script.ir_builder import tirx as T


@dataclass
class Arguments:
    """The buffers of a kernel; those that the layer does not have are None. ``results`` are those of ``Linear.results``.

    ``easy_scale``: that of the result is known to be (``code_rounding.is_easy``).
    """

    m: Expr
    x: Expr
    weight: Expr
    results: list[Expr]
    x_scale: Expr | None = None
    x_zero: Expr | None = None
    sums: Expr | None = None
    scale: Expr | None = None
    weight_zero: Expr | None = None
    bias: Expr | None = None
    table: Expr | None = None
    residual: Expr | None = None
    out_scale: Expr | None = None
    out_zero: Expr | None = None
    easy_scale: bool = False
    rounding: CodeRounding | None = None
    bytes: ByteCodes | None = None

    def begin_task(self, spec: Linear) -> None:
        """Emit what is the same for all results of a task."""
        epilogue = spec.epilogue
        if not epilogue.codes:
            return
        scale, zero = self.out_scale[0], self.out_zero[0]
        self.rounding = CodeRounding(scale, zero, *epilogue.range, isa=spec.isa)
        if spec.tiled and not epilogue.residual:
            self.bytes = ByteCodes(scale, zero, epilogue.output, epilogue.range, epilogue.activation, spec.isa, easy=self.easy_scale)


def multiply_add(spec: Linear, total: Expr, x: Expr, weight: Expr) -> Expr:
    """Return total + x * weight for 16 columns: x 16 equal words, weight 16 words."""
    if spec.pairs:
        return add_pairs(total, x, T.reinterpret("int32x16", weight))
    return add_byte_products(spec.isa, total, x, weight) if spec.integer else total + x * weight


class Panel:
    """Weights that need no unpacking.

    Attributes:
        sums: of the codes of each group of a stretch and each column, where the zero point of x is taken back from groups.
    """

    sums: Expr = None

    def __init__(self, spec: Linear, arguments: Arguments) -> None:
        self.spec, self.arguments = spec, arguments

    def fill(self, column_block: Expr, first_word: Expr, words: Expr) -> None:
        """Emit what makes a stretch of weights readable."""

    def vector(self, column_block: Expr, first_word: Expr, word: Expr, j: int) -> Expr:
        """Return vector j of a word, counted from the stretch's first."""
        size = LANES if self.spec.bits == 32 else 64
        return self.arguments.weight[column_block, first_word + word, T.ramp(j * size, 1, size)]

    def tile(self, column_block: Expr, first_word: Expr, word: Expr, j: int) -> Expr:
        """Return the address of vector j of a word, counted from the stretch's first; words are ``columns`` * 4 bytes apart."""
        return T.address_of(self.arguments.weight[column_block, first_word + word, j * 64])

    def excess(self, group: Expr, j: int, granule: Expr) -> Expr:
        """Return what the zero point of x added to the sums of a group, counted from the stretch's first."""
        raise NotImplementedError("weights without groups are corrected by column sums at the end")


class UnpackedPanel(Panel):
    """Weights unpacked to signed bytes, or to floats where x is float, once for all rows of a task."""

    def __init__(self, spec: Linear, arguments: Arguments) -> None:
        super().__init__(spec, arguments)
        words = spec.stretch + (spec.step - 1 if spec.ternary else 0)  # the last step may pass the end
        self.codes = T.alloc_buffer((words * spec.columns * (4 if spec.integer else 1),), "int8" if spec.integer else "float32")
        if spec.group and spec.corrects_panels:
            self.sums = T.alloc_buffer((spec.stretch // spec.group_words * spec.columns,), "int32")

    def fill(self, column_block: Expr, first_word: Expr, words: Expr) -> None:
        spec = self.spec
        per_word = 1 if spec.integer else spec.word_codes  # words of x for one word of codes
        step_words = spec.step * per_word
        first_step = hold(T.truncdiv(first_word, step_words))
        if not spec.group:
            zeros = [self._zero(column_block, 0, j) for j in range(spec.tile.vectors)]
            with T.serial(0, T.truncdiv(words + step_words - 1, step_words)) as s:
                for j in range(spec.tile.vectors):
                    self._unpack(column_block, first_step + s, s, j, zeros[j], None, None)
            return
        steps = spec.group_words // step_words
        with T.serial(0, T.truncdiv(words, spec.group_words)) as g:
            group = hold(T.truncdiv(first_word, spec.group_words) + g)
            for j in range(spec.tile.vectors):
                lanes = T.ramp(j * LANES, 1, LANES)
                zero, total = self._zero(column_block, group, j), None
                scale = None if spec.integer else self.arguments.scale[column_block, group, lanes]
                if spec.corrects_panels:
                    total = register("int32", LANES)
                    T.buffer_store(total, spread(T.int32(0), LANES), [T.ramp(0, 1, LANES)])
                with T.serial(0, steps) as s:
                    self._unpack(column_block, first_step + g * steps + s, g * steps + s, j, zero, scale, total)
                if total is not None:
                    T.buffer_store(self.sums, total[T.ramp(0, 1, LANES)], [T.ramp(g * spec.columns + j * LANES, 1, LANES)])

    def _zero(self, column_block: Expr, group: Expr, j: int) -> Expr | None:
        """Return the zero point of 16 columns in each of their four bytes, None where it is 0."""
        spec = self.spec
        if spec.codebook:  # looked up with their sign
            return None
        if not spec.weight_affine:
            return spread(T.int8(spec.code_zero), 64) if spec.code_zero and spec.code_zero < 128 else None
        lanes = T.ramp(j * LANES + (0 if spec.group else column_block * spec.columns), 1, LANES)
        zeros = self.arguments.weight_zero[(column_block, group, lanes) if spec.group else lanes]
        words = T.cast(zeros, "int32x16") * spread(T.int32(0x01010101), LANES)
        return T.reinterpret("int8x64", hold(words))

    def _unpack(self, column_block: Expr, step: Expr, local_step: Expr, j: int, zero: Expr | None, scale: Expr | None, total: Expr) -> None:
        """Unpack vector j of one step of words; ``total`` gathers the sums of the columns' codes."""
        spec = self.spec
        if spec.bits == 16:
            words = T.Bind(T.reinterpret("int32x16", self.arguments.weight[column_block, step, T.ramp(j * 64, 1, 64)]))
            for e in range(2):
                T.buffer_store(self.codes, half(words, e), [T.ramp((local_step * 2 + e) * spec.columns + j * LANES, 1, LANES)])
            return
        planes = load_planes(spec, self.arguments.weight, column_block, step, j)
        table = make_lookup(spec, self.arguments.table)
        for w, code in enumerate(step_codes(spec, planes)):
            code = T.reinterpret("int8x64", table(code) if table is not None and spec.integer else code)
            code = T.Bind(code if zero is None else code - zero)
            word = local_step * spec.step + w
            if spec.integer:
                T.buffer_store(self.codes, code, [T.ramp((word * spec.columns + j * LANES) * 4, 1, 64)])
                if total is not None:
                    lanes = T.ramp(0, 1, LANES)
                    T.buffer_store(total, multiply_add(spec, total[lanes], spread(T.int32(0x01010101), LANES), code), [lanes])
                continue
            bits = T.Bind(T.reinterpret("int32x16", code))
            for i in range(4):
                if table is not None:
                    value = table(T.shift_right(bits, spread(T.int32(8 * i), LANES)) if i else bits)
                else:
                    value = T.cast(signed_byte(bits, i), "float32x16")
                value = value if scale is None else value * scale
                T.buffer_store(self.codes, value, [T.ramp((word * 4 + i) * spec.columns + j * LANES, 1, LANES)])

    def vector(self, column_block: Expr, first_word: Expr, word: Expr, j: int) -> Expr:
        size = 4 if self.spec.integer else 1
        return self.codes[T.ramp((word * self.spec.columns + j * LANES) * size, 1, LANES * size)]

    def tile(self, column_block: Expr, first_word: Expr, word: Expr, j: int) -> Expr:
        return T.address_of(self.codes[(word * self.spec.columns + j * LANES) * 4])

    def excess(self, group: Expr, j: int, granule: Expr) -> Expr:
        zero = T.int32(self.spec.x_shift)
        if self.spec.x_affine:
            zero = self.arguments.x_zero[granule] + zero
        return spread(zero, LANES) * self.sums[T.ramp(group * self.spec.columns + j * LANES, 1, LANES)]


def make_panel(spec: Linear, arguments: Arguments) -> Panel:
    """Return the panel that a layer's weights need, its buffers allocated in the current task."""
    return UnpackedPanel(spec, arguments) if spec.unpacks else Panel(spec, arguments)

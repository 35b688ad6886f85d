"""Multi-head attention over int8 codes (dialect ``qc.attention_codes``), bit for bit: scores, softmax and values in one kernel.

A task owns some query rows of one (batch, head). Keys come in passes of ``PASS`` rows, which are packed once for all of the task's rows
into panels of sixteen columns of words of four codes, as products of bytes read them (``byte_products``, ``tiles``):

    keys    [block of 16 keys][word of channels][16 keys]           scores[row][key] += query word * panel word
    values  [block of 16 channels][word of keys][16 channels]       sums[row][channel] += weight word * panel word

Sixteen query rows at a time make scores, weights and sums, all of them small enough for the first-level cache; lanes are keys, then
channels, so weights are written as bytes in the order in which the second product reads them, and nothing is transposed but the panels.

A weight needs the greatest score of its row. Where the keys are one pass it is found on the way; more passes go over the keys twice, first
for the greatest alone. Products cost little beside powers of two, which are computed once either way.

Where a product takes its first operand without sign, queries are raised by 128; where with sign, weights are lowered by 128. Either is
taken back by the value that sums start with, 128 times the sum of the panel's column.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels import tiles
from qcompile.backends.cpu.kernels.byte_products import add_byte_products
from qcompile.backends.cpu.kernels.code_rounding import RANGES, CodeRounding
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Expression,
    Index,
    argument,
    below,
    fold,
    function,
    load_part,
    local,
    long,
    ramp,
    serial_or_parallel,
    size,
    splat,
    store,
    store_row,
    transpose,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import hold, register, round_to_int, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcompile.graph.dialect import FAINTEST, POWER

PASS = 512  # keys: sixteen rows of their scores are 32 KiB
BLOCK = 16  # query rows that are computed together, the rows of a tile
TASK_ROWS = 128  # packing keys and values stays small beside what so many rows compute with them
HIDDEN = -(1 << 30)  # below every score of fewer than 65536 channels
_SCORE_PITCH = PASS + LANES  # from row to row; a power of two would put all rows into a few sets of the cache
_WEIGHT_PITCH = PASS // 4 + LANES  # words
_KEY_WORK = 16  # a key of a row costs about as much as so many multiply-adds
_TOP_BITS, _ONES = 0x80808080, 0x01010101
_BYTES = 4 * LANES


@dataclass(frozen=True)
class CodeAttention:
    """Attention over int8 codes with one scale each.

    Attributes:
        heads, kv_heads, head_dim: query heads, key heads, channels of a head.
        scale: what scores are multiplied by.
        key_mask: there is a mask of keys, an argument.
        causal, past, window: as ``attention.attention`` has them.
        codes: dtype of the result's codes, int8 or uint8; empty: the result is float32.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    key_mask: bool = False
    causal: bool = False
    past: bool = False
    window: int = 0
    codes: str = ""
    isa: str = field(default_factory=instruction_sets.detect)

    def __post_init__(self) -> None:
        instruction_sets.check(self.isa)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide among {self.kv_heads} key heads")
        if (self.past or self.window) and not self.causal:
            raise ValueError("past and a window are of causal attention")

    @property
    def tiled(self) -> bool:
        """Whether products are made in tile registers: heads of 32 channels leave half a tile empty, and take vectors 0.92 of the time."""
        return instruction_sets.SETS[self.isa].tiles and self.head_dim > tiles.DEPTH // 2

    @property
    def signed_x(self) -> bool:
        """Whether vectors' products take their first operand with a sign."""
        return instruction_sets.SETS[self.isa].signed_x

    @property
    def block(self) -> tuple[int, int]:
        """Rows and vectors of the register block."""
        found = instruction_sets.SETS[self.isa]
        vectors = 2 if found.parts == 1 else 1
        return (8 if found.block_rows(vectors, integer=True) >= 8 else 4), vectors

    @property
    def query_words(self) -> int:
        """Words of a packed query, whole tiles where there are any."""
        words = -(-self.head_dim // 4)
        return -(-words // tiles.WORDS) * tiles.WORDS if self.tiled else words

    @property
    def key_step(self) -> int:
        """Keys that are computed together: whole tiles, or whole blocks of vectors."""
        return tiles.DEPTH if self.tiled else 2 * LANES

    @property
    def channel_blocks(self) -> int:
        return -(-self.head_dim // LANES)


def attention_codes(spec: CodeAttention) -> tirx.PrimFunc:
    """Build ``f(q, k, v, q_scale, k_scale, v_scale[, key_mask][, past][, scale, zero_point], out)``.

    q int8 [batch, tokens, heads * d], k and v int8 [batch, keys, kv_heads * d]; scales float32 [1]; key_mask bool [batch, keys]; past
    int64 [batch]; out float32 or codes [batch, tokens, heads * d], of scale float32 [1] and zero_point int32 [1].

    Keys number at most 65,000, channels of a head 65,535: sums are int32.
    """
    with function("attention_codes") as builder:
        task = _Attention(spec)
        parts = (task.tokens + TASK_ROWS - 1) // TASK_ROWS
        serial_or_parallel(task.batch * spec.heads * parts, task.work, lambda index: task.run(index, parts))
    return builder.get()


class _Attention:
    """The arguments of one function and the statements of its tasks."""

    def __init__(self, spec: CodeAttention) -> None:
        self.spec, d = spec, spec.head_dim
        self.batch, self.tokens, self.keys = size("batch"), size("tokens"), size("keys")
        self.q = argument("q", (self.batch, self.tokens, spec.heads * d), "int8")
        self.k = argument("k", (self.batch, self.keys, spec.kv_heads * d), "int8")
        self.v = argument("v", (self.batch, self.keys, spec.kv_heads * d), "int8")
        self.q_scale, self.k_scale, self.v_scale = (argument(f"{name}_scale", (1,)) for name in "qkv")
        self.key_mask = argument("key_mask", (self.batch, self.keys), "bool") if spec.key_mask else None
        self.past = argument("past", (self.batch,), "int64") if spec.past else None
        self.out_scale = argument("scale", (1,)) if spec.codes else None
        self.out_zero = argument("zero_point", (1,), "int32") if spec.codes else None
        self.out = argument("out", (self.batch, self.tokens, spec.heads * d), spec.codes or "float32")
        self.work = self.batch * spec.heads * self.tokens * self.keys * (_KEY_WORK + d // 4)
        self.pitch = spec.channel_blocks * LANES  # of a row of sums

    def run(self, index: Index, parts: Index) -> None:
        """Compute some rows of one (batch, head)."""
        spec = self.spec
        self.b, self.h = hold(long(index) // (spec.heads * parts)), hold(long(index) // parts % spec.heads)
        self.first = hold(long(index) % parts * TASK_ROWS)
        self.rows = hold(T.min(self.tokens - self.first, long(TASK_ROWS)))
        kv_head = hold(self.h // (spec.heads // spec.kv_heads))
        self.kv_channel = hold(kv_head * spec.head_dim)
        self.before = hold(self._before())
        self.queries = local(TASK_ROWS * spec.query_words, "int32")
        self.key_panel = local(PASS * spec.query_words * 4, "int8")
        self.value_panel = local(PASS * self.pitch, "int8")
        self.key_starts, self.value_starts = local(PASS, "int32"), local(self.pitch, "int32")
        self.limits = local(PASS, "int32")
        self.scores, self.weights = local(BLOCK * _SCORE_PITCH, "int32"), local(BLOCK * _WEIGHT_PITCH, "int32")
        self.tops, self.totals = local(TASK_ROWS, "int32"), local(TASK_ROWS, "int32")
        self.sums = local(TASK_ROWS * self.pitch, "int32")
        scales = rounded(self.q_scale[0] * self.k_scale[0])
        self.step = hold(rounded(scales * T.float32(spec.scale * math.log2(math.e))))
        self.rounding = CodeRounding(self.out_scale[0], self.out_zero[0], *RANGES[spec.codes], spec.isa) if spec.codes else None
        if spec.tiled:
            tiles.configure()
        self._pack_queries()
        # Keys after the last row of the task are never seen, nor are those before the window of the first.
        seen = hold(self.before + self.first + self.rows if spec.causal else self.keys)
        skipped = hold(T.max(self.before + self.first + 1 - spec.window, long(0)) // PASS) if spec.window else long(0)
        passes = hold((seen + PASS - 1) // PASS - skipped)
        with T.If(passes > 1), T.Then(), T.serial(passes) as p:
            self._open_pass(hold((p + skipped) * PASS), seen)
            self._each_block(self._find_greatest)
        with T.serial(passes) as p:
            self._open_pass(hold((p + skipped) * PASS), seen)
            self._pack_values()
            self._each_block(lambda row, count: self._attend(row, count, p))
        if spec.tiled:
            tiles.release()
        with T.serial(self.rows) as row:
            self._finish(row)

    def _before(self) -> Index:
        """Return how many keys stand before the queries of the batch row; never beyond the cache, whatever the caller says."""
        if self.past is None:
            return self.keys - self.tokens
        return T.max(T.min(self.past[self.b], self.keys - self.tokens), long(0))

    def _each_block(self, body: Callable[[Index, Index], None]) -> None:
        """Emit ``body(first row, rows)`` for the blocks of the task's rows."""
        with T.serial((self.rows + BLOCK - 1) // BLOCK) as block:
            body(hold(long(block) * BLOCK), hold(T.min(self.rows - block * BLOCK, long(BLOCK))))

    # ---- packing ----

    def _words(self, buffer: Any, c: int, *where: Index) -> Expression:
        """Return sixteen words of the codes of a head from channel ``c`` on; words after the head's last are anything.

        Codes after the last within its word are zero.
        """
        width = min(_BYTES, self.spec.head_dim - c)
        row, channel = where[:-1], where[-1]
        if width == _BYTES:
            return T.reinterpret(f"int32x{LANES}", buffer[(*row, ramp(channel + c, _BYTES))])
        if width % 4 == 0 and width & (width - 1) == 0:
            part = T.Bind(T.reinterpret("int32" if width == 4 else f"int32x{width // 4}", buffer[(*row, ramp(channel + c, width))]))
            return splat(part) if width == 4 else tirx.Shuffle([part] * (_BYTES // width), list(range(LANES)))
        found = load_part(buffer, below(width, lanes=_BYTES), *row, ramp(channel + c, _BYTES), lanes=_BYTES)
        return T.reinterpret(f"int32x{LANES}", found)

    def _pack_queries(self) -> None:
        """Copy the task's rows as words; rows up to a whole block repeat the last. Nothing is greatest yet, and nothing summed."""
        spec = self.spec
        raised = not spec.tiled and not spec.signed_x
        with T.serial((self.rows + BLOCK - 1) // BLOCK * BLOCK) as i:
            row = hold(self.first + T.min(i, self.rows - 1))
            for c in range(0, spec.head_dim, _BYTES):
                words = self._words(self.q, c, self.b, row, self.h * spec.head_dim)
                if raised:
                    words = T.bitwise_xor(words, splat(T.reinterpret("int32", T.uint32(_TOP_BITS))))
                lanes = min(LANES, spec.query_words - c // 4)
                kept = words if lanes == LANES else tirx.Shuffle([T.Bind(words)], list(range(lanes)))
                start = i * spec.query_words + c // 4
                store(self.queries, kept, ramp(start, lanes) if lanes > 1 else start)
            store(self.tops, T.int32(HIDDEN), i)
            store(self.totals, T.int32(0), i)

    def _open_pass(self, base: Index, seen: Index) -> None:
        """Pack a pass of keys and write the most that each key's score may be; what is after the last is hidden."""
        spec, self.base = self.spec, base
        self.count = hold(T.min(seen - base, long(PASS)))
        self.steps = hold((self.count + spec.key_step - 1) // spec.key_step)
        with T.serial(self.steps * (spec.key_step // LANES)) as block:
            key = hold(long(block) * LANES)
            places = [hold(base + T.min(key + j, self.count - 1)) for j in range(LANES)]
            start = hold(key * spec.query_words * 4)
            total = register("int32", LANES)
            store(total, splat(T.int32(0)), ramp(0))
            words = -(-spec.head_dim // 4)
            for c in range(0, spec.head_dim, _BYTES):
                columns = transpose([self._words(self.k, c, self.b, place, self.kv_channel) for place in places])
                for w, column in enumerate(columns[: words - c // 4]):
                    panel = T.Bind(T.reinterpret(f"int8x{_BYTES}", column))
                    store(self.key_panel, panel, ramp(start + (c // 4 + w) * _BYTES, _BYTES))
                    self._add_column(total, panel)
            for w in range(words, spec.query_words):
                store(self.key_panel, splat(T.int8(0), _BYTES), ramp(start + w * _BYTES, _BYTES))
            if not spec.tiled:
                lowered = splat(T.int32(0 if spec.signed_x else -128)) * total[ramp(0)]
                store(self.key_starts, lowered, ramp(key))
            with T.serial(LANES) as j:
                visible = key + j < self.count
                if self.key_mask is not None:
                    visible = tirx.all(visible, self.key_mask[self.b, base + T.min(key + j, self.count - 1)])
                store(self.limits, tirx.Select(visible, T.int32(-HIDDEN), T.int32(HIDDEN)), key + j)

    def _add_column(self, total: Any, panel: Expression) -> None:
        """Add the codes of a panel's word to the sums of its columns."""
        if not self.spec.tiled:
            store(total, add_byte_products(self.spec.isa, total[ramp(0)], splat(T.int32(_ONES)), panel), ramp(0))

    def _pack_values(self) -> None:
        """Pack a pass of values; rows after the last repeat it, their weights are zero."""
        spec = self.spec
        words = hold(self.steps * (spec.key_step // 4))
        totals = [register("int32", LANES) for _ in range(spec.channel_blocks)]
        for total in totals:
            store(total, splat(T.int32(0)), ramp(0))
        with T.serial(words) as word:
            rows = [hold(self.base + T.min(long(word) * 4 + e, self.count - 1)) for e in range(4)]
            for block, total in enumerate(totals):
                width = min(LANES, spec.head_dim - block * LANES)
                packed: Any = None
                for e, row in enumerate(rows):
                    where = (self.b, row, ramp(self.kv_channel + block * LANES))
                    codes = self.v[where] if width == LANES else load_part(self.v, below(width), *where)
                    part = T.shift_left(T.cast(T.reinterpret(f"uint8x{LANES}", codes), f"int32x{LANES}"), splat(T.int32(8 * e)))
                    packed = part if packed is None else T.bitwise_or(packed, part)
                panel = T.Bind(T.reinterpret(f"int8x{_BYTES}", packed))
                store(self.value_panel, panel, ramp((block * (PASS // 4) + word) * _BYTES, _BYTES))
                self._add_column(total, panel)
        for block, total in enumerate(totals):
            raised = splat(T.int32(128 if spec.signed_x and not spec.tiled else 0)) * total[ramp(0)]
            store(self.value_starts, raised, ramp(block * LANES))

    # ---- scores and weights ----

    def _score(self, row: Index, count: Index) -> None:
        """Fill the scores of a block of rows, not yet hidden."""
        spec = self.spec
        if spec.tiled:
            with T.serial(self.steps * (spec.key_step // (2 * LANES))) as pair:
                panels = [(pair * 2 + j) * (LANES * spec.query_words * 4) for j in range(2)]
                spots = [[T.address_of(self.scores[(pair * 2 + j) * LANES]) for j in range(2)]]
                block = tiles.Block(1, 2, "int8")
                block.zero()
                for word in range(0, spec.query_words, tiles.WORDS):
                    weight = [T.address_of(self.key_panel[panel + word * _BYTES]) for panel in panels]
                    query = T.address_of(self.queries[row * spec.query_words + word])
                    block.multiply_add([query], spec.query_words * 4, weight, _BYTES)
                block.store(spots, _SCORE_PITCH * 4)
            return
        rows, vectors = spec.block
        with T.serial(self.steps * (spec.key_step // (vectors * LANES))) as group, T.serial((count + rows - 1) // rows) as part:
            first, key = hold(long(part) * rows), hold(long(group) * (vectors * LANES))
            self._multiply(
                rows, vectors, spec.query_words,
                lambda i, w: self.queries[(row + first + i) * spec.query_words + w],
                lambda j, w: self.key_panel[ramp((key + j * LANES) * (spec.query_words * 4) + w * _BYTES, _BYTES)],
                lambda i, j: self.key_starts[ramp(key + j * LANES)],
                lambda i, j: (self.scores, ramp((first + i) * _SCORE_PITCH + key + j * LANES)),
            )  # fmt: skip

    def _multiply(
        self, rows: int, vectors: int, words: Index, x: Callable[[int, Index], Expression], weight: Callable[[int, Index], Expression],
        start: Callable[[int, int], Expression], spot: Callable[[int, int], tuple[Any, Index]],
    ) -> None:  # fmt: skip
        """Emit ``spot[i][j] = start[i][j] + sum over words of x[i] weight[j]`` in registers."""
        totals = [[register("int32", LANES) for _ in range(vectors)] for _ in range(rows)]
        for i in range(rows):
            for j in range(vectors):
                store(totals[i][j], start(i, j), ramp(0))
        with T.serial(words) as w:
            weights = [T.Bind(weight(j, w)) for j in range(vectors)]
            for i in range(rows):
                word = T.Bind(splat(x(i, w)))
                for j in range(vectors):
                    store(totals[i][j], add_byte_products(self.spec.isa, totals[i][j][ramp(0)], word, weights[j]), ramp(0))
        for i in range(rows):
            for j in range(vectors):
                buffer, lanes = spot(i, j)
                store(buffer, totals[i][j][ramp(0)], lanes)

    def _find_greatest(self, row: Index, count: Index) -> None:
        """Raise the rows' greatest scores by those of a pass."""
        self._score(row, count)
        with T.serial(count) as i:
            self._hide(row, i)

    def _hide(self, row: Index, i: Index) -> Expression:
        """Hide what row ``i`` of a block may not see, and return its greatest score so far."""
        spec, kept = self.spec, register("int32", LANES)
        store(kept, splat(self.tops[row + i]), ramp(0))
        own = hold(self.before + self.first + row + i - self.base)  # the row's own key, as a place in the pass

        def place_of(place: Index) -> Index:
            return hold(T.cast(T.max(T.min(place, long(PASS)), long(-1)), "int32"))  # however long a cache is

        last = place_of(own) if spec.causal else None
        earliest = place_of(own - spec.window + 1) if spec.window else None
        with T.serial(self.steps * (spec.key_step // LANES)) as block:
            lanes = ramp(i * _SCORE_PITCH + block * LANES)
            score = T.min(self.scores[lanes], self.limits[ramp(block * LANES)])
            if last is not None:
                place = ramp(T.cast(block, "int32") * LANES)
                visible = place <= splat(last)
                if earliest is not None:
                    visible = tirx.And(visible, place >= splat(earliest))
                score = tirx.Select(visible, score, splat(T.int32(HIDDEN)))
            score = T.Bind(score)
            store(self.scores, score, lanes)
            store(kept, T.max(kept[ramp(0)], score), ramp(0))
        greatest = hold(fold(kept[ramp(0)], T.max))
        store(self.tops, greatest, row + i)
        return greatest

    def _attend(self, row: Index, count: Index, p: Index) -> None:
        """Add what a block of rows takes of a pass of values."""
        self._score(row, count)
        self._weigh(row, count)
        self._add_values(row, count, p)

    def _weigh(self, row: Index, count: Index) -> None:
        """Turn the scores of a block of rows into weights."""
        with T.serial(count) as i:
            greatest, total = self._hide(row, i), register("int32", LANES)
            store(total, splat(T.int32(0)), ramp(0))
            with T.serial(self.steps * (self.spec.key_step // LANES)) as block:
                codes = T.Bind(self._power_codes(self.scores[ramp(i * _SCORE_PITCH + block * LANES)], greatest))
                store(total, total[ramp(0)] + codes, ramp(0))
                if self.spec.signed_x and not self.spec.tiled:
                    codes = codes - splat(T.int32(128))
                packed = T.reinterpret("int32x4", T.cast(codes, f"int8x{LANES}"))
                store(self.weights, packed, ramp(i * _WEIGHT_PITCH + block * (LANES // 4), LANES // 4))
            store(self.totals, self.totals[row + i] + fold(total[ramp(0)], operator.add), row + i)

    def _power_codes(self, score: Expression, greatest: Expression) -> Expression:
        """Return the int32 weights of sixteen scores, as the dialect's ``_power_codes`` rounds them; 0 of a hidden one."""
        score = T.Bind(score)
        below_top = T.cast(score - splat(greatest), f"float32x{LANES}")
        x = T.Bind(T.max(rounded(below_top * splat(self.step)), splat(FAINTEST)))
        shifted = T.Bind(rounded(x + splat(12582912.0)))  # 1.5 * 2**23: the integer is in the low bits of the mantissa
        rest = T.Bind(rounded(x - rounded(shifted - splat(12582912.0))))
        y = splat(POWER[0])
        for coefficient in POWER[1:]:
            y = rounded(rounded(y * rest) + splat(coefficient))
        exponent = T.shift_left(T.reinterpret(f"int32x{LANES}", shifted), splat(T.int32(23)))
        power = T.reinterpret(f"float32x{LANES}", T.reinterpret(f"int32x{LANES}", y) + exponent)
        return tirx.Select(score > splat(T.int32(HIDDEN)), round_to_int(power), splat(T.int32(0)))

    # ---- values ----

    def _add_values(self, row: Index, count: Index, p: Index) -> None:
        """Add weights x values of a pass to the sums of a block of rows."""
        spec = self.spec
        words = hold(self.steps * (spec.key_step // 4))
        rows, vectors = (BLOCK, 2) if spec.tiled else spec.block
        for block in range(0, spec.channel_blocks, vectors):
            self._add_value_block(row, count, p, words, (block, min(vectors, spec.channel_blocks - block), rows))

    def _add_value_block(self, row: Index, count: Index, p: Index, words: Index, shape: tuple[int, int, int]) -> None:
        block, vectors, rows = shape
        panels = [(block + j) * (PASS // 4) * _BYTES for j in range(vectors)]
        if self.spec.tiled:
            product = tiles.Block(1, vectors, "uint8")
            spots = [[T.address_of(self.sums[row * self.pitch + (block + j) * LANES]) for j in range(vectors)]]
            with T.If(p == 0):
                with T.Then():
                    product.zero()
                with T.Else():
                    product.load(spots, self.pitch * 4)
            with T.serial(words // tiles.WORDS) as step:
                weight = [T.address_of(self.value_panel[panel + step * (tiles.WORDS * _BYTES)]) for panel in panels]
                product.multiply_add([T.address_of(self.weights[step * tiles.WORDS])], _WEIGHT_PITCH * 4, weight, _BYTES)
            product.store(spots, self.pitch * 4)
            return

        def spot(first: Index, i: int, j: int) -> Index:
            return ramp((row + first + i) * self.pitch + (block + j) * LANES)

        with T.serial((count + rows - 1) // rows) as part:
            first = hold(long(part) * rows)
            with T.If(p == 0), T.Then():
                for i in range(rows):
                    for j in range(vectors):
                        store(self.sums, splat(T.int32(0)), spot(first, i, j))
            self._multiply(
                rows, vectors, words,
                lambda i, w: self.weights[(first + i) * _WEIGHT_PITCH + w],
                lambda j, w: self.value_panel[ramp(panels[j] + w * _BYTES, _BYTES)],
                lambda i, j: self.sums[spot(first, i, j)] + self.value_starts[ramp((block + j) * LANES)],
                lambda i, j: (self.sums, spot(first, i, j)),
            )  # fmt: skip

    # ---- results ----

    def _finish(self, row: Index) -> None:
        """Scale a row's sums and store its channels."""
        spec = self.spec
        total = T.cast(T.max(self.totals[row], T.int32(1)), "float32")
        scale = hold(rounded(self.v_scale[0] / total))
        for c in range(0, spec.head_dim, LANES):
            width = min(LANES, spec.head_dim - c)
            y = T.Bind(rounded(T.cast(self.sums[ramp(row * self.pitch + c)], f"float32x{LANES}") * splat(scale)))
            result = T.Bind(T.cast(self.rounding.codes(y), f"{spec.codes}x{LANES}")) if self.rounding else y
            place = (self.b, self.first + row, self.h * spec.head_dim + c)
            store_row(self.out, result, None if width == LANES else below(width), *place)

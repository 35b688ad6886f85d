"""Multi-head attention in one pass over the keys, float32 (dialect ``qc.attention``).

A task is one (batch, head, block of query rows). Lanes are query rows: scores are kept transposed, [key][row], so that the softmax
needs no horizontal step and both products read keys and values straight from the [batch, key, head * d] layout as broadcast
scalars. Only the queries of a task and its result are transposed. Running maximum and sum (Milakov and Gimelshein 2018,
Dao et al. 2022) let any number of keys pass through one small tile. With fewer queries than ``FEW_ROWS`` (decoding) lanes are
channels instead.

Error against exact arithmetic for bounded inputs: products of d and s terms in float32 and an exp2 within 1.5 ulp.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.backends.cpu.kernels.bfloat16 import narrowed, stored_dtype
from qcompile.backends.cpu.kernels.code_rounding import RANGES, CodeRounding
from qcompile.backends.cpu.kernels.isa import SETS, detect, thread_count
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Expression,
    Index,
    argument,
    below,
    exp2,
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
from qcompile.backends.cpu.kernels.stored_rows import Rows, Stored
from qcompile.backends.cpu.kernels.vector import register, rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T

FEW_ROWS = 4  # below this a block of query rows would mostly compute padding
Reader = Callable[[Index, Index], Expression]
LOWEST = -1.0e30  # first running maximum: below every score, and finite, so that a row that sees no key gives zeros


@dataclass(frozen=True)
class _Block:
    """Tile sizes: vectors of query rows, keys in one register tile, keys in one pass, channels in one register tile."""

    vectors: int
    keys: int
    pass_keys: int
    channels: int

    @property
    def rows(self) -> int:
        return self.vectors * LANES


# 8 keys x 2 vectors are 16 accumulators: enough to hide the latency of 2 FMA units, and 10 loads per 16 products fit the load ports.
# Sixteen half-width registers, or 32 of a quarter, hold 4 x 1 (8 or 16 registers).
_WIDE_BLOCK, _BLOCK = _Block(2, 8, 128, 8), _Block(1, 4, 128, 4)


def attention(
    heads: int, kv_heads: int, head_dim: int, scale: float, *, key_mask: bool, causal: bool, bias: bool = False, codes: str = "",
    past: bool = False, window: int = 0, own: str = "", stored_k: Stored | None = None, stored_v: Stored | None = None,
    isa: str | None = None,
) -> tirx.PrimFunc:  # fmt: skip
    """Build ``f(q, k, v[, key_mask][, bias][, past][, own_k, own_v][, scales of k][, scales of v][, scale, zero_point], out)``.

    q and out float32 [batch, tokens, heads * head_dim]; k and v float32 [batch, keys, kv_heads * head_dim]; key_mask bool [batch, keys],
    True where a key may be seen; bias float32 [bias_batch, bias_heads, tokens, keys], added to the scaled scores, either size 1 broadcasts.
    ``causal`` counts from the end: query i sees key j when ``j <= before + i``, before = keys - tokens, and with a ``window`` only where
    ``j > before + i - window``. With past, int64 [batch], before is past[b], and keys after the queries' own are not read: k and v are
    caches with room for more. A query that sees no key gives zeros.
    ``own_k`` and ``own_v``, float32 [batch, tokens, kv_heads * head_dim], are there where ``own`` is "token": they stand for k and v where
    a query meets its own token; or "call": they stand for all tokens of the queries, and of k and v only what is before them is read.
    ``stored_k`` and ``stored_v`` say that k or v hold codes; then scales (and zero points) of each row follow, ``stored_rows.Rows``.
    ``codes`` is "", "int8" or "uint8": then out holds codes of that dtype, of scale float32 [1] and zero_point int32 [1]; or "bfloat16".

    Raises:
        ValueError: heads is no multiple of kv_heads; past, a window or own tokens without causal; own tokens with a mask or a bias; codes
            of heads that are no whole vectors.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide among {kv_heads} key heads")
    if (past or window) and not causal:
        raise ValueError("past and a window are of causal attention")
    if own and (not causal or key_mask or bias):
        raise ValueError("own tokens are of causal attention without a mask")
    with function("attention") as builder:
        stored = stored_k, stored_v
        shape = _Shape(heads, kv_heads, head_dim, scale, key_mask, causal, bias, codes, past, window, own, *stored, isa or detect())
        task = _Attention(shape)
        with T.If(task.tokens < T.int64(FEW_ROWS)):
            with T.Then():
                serial_or_parallel(task.batch * (heads // task.share), task.work, task.few_rows)
            with T.Else():
                blocks = (task.tokens + task.block.rows - 1) // task.block.rows
                serial_or_parallel(task.batch * heads * blocks, task.work, lambda index: task.row_block(index, blocks))
    return builder.get()


@dataclass(frozen=True)
class _Shape:
    """What one attention function is made for; the names are those of ``attention``."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    key_mask: bool
    causal: bool
    bias: bool
    codes: str
    past: bool
    window: int
    own: str
    stored_k: Stored | None
    stored_v: Stored | None
    isa: str


class _Attention:
    """The arguments of one attention function and the statements of its tasks."""

    def __init__(self, shape: _Shape) -> None:
        self.heads, self.kv_heads, self.d, self.causal = shape.heads, shape.kv_heads, shape.head_dim, shape.causal
        self.isa, self.block = shape.isa, _WIDE_BLOCK if SETS[shape.isa].parts == 1 else _BLOCK
        self.scale = shape.scale * math.log2(math.e)  # the softmax runs in powers of two
        self.batch, self.tokens, self.keys = size("batch"), size("tokens"), size("keys")
        self.q = argument("q", (self.batch, self.tokens, self.heads * self.d))
        self.k = Rows("k", (self.batch, self.keys), self.kv_heads, self.d, shape.stored_k)
        self.v = Rows("v", (self.batch, self.keys), self.kv_heads, self.d, shape.stored_v)
        self.key_mask = argument("key_mask", (self.batch, self.keys), "bool") if shape.key_mask else None
        self.bias_batch, self.bias_heads = size("bias_batch"), size("bias_heads")
        self.bias = argument("bias", (self.bias_batch, self.bias_heads, self.tokens, self.keys)) if shape.bias else None
        self.past, self.window = argument("past", (self.batch,), "int64") if shape.past else None, shape.window
        self.own = shape.own
        if self.own:
            self.own_k, self.own_v = (Rows(name, (self.batch, self.tokens), self.kv_heads, self.d, None) for name in ("own_k", "own_v"))
        self.k.declare_scales()
        self.v.declare_scales()
        self.codes = shape.codes
        self.out_scale = argument("scale", (1,)) if shape.codes in RANGES else None
        self.out_zero = argument("zero_point", (1,), "int32") if shape.codes in RANGES else None
        self.out = argument("out", (self.batch, self.tokens, self.heads * self.d), stored_dtype(shape.codes or "float32"))
        # Heads of one task of few rows: all that share their keys, fewer where that would leave threads without work.
        together = self.heads // self.kv_heads
        fitting = (n for n in range(together, 0, -1) if together % n == 0 and self.heads // n >= thread_count())
        self.share = next(fitting, 1)
        self.work = self.batch * self.heads * self.tokens * (self._before(0) + self.tokens) * self.d

    def _before(self, b: Index) -> Index:
        """Return how many keys stand before the queries of a batch row."""
        if self.past is None:
            return self.keys - self.tokens
        # Never beyond the cache, whatever the caller says.
        return T.max(T.min(self.past[b], self.keys - self.tokens), long(0))

    def _first_pass(self, before: Index, row: Index) -> Index:
        """Return the first pass of keys of which a row or a later one sees any."""
        return T.Bind(T.max(before + row + 1 - self.window, long(0)) // self.block.pass_keys) if self.window else long(0)

    def _rounding(self) -> CodeRounding | None:
        """Compute what all codes of a task share."""
        return CodeRounding(self.out_scale[0], self.out_zero[0], *RANGES[self.codes], self.isa) if self.codes in RANGES else None

    def _store(self, rounding: CodeRounding | None, value: Expression, place: tuple[Index, Index, Index], width: int) -> None:
        """Store ``width`` channels of one row from one channel on: the floats, or their codes."""
        value = T.Bind(rounded(value)) if self.codes else value
        value = narrowed(value) if self.codes == "bfloat16" else value
        result = T.Bind(T.cast(rounding.codes(value), f"{self.codes}x{LANES}")) if rounding else value
        store_row(self.out, result, None if width == LANES else below(width), *place)

    def chunks(self) -> list[tuple[int, int]]:
        """Return (first channel, channels) of each vector of a head."""
        return [(c, min(LANES, self.d - c)) for c in range(0, self.d, LANES)]

    # ---- blocks of query rows: lanes are rows ----

    def row_block(self, index: Index, blocks: Index) -> None:
        """Compute one (batch, head, block of rows)."""
        block, d = self.block, self.d
        b, h = T.Bind(index // (self.heads * blocks)), T.Bind(index // blocks % self.heads)
        first = T.Bind(index % blocks * block.rows)
        kv_head = T.Bind(h // (self.heads // self.kv_heads))
        queries, result = local(d * block.rows), local(d * block.rows)
        decoded = [local(block.pass_keys * d) if rows.stored else None for rows in (self.k, self.v)]
        weights, limits = local(block.pass_keys * block.rows), local(block.pass_keys)
        tops, totals = self._each_vector(splat(LOWEST)), self._each_vector(splat(0.0))
        rounding = self._rounding()
        self._load_rows(queries, self.q, self.scale, (b, h, first))
        with T.serial(d * block.vectors) as i:
            store(result, splat(0.0), ramp(i * LANES))
        state, task = (result, tops, totals), (queries, weights, limits, (b, h, first, kv_head))
        before = T.Bind(self._before(b))
        # Keys after the last row of the block are never seen.
        last = T.Bind(T.min(self.tokens, first + block.rows))
        seen = {"": before + last if self.causal else self.keys, "token": before + last, "call": before}[self.own]
        self._each_pass(task, state, (self.k, self.v), decoded, before, T.Bind(seen))
        if self.own == "call":
            self._each_pass(task, state, (self.own_k, self.own_v), [None, None], long(0), last)
        elif self.own:
            self._own_tokens(queries, state, (b, kv_head, first))
        self._store_result(result, totals, rounding, (b, h, first))

    def _each_pass(
        self, task: tuple[Any, ...], state: tuple[Any, ...], rows: tuple[Rows, Rows], decoded: list[Any], before: Index, seen: Index
    ) -> None:
        """Take the first ``seen`` of some rows of keys and values, of which ``before`` stand before the queries, a pass at a time."""
        queries, weights, limits, (b, h, first, kv_head) = task
        result, tops, totals = state
        block, d = self.block, self.d
        skipped = self._first_pass(before, first)  # nothing before the window of the first row is seen
        with T.serial((seen + block.pass_keys - 1) // block.pass_keys - skipped) as p:
            base = T.Bind((p + skipped) * block.pass_keys)
            count = T.Bind(T.min(seen - base, long(block.pass_keys)))
            tiles = T.Bind((count + block.keys - 1) // block.keys)
            self._set_limits(limits, b, base, count, tiles)
            read_k, read_v = (self._reader(*each, b, kv_head, base, count) for each in zip(rows, decoded, strict=True))
            highest = self._each_vector(*(top[ramp(0)] for top in tops))
            with T.serial(tiles) as tile:
                self._score_tile(queries, weights, limits, highest, read_k, (b, h, first, base, count), T.Bind(tile * block.keys), before)
            factors = [T.Bind(exp2(top[ramp(0)] - new[ramp(0)])) for top, new in zip(tops, highest, strict=True)]
            with T.If(base > 0 if rows[0] is self.k else count > 0), T.Then(), T.serial(d) as c:
                self._scale_result(result, c, factors)
            for v, factor in enumerate(factors):
                store(totals[v], totals[v][ramp(0)] * factor, ramp(0))
                store(tops[v], highest[v][ramp(0)], ramp(0))
            self._raise_powers(weights, tops, totals, tiles)
            self._values(weights, result, read_v, count)

    def _scale_result(self, result: Any, c: Index, factors: list[Expression]) -> None:
        for v, factor in enumerate(factors):
            lanes = ramp(c * self.block.rows + v * LANES)
            store(result, result[lanes] * factor, lanes)

    def _own_tokens(self, queries: Any, state: tuple[Any, ...], place: tuple[Index, Index, Index]) -> None:
        """Let each row of a block see its own token: lanes are rows of queries and of keys alike."""
        result, tops, totals = state
        b, kv_head, first = place
        block, d = self.block, self.d
        rows = local(d * block.rows)
        self._load_rows(rows, self.own_k.data, 1.0, (b, kv_head, first))
        scores = self._each_vector(splat(0.0))
        with T.serial(d) as c:
            for v, score in enumerate(scores):
                lanes = ramp(c * block.rows + v * LANES)
                store(score, queries[lanes] * rows[lanes] + score[ramp(0)], ramp(0))
        self._load_rows(rows, self.own_v.data, 1.0, (b, kv_head, first))
        factors, weights = [], []
        for score, top, total in zip(scores, tops, totals, strict=True):
            highest = T.Bind(T.max(top[ramp(0)], score[ramp(0)]))
            factors.append(T.Bind(exp2(top[ramp(0)] - highest)))
            weights.append(T.Bind(exp2(score[ramp(0)] - highest)))
            store(total, total[ramp(0)] * factors[-1] + weights[-1], ramp(0))
        with T.serial(d) as c:
            self._scale_result(result, c, factors)
            for v, weight in enumerate(weights):
                lanes = ramp(c * block.rows + v * LANES)
                store(result, rows[lanes] * weight + result[lanes], lanes)

    def _reader(self, rows: Rows, decoded: Any, b: Index, kv_head: Index, base: Index, count: Index) -> Reader:
        """Return how to read an element of a row, counted from ``base``; rows of codes are decoded first, once for all queries."""
        if rows.stored is None:
            return lambda key, c: rows.scalar(b, base + key, kv_head, c)
        with T.serial(count) as j:
            scale, zero = T.Bind(rows.scale(b, base + j, kv_head)), rows.zero(b, base + j, kv_head)
            zero = T.Bind(zero) if zero is not None else None
            for c, width in self.chunks():
                store(decoded, _less(rows.vector(b, base + j, kv_head, c, width), zero) * splat(scale), ramp(j * self.d + c))
        return lambda key, c: decoded[key * self.d + c]

    def _each_vector(self, *values: Expression) -> list[Any]:
        """Return a register for each vector of rows, with a value each or one for all."""
        found = [register("float32", LANES) for _ in range(self.block.vectors)]
        for v, kept in enumerate(found):
            store(kept, values[v % len(values)], ramp(0))
        return found

    def _load_rows(self, buffer: Any, source: Any, factor: float, place: tuple[Index, Index, Index]) -> None:
        """Write a head of the block's rows, times a factor, as [channel][row]; those after the last repeat it and are not stored later."""
        b, head, first = place
        with T.serial(self.block.vectors) as v:

            def part(c: Index, width: int) -> None:
                rows = []
                for r in range(LANES):
                    where = (b, T.min(first + v * LANES + r, self.tokens - 1), ramp(head * self.d + c))
                    rows.append(source[where] if width == LANES else load_part(source, below(width), *where))
                for i, column in enumerate(transpose(rows)[:width]):
                    scaled = column if factor == 1.0 else column * splat(factor)
                    store(buffer, scaled, ramp((c + i) * self.block.rows + v * LANES))

            self._each_chunk(part)

    def _each_chunk(self, body: Callable[[Index, int], None]) -> None:
        """Emit ``body(first channel, channels)`` for each vector of a head: a loop, then the ragged last one."""
        whole, rest = divmod(self.d, LANES)
        if whole:
            with T.serial(whole) as i:
                body(i * LANES, LANES)
        if rest:
            body(whole * LANES, rest)

    def _set_limits(self, limits: Any, b: Index, base: Index, count: Index, tiles: Index) -> None:
        """Write for each key of a pass the most its score may be: -inf hides it from every row. Minima are cheaper than masks."""
        with T.serial(tiles * self.block.keys) as j:
            seen = j < count
            if self.key_mask is not None:
                seen = tirx.all(seen, self.key_mask[b, base + T.min(j, count - 1)])
            store(limits, tirx.Select(seen, T.float32(math.inf), T.float32(-math.inf)), j)

    def _score_tile(
        self, queries: Any, weights: Any, limits: Any, highest: list[Any], read_k: Reader, place: tuple[Index, ...], start: Index,
        before: Index,
    ) -> None:  # fmt: skip
        """Compute one register tile of scores [key][row] into ``weights``, hide what may not be seen, and raise the running maximum."""
        b, h, first, base, count = place
        block = self.block
        dots = [self._each_vector(splat(0.0)) for _ in range(block.keys)]
        # Keys after the last repeat it: every address is valid, the score is hidden below.
        places = [T.Bind(T.min(start + j, count - 1)) for j in range(block.keys)]
        keys = [T.Bind(base + place) for place in places]

        def channel_products(c: Index) -> None:
            rows = [T.Bind(queries[ramp(c * block.rows + v * LANES)]) for v in range(block.vectors)]
            for key, dot in zip(places, dots, strict=True):
                scalar = T.Bind(splat(read_k(key, c)))
                for row, kept in zip(rows, dot, strict=True):
                    store(kept, scalar * row + kept[ramp(0)], ramp(0))

        _unrolled(self.d, channel_products)
        for j, dot in enumerate(dots):
            for v, kept in enumerate(dot):
                score = kept[ramp(0)]
                if self.bias is not None:
                    score = score + self._bias_column(b, h, first + v * LANES, keys[j]) * splat(math.log2(math.e))
                store(kept, T.min(score, splat(limits[start + j])), ramp(0))
        if self.causal:
            self._hide_later_keys(dots, keys, first, before)
        if self.window:
            self._hide_earlier_keys(dots, keys, first, before)
        for j, dot in enumerate(dots):
            for v, kept in enumerate(dot):
                store(weights, kept[ramp(0)], ramp((start + j) * block.rows + v * LANES))
                store(highest[v], T.max(highest[v][ramp(0)], kept[ramp(0)]), ramp(0))

    def _hide_later_keys(self, dots: list[list[Any]], keys: list[Index], first: Index, before: Index) -> None:
        """Hide the keys of a tile from the rows that stand before them; most tiles have none. ``own`` hides a row's own token too."""
        own = 1 if self.own == "token" else 0
        with T.If(keys[-1] + own - before > first), T.Then():
            for key, dot in zip(keys, dots, strict=True):
                for v, kept in enumerate(dot):
                    visible = splat(T.cast(key + own - before - (first + v * LANES), "int32")) <= ramp(T.int32(0))
                    store(kept, tirx.Select(visible, kept[ramp(0)], splat(-math.inf)), ramp(0))

    def _hide_earlier_keys(self, dots: list[list[Any]], keys: list[Index], first: Index, before: Index) -> None:
        """Hide the keys of a tile from the rows whose window begins after them."""
        with T.If(keys[0] - before + self.window < first + self.block.rows), T.Then():
            for key, dot in zip(keys, dots, strict=True):
                for v, kept in enumerate(dot):
                    visible = splat(T.cast(key - before + self.window - (first + v * LANES), "int32")) > ramp(T.int32(0))
                    store(kept, tirx.Select(visible, kept[ramp(0)], splat(-math.inf)), ramp(0))

    def _bias_column(self, b: Index, h: Index, row: Index, key: Index) -> Any:
        """Gather the additive mask of one key for sixteen rows."""
        column = register("float32", LANES)
        where_b, where_h = T.min(b, self.bias_batch - 1), T.min(h, self.bias_heads - 1)
        for r in range(LANES):
            store(column, self.bias[where_b, where_h, T.min(row + r, self.tokens - 1), key], r)
        return column[ramp(0)]

    def _raise_powers(self, weights: Any, tops: list[Any], totals: list[Any], tiles: Index) -> None:
        """Turn the scores of a pass into exp2(score - maximum) and add them to the rows' totals."""
        block = self.block
        with T.serial(tiles) as tile:
            for j in range(block.keys):
                for v in range(block.vectors):
                    lanes = ramp((tile * block.keys + j) * block.rows + v * LANES)
                    weight = T.Bind(exp2(weights[lanes] - tops[v][ramp(0)]))
                    store(weights, weight, lanes)
                    store(totals[v], totals[v][ramp(0)] + weight, ramp(0))

    def _values(self, weights: Any, result: Any, read_v: Reader, count: Index) -> None:
        """Add weights x values of one pass to ``result`` [channel][row]."""
        block = self.block
        with T.serial(self.d // block.channels) as chunk:
            self._value_tile(weights, result, read_v, count, chunk * block.channels, block.channels)
        if self.d % block.channels:
            rest = self.d % block.channels
            self._value_tile(weights, result, read_v, count, T.int64(self.d - rest), rest)

    def _value_tile(self, weights: Any, result: Any, read_v: Reader, count: Index, first: Index, channels: int) -> None:
        block = self.block
        spots = [[ramp((first + c) * block.rows + v * LANES) for v in range(block.vectors)] for c in range(channels)]
        sums = [self._each_vector(*(result[spot] for spot in row)) for row in spots]

        def key_products(j: Index) -> None:
            rows = [T.Bind(weights[ramp(j * block.rows + v * LANES)]) for v in range(block.vectors)]
            for c, kept in enumerate(sums):
                scalar = T.Bind(splat(read_v(j, first + c)))
                for row, total in zip(rows, kept, strict=True):
                    store(total, scalar * row + total[ramp(0)], ramp(0))

        _unrolled(count, key_products)
        for row, kept in zip(spots, sums, strict=True):
            for spot, total in zip(row, kept, strict=True):
                store(result, total[ramp(0)], spot)

    def _store_result(self, result: Any, totals: list[Any], rounding: CodeRounding | None, place: tuple[Index, Index, Index]) -> None:
        """Divide by the sums, transpose back, store the rows that exist; rows without a key get zeros."""
        block, (b, h, first) = self.block, place
        inverses, turned = local(block.rows), local(LANES * LANES)
        for v, total in enumerate(totals):
            sums = total[ramp(0)]
            store(inverses, tirx.Select(sums > splat(0.0), splat(1.0) / sums, splat(0.0)), ramp(v * LANES))
        with T.serial(block.vectors) as v:
            inverse, row = T.Bind(inverses[ramp(v * LANES)]), T.Bind(first + v * LANES)

            def part(c: Index, width: int) -> None:
                columns = [result[ramp((c + min(i, width - 1)) * block.rows + v * LANES)] * inverse for i in range(LANES)]
                for r, values in enumerate(transpose(columns)):
                    store(turned, values, ramp(r * LANES))
                with T.serial(T.min(self.tokens - row, long(LANES))) as r:
                    self._store(rounding, turned[ramp(r * LANES)], (b, row + r, h * self.d + c), width)

            self._each_chunk(part)

    # ---- few query rows (decoding): lanes are channels ----

    def few_rows(self, index: Index) -> None:
        """Compute all query rows of some heads that share their keys; memory traffic of keys and values is the cost here.

        A pass of keys and values comes into the second-level cache once for all of them.
        """
        groups, most, padded = self.heads // self.share, (FEW_ROWS - 1) * self.share, len(self.chunks()) * LANES
        b, head = T.Bind(index // groups), T.Bind(index % groups * self.share)
        kv_head = T.Bind(head // (self.heads // self.kv_heads))
        weights, sums, tops, totals = local(self.block.pass_keys), local(most * padded), local(most), local(most)
        rounding, queries = self._rounding(), T.Bind(self.tokens * self.share)
        with T.serial(queries) as i:
            store(tops, T.float32(LOWEST), i)
            store(totals, T.float32(0.0), i)
            for c in range(0, padded, LANES):
                store(sums, splat(0.0), ramp(i * padded + c))
        before = T.Bind(self._before(b))
        state, task = (weights, tops, totals, sums, padded), (b, head, kv_head)
        # How many keys before its own token and from there on a row sees.
        past_rows = (self.k, self.v), before
        behind = {"": lambda row: before + row + 1 if self.causal else self.keys, "token": lambda row: before + row}
        self._few_passes(task, state, past_rows, behind.get(self.own, lambda row: before), before + self.tokens)
        if self.own == "call":
            self._few_passes(task, state, ((self.own_k, self.own_v), long(0)), lambda row: row + 1, self.tokens)
        elif self.own:
            with T.serial(queries) as i:
                row, h = T.Bind(i // self.share), T.Bind(head + i % self.share)
                self._few_keys(state, i, (b, h, row, kv_head, row, long(1)), None, (self.own_k, self.own_v))
        with T.serial(queries) as i:
            total = T.Bind(totals[i])
            inverse = T.Bind(tirx.Select(total > T.float32(0.0), T.float32(1.0) / total, T.float32(0.0)))
            for c, width in self.chunks():
                value = sums[ramp(i * padded + c)] * splat(inverse)
                self._store(rounding, value, (b, i // self.share, (head + i % self.share) * self.d + c), width)

    def _few_passes(
        self, task: tuple[Index, ...], state: tuple[Any, ...], source: tuple[tuple[Rows, Rows], Index], seen: Callable[[Index], Index],
        most: Index,
    ) -> None:  # fmt: skip
        """Take the first ``seen(row)`` of at most ``most`` keys for each query row; ``source``: rows, and how many before the queries."""
        b, head, kv_head = task
        rows, before = source
        passes, skipped = (most + self.block.pass_keys - 1) // self.block.pass_keys, self._first_pass(before, long(0))
        with T.serial(passes - skipped) as p, T.serial(T.Bind(self.tokens * self.share)) as i:
            row, h, base = T.Bind(i // self.share), T.Bind(head + i % self.share), T.Bind((p + skipped) * self.block.pass_keys)
            count = T.Bind(T.min(seen(row) - base, long(self.block.pass_keys)))
            with T.If(count > 0), T.Then():
                hidden = T.Bind(before + row + 1 - self.window - base) if self.window else None
                self._few_keys(state, i, (b, h, row, kv_head, base, count), hidden, rows)

    def _few_keys(self, state: tuple[Any, ...], i: Index, place: tuple[Index, ...], hidden: Index | None, rows: tuple[Rows, Rows]) -> None:
        """Take one pass of keys and values for one query row."""
        weights, tops, totals, sums, padded = state
        b, _, _, kv_head, base, count = place
        factor = self._row_scores(weights, (tops, totals, i), place, hidden, rows[0])
        self._row_values(weights, factor, (sums, i * padded), (b, kv_head, base, count), rows[1])

    def _query(self, b: Index, row: Index, channel: Index, width: int) -> Any:
        return self.q[b, row, ramp(channel)] if width == LANES else load_part(self.q, below(width), b, row, ramp(channel))

    def _row_scores(
        self, weights: Any, state: tuple[Any, Any, Index], place: tuple[Index, ...], hidden: Index | None, keys: Rows
    ) -> Expression:
        """Fill ``weights`` with exp2(score - maximum) of one pass of keys; update maximum and sum, return the earlier passes' factor.

        The first ``hidden`` keys of the pass stand before the row's window.
        """
        b, h, row, kv_head, base, count = place
        tops, totals, query_index = state
        top = T.Bind(tops[query_index])
        vectors = T.Bind((count + LANES - 1) // LANES)
        store(weights, splat(-math.inf), ramp((vectors - 1) * LANES))
        query = [T.Bind(self._query(b, row, h * self.d + c, width) * splat(self.scale)) for c, width in self.chunks()]
        with T.serial(count) as j:
            dot: Any = None
            zero = keys.zero(b, base + j, kv_head)
            zero = T.Bind(zero) if zero is not None else None
            for (c, width), part in zip(self.chunks(), query, strict=True):
                product = part * _less(keys.vector(b, base + j, kv_head, c, width), zero)
                dot = product if dot is None else dot + product
            score = fold(dot, operator.add)
            if keys.stored:
                score = score * keys.scale(b, base + j, kv_head)
            if self.bias is not None:
                where = (T.min(b, self.bias_batch - 1), T.min(h, self.bias_heads - 1), row, base + j)
                score = score + self.bias[where] * T.float32(math.log2(math.e))
            if self.key_mask is not None:
                score = tirx.Select(self.key_mask[b, base + j], score, T.float32(-math.inf))
            if hidden is not None:
                score = tirx.Select(j >= hidden, score, T.float32(-math.inf))
            store(weights, score, j)
        kept = register("float32", LANES)
        store(kept, splat(top), ramp(0))
        with T.serial(vectors) as i:
            store(kept, T.max(kept[ramp(0)], weights[ramp(i * LANES)]), ramp(0))
        highest = T.Bind(fold(kept[ramp(0)], T.max))
        store(kept, splat(0.0), ramp(0))
        with T.serial(vectors) as i:
            weight = T.Bind(exp2(weights[ramp(i * LANES)] - splat(highest)))
            store(weights, weight, ramp(i * LANES))
            store(kept, kept[ramp(0)] + weight, ramp(0))
        factor = register("float32", LANES)
        store(factor, exp2(splat(top - highest)), ramp(0))
        store(totals, totals[query_index] * factor[0] + fold(kept[ramp(0)], operator.add), query_index)
        store(tops, highest, query_index)
        return factor[ramp(0)]

    def _row_values(self, weights: Any, factor: Expression, result: tuple[Any, Index], place: tuple[Index, ...], values: Rows) -> None:
        """Add weights x values of one pass to the row's sums, two keys at a time to shorten the chain of dependent sums."""
        b, kv_head, base, count = place
        buffer, start = result
        even, odd = ([register("float32", LANES) for _ in self.chunks()] for _ in range(2))
        for (c, _), first, second in zip(self.chunks(), even, odd, strict=True):
            store(first, buffer[ramp(start + c)] * factor, ramp(0))
            store(second, splat(0.0), ramp(0))
        with T.serial((count + 1) // 2) as pair:
            second = T.Bind(T.min(pair * 2 + 1, count - 1))
            last = T.Bind(tirx.Select(pair * 2 + 1 < count, weights[second], T.float32(0.0)))
            for key, weight, totals in ((pair * 2, weights[pair * 2], even), (second, last, odd)):
                zero = values.zero(b, base + key, kv_head)
                zero = T.Bind(zero) if zero is not None else None
                share = T.Bind(weight * values.scale(b, base + key, kv_head)) if values.stored else weight
                for (c, width), kept in zip(self.chunks(), totals, strict=True):
                    value = _less(values.vector(b, base + key, kv_head, c, width), zero)
                    store(kept, value * splat(share) + kept[ramp(0)], ramp(0))
        for (c, _), first, other in zip(self.chunks(), even, odd, strict=True):
            store(buffer, first[ramp(0)] + other[ramp(0)], ramp(start + c))


def _less(vector: Expression, zero: Expression | None) -> Expression:
    return vector if zero is None else vector - splat(zero)


def _unrolled(count: Index, body: Callable[[Index], None]) -> None:
    """Emit a loop of ``count`` steps, four at a time: a jump after each would hold the multipliers up."""
    whole = T.Bind(T.truncdiv(count, 4)) if not isinstance(count, int) else count // 4
    with T.serial(whole) as i:
        for step in range(4):
            body(i * 4 + step)
    if not isinstance(count, int) or count % 4:
        with T.serial(count - whole * 4) as i:
            body(whole * 4 + i)

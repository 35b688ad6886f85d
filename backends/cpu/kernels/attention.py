"""Multi-head attention in one pass over the keys, float32 (dialect ``qc.attention``).

A task is one (batch, head, block of query rows). Lanes are query rows: scores are kept transposed, [key][row], so that the softmax
needs no horizontal step and both products read keys and values straight from the [batch, key, head * d] layout as broadcast
scalars. Only the queries of a task and its result are transposed. Running maximum and sum (Milakov and Gimelshein 2018,
Dao et al. 2022) let any number of keys pass through one small tile. With fewer queries than ``FEW_ROWS`` (decoding) lanes are
channels instead.

Error against exact arithmetic for bounded inputs: products of d and s terms in float32 and an exp2 within 2 ulp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.backends.cpu.kernels.isa import SETS, detect
from qcompile.backends.cpu.kernels.registers import (
    LANES,
    Index,
    argument,
    below,
    exp2,
    function,
    load_part,
    local,
    long,
    ramp,
    reduce,
    serial_or_parallel,
    size,
    splat,
    store,
    store_part,
    transpose,
)  # fmt: skip
from tvm import tirx
from tvm.tirx.script.builder import ir as T

FEW_ROWS = 4  # below this a block of query rows would mostly compute padding
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
    heads: int, kv_heads: int, head_dim: int, scale: float, *, key_mask: bool, causal: bool, bias: bool = False, isa: str | None = None
) -> tirx.PrimFunc:
    """Build ``f(q, k, v[, key_mask][, bias], out)``.

    q and out float32 [batch, tokens, heads * head_dim]; k and v float32 [batch, keys, kv_heads * head_dim]; key_mask bool [batch, keys],
    True where a key may be seen; bias float32 [bias_batch, bias_heads, tokens, keys], added to the scaled scores, either size 1 broadcasts.
    ``causal`` counts from the end: query i sees key j when ``j <= i + keys - tokens``. A query that sees no key gives zeros.

    Raises:
        ValueError: heads is no multiple of kv_heads.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide among {kv_heads} key heads")
    with function("attention") as builder:
        block = _WIDE_BLOCK if SETS[isa or detect()].parts == 1 else _BLOCK
        task = _Attention(heads, kv_heads, head_dim, scale, key_mask, causal, bias, block)
        with T.If(task.tokens < T.int64(FEW_ROWS)):
            with T.Then():
                serial_or_parallel(task.batch * heads, task.work, task.few_rows)
            with T.Else():
                blocks = (task.tokens + task.block.rows - 1) // task.block.rows
                serial_or_parallel(task.batch * heads * blocks, task.work, lambda index: task.row_block(index, blocks))
    return builder.get()


class _Attention:
    """The arguments of one attention function and the statements of its tasks."""

    def __init__(self, heads: int, kv_heads: int, d: int, scale: float, key_mask: bool, causal: bool, bias: bool, block: _Block) -> None:
        self.heads, self.kv_heads, self.d, self.causal, self.block = heads, kv_heads, d, causal, block
        self.scale = scale * math.log2(math.e)  # the softmax runs in powers of two
        self.batch, self.tokens, self.keys = size("batch"), size("tokens"), size("keys")
        self.q = argument("q", (self.batch, self.tokens, heads * d))
        self.k = argument("k", (self.batch, self.keys, kv_heads * d))
        self.v = argument("v", (self.batch, self.keys, kv_heads * d))
        self.key_mask = argument("key_mask", (self.batch, self.keys), "bool") if key_mask else None
        self.bias_batch, self.bias_heads = size("bias_batch"), size("bias_heads")
        self.bias = argument("bias", (self.bias_batch, self.bias_heads, self.tokens, self.keys)) if bias else None
        self.out = argument("out", (self.batch, self.tokens, heads * d))
        self.work = self.batch * heads * self.tokens * self.keys * d

    def chunks(self) -> list[tuple[int, int]]:
        """Return (first channel, channels) of each vector of a head."""
        return [(c, min(LANES, self.d - c)) for c in range(0, self.d, LANES)]

    # ---- blocks of query rows: lanes are rows ----

    def row_block(self, index: Index, blocks: Index) -> None:
        """Compute one (batch, head, block of rows)."""
        block, d = self.block, self.d
        b, h = T.Bind(index // (self.heads * blocks)), T.Bind(index // blocks % self.heads)
        first = T.Bind(index % blocks * block.rows)
        channel = T.Bind(h // (self.heads // self.kv_heads) * d)
        queries, result = local(d * block.rows), local(d * block.rows)
        weights = local(block.pass_keys * block.rows)
        top, total = local(block.rows), local(block.rows)
        self._load_queries(queries, b, h, first)
        for v in range(block.vectors):
            store(top, splat(LOWEST), ramp(v * LANES))
            store(total, splat(0.0), ramp(v * LANES))
        with T.serial(d * block.vectors) as i:
            store(result, splat(0.0), ramp(i * LANES))
        # Keys after the last row of the block are never seen.
        seen = T.Bind(T.min(self.keys, first + block.rows + self.keys - self.tokens)) if self.causal else self.keys
        with T.serial((seen + block.pass_keys - 1) // block.pass_keys) as p:
            base = T.Bind(p * block.pass_keys)
            count = T.Bind(T.min(seen - base, long(block.pass_keys)))
            self._scores(queries, weights, top, total, result, (b, h, first, channel, base, count))
            self._values(weights, result, b, channel, base, count)
        self._store_result(result, total, b, h, first)

    def _load_queries(self, queries: Any, b: Index, h: Index, first: Index) -> None:
        """Write the block's queries, scaled, as [channel][row]; rows after the last repeat it and are not stored later."""
        with T.serial(self.block.vectors) as v:

            def part(c: Index, width: int) -> None:
                rows = []
                for r in range(LANES):
                    where = (b, T.min(first + v * LANES + r, self.tokens - 1), ramp(h * self.d + c))
                    rows.append(self.q[where] if width == LANES else load_part(self.q, below(width), *where))
                for i, column in enumerate(transpose(rows)[:width]):
                    store(queries, column * splat(self.scale), ramp((c + i) * self.block.rows + v * LANES))

            self._each_chunk(part)

    def _each_chunk(self, body: Callable[[Index, int], None]) -> None:
        """Emit ``body(first channel, channels)`` for each vector of a head: a loop, then the ragged last one."""
        whole, rest = divmod(self.d, LANES)
        if whole:
            with T.serial(whole) as i:
                body(i * LANES, LANES)
        if rest:
            body(whole * LANES, rest)

    def _scores(self, queries: Any, weights: Any, top: Any, total: Any, result: Any, place: tuple[Index, ...]) -> None:
        """Fill ``weights`` [key][row] with exp2(score - maximum) for one pass of keys; rescale what earlier passes left."""
        block, count = self.block, place[-1]
        highest = local(block.rows)
        for v in range(block.vectors):
            store(highest, top[ramp(v * LANES)], ramp(v * LANES))
        tiles = T.Bind((count + block.keys - 1) // block.keys)
        with T.serial(tiles) as tile:
            self._score_tile(queries, weights, highest, place, T.Bind(tile * block.keys))
        for v in range(block.vectors):
            lanes = ramp(v * LANES)
            store(top, exp2(top[lanes] - highest[lanes]), lanes)  # from here the factor for the earlier passes
            store(total, total[lanes] * top[lanes], lanes)
        with T.If(place[4] > 0), T.Then(), T.serial(self.d) as c:
            for v in range(block.vectors):
                lanes = ramp(c * block.rows + v * LANES)
                store(result, result[lanes] * top[ramp(v * LANES)], lanes)
        sums = local(block.rows)
        for v in range(block.vectors):
            store(sums, total[ramp(v * LANES)], ramp(v * LANES))
        with T.serial(tiles) as tile:
            for j in range(block.keys):
                for v in range(block.vectors):
                    lanes = T.ramp((tile * block.keys + j) * block.rows + v * LANES, 1, LANES)
                    weight = T.Bind(exp2(weights[lanes] - highest[ramp(v * LANES)]))
                    store(weights, weight, lanes)
                    store(sums, sums[ramp(v * LANES)] + weight, ramp(v * LANES))
        for v in range(block.vectors):
            store(total, sums[ramp(v * LANES)], ramp(v * LANES))
            store(top, highest[ramp(v * LANES)], ramp(v * LANES))

    def _score_tile(self, queries: Any, weights: Any, highest: Any, place: tuple[Index, ...], start: Index) -> None:
        """Compute one register tile of scores, hide what may not be seen, and raise the running maximum."""
        b, h, first, channel, base, count = place
        block = self.block
        dots = local(block.keys * block.rows)
        for i in range(block.keys * block.vectors):
            store(dots, splat(0.0), ramp(i * LANES))
        # Keys after the last repeat it: every address is valid, the score is hidden below.
        keys = [T.Bind(base + T.min(start + j, count - 1)) for j in range(block.keys)]
        with T.serial(self.d) as c:
            rows = [T.Bind(queries[ramp(c * block.rows + v * LANES)]) for v in range(block.vectors)]
            for j, key in enumerate(keys):
                scalar = T.Bind(splat(self.k[b, key, channel + c]))
                for v, row in enumerate(rows):
                    lanes = ramp((j * block.vectors + v) * LANES)
                    store(dots, scalar * row + dots[lanes], lanes)
        for i in range(block.keys * block.vectors):
            store(weights, dots[ramp(i * LANES)], ramp(start * block.rows + i * LANES))
        with T.serial(block.keys) as j:
            key = T.Bind(base + T.min(start + j, count - 1))
            open_key = T.Bind(start + j < count if self.key_mask is None else tirx.all(start + j < count, self.key_mask[b, key]))
            for v in range(block.vectors):
                row, lanes = T.Bind(first + v * LANES), ramp((start + j) * block.rows + v * LANES)
                score = weights[lanes]
                if self.bias is not None:
                    score = score + self._bias_column(b, h, row, key) * splat(math.log2(math.e))
                visible = splat(open_key)
                if self.causal:
                    visible = tirx.all(visible, splat(T.cast(key - (self.keys - self.tokens) - row, "int32")) <= ramp(T.int32(0)))
                score = T.Bind(tirx.Select(visible, score, splat(-math.inf)))
                store(weights, score, lanes)
                store(highest, T.max(highest[ramp(v * LANES)], score), ramp(v * LANES))

    def _bias_column(self, b: Index, h: Index, row: Index, key: Index) -> Any:
        """Gather the additive mask of one key for sixteen rows."""
        column = local(LANES)
        where_b, where_h = T.min(b, self.bias_batch - 1), T.min(h, self.bias_heads - 1)
        for r in range(LANES):
            store(column, self.bias[where_b, where_h, T.min(row + r, self.tokens - 1), key], r)
        return column[ramp(0)]

    def _values(self, weights: Any, result: Any, b: Index, channel: Index, base: Index, count: Index) -> None:
        """Add weights x values of one pass to ``result`` [channel][row]."""
        block = self.block
        with T.serial(self.d // block.channels) as chunk:
            self._value_tile(weights, result, (b, channel, base, count), chunk * block.channels, block.channels)
        if self.d % block.channels:
            rest = self.d % block.channels
            self._value_tile(weights, result, (b, channel, base, count), T.int64(self.d - rest), rest)

    def _value_tile(self, weights: Any, result: Any, place: tuple[Index, ...], first: Index, channels: int) -> None:
        b, channel, base, count = place
        block = self.block
        sums = local(channels * block.rows)
        for i in range(channels * block.vectors):
            store(sums, result[ramp(first * block.rows + i * LANES)], ramp(i * LANES))
        with T.serial(count) as j:
            rows = [T.Bind(weights[ramp(j * block.rows + v * LANES)]) for v in range(block.vectors)]
            for c in range(channels):
                scalar = T.Bind(splat(self.v[b, base + j, channel + first + c]))
                for v, row in enumerate(rows):
                    lanes = ramp((c * block.vectors + v) * LANES)
                    store(sums, scalar * row + sums[lanes], lanes)
        for i in range(channels * block.vectors):
            store(result, sums[ramp(i * LANES)], ramp(first * block.rows + i * LANES))

    def _store_result(self, result: Any, total: Any, b: Index, h: Index, first: Index) -> None:
        """Divide by the sums, transpose back, store the rows that exist; rows without a key get zeros."""
        block = self.block
        with T.serial(block.vectors) as v:
            sums = total[ramp(v * LANES)]
            inverse = T.Bind(tirx.Select(sums > splat(0.0), splat(1.0) / sums, splat(0.0)))

            def part(c: Index, width: int) -> None:
                columns = [result[ramp((c + min(i, width - 1)) * block.rows + v * LANES)] * inverse for i in range(LANES)]
                for r, row in enumerate(transpose(columns)):
                    where = (b, first + v * LANES + r, ramp(h * self.d + c))
                    with T.If(first + v * LANES + r < self.tokens), T.Then():
                        if width == LANES:
                            store(self.out, row, *where)
                        else:
                            store_part(self.out, row, below(width), *where)

            self._each_chunk(part)

    # ---- few query rows (decoding): lanes are channels ----

    def few_rows(self, index: Index) -> None:
        """Compute all query rows of one (batch, head), a row at a time; memory traffic of keys and values is the cost here."""
        b, h = T.Bind(index // self.heads), T.Bind(index % self.heads)
        channel = T.Bind(h // (self.heads // self.kv_heads) * self.d)
        keys = self.block.pass_keys
        weights, state = local(keys), local(3)  # state: running maximum, running sum, factor of the earlier passes
        sums = local(len(self.chunks()) * LANES)
        with T.serial(self.tokens) as row:
            store(state, T.float32(LOWEST), 0)
            store(state, T.float32(0.0), 1)
            for i in range(len(self.chunks())):
                store(sums, splat(0.0), ramp(i * LANES))
            seen = T.Bind(T.min(self.keys, row + 1 + self.keys - self.tokens)) if self.causal else self.keys
            with T.serial((seen + keys - 1) // keys) as p:
                base = T.Bind(p * keys)
                count = T.Bind(T.min(seen - base, long(keys)))
                self._row_scores(weights, state, (b, h, row, channel, base, count))
                self._row_values(weights, state, sums, (b, channel, base, count))
            total = T.Bind(state[1])
            inverse = T.Bind(tirx.Select(total > T.float32(0.0), T.float32(1.0) / total, T.float32(0.0)))
            for i, (c, width) in enumerate(self.chunks()):
                where = (b, row, ramp(h * self.d + c))
                value = sums[ramp(i * LANES)] * splat(inverse)
                if width == LANES:
                    store(self.out, value, *where)
                else:
                    store_part(self.out, value, below(width), *where)

    def _vector(self, buffer: Any, b: Index, row: Index, channel: Index, width: int) -> Any:
        return buffer[b, row, ramp(channel)] if width == LANES else load_part(buffer, below(width), b, row, ramp(channel))

    def _row_scores(self, weights: Any, state: Any, place: tuple[Index, ...]) -> None:
        """Fill ``weights`` with exp2(score - maximum) of one pass of keys for one row; update the running state."""
        b, h, row, channel, base, count = place
        with T.serial(self.block.pass_keys // LANES) as i:
            store(weights, splat(-math.inf), ramp(i * LANES))
        query = [T.Bind(self._vector(self.q, b, row, h * self.d + c, width) * splat(self.scale)) for c, width in self.chunks()]
        with T.serial(count) as j:
            dot: Any = None
            for (c, width), part in zip(self.chunks(), query, strict=True):
                product = part * self._vector(self.k, b, base + j, channel + c, width)
                dot = product if dot is None else dot + product
            halves = T.Bind(dot)
            score = reduce("fadd", _pairwise(halves))
            if self.bias is not None:
                where = (T.min(b, self.bias_batch - 1), T.min(h, self.bias_heads - 1), row, base + j)
                score = score + self.bias[where] * T.float32(math.log2(math.e))
            if self.key_mask is not None:
                score = tirx.Select(self.key_mask[b, base + j], score, T.float32(-math.inf))
            store(weights, score, j)
        highest = local(LANES)
        store(highest, splat(state[0]), ramp(0))
        with T.serial(self.block.pass_keys // LANES) as i:
            store(highest, T.max(highest[ramp(0)], weights[ramp(i * LANES)]), ramp(0))
        top = T.Bind(reduce("fmax", highest[ramp(0)]))
        store(highest, splat(0.0), ramp(0))
        with T.serial(self.block.pass_keys // LANES) as i:
            weight = T.Bind(exp2(weights[ramp(i * LANES)] - splat(top)))
            store(weights, weight, ramp(i * LANES))
            store(highest, highest[ramp(0)] + weight, ramp(0))
        factor = local(LANES)
        store(factor, exp2(splat(state[0] - top)), ramp(0))
        store(state, factor[0], 2)
        store(state, state[1] * state[2] + reduce("fadd", highest[ramp(0)]), 1)
        store(state, top, 0)

    def _row_values(self, weights: Any, state: Any, sums: Any, place: tuple[Index, ...]) -> None:
        """Add weights x values of one pass to the row's sums, two keys at a time to shorten the chain of dependent sums."""
        b, channel, base, count = place
        chunks = self.chunks()
        odd = local(len(chunks) * LANES)
        for i in range(len(chunks)):
            store(sums, sums[ramp(i * LANES)] * splat(state[2]), ramp(i * LANES))
            store(odd, splat(0.0), ramp(i * LANES))
        with T.serial((count + 1) // 2) as pair:
            second = T.Bind(T.min(pair * 2 + 1, count - 1))
            last = T.Bind(tirx.Select(pair * 2 + 1 < count, weights[second], T.float32(0.0)))
            for i, (c, width) in enumerate(chunks):
                lanes = ramp(i * LANES)
                store(sums, self._vector(self.v, b, base + pair * 2, channel + c, width) * splat(weights[pair * 2]) + sums[lanes], lanes)
                store(odd, self._vector(self.v, b, base + second, channel + c, width) * splat(last) + odd[lanes], lanes)
        for i in range(len(chunks)):
            store(sums, sums[ramp(i * LANES)] + odd[ramp(i * LANES)], ramp(i * LANES))


def _pairwise(value: Any) -> Any:
    """Return the vector folded to four lanes; an ordered reduction of sixteen would be a chain of sixteen additions."""
    for lanes in (16, 8):
        half = lanes // 2
        bound = T.Bind(value)
        value = tirx.Shuffle([bound], list(range(half))) + tirx.Shuffle([bound], list(range(half, lanes)))
    return value

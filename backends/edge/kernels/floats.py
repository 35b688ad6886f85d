"""What decoders hold between products of codes, in float32: norms, attention over caches, dynamic quantization.

For processors with an FPU; elsewhere a compiler's own routines do it, slowly. Divisions and sums stand in the order of the dialect where it
names one. Nothing of a C library's mathematics is called: exponentials and roots are those of ``runtime.h``.
"""

from __future__ import annotations

from qcompile.backends.edge.kernels.builder import Expression, cell, external, function, let, loop, numbers, pointer, quotient, store, widen
from qcompile.backends.edge.kernels.products import CHANNELS, Product, block, widen_rows
from tvm import tirx
from tvm.tirx.script.builder import ir as T

ACTIVATIONS = ("none", "relu", "silu")


def linear_to_float(product: Product, *, bias: bool, activation: str, residual: bool) -> tirx.PrimFunc:
    """Build ``f(x, x_scale, weight, weight_scale, [bias], [residual], rows, length, out_channels, y, [pairs])``.

    y float32 [rows, out channels]; x [rows, length] codes, a scale for each row;
    ``y = activation((float32(sum) * weight_scale) * x_scale + bias) + residual``.
    """
    with function("linear_to_float") as builder:
        x, x_scale, weight = pointer("x", product.input_dtype), pointer("x_scale", "float32"), pointer("weight", product.weight_dtype)
        weight_scale = pointer("weight_scale", "float32")
        added = pointer("bias", "float32") if bias else None
        kept = pointer("residual", "float32") if residual else None
        rows, length, out_channels = numbers("rows length out_channels")
        y, none = pointer("y", "float32"), [T.int32(0)] * CHANNELS
        pairs = pointer("pairs", "int32") if product.pairs else None
        with loop("group", quotient(rows + (product.pixels - 1), product.pixels)) as group:
            places = [let(f"row_{i}", T.min(group * product.pixels + i, rows - 1)) for i in range(product.pixels)]
            starts = [let(f"start_{i}", place * length) for i, place in enumerate(places)]
            offsets = widen_rows(product, x, starts, pairs, length) if product.pairs else []
            with loop("columns", quotient(out_channels + (CHANNELS - 1), CHANNELS)) as columns:
                sums = block(product, pairs if product.pairs else x, starts, offsets, weight, columns, none, length)
                for j in range(CHANNELS):
                    out = let(f"out_{j}", columns * CHANNELS + j)
                    with T.If(out < out_channels), T.Then():
                        for place, row in zip(places, sums, strict=True):
                            value = T.cast(row[j], "float32") * weight_scale[out] * x_scale[place]
                            value = _activated(let("value", value if added is None else value + added[out]), activation)
                            at = let("at", place * out_channels + out)
                            store(y, value if kept is None else value + kept[at], at)
    return builder.get()


def _activated(value: Expression, activation: str) -> Expression:
    if activation == "silu":
        return value / (T.float32(1) + external("qc_expf", -value, dtype="float32"))
    return T.max(value, T.float32(0)) if activation == "relu" else value


def quantize_rows(highest: int, smallest: float) -> tirx.PrimFunc:
    """Build ``f(x, rows, width, codes, scale, zero_point)``: qc.quantize_dynamic to int8 codes with a symmetric scale for each row."""
    with function("quantize_rows") as builder:
        x = pointer("x", "float32")
        rows, width = numbers("rows width")
        codes, scale, zero_point = pointer("codes", "int8"), pointer("scale", "float32"), pointer("zero_point", "int32")
        with loop("row", rows) as row:
            start, top = let("start", row * width), cell("top", T.float32(0), "float32")
            with loop("i", width) as i:
                value = let("value", x[start + i])
                store(top, T.max(top[0], T.max(value, -value)), 0)
            step = let("step", T.max(top[0] / T.float32(highest), T.float32(smallest)))
            store(scale, step, row)
            store(zero_point, T.int32(0), row)
            with loop("i", width) as i:
                store(codes, T.cast(external("qc_round", x[start + i] / step), "int8"), start + i)
    return builder.get()


def rms_norm(epsilon: float) -> tirx.PrimFunc:
    """Build ``f(x, weight, rows, width, y)``: each row divided by the root of its mean square, times the weight."""
    with function("rms_norm") as builder:
        x, weight = pointer("x", "float32"), pointer("weight", "float32")
        rows, width = numbers("rows width")
        y = pointer("y", "float32")
        with loop("row", rows) as row:
            start, total = let("start", row * width), cell("total", T.float32(0), "float32")
            with loop("i", width) as i:
                store(total, total[0] + x[start + i] * x[start + i], 0)
            mean = total[0] / T.cast(width, "float32") + T.float32(epsilon)
            factor = let("factor", external("qc_rsqrt", mean, dtype="float32"))
            with loop("i", width) as i:
                store(y, x[start + i] * factor * weight[i], start + i)
    return builder.get()


def gather_rows(bits: int) -> tirx.PrimFunc:
    """Build ``f(indices, table, scale, count, width, row_bytes, y)``: rows of signed codes of 8 or 4 bits, each with its scale."""
    with function(f"gather_rows_w{bits}") as builder:
        indices, table, scale = pointer("indices", "int64"), pointer("table", "int8"), pointer("scale", "float32")
        count, width, row_bytes = numbers("count width row_bytes")
        y = pointer("y", "float32")
        with loop("n", count) as n:
            row = let("row", T.cast(indices[n], "int32"))
            with loop("i", width) as i:
                code: Expression
                if bits == 8:
                    code = widen(table[row * row_bytes + i])
                else:
                    byte = let("byte", widen(table[row * row_bytes + T.shift_right(i, T.int32(1))]))
                    low = external("qc_top_bits", byte, 4, 4)
                    code = T.shift_right(
                        tirx.Select(T.bitwise_and(i, T.int32(1)) == 0, low, external("qc_top_bits", byte, 0, 4)), T.int32(4)
                    )
                store(y, T.cast(code, "float32") * scale[row], n * width + i)
    return builder.get()


def append_rows(dtype: str) -> tirx.PrimFunc:
    """Build ``f(cache, new, past, capacity, tokens, width)``: rows of ``new`` from row ``past`` of the cache on, where there is room."""
    with function(f"append_rows_{dtype}") as builder:
        cache, new, past = pointer("cache", dtype), pointer("new", dtype), pointer("past", "int64")
        capacity, tokens, width = numbers("capacity tokens width")
        with loop("token", tokens) as token:
            row = let("row", T.cast(past[0], "int32") + token)
            with T.If(tirx.all(row >= 0, row < capacity)), T.Then(), loop("i", width) as i:
                store(cache, new[token * width + i], row * width + i)
    return builder.get()


def attention(scale: float, window: int) -> tirx.PrimFunc:
    """Build ``f(q, k, v, past, tokens, heads, kv_heads, depth, keys, y, weights)``: causal attention over caches of ``keys`` rows.

    ``weights`` is scratch, one number for each key.
    """
    with function("attention") as builder:
        q, k, v = (pointer(name, "float32") for name in "qkv")
        past = pointer("past", "int64")
        tokens, heads, kv_heads, depth, keys = numbers("tokens heads kv_heads depth keys")
        y, weights = pointer("y", "float32"), pointer("weights", "float32")
        shared = let("shared", quotient(heads, kv_heads))
        with loop("token", tokens) as token, loop("head", heads) as head:
            last = let("last", T.min(T.cast(past[0], "int32") + token, keys - 1))
            first = let("first", T.max(last - (window - 1), 0)) if window else T.int32(0)
            query = let("query", (token * heads + head) * depth)
            kv = let("kv", quotient(head, shared) * depth)
            row = let("row_length", kv_heads * depth)
            count = let("count", last - first + 1)
            top, total = cell("top", T.float32(-3.4e38), "float32"), cell("total", T.float32(0), "float32")
            with loop("key", count) as key:
                score = cell("score", T.float32(0), "float32")
                with loop("i", depth) as i:
                    store(score, score[0] + q[query + i] * k[(first + key) * row + kv + i], 0)
                store(weights, score[0] * T.float32(scale), key)
                store(top, T.max(top[0], weights[key]), 0)
            with loop("key", count) as key:
                store(weights, external("qc_expf", weights[key] - top[0], dtype="float32"), key)
                store(total, total[0] + weights[key], 0)
            with loop("i", depth) as i:
                value = cell("value", T.float32(0), "float32")
                with loop("key", count) as key:
                    store(value, value[0] + weights[key] * v[(first + key) * row + kv + i], 0)
                store(y, value[0] / total[0], query + i)
    return builder.get()

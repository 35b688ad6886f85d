"""What each qc operator means, written with generic Relax operators: what runs where a target has no kernel.

Integers are exact (products and sums in int32); float parts follow the order of operations of ``qcompile.graph.dialect``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.lowering.arithmetic import cast
from qcompile.backends.lowering.converters import POINTWISE, TABLE, converts
from qcompile.backends.lowering.layers import causal_mask, masked_softmax
from qcompile.backends.lowering.translate import Walk
from torch import fx
from tvm import relax, te, tirx
from tvm.relax import op

import qcompile.graph.dialect as dialect
from qcompile.errors import Refused
from qcompile.formats import BFloat16, Block, Channel, Group, Scheme, Token, dequantize, parse_scheme
from qcompile.formats.bfloat16 import NAN
from qcompile.formats.integer import Integer
from qcompile.graph.hadamard import hadamard_matrix

Arguments = SimpleNamespace


def _f32(value: float) -> Any:
    return relax.const(value, "float32")


# ---- quantize, dequantize -------------------------------------------------------------------------------------------------


def round_half_even(walk: Walk, value: Any) -> Any:
    """Emit rounding to the nearest integer, ties to even (Relax's own round is not specified for ties)."""
    return walk.builder.emit_te(
        lambda x: te.compute(x.shape, lambda *i: tirx.nearbyint(x(*i)), name="round"), value, primfunc_name_hint="round_half_even"
    )  # fmt: skip


def expand_scale(walk: Walk, scale: Any, scheme: Scheme, shape: list[Any]) -> Any:
    """Emit a scale or zero point so that it broadcasts against a tensor of this shape."""
    granularity = scheme.granularity
    if isinstance(granularity, Channel):
        view = [1] * len(shape)
        view[granularity.axis] = shape[granularity.axis]
        return walk.reshape(scale, view)
    runs = {granularity.axis: granularity.size} if isinstance(granularity, Group) else {}
    runs = {-2: granularity.rows, -1: granularity.columns} if isinstance(granularity, Block) else runs
    for axis, size in runs.items():
        axis %= len(shape)
        repeated = walk.emit(op.repeat(scale, size, axis))
        scale = walk.emit(op.strided_slice(repeated, [axis], [0], [shape[axis]], assume_inbound=True))
    return scale


def _encode(walk: Walk, value: Any, scheme: Scheme) -> Any:
    if not isinstance(scheme.format, Integer):
        raise Refused(f"{scheme.format} has no encoder here", node=walk.node.name, operator=str(walk.node.target))
    clamped = op.minimum(op.maximum(value, _f32(scheme.format.lowest)), _f32(scheme.format.highest))
    return walk.emit(op.astype(walk.emit(clamped), str(scheme.format.storage).removeprefix("torch.")))


def emit_quantize(walk: Walk, x: Any, scale: Any, zero_point: Any, scheme: Scheme) -> Any:
    """Emit the codes of x."""
    if isinstance(scheme.format, BFloat16):
        return walk.builder.emit_te(_to_bfloat16, x, primfunc_name_hint="round_to_bfloat16")
    shape = list(x.ty.shape)
    rounded = round_half_even(walk, walk.emit(op.divide(x, expand_scale(walk, scale, scheme, shape))))
    if zero_point is not None:
        rounded = walk.emit(op.add(rounded, cast(walk, expand_scale(walk, zero_point, scheme, shape), "float32")))
    return _encode(walk, rounded, scheme)


def _decode(walk: Walk, codes: Any, scheme: Scheme, dtype: str) -> Any:
    if isinstance(scheme.format, Integer):
        return cast(walk, codes, dtype)
    every_code = torch.arange(2**scheme.bits, dtype=torch.uint8).view(scheme.format.storage)
    levels = walk.parameter(f"levels of {scheme.format}", lambda: scheme.format.decode(every_code))
    return cast(walk, walk.emit(op.take(levels, cast(walk, codes, "int64"), axis=0)), dtype)


def _centered(walk: Walk, codes: Any, zero_point: Any, scheme: Scheme) -> Any:
    """Emit decode(codes) - zero_point as int32."""
    values = _decode(walk, codes, scheme, "int32")
    if zero_point is None:
        return values
    return walk.emit(op.subtract(values, expand_scale(walk, zero_point, scheme, list(codes.ty.shape))))


def emit_dequantize(walk: Walk, codes: Any, scale: Any, zero_point: Any, scheme: Scheme) -> Any:
    """Emit scale * (code - zero_point) for codes that are not packed."""
    if isinstance(scheme.format, BFloat16):
        return walk.builder.emit_te(_from_bfloat16, codes, primfunc_name_hint="widen_bfloat16")
    shape = list(codes.ty.shape)
    values = _decode(walk, codes, scheme, "float32")
    if zero_point is not None:
        values = walk.emit(op.subtract(values, cast(walk, expand_scale(walk, zero_point, scheme, shape), "float32")))
    return walk.emit(op.multiply(values, expand_scale(walk, scale, scheme, shape)))


def _to_bfloat16(x: Any) -> Any:
    def bits(*index: Any) -> Any:
        word = tirx.reinterpret("int32", x(*index))
        upper = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        upper = tirx.Select((upper & 0x7F80) == 0, upper & -0x8000, upper)
        return tirx.Select((word & 0x7FFFFFFF) > 0x7F800000, tirx.const(NAN, "int32"), upper).astype("int16")

    return te.compute(x.shape, bits, name="round_to_bfloat16")


def _from_bfloat16(codes: Any) -> Any:
    def value(*index: Any) -> Any:
        upper = codes(*index).astype("int32")
        return tirx.reinterpret("float32", tirx.Select((upper & 0x7F80) == 0, upper & -0x8000, upper) << 16)

    return te.compute(codes.shape, value, name="widen_bfloat16")


@converts("qc.quantize")
def _quantize(walk: Walk, a: Arguments) -> Any:
    return emit_quantize(walk, a.x, a.scale, a.zero_point, parse_scheme(a.scheme))


@converts("qc.dequantize")
def _dequantize(walk: Walk, a: Arguments) -> Any:
    scheme = parse_scheme(a.scheme)
    codes = a.codes
    if a.size is not None and (scheme.bits < 8 or not scheme.format.dense):
        if not (isinstance(scheme.format, Integer) and scheme.format.dense):
            raise Refused("only constants may be packed in this format", node=walk.node.name, operator=str(walk.node.target))
        codes = _unpack(walk, codes, scheme, a.size)
    return emit_dequantize(walk, codes, a.scale, a.zero_point, scheme)


@converts("qc.pack")
def _pack(walk: Walk, a: Arguments) -> Any:
    format, size = parse_scheme(a.scheme).format, a.codes.ty.shape[-1]
    bits = format.bits
    if not (isinstance(format, Integer) and format.dense):
        raise Refused("codes of this format are packed before they run", node=walk.node.name, operator=str(walk.node.target))

    def pack(codes: Any) -> Any:
        def byte(*index: Any) -> Any:
            total: Any = tirx.const(0, "uint8")
            for k in range(8):
                place = index[-1] * 8 + k
                code = codes[(*index[:-1], tirx.min(place // bits, size - 1))].astype("uint8")
                bit = ((code >> (place % bits).astype("uint8")) & tirx.const(1, "uint8")) << tirx.const(k, "uint8")
                total = total | tirx.Select(place < size * bits, bit, tirx.const(0, "uint8"))
            return total

        return te.compute((*codes.shape[:-1], (size * bits + 7) // 8), byte, name="pack")

    return walk.builder.emit_te(pack, a.codes, primfunc_name_hint="pack")


def _unpack(walk: Walk, packed: Any, scheme: Scheme, size: int) -> Any:
    """Emit codes [.., size] of bytes as ``qcompile.formats.packing`` lays them out."""
    bits, signed = scheme.bits, scheme.format.lowest < 0

    def unpack(data: Any) -> Any:
        def code(*index: Any) -> Any:
            total: Any = tirx.const(0, "uint8")
            for t in range(bits):
                place = index[-1] * bits + t
                bit = (data[(*index[:-1], place // 8)] >> (place % 8).astype("uint8")) & tirx.const(1, "uint8")
                total = total | (bit << tirx.const(t, "uint8"))
            if not signed:
                return total
            # Two's complement: the highest bit of a code fills the byte.
            left = tirx.const(8 - bits, "int8")
            return (total.astype("int8") << left) >> left

        return te.compute((*data.shape[:-1], size), code, name="unpack")

    return walk.builder.emit_te(unpack, packed, primfunc_name_hint="unpack")


@converts("qc.quantize_dynamic")
def _quantize_dynamic(walk: Walk, a: Arguments) -> list[Any]:
    scheme, granularity = parse_scheme(a.scheme), parse_scheme(a.scheme).granularity
    sizes = list(a.x.ty.shape)
    if isinstance(granularity, Group) and granularity.axis == -1 and int(sizes[-1]) % granularity.size == 0:
        shape = [*sizes[:-1], int(sizes[-1]) // granularity.size]
        by_run = replace(scheme, granularity=Token())
        codes, scale, zero = _quantize_dynamic(walk, SimpleNamespace(x=walk.reshape(a.x, [*shape, granularity.size]), scheme=str(by_run)))
        return [walk.reshape(codes, sizes), walk.reshape(scale, shape), walk.reshape(zero, shape)]
    if str(granularity) not in ("token", "tensor") or not isinstance(scheme.format, Integer) or scheme.bits < 2:
        raise Refused(f"dynamic ranges of '{scheme}' cannot be lowered", node=walk.node.name, operator=str(walk.node.target))
    axes, keep = ([-1], True) if str(scheme.granularity) == "token" else (None, False)
    low, high = walk.emit(op.min(a.x, axes, keep)), walk.emit(op.max(a.x, axes, keep))
    smallest = _f32(2.0**-100)
    if scheme.symmetric:
        scale = op.divide(op.maximum(op.abs(low), op.abs(high)), _f32(scheme.format.highest))
        scale = walk.emit(op.maximum(scale, smallest))
        return [emit_quantize(walk, a.x, scale, None, scheme), scale, walk.emit(op.zeros(scale.ty.shape, "int32"))]
    low, high = walk.emit(op.minimum(low, _f32(0))), walk.emit(op.maximum(high, _f32(0)))
    scale = walk.emit(op.maximum(op.divide(op.subtract(high, low), _f32(scheme.format.highest - scheme.format.lowest)), smallest))
    zero = round_half_even(walk, walk.emit(op.subtract(_f32(scheme.format.lowest), op.divide(low, scale))))
    zero = op.minimum(op.maximum(zero, _f32(scheme.format.lowest)), _f32(scheme.format.highest))
    zero_point = walk.emit(op.astype(walk.emit(zero), "int32"))
    return [emit_quantize(walk, a.x, scale, zero_point, scheme), scale, zero_point]


# ---- products -------------------------------------------------------------------------------------------------------------


def activate(walk: Walk, y: Any, activation: str) -> Any:
    """Emit one of the activations of ``dialect.ACTIVATIONS``."""
    name = activation.removeprefix("add_")
    if name == "none":
        return y
    aten = {"gelu_tanh": "gelu"}.get(name, name)
    arguments = SimpleNamespace(self=y, approximate="tanh" if name == "gelu_tanh" else "none")
    return walk.emit(TABLE[f"aten.{aten}"].emit(walk, arguments)) if name in ("gelu", "gelu_tanh") else walk.emit(_SIMPLE[name](y))


_SIMPLE = {
    "relu": op.nn.relu,
    "relu6": lambda y: op.clip(y, 0, 6),
    "silu": op.nn.silu,
    "tanh": op.tanh,
    "sigmoid": op.sigmoid,
    "hardswish": lambda y: op.divide(op.multiply(y, op.clip(op.add(y, _f32(3)), 0, 6)), _f32(6)),
}


def _is_float(value: Any) -> bool:
    return value is not None and str(value.ty.dtype).startswith("float")


def epilogue(walk: Walk, y: Any, a: Arguments, bias: Any) -> Any:
    """Emit what follows a product and its scales; arguments are values."""
    if _is_float(bias):
        y = walk.emit(op.add(y, bias))
    if not a.activation.startswith("add_"):
        y = activate(walk, y, a.activation)
    if a.residual is not None:
        y = walk.emit(op.add(y, a.residual))
    if a.activation.startswith("add_"):
        y = activate(walk, y, a.activation)
    return emit_quantize(walk, y, a.out_scale, a.out_zero_point, parse_scheme(a.out_scheme)) if a.out_scheme else y


def _weight(walk: Walk, dtype: torch.dtype, size: int, order: str, arrange: Any) -> Any:
    """Return the weight of qc.linear or qc.conv2d as a constant: int32 codes less the zero point, or float32 values."""
    node, arguments = _argument(walk, "weight"), _arguments(walk)
    scheme = parse_scheme(arguments["weight_scheme"])

    def make(packed: torch.Tensor) -> torch.Tensor:
        codes = scheme.format.unpack(packed, size)
        zero_point, table = walk.constant(_argument(walk, "weight_zero_point")), walk.constant(arguments.get("weight_table"))
        if dtype == torch.float32:
            return arrange(dequantize(codes, walk.constant(_argument(walk, "weight_scale")), zero_point, scheme, table))
        return arrange(dialect._centered(codes, zero_point, scheme, table).to(torch.int32))

    return walk.packed(node, f"{order} {dtype}", make)


def _argument(walk: Walk, name: str) -> Any:
    return _arguments(walk)[name]


def _arguments(walk: Walk) -> dict[str, Any]:
    from qcompile.backends.lowering.converters import named_arguments

    return named_arguments(walk.node)


def _values(walk: Walk, a: Arguments) -> Any:
    """Emit x as floats: as it is, or of codes of a format without a scale."""
    return emit_dequantize(walk, a.x, None, None, parse_scheme(a.x_scheme)) if a.x_scheme else a.x


@converts("qc.linear")
def _linear(walk: Walk, a: Arguments) -> Any:
    if not a.x_scheme or a.weight_scale is None:
        weight = _weight(walk, torch.float32, a.in_features, "transposed", lambda w: w.t())
        return epilogue(walk, walk.emit(op.matmul(_values(walk, a), weight)), a, a.bias)
    scheme = parse_scheme(a.weight_scheme)
    x = _centered(walk, a.x, a.x_zero_point, parse_scheme(a.x_scheme))
    weight = _weight(walk, torch.int32, a.in_features, "transposed", lambda w: w.t())
    if isinstance(scheme.granularity, Group):
        y = _grouped_product(walk, x, weight, a.weight_scale, scheme.granularity.size, a.in_features)
    else:
        accumulator = walk.emit(op.matmul(x, weight))
        if a.bias is not None and not _is_float(a.bias):
            accumulator = walk.emit(op.add(accumulator, a.bias))
        y = walk.emit(op.multiply(cast(walk, accumulator, "float32"), a.weight_scale))
    return epilogue(walk, walk.emit(op.multiply(y, a.x_scale)), a, a.bias)


def _grouped_product(walk: Walk, x: Any, weight: Any, scales: Any, size: int, features: int) -> Any:
    """Emit the sum, in ascending group order, of each group's exact product times the group's scales."""
    total: Any = None
    for group in range(math.ceil(features / size)):
        start, end = group * size, min((group + 1) * size, features)
        rank = len(x.ty.shape)
        part = walk.emit(op.strided_slice(x, [rank - 1], [start], [end], assume_inbound=True))
        rows = walk.emit(op.strided_slice(weight, [0], [start], [end], assume_inbound=True))
        scale = walk.reshape(walk.emit(op.strided_slice(scales, [1], [group], [group + 1], assume_inbound=True)), [scales.ty.shape[0]])
        product = walk.emit(op.multiply(cast(walk, walk.emit(op.matmul(part, rows)), "float32"), scale))
        total = product if total is None else walk.emit(op.add(total, product))
    return total


@converts("qc.conv2d")
def _conv2d(walk: Walk, a: Arguments) -> Any:
    stride, padding, dilation = list(a.stride), list(a.padding), list(a.dilation)
    if a.x_scheme and a.weight_scale is not None:
        x = _centered(walk, a.x, a.x_zero_point, parse_scheme(a.x_scheme))
        weight = _weight(walk, torch.int32, a.kernel_width, "plain", lambda w: w)
        accumulator = walk.emit(op.nn.conv2d(x, weight, stride, padding, dilation, a.groups))
        if a.bias is not None and not _is_float(a.bias):
            accumulator = walk.emit(op.add(accumulator, _per_channel(walk, a.bias)))
        y = walk.emit(op.multiply(cast(walk, accumulator, "float32"), _per_channel(walk, a.weight_scale)))
        y = walk.emit(op.multiply(y, a.x_scale))
    else:
        weight = _weight(walk, torch.float32, a.kernel_width, "plain", lambda w: w)
        y = walk.emit(op.nn.conv2d(_values(walk, a), weight, stride, padding, dilation, a.groups))
    return epilogue(walk, y, a, None if a.bias is None else _per_channel(walk, a.bias))


def _per_channel(walk: Walk, value: Any) -> Any:
    shape = value.ty.shape
    return value if not len(shape) else walk.reshape(value, [math.prod(int(s) for s in shape), 1, 1])


@converts("qc.matmul")
def _matmul(walk: Walk, a: Arguments) -> Any:
    left = _centered(walk, a.a, a.a_zero_point, parse_scheme(a.a_scheme))
    right = _centered(walk, a.b, a.b_zero_point, parse_scheme(a.b_scheme))
    accumulator = cast(walk, walk.emit(op.matmul(left, right)), "float32")
    y = walk.emit(op.multiply(walk.emit(op.multiply(accumulator, a.b_scale)), a.a_scale))
    a.activation, a.residual = "none", None
    return epilogue(walk, y, a, None)


@converts("qc.vector_codes")
def _vector_codes(walk: Walk, a: Arguments) -> Any:
    runs, places, coupled = (int(size) for size in a.table.ty.shape)

    def distances(x: Any, table: Any) -> Any:
        def distance(*index: Any) -> Any:
            *row, run, place = index
            differences = [x(*row, run * coupled + i) - table(run, place, i) for i in range(coupled)]
            return functools.reduce(lambda a, b: a + b, [d * d for d in differences])

        return te.compute((*x.shape[:-1], runs, places), distance, name="distances")

    found = walk.builder.emit_te(distances, a.x, a.table, primfunc_name_hint="distances")
    return cast(walk, walk.emit(op.argmin(found, -1)), "uint8")


@converts("qc.vectors")
def _vectors(walk: Walk, a: Arguments) -> Any:
    runs, _, coupled = (int(size) for size in a.table.ty.shape)

    def take(codes: Any, table: Any) -> Any:
        def channel(*index: Any) -> Any:
            *row, c = index
            return table(c // coupled, codes(*row, c // coupled).astype("int64"), c % coupled)

        return te.compute((*codes.shape[:-1], runs * coupled), channel, name="vectors")

    return walk.builder.emit_te(take, a.codes, a.table, primfunc_name_hint="vectors")


# ---- embedding, addition, rotation, attention -----------------------------------------------------------------------------


@converts("qc.embedding")
def _embedding(walk: Walk, a: Arguments) -> Any:
    scheme = parse_scheme(a.scheme)
    node: fx.Node = _argument(walk, "weight")

    def table(packed: torch.Tensor) -> torch.Tensor:
        codes = scheme.format.unpack(packed, a.size)
        return dequantize(codes, walk.constant(_argument(walk, "scale")), walk.constant(_argument(walk, "zero_point")), scheme)

    return op.take(walk.packed(node, "float32", table), a.indices, axis=0, mode="clip")


@converts("qc.add", order=POINTWISE)
def _add(walk: Walk, a: Arguments) -> Any:
    left = emit_dequantize(walk, a.a, a.a_scale, a.a_zero_point, parse_scheme(a.a_scheme))
    right = emit_dequantize(walk, a.b, a.b_scale, a.b_zero_point, parse_scheme(a.b_scheme))
    y = activate(walk, walk.emit(op.add(left, right)), a.activation)
    return emit_quantize(walk, y, a.out_scale, a.out_zero_point, parse_scheme(a.out_scheme))


@converts("qc.hadamard")
def _hadamard(walk: Walk, a: Arguments) -> Any:
    matrix = walk.parameter(f"hadamard {a.block}", lambda: hadamard_matrix(a.block))
    shape = list(a.x.ty.shape)
    runs = walk.reshape(a.x, [*shape[:-1], tirx.floordiv(shape[-1], a.block), a.block])
    return op.reshape(walk.emit(op.matmul(runs, matrix)), shape)


@converts("qc.rotary")
def _rotary(walk: Walk, a: Arguments) -> Any:
    width = a.x.ty.shape[2]
    depth, turned = int(width) // a.heads, int(a.cos.ty.shape[-1])
    half = turned // 2

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        def element(b: Any, t: Any, i: Any) -> Any:
            c = i % depth
            angle = (b if cos.shape[0] == x.shape[0] else 0, t, tirx.min(c, turned - 1))
            other = tirx.if_then_else(c < half, -x[b, t, tirx.min(i + half, width - 1)], x[b, t, tirx.max(i - half, 0)])
            return tirx.if_then_else(c < turned, x[b, t, i] * cos[angle] + other * sin[angle], x[b, t, i])

        return te.compute(x.shape, element, name="rotary")

    return walk.builder.emit_te(rotate, a.x, a.cos, a.sin, primfunc_name_hint="rotary")


def _causal_mask(walk: Walk, a: Arguments, tokens: Any, keys: Any) -> Any:
    """Emit bool, broadcast to [batch, heads, tokens, keys]: which keys stand at or before each query, and in its window."""
    if a.past is None and not a.window:
        return causal_mask(walk, tokens, keys, from_end=True)

    def mask(*past: Any) -> Any:
        def sees(b: Any, _: Any, i: Any, j: Any) -> Any:
            last = (past[0][b] if past else keys - tokens) + i
            return tirx.all(j <= last, j > last - a.window) if a.window else j <= last

        return te.compute((past[0].shape[0] if past else 1, 1, tokens, keys), sees, name="causal_mask")

    return walk.builder.emit_te(mask, *([a.past] if a.past is not None else []), primfunc_name_hint="causal_mask")


@converts("qc.attention")
def _attention(walk: Walk, a: Arguments) -> Any:
    batch, tokens, width = a.q.ty.shape
    keys, depth = a.k.ty.shape[1], int(width) // a.heads

    def by_head(t: Any, length: Any, heads: int) -> Any:
        split = walk.emit(op.permute_dims(walk.reshape(t, [batch, length, heads, depth]), [0, 2, 1, 3]))
        return split if heads == a.heads else walk.emit(op.repeat(split, a.heads // heads, 1))

    q, k, v = by_head(a.q, tokens, a.heads), by_head(a.k, keys, a.kv_heads), by_head(a.v, keys, a.kv_heads)
    scores = walk.emit(op.matmul(q, walk.emit(op.permute_dims(k, [0, 1, 3, 2]))))
    scores = walk.emit(op.multiply(scores, _f32(a.scale)))
    masks = [] if a.key_mask is None else [walk.reshape(cast(walk, a.key_mask, "bool"), [batch, 1, 1, keys])]
    masks += [_causal_mask(walk, a, tokens, keys)] if a.causal else []
    own = [] if a.own_k is None else [by_head(t, tokens, a.kv_heads) for t in (a.own_k, a.own_v)]
    met = _causal_mask(walk, SimpleNamespace(past=a.past, window=1), tokens, keys) if own else None  # where a query meets its own token
    if own:
        alone = walk.emit(op.sum(walk.emit(op.multiply(q, own[0])), -1, keepdims=True))
        scores = walk.emit(op.where(met, walk.emit(op.multiply(alone, _f32(a.scale))), scores))
    for mask in masks:
        scores = walk.emit(op.where(mask, scores, _f32(-math.inf)))
    weights = masked_softmax(walk, scores, masks[0] if masks else None)
    if own:
        others = walk.emit(op.where(met, _f32(0.0), weights))
        share = walk.emit(op.sum(walk.emit(op.subtract(weights, others)), -1, keepdims=True))
        mixed = walk.emit(op.add(walk.emit(op.matmul(others, v)), walk.emit(op.multiply(share, own[1]))))
    else:
        mixed = walk.emit(op.matmul(weights, v))
    joined = walk.emit(op.permute_dims(mixed, [0, 2, 1, 3]))
    return op.reshape(joined, [batch, tokens, width])


@converts("qc.cache_append")
def _cache_append(walk: Walk, a: Arguments) -> Any:
    """A copy of the cache with the new rows; a target that may write to its inputs does it in place."""

    def append(cache: Any, new: Any, past: Any) -> Any:
        tokens = new.shape[1]

        def element(b: Any, row: Any, *rest: Any) -> Any:
            t = row - past[b]
            fits = tirx.all(t >= 0, t < tokens)
            return tirx.if_then_else(fits, new[(b, tirx.max(tirx.min(t, tokens - 1), 0), *rest)], cache[(b, row, *rest)])

        return te.compute(cache.shape, element, name="cache_append")

    return walk.builder.emit_te(append, a.cache, a.new, a.past, primfunc_name_hint="cache_append")

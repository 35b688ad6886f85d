"""The qc operators in standard ONNX: dequantize, the float operator, activation, quantize.

In the integer form the products of codes are exact: ``qcompile.backends.onnx.integers``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx as fx
from onnx import TensorProto
from qcompile.backends.onnx.activations import activate
from qcompile.backends.onnx.emit import ONNX_TYPES, Emitter, converts
from qcompile.backends.onnx.layers import causal_mask, safe_softmax

from qcompile.formats import Channel, Codebook, Group, Integer, Lookup, NormalFloat, Scheme, Tensor, Token, decode, parse_scheme
from qcompile.formats.quantize import SMALLEST_SCALE
from qcompile.graph.hadamard import hadamard_matrix

# ---- quantize -------------------------------------------------------------------------------------------------------------


@converts("qc.quantize")
def quantize_operator(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = emitter.fake(arguments.x).ndim
    return quantize(emitter, emitter.value(arguments.x), rank, arguments.scale, arguments.zero_point, arguments.scheme)


def _integers_only(emitter: Emitter, text: str) -> Scheme:
    """Return the scheme of codes that are computed at run time."""
    scheme = parse_scheme(text)
    if not isinstance(scheme.format, Integer):
        raise emitter.refuse(f"codes of {scheme.format} computed at run time have no ONNX form")
    return scheme


def quantize(emitter: Emitter, x: str, rank: int, scale: Any, zero_point: Any, text: str) -> str:
    """Return the codes of a float value: QuantizeLinear at 8 bits, else divide, round, shift, clip and cast."""
    scheme = _integers_only(emitter, text)
    granularity = scheme.granularity
    if scheme.bits == 8 and isinstance(granularity, (Tensor, Channel)):
        axis = granularity.axis % rank if isinstance(granularity, Channel) else None
        typed = _typed_zero_point(emitter, scale, zero_point, scheme)
        return str(emitter.op("QuantizeLinear", x, emitter.value(scale), typed, axis=axis))
    divisor = _expanded(emitter, scale, rank, scheme, None)
    shift = None if zero_point is None else _expanded(emitter, zero_point, rank, scheme, torch.float32)
    return _encode(emitter, x, divisor, shift, scheme)


def _encode(emitter: Emitter, x: str, scale: str, zero_point: str | None, scheme: Scheme) -> str:
    rounded = emitter.op("Round", emitter.op("Div", x, scale))
    shifted = rounded if zero_point is None else emitter.op("Add", rounded, zero_point)
    limits = emitter.constant(scheme.format.lowest), emitter.constant(scheme.format.highest)
    return str(emitter.op("Cast", emitter.op("Clip", shifted, *limits), to=ONNX_TYPES[scheme.format.storage]))


def _typed_zero_point(emitter: Emitter, scale: Any, zero_point: Any, scheme: Scheme) -> str:
    """Return the zero point in the codes' dtype, which tells ONNX that dtype."""
    storage = scheme.format.storage
    if zero_point is None:
        shape = list(emitter.fake(scale).shape)
        return emitter.constant(torch.zeros(shape, dtype=storage))
    known = emitter.tensor(zero_point)
    if known is not None:
        return emitter.constant(known.to(storage), name=str(zero_point.target))
    return emitter.value(zero_point, storage)


def _expanded(emitter: Emitter, value: Any, rank: int, scheme: Scheme, dtype: torch.dtype | None) -> str:
    """Return a scale or zero point so that it broadcasts against a value of this rank."""
    name = emitter.value(value, dtype)
    granularity = scheme.granularity
    if isinstance(granularity, (Tensor, Token)):
        return name
    if isinstance(granularity, Channel):
        shape = [1] * rank
        shape[granularity.axis] = -1
        return str(emitter.op("Reshape", name, emitter.constant(shape, torch.int64)))
    raise emitter.refuse(f"codes with '{granularity}' computed at run time have no ONNX form", "use tensor, channel or token scales")


@converts("qc.quantize_dynamic")
def quantize_dynamic(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Find the range, then quantize: scale from the largest magnitude, or scale and zero point from minimum and maximum."""
    scheme, rank = _integers_only(emitter, arguments.scheme), emitter.fake(arguments.x).ndim
    axes, shape = _granule(emitter, scheme, rank)
    x, format = emitter.value(arguments.x), scheme.format
    smallest = emitter.constant(max(SMALLEST_SCALE, torch.finfo(scheme.scale_dtype).smallest_normal))
    if scheme.symmetric:
        reach = emitter.op("ReduceMax", emitter.op("Abs", x), *axes, keepdims=1)
        scale = _storable(emitter, emitter.op("Div", reach, emitter.constant(format.highest)), smallest, scheme)
        codes = _encode(emitter, x, scale, None, scheme)
        narrow = emitter.op("Reshape", scale, shape) if shape else scale
        zero = emitter.op("Expand", emitter.constant(0, torch.int32), emitter.op("Shape", narrow))
        return [codes, narrow, zero]
    low = emitter.op("Min", emitter.op("ReduceMin", x, *axes, keepdims=1), emitter.constant(0.0))
    high = emitter.op("Max", emitter.op("ReduceMax", x, *axes, keepdims=1), emitter.constant(0.0))
    width = emitter.op("Div", emitter.op("Sub", high, low), emitter.constant(format.highest - format.lowest))
    scale = _storable(emitter, width, smallest, scheme)
    start = emitter.op("Round", emitter.op("Sub", emitter.constant(format.lowest), emitter.op("Div", low, scale)))
    zero_point = emitter.op("Clip", start, emitter.constant(format.lowest), emitter.constant(format.highest))
    codes = _encode(emitter, x, scale, zero_point, scheme)
    whole = emitter.op("Cast", zero_point, to=ONNX_TYPES[torch.int32])
    return [codes, *(emitter.op("Reshape", item, shape) if shape else item for item in (scale, whole))]


def _storable(emitter: Emitter, scale: str, smallest: str, scheme: Scheme) -> str:
    scale = emitter.op("Max", scale, emitter.constant(SMALLEST_SCALE))
    if scheme.scale_dtype == torch.float32:
        return scale
    narrow = emitter.op("Cast", scale, to=ONNX_TYPES[scheme.scale_dtype])
    return str(emitter.op("Max", emitter.op("Cast", narrow, to=ONNX_TYPES[torch.float32]), smallest))


def _granule(emitter: Emitter, scheme: Scheme, rank: int) -> tuple[list[str], str]:
    """Return the axes to reduce (as operands; none for all) and the shape of the scale, "" where it keeps the reduced axes."""
    if isinstance(scheme.granularity, Token):
        return [emitter.constant([-1], torch.int64)], ""
    if isinstance(scheme.granularity, Tensor):
        return [], emitter.constant(torch.zeros(0, dtype=torch.int64))
    if isinstance(scheme.granularity, Channel):
        axes = [axis for axis in range(rank) if axis != scheme.granularity.axis % rank]
        return [emitter.constant(axes, torch.int64)], emitter.constant([-1], torch.int64)
    raise emitter.refuse(f"dynamic scales with '{scheme.granularity}' have no ONNX form", "use tensor, channel or token scales")


# ---- dequantize -----------------------------------------------------------------------------------------------------------


@converts("qc.dequantize")
def dequantize_operator(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if emitter.tensor(arguments.codes) is not None:
        stored = (arguments.codes, arguments.scale, arguments.zero_point, arguments.scheme, arguments.size)
        return weight(emitter, *stored, table=arguments.table)
    if arguments.size is not None:
        raise emitter.refuse("packed codes computed at run time have no ONNX form")
    return dequantize(emitter, arguments.codes, arguments.scale, arguments.zero_point, arguments.scheme)


def dequantize(emitter: Emitter, codes: Any, scale: Any, zero_point: Any, text: str) -> str:
    """Return the float values of codes computed at run time.

    The integer form has no DequantizeLinear there: ONNX Runtime joins a QuantizeLinear, DequantizeLinear pair with the next one, which
    rounds once where the graph rounds twice.
    """
    scheme, rank = _integers_only(emitter, text), emitter.fake(codes).ndim
    granularity, name = scheme.granularity, emitter.value(codes)
    if isinstance(granularity, (Tensor, Channel)) and emitter.form == "qdq":
        operands = [name, emitter.value(scale)]
        operands += [_typed_zero_point(emitter, scale, zero_point, scheme)] if zero_point is not None else []
        return str(emitter.op("DequantizeLinear", *operands, axis=granularity.axis % rank if isinstance(granularity, Channel) else None))
    values = emitter.op("Cast", name, to=ONNX_TYPES[torch.float32])
    if zero_point is not None:
        values = emitter.op("Sub", values, _expanded(emitter, zero_point, rank, scheme, torch.float32))
    return str(emitter.op("Mul", values, _expanded(emitter, scale, rank, scheme, None)))


def weight(
    emitter: Emitter, codes: Any, scale: Any, zero_point: Any, text: str, size: int | None, *, table: Any = None, transposed: bool = False
) -> str:
    """Return the float values of constant codes, stored unpacked (4-bit ones as int4), by one DequantizeLinear.

    Codes that are places in a table of bytes are stored as those bytes; where its levels are floats, by one Gather instead.
    ``transposed`` stores a matrix [out, in] as [in, out], the way MatMul reads it.
    """
    scheme, packed = parse_scheme(text), emitter.tensor(codes)
    known, shift = emitter.tensor(scale), None if zero_point is None else emitter.tensor(zero_point)
    if packed is None or known is None or (zero_point is not None and shift is None):
        raise emitter.refuse("a weight that is not constant has no ONNX form")
    plain = packed if size is None else scheme.format.unpack(packed, size)
    if isinstance(scheme.format, NormalFloat):
        return _looked_up(emitter, plain, known, scheme, str(codes.target), transposed)
    plain, scheme = as_integers(plain, None if table is None else emitter.tensor(table), scheme)
    axis, block, known, shift = _blocks(emitter, scheme, tuple(plain.shape), known, shift)
    if transposed:
        plain, axis = plain.t(), None if axis is None else 1 - axis
        known = known.t() if known.ndim == 2 else known
        shift = shift.t() if shift is not None and shift.ndim == 2 else shift
    operands = [_codes(emitter, plain, scheme, str(codes.target)), emitter.constant(known.to(torch.float32), name=str(scale.target))]
    operands += [_codes(emitter, shift.to(scheme.format.storage), scheme, str(zero_point.target))] if shift is not None else []
    return str(emitter.op("DequantizeLinear", *operands, axis=axis, block_size=block))


def as_integers(codes: torch.Tensor, table: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, Scheme]:
    """Return codes of a codebook as the bytes that they mean, in an integer scheme; others as they are."""
    if not isinstance(scheme.format, Codebook):
        return codes, scheme
    return decode(codes, scheme, table, torch.float32).to(torch.int8), Scheme(Integer(8, True), scheme.granularity)


def _looked_up(emitter: Emitter, codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme, name: str, transposed: bool) -> str:
    """Return levels gathered by codes, times scales."""
    full, shape = scheme.granularity.expand(scale.to(torch.float32), tuple(codes.shape)), list(codes.shape)
    granularity = scheme.granularity
    values = levels(emitter, emitter.constant(codes, name=name), scheme)
    if isinstance(granularity, Group) and granularity.axis in (-1, len(shape) - 1) and shape[-1] % granularity.size == 0:
        # A scale for each group is enough: a group is an axis for as long as the product takes.
        runs = emitter.op("Reshape", values, emitter.constant([*shape[:-1], -1, granularity.size], torch.int64))
        scaled = emitter.op("Mul", runs, emitter.constant(scale.to(torch.float32).unsqueeze(-1)))
        values = emitter.op("Reshape", scaled, emitter.constant(shape, torch.int64))
    else:
        values = emitter.op("Mul", values, emitter.constant(full))
    return str(emitter.op("Transpose", values, perm=[1, 0]) if transposed else values)


def levels(emitter: Emitter, codes: str, scheme: Scheme) -> str:
    """Return what codes mean in units of the scale: gathered from the format's levels, or the integers that they are."""
    if not isinstance(scheme.format, Lookup):
        return str(emitter.op("Cast", codes, to=ONNX_TYPES[torch.float32]))
    places = emitter.op("Cast", codes, to=ONNX_TYPES[torch.int32])
    return str(emitter.op("Gather", emitter.constant(torch.tensor(scheme.format.levels)), places, axis=0))


def _blocks(
    emitter: Emitter, scheme: Scheme, shape: tuple[int, ...], scale: torch.Tensor, zero_point: torch.Tensor | None
) -> tuple[int | None, int | None, torch.Tensor, torch.Tensor | None]:
    """Return axis, block size, scale and zero point as DequantizeLinear takes them.

    Groups of one size along an axis are blocks. Anything else (a short last group, rectangles, tokens) becomes blocks of one
    element, which costs space and is never wrong.
    """
    granularity = scheme.granularity
    if isinstance(granularity, Tensor):
        return None, None, scale, zero_point
    if isinstance(granularity, Channel):
        return granularity.axis % len(shape), None, scale, zero_point
    axis = granularity.axis % len(shape) if isinstance(granularity, Group) else len(shape) - 1
    if isinstance(granularity, Group) and shape[axis] % granularity.size == 0:
        return axis, granularity.size, scale, zero_point
    full = granularity.expand(scale, shape).expand(shape).contiguous()
    return axis, 1, full, None if zero_point is None else granularity.expand(zero_point, shape).expand(shape).contiguous()


def _codes(emitter: Emitter, codes: torch.Tensor, scheme: Scheme, name: str) -> str:
    """Return an initializer of codes: int4 or uint4 with two in a byte, other widths as int8 or uint8."""
    if scheme.bits != 4:
        return emitter.constant(codes, name=name)
    flat = codes.contiguous().reshape(-1).view(torch.uint8) & 15
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).reshape(-1, 2)
    data = (flat[:, 0] | (flat[:, 1] << 4)).to(torch.uint8).numpy().tobytes()
    type = TensorProto.INT4 if scheme.format.lowest < 0 else TensorProto.UINT4
    return emitter.initializer(data, type, tuple(codes.shape), name)


# ---- products -------------------------------------------------------------------------------------------------------------


def _activation(emitter: Emitter, x: Any, scale: Any, zero_point: Any, scheme: str) -> str:
    return dequantize(emitter, x, scale, zero_point, scheme) if scheme else emitter.value(x)


def _bias(emitter: Emitter, arguments: SimpleNamespace) -> str | None:
    """Return the bias in float; an int32 one has the scale x_scale * weight_scale, for each output."""
    if arguments.bias is None:
        return None
    if emitter.fake(arguments.bias).dtype.is_floating_point:
        return emitter.value(arguments.bias)
    codes, x_scale = emitter.tensor(arguments.bias), emitter.tensor(arguments.x_scale)
    weight_scale = emitter.tensor(arguments.weight_scale)
    if codes is None or x_scale is None or weight_scale is None or x_scale.ndim or weight_scale.ndim > 1:
        raise emitter.refuse("an int32 bias needs a static activation scale and a weight scale for each output or tensor")
    scale = x_scale * weight_scale
    axis = 0 if scale.ndim else None
    return str(emitter.op("DequantizeLinear", emitter.constant(codes, name=str(arguments.bias.target)), emitter.constant(scale), axis=axis))


def epilogue(emitter: Emitter, y: str, rank: int, arguments: SimpleNamespace) -> str:
    """Return what the dialect does after a product and its bias: activation, residual, ``add_`` activation, quantize."""
    late = arguments.activation.startswith("add_")
    y = y if late else activate(emitter, y, arguments.activation)
    if arguments.residual is not None:
        y = emitter.op("Add", y, emitter.value(arguments.residual))
    y = activate(emitter, y, arguments.activation) if late else y
    return requantize(emitter, y, rank, arguments)


def requantize(emitter: Emitter, y: str, rank: int, arguments: SimpleNamespace) -> str:
    """Return y as codes of the operator's out scheme, or y where it has none."""
    return quantize(emitter, y, rank, arguments.out_scale, arguments.out_zero_point, arguments.out_scheme) if arguments.out_scheme else y


@converts("qc.linear")
def linear(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    x = _activation(emitter, arguments.x, arguments.x_scale, arguments.x_zero_point, arguments.x_scheme)
    w = weight(emitter, arguments.weight, arguments.weight_scale, arguments.weight_zero_point, arguments.weight_scheme,
               arguments.in_features, table=arguments.weight_table, transposed=True)  # fmt: skip
    y = emitter.op("MatMul", x, w)
    bias = _bias(emitter, arguments)
    y = y if bias is None else emitter.op("Add", y, bias)
    return epilogue(emitter, y, emitter.fake(emitter.current).ndim, arguments)


@converts("qc.conv2d")
def conv2d(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    x = _activation(emitter, arguments.x, arguments.x_scale, arguments.x_zero_point, arguments.x_scheme)
    w = weight(
        emitter, arguments.weight, arguments.weight_scale, arguments.weight_zero_point, arguments.weight_scheme, arguments.kernel_width
    )
    bias = _bias(emitter, arguments)
    y = emitter.op(
        "Conv",
        *([x, w] if bias is None else [x, w, bias]),
        kernel_shape=[int(emitter.fake(arguments.weight).shape[2]), arguments.kernel_width],
        strides=list(arguments.stride),
        pads=list(arguments.padding) * (4 // len(arguments.padding)),
        dilations=list(arguments.dilation),
        group=arguments.groups,
    )
    return epilogue(emitter, y, 4, arguments)


@converts("qc.matmul")
def matmul(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a = dequantize(emitter, arguments.a, arguments.a_scale, arguments.a_zero_point, arguments.a_scheme)
    b = dequantize(emitter, arguments.b, arguments.b_scale, arguments.b_zero_point, arguments.b_scheme)
    return requantize(emitter, emitter.op("MatMul", a, b), emitter.fake(emitter.current).ndim, arguments)


@converts("qc.add")
def add(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a = dequantize(emitter, arguments.a, arguments.a_scale, arguments.a_zero_point, arguments.a_scheme)
    b = dequantize(emitter, arguments.b, arguments.b_scale, arguments.b_zero_point, arguments.b_scheme)
    y = activate(emitter, emitter.op("Add", a, b), arguments.activation)
    return quantize(emitter, y, emitter.fake(emitter.current).ndim, arguments.out_scale, arguments.out_zero_point, arguments.out_scheme)


# ---- embedding, rotation, attention ---------------------------------------------------------------------------------------


@converts("qc.embedding")
def embedding(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Gather codes first and dequantize the few rows read; the table of one float for each weight never exists.

    Codes of fewer than 8 bits are stored as bytes, because Gather takes no narrower type.
    """
    scheme, packed = parse_scheme(arguments.scheme), emitter.tensor(arguments.weight)
    scale = emitter.tensor(arguments.scale)
    if packed is None or scale is None:
        raise emitter.refuse("an embedding table that is not constant has no ONNX form")
    codes = scheme.format.unpack(packed, arguments.size)
    indices = emitter.value(arguments.indices)
    rows = emitter.op("Gather", emitter.constant(codes, name=str(arguments.weight.target)), indices, axis=0)
    values = levels(emitter, rows, scheme)
    if arguments.zero_point is not None:
        values = emitter.op("Sub", values, _row_scale(emitter, arguments.zero_point, indices, scheme, arguments.size))
    return emitter.op("Mul", values, _row_scale(emitter, arguments.scale, indices, scheme, arguments.size))


def _row_scale(emitter: Emitter, constant: Any, indices: str, scheme: Scheme, size: int) -> str:
    """Return the scales (or zero points in float) of the rows read, so that they broadcast against [.., size]."""
    value, granularity = emitter.tensor(constant), scheme.granularity
    assert value is not None
    value = value.to(torch.float32)
    name = str(constant.target)
    if isinstance(granularity, Tensor):
        return emitter.constant(value, name=name)
    if isinstance(granularity, Group) and granularity.axis in (1, -1):
        gathered = emitter.op("Gather", emitter.constant(value, name=name), indices, axis=0)  # [.., groups]
        each = torch.arange(size) // granularity.size
        return str(emitter.op("Gather", gathered, emitter.constant(each), axis=-1))
    rows = isinstance(granularity, Token) or (isinstance(granularity, Channel) and granularity.axis == 0)
    if not rows:
        raise emitter.refuse(f"an embedding with '{granularity}' has no ONNX form", "use tensor, channel or group scales")
    return str(emitter.op("Gather", emitter.constant(value.reshape(-1, 1), name=name), indices, axis=0))


@converts("qc.hadamard")
def hadamard(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = emitter.fake(arguments.x).ndim
    runs = emitter.constant([0] * (rank - 1) + [-1, arguments.block], torch.int64)
    matrix = emitter.constant(hadamard_matrix(arguments.block), name=f"hadamard{arguments.block}")
    turned = emitter.op("MatMul", emitter.op("Reshape", emitter.value(arguments.x), runs), matrix)
    return emitter.op("Reshape", turned, emitter.constant([0] * (rank - 1) + [-1], torch.int64))


@converts("qc.rotary")
def rotary(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    r = int(emitter.fake(arguments.cos).shape[-1])
    d = int(emitter.fake(arguments.x).shape[-1]) // arguments.heads
    x = emitter.op("Reshape", emitter.value(arguments.x), emitter.constant([0, 0, arguments.heads, d], torch.int64))

    def channels(start: int, end: int) -> str:
        bounds = (emitter.constant([bound], torch.int64) for bound in (start, end, -1))
        return str(emitter.op("Slice", x, *bounds))

    head_axis = emitter.constant([2], torch.int64)
    cos, sin = (emitter.op("Unsqueeze", emitter.value(angle), head_axis) for angle in (arguments.cos, arguments.sin))
    turned = emitter.op("Concat", emitter.op("Neg", channels(r // 2, r)), channels(0, r // 2), axis=-1)
    y = emitter.op("Add", emitter.op("Mul", channels(0, r), cos), emitter.op("Mul", turned, sin))
    y = y if r == d else emitter.op("Concat", y, channels(r, d), axis=-1)
    return emitter.op("Reshape", y, emitter.constant([0, 0, arguments.heads * d], torch.int64))


@converts("qc.attention")
def attention(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if arguments.past is not None:
        raise emitter.refuse("attention to a cache has no ONNX export", "export the graph over whole texts")
    if arguments.own_k is not None:
        raise emitter.refuse("attention to codes of the past alone has no ONNX export", "quantize the cache without past_only")
    heads, kv_heads = arguments.heads, arguments.kv_heads
    d = int(emitter.fake(arguments.q).shape[-1]) // heads
    q = _heads(emitter, arguments.q, heads, d, [0, 2, 1, 3])
    keys = _heads(emitter, arguments.k, kv_heads, d, [0, 2, 3, 1])  # [batch, heads, d, keys]
    values = _heads(emitter, arguments.v, kv_heads, d, [0, 2, 1, 3])
    if kv_heads != heads:
        keys = _repeat_heads(emitter, keys, heads, heads // kv_heads, [d, -1])
        values = _repeat_heads(emitter, values, heads, heads // kv_heads, [-1, d])
    scores = emitter.op("Mul", emitter.op("MatMul", q, keys), emitter.constant(float(arguments.scale)))
    hidden = emitter.constant(-math.inf)
    if arguments.key_mask is not None:
        seen = emitter.op("Unsqueeze", emitter.value(arguments.key_mask, torch.bool), emitter.constant([1, 2], torch.int64))
        scores = emitter.op("Where", seen, scores, hidden)
    if arguments.causal:
        q_value, k_value = emitter.value(arguments.q), emitter.value(arguments.k)
        seen = causal_mask(emitter, q_value, k_value, 1, 1, aligned_at_end=True, window=arguments.window)
        scores = emitter.op("Where", seen, scores, hidden)
    mixed = emitter.op("MatMul", safe_softmax(emitter, scores), values)
    joined = emitter.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return emitter.op("Reshape", joined, emitter.constant([0, 0, heads * d], torch.int64))


def _heads(emitter: Emitter, x: fx.Node, heads: int, d: int, order: list[int]) -> str:
    split = emitter.op("Reshape", emitter.value(x), emitter.constant([0, 0, heads, d], torch.int64))
    return str(emitter.op("Transpose", split, perm=order))


def _repeat_heads(emitter: Emitter, x: str, heads: int, times: int, rest: list[int]) -> str:
    """Repeat each head of [batch, kv_heads, ..] in place: heads that share keys and values."""
    apart = emitter.op("Unsqueeze", x, emitter.constant([2], torch.int64))
    many = emitter.op("Expand", apart, emitter.constant([1, 1, times, 1, 1], torch.int64))
    return str(emitter.op("Reshape", many, emitter.constant([0, heads, *rest], torch.int64)))

"""Products of codes in the integer form: exact int32 sums, then the dialect's epilogue operator by operator.

    qc.linear(%x, ..) {x_scheme="int8 tensor sym"}
 -> Cast(uint8), BitwiseXor(128) -> MatMulInteger -> Cast(float32) -> Mul(weight_scale) -> Mul(x_scale) -> Add(bias) ..

Both operands are uint8: a signed code c is stored as c + 128 with the zero point raised by as much, which changes no difference of
code and zero point. With a signed operand, x86 processors before VNNI add pairs of products in saturating int16 (VPMADDUBSW; ONNX Runtime,
"Quantize ONNX models", on U8S8 and reduce_range); unsigned pairs are widened first and the sum is exact on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from onnx import TensorProto
from qcompile.backends.onnx import quantized
from qcompile.backends.onnx.emit import INTEGER_TABLE, Emitter, converts

from qcompile.formats import Channel, Codebook, Group, Integer, Scheme, Tensor, Token, parse_scheme

OFFSET = 128  # from int8 to uint8

# One part of a weight: uint8 codes and their zero point. The product with a weight is the sum of those with its parts.
Part = tuple[torch.Tensor, int]


# ---- operands -------------------------------------------------------------------------------------------------------------


def _offset(scheme: Scheme) -> int:
    return OFFSET if scheme.format.storage == torch.int8 else 0


def _unsigned(emitter: Emitter, codes: Any, scheme: Scheme) -> str:
    """Return codes computed at run time as uint8: the top bit of a signed byte turned over adds 128 to it."""
    name = emitter.value(codes)
    if not _offset(scheme):
        return name
    return str(emitter.op("BitwiseXor", emitter.op("Cast", name, to=TensorProto.UINT8), _byte(emitter, OFFSET)))


def _byte(emitter: Emitter, value: int) -> str:
    return emitter.constant(value, torch.uint8)


def _zero_byte(emitter: Emitter, zero_point: Any, scheme: Scheme) -> str:
    """Return the zero point of ``_unsigned`` codes, one scalar, as uint8."""
    if zero_point is None:
        return _byte(emitter, _offset(scheme))
    known = emitter.tensor(zero_point)
    if known is not None:
        return _byte(emitter, int(known) + _offset(scheme))
    raised = emitter.op("Add", emitter.value(zero_point), emitter.constant(_offset(scheme), torch.int32))
    return str(emitter.op("Cast", raised, to=TensorProto.UINT8))


def weight_parts(codes: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme) -> list[Part]:
    """Return parts whose (codes - zero point) add up to the weight's: one part, or two where 8 bits do not hold the difference.

    ONNX Runtime's ConvInteger takes one zero point for all channels, so zero points that differ are subtracted here.
    """
    whole = codes.to(torch.int32)
    if zero_point is None or bool((zero_point == zero_point.reshape(-1)[0]).all()):
        zero = 0 if zero_point is None else int(zero_point.reshape(-1)[0])
        return [((whole + _offset(scheme)).to(torch.uint8), zero + _offset(scheme))]
    centered = whole - scheme.granularity.expand(zero_point, tuple(codes.shape)).to(torch.int32)
    if int(centered.min()) >= -OFFSET and int(centered.max()) < OFFSET:
        return [((centered + OFFSET).to(torch.uint8), OFFSET)]
    near = centered.clamp(-OFFSET, OFFSET - 1)  # of -255 .. 255, which leaves -127 .. 128
    return [((near + OFFSET).to(torch.uint8), OFFSET), ((centered - near + OFFSET - 1).to(torch.uint8), OFFSET - 1)]


def _plain_weight(emitter: Emitter, arguments: SimpleNamespace, size: int) -> tuple[torch.Tensor, torch.Tensor | None, Scheme]:
    """Return a constant weight's codes, one in each element, zero points and scheme."""
    scheme, packed = parse_scheme(arguments.weight_scheme), emitter.tensor(arguments.weight)
    zero = None if arguments.weight_zero_point is None else emitter.tensor(arguments.weight_zero_point)
    if packed is None or (arguments.weight_zero_point is not None and zero is None):
        raise emitter.refuse("a weight that is not constant has no ONNX form")
    table = None if getattr(arguments, "weight_table", None) is None else emitter.tensor(arguments.weight_table)
    codes, scheme = quantized.as_integers(scheme.format.unpack(packed, size), table, scheme)
    return codes, zero, scheme


def _sum_of(emitter: Emitter, terms: list[str]) -> str:
    total = terms[0]
    for term in terms[1:]:
        total = str(emitter.op("Add", total, term))
    return total


# ---- what stays a product of floats ---------------------------------------------------------------------------------------


def _why_float(arguments: SimpleNamespace, weights: tuple[type, ...], activations: tuple[type, ...]) -> str | None:
    """Return why a layer's product is not one of integers, or None."""
    if not arguments.x_scheme:
        return "its activations are float"
    x, w = parse_scheme(arguments.x_scheme), parse_scheme(arguments.weight_scheme)
    if not isinstance(x.format, Integer) or not isinstance(w.format, Integer | Codebook):
        return "its codes are not integers"
    if not isinstance(x.granularity, activations):
        return f"activation scales by {x.granularity} stand inside the sum"
    if not isinstance(w.granularity, weights) or (isinstance(w.granularity, Channel) and w.granularity.axis != 0):
        return f"weight scales by {w.granularity} stand inside the sum"
    if isinstance(w.granularity, Group) and w.granularity.axis not in (1, -1):
        return f"weight scales by {w.granularity} stand inside the sum"
    if isinstance(w.granularity, Group) and arguments.bias is not None and not arguments.bias.meta["val"].dtype.is_floating_point:
        return "an int32 bias has no unit where weights have groups"
    return None


def _in_float(emitter: Emitter, arguments: SimpleNamespace, reason: str, converter: Callable[..., Any]) -> Any:
    assert emitter.current is not None
    emitter.float_products[emitter.current.name] = reason
    return converter(emitter, arguments)


# ---- products -------------------------------------------------------------------------------------------------------------


@converts("qc.linear", table=INTEGER_TABLE)
def linear(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    reason = _why_float(arguments, (Tensor, Channel, Group), (Tensor, Token))
    if reason:
        return _in_float(emitter, arguments, reason, quantized.linear)
    assert emitter.current is not None
    codes, zero, scheme = _plain_weight(emitter, arguments, arguments.in_features)
    x = _unsigned(emitter, arguments.x, parse_scheme(arguments.x_scheme))
    if isinstance(scheme.granularity, Group):
        y = _grouped_sum(emitter, x, codes, zero, scheme, arguments)
    else:
        accumulator = _matrix_sum(emitter, x, weight_parts(codes, zero, scheme), arguments)
        y = _scaled(emitter, accumulator, arguments, emitter.value(arguments.weight_scale), lambda name: name)
    return _finish(emitter, y, emitter.fake(emitter.current).ndim, arguments, lambda name: name)


def _grouped_sum(
    emitter: Emitter, x: str, codes: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme, arguments: SimpleNamespace
) -> str:
    """Return the float sum over groups, in their order, of float32(accumulator of the group) * its weight scales."""
    assert isinstance(scheme.granularity, Group)
    scales, size = emitter.tensor(arguments.weight_scale), scheme.granularity.size
    if scales is None:
        raise emitter.refuse("a weight that is not constant has no ONNX form")
    sizes = [part.shape[1] for part in codes.split(size, 1)]
    runs = emitter.op("Split", x, emitter.constant(sizes, torch.int64), outputs=len(sizes), axis=-1) if len(sizes) > 1 else [x]
    terms = []
    for group, (run, part) in enumerate(zip(runs, codes.split(size, 1), strict=True)):
        shift = None if zero is None else zero[:, group]
        parts = weight_parts(part, shift, Scheme(scheme.format, Channel(0)))
        whole = emitter.op("Cast", _matrix_sum(emitter, run, parts, arguments), to=TensorProto.FLOAT)
        terms.append(str(emitter.op("Mul", whole, emitter.constant(scales[:, group].to(torch.float32)))))
    return _sum_of(emitter, terms)


def _matrix_sum(emitter: Emitter, x: str, parts: list[Part], arguments: SimpleNamespace) -> str:
    """Return the int32 sum over (x - zero) * (w - zero) for a weight [out, in] in parts."""
    scheme = parse_scheme(arguments.x_scheme)
    by_token = isinstance(scheme.granularity, Token) and arguments.x_zero_point is not None
    zero = _byte(emitter, 0) if by_token else _zero_byte(emitter, arguments.x_zero_point, scheme)
    name = str(arguments.weight.target)
    terms = [
        str(emitter.op("MatMulInteger", x, emitter.constant(codes.t(), name=name), zero, _byte(emitter, shift))) for codes, shift in parts
    ]
    total = _sum_of(emitter, terms)
    if not by_token:
        return total
    # MatMulInteger takes one zero point for all rows: zero * sum(w - w_zero) is what rows with their own must lose.
    columns = sum((codes.to(torch.int32) - shift).sum(1, dtype=torch.int32) for codes, shift in parts)
    raised = emitter.op("Add", emitter.value(arguments.x_zero_point), emitter.constant(_offset(scheme), torch.int32))
    return str(emitter.op("Sub", total, emitter.op("Mul", raised, emitter.constant(columns))))


@converts("qc.conv2d", table=INTEGER_TABLE)
def conv2d(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    reason = _why_float(arguments, (Tensor, Channel), (Tensor,))
    if reason:
        return _in_float(emitter, arguments, reason, quantized.conv2d)
    codes, zero, scheme = _plain_weight(emitter, arguments, arguments.kernel_width)
    x_scheme = parse_scheme(arguments.x_scheme)
    x, x_zero = _unsigned(emitter, arguments.x, x_scheme), _zero_byte(emitter, arguments.x_zero_point, x_scheme)
    terms = [
        emitter.op(
            "ConvInteger",
            *(x, emitter.constant(part, name=str(arguments.weight.target)), x_zero, _byte(emitter, shift)),
            kernel_shape=list(part.shape[2:]),
            strides=list(arguments.stride),
            pads=list(arguments.padding) * (4 // len(arguments.padding)),  # ConvInteger pads with x's zero point
            dilations=list(arguments.dilation),
            group=arguments.groups,
        )
        for part, shift in weight_parts(codes, zero, scheme)
    ]

    def by_channel(name: str) -> str:
        return str(emitter.op("Reshape", name, emitter.constant([-1, 1, 1], torch.int64)))

    weight_scale = emitter.value(arguments.weight_scale)
    weight_scale = by_channel(weight_scale) if emitter.fake(arguments.weight_scale).ndim else weight_scale
    y = _scaled(emitter, _sum_of(emitter, terms), arguments, weight_scale, by_channel)
    return _finish(emitter, y, 4, arguments, by_channel)


def _integer_bias(arguments: SimpleNamespace) -> bool:
    return arguments.bias is not None and not arguments.bias.meta["val"].dtype.is_floating_point


def _scaled(emitter: Emitter, accumulator: str, arguments: SimpleNamespace, weight_scale: str, placed: Callable[[str], str]) -> str:
    """Return float32(accumulator + int32 bias) * weight_scale; ``placed`` shapes a value for each output."""
    if _integer_bias(arguments):
        accumulator = emitter.op("Add", accumulator, placed(emitter.value(arguments.bias)))
    return str(emitter.op("Mul", emitter.op("Cast", accumulator, to=TensorProto.FLOAT), weight_scale))


def _finish(emitter: Emitter, y: str, rank: int, arguments: SimpleNamespace, placed: Callable[[str], str]) -> str:
    """Return y * x_scale + float bias after activation, residual and quantization."""
    y = emitter.op("Mul", y, emitter.value(arguments.x_scale))
    if arguments.bias is not None and not _integer_bias(arguments):
        y = emitter.op("Add", y, placed(emitter.value(arguments.bias)))
    return quantized.epilogue(emitter, y, rank, arguments)


@converts("qc.matmul", table=INTEGER_TABLE)
def matmul(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    a_scheme, b_scheme = parse_scheme(arguments.a_scheme), parse_scheme(arguments.b_scheme)
    for scheme in (a_scheme, b_scheme):
        if not isinstance(scheme.granularity, Tensor):
            return _in_float(emitter, arguments, f"scales by {scheme.granularity} stand inside the sum", quantized.matmul)
    accumulator = emitter.op(
        "MatMulInteger",
        *(_unsigned(emitter, arguments.a, a_scheme), _unsigned(emitter, arguments.b, b_scheme)),
        *(_zero_byte(emitter, arguments.a_zero_point, a_scheme), _zero_byte(emitter, arguments.b_zero_point, b_scheme)),
    )
    y = emitter.op("Mul", emitter.op("Cast", accumulator, to=TensorProto.FLOAT), emitter.value(arguments.b_scale))
    y = emitter.op("Mul", y, emitter.value(arguments.a_scale))
    rank = emitter.fake(emitter.current).ndim
    return quantized.requantize(emitter, y, rank, arguments)

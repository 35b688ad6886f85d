"""QuantizeLinear and its relatives: already-quantized models become graphs in stage ``integer``."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.operators import Call, Result, normal_axis, operator
from qcompile.errors import Refused
from qcompile.formats import Channel, Group, Integer, Scheme, Tensor, pack, parse_scheme

aten, qc = torch.ops.aten, torch.ops.qc


def _format(call: Call, dtype: torch.dtype, source: Value | None) -> Integer:
    narrow = call.build.narrow.get(id(source)) if isinstance(source, torch.Tensor) else None
    if narrow:
        return Integer(int(narrow[-1]), not narrow.startswith("u"))
    if dtype not in (torch.int8, torch.uint8):
        raise Refused(f"quantization to {str(dtype).removeprefix('torch.')} is not supported", way_out="use int8 or uint8")
    return Integer(8, dtype == torch.int8)


def _granularity(call: Call, shape: tuple[int | torch.SymInt, ...], scale: Value) -> Tensor | Channel | Group:
    """Return the granularity of a scale: one element, one for each index of an axis, or blocks along an axis."""
    scale_shape = call.build.static_shape(scale)
    rank = len(shape)
    if not scale_shape or (scale_shape == [1] and not call.integer("block_size")):
        return Tensor()
    axis = normal_axis(call.integer("axis", 1), rank)
    if block := call.integer("block_size"):
        return Group(block) if axis == rank - 1 else Group(block, axis)
    if len(scale_shape) != 1 or scale_shape[0] != shape[axis]:
        raise Refused(f"a scale of shape {scale_shape} does not fit axis {axis}")
    return Channel(axis)


def _grid(call: Call, format: Integer, x: Value, scale: Value, zero_point: Value | None) -> tuple[Value, Value | None, Scheme]:
    """Return scale and zero point of the scheme's shape, and the scheme."""
    granularity = _granularity(call, call.build.shape(x), scale)
    if isinstance(granularity, Tensor):
        scale = _flat(call, scale)
        zero_point = None if zero_point is None else _flat(call, zero_point)
    if isinstance(scale, torch.Tensor) and not bool((scale > 0).all() & scale.isfinite().all()):
        raise Refused("the scale is not positive and finite", node=call.name(1))
    if isinstance(zero_point, torch.Tensor) and not bool(zero_point.any()):
        zero_point = None
    if isinstance(zero_point, torch.Tensor):
        zero_point = call.build.derive(zero_point, "int32", lambda t: t.to(torch.int32))
    elif zero_point is not None:
        zero_point = call.build.cast(zero_point, torch.int32)
    return scale, zero_point, Scheme(format, granularity, symmetric=zero_point is None)


def _flat(call: Call, value: Value) -> Value:
    if call.build.rank(value) == 0:
        return value
    if isinstance(value, torch.Tensor):
        return call.build.derive(value, "scalar", lambda t: t.reshape(()))
    return call.build.reshape(value, [])


@operator("QuantizeLinear", since=10)
def quantize_linear(call: Call) -> Result:
    zero_point = call.get(2)
    wanted = {0: None, 2: torch.uint8, 3: torch.int8}.get(call.integer("output_dtype"), torch.int16)
    dtype = call.build.dtype(zero_point) if zero_point is not None else wanted or torch.uint8
    x = call.build.cast(call[0], call.build.dtype(call[1]))
    scale, zero_point, scheme = _grid(call, _format(call, dtype, zero_point), x, call[1], zero_point)
    return call.build.call_node(qc.quantize.default, x, scale, zero_point, str(scheme))


@operator("DequantizeLinear", since=10)
def dequantize_linear(call: Call) -> Result:
    codes, scale, zero_point = call[0], call[1], call.get(2)
    if call.build.dtype(codes) == torch.int32:
        return _dequantize_bias(call, codes, scale)
    format = _format(call, call.build.dtype(codes), codes)
    scale, zero_point, scheme = _grid(call, format, codes, scale, zero_point)
    if format.bits < 8:
        assert isinstance(codes, torch.Tensor)
        packed = call.build.derive(codes, "packed", lambda t: pack(t, format.bits))
        return call.build.call_node(qc.dequantize.default, packed, scale, zero_point, str(scheme), codes.shape[-1])
    return call.build.call_node(qc.dequantize.default, codes, scale, zero_point, str(scheme))


def _dequantize_bias(call: Call, codes: Value, scale: Value) -> Value:
    """Return an int32 bias in float, one scale for all or one for each element."""
    zero_point = call.get(2)
    if not isinstance(codes, torch.Tensor) or not isinstance(scale, torch.Tensor):
        raise Refused("int32 values are dequantized only as constants")
    if isinstance(zero_point, torch.Tensor) and bool(zero_point.any()):
        raise Refused("an int32 zero point must be 0")
    if scale.numel() > 1 and (codes.ndim != 1 or scale.shape != codes.shape):
        raise Refused("a scale of an int32 constant must have one element or one for each of its elements")
    return call.build.derive(codes, "float", lambda t: t.to(scale.dtype) * scale)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(call: Call) -> Result:
    made = call.build.call_node(qc.quantize_dynamic.default, call[0], "uint8 tensor affine dynamic")
    codes, scale, zero_point = (call.build.item(made, index) for index in range(3))
    return codes, scale, call.build.cast(zero_point, torch.uint8)


def transposed_weight(call: Call, node: fx.Node, *, single: bool) -> fx.Node | None:
    """Return the transpose of a dequantized constant weight [in, out] as a dequantized constant [out, in], or None for other nodes.

    ``single`` says that nothing else will read the weight, so that the call for its old form is taken back.
    """
    if node.target is not qc.dequantize.default or len(node.args) != 4:  # packed codes stay as they are
        return None
    codes, scale, zero_point, text = node.args
    scheme = parse_scheme(str(text))
    if not isinstance(codes, fx.Node) or codes.op != "get_attr" or not isinstance(scheme.granularity, (Tensor, Channel)):
        return None
    granularity = Channel(1 - scheme.granularity.axis % 2) if isinstance(scheme.granularity, Channel) else scheme.granularity
    turned = Scheme(scheme.format, granularity, scheme.symmetric)
    weight = call.build.derive(_tensor(call, codes), "transposed", torch.t)
    scale, zero_point = (_tensor(call, item) for item in (scale, zero_point))
    if single:
        call.build.release(node)
    return call.build.call_node(qc.dequantize.default, weight, scale, zero_point, str(turned))


def _tensor(call: Call, item: Any) -> Any:
    """Return the tensor of a constant's node under its name, and anything else as it is."""
    if not isinstance(item, fx.Node) or item.op != "get_attr":
        return item
    return call.build.name_constant(call.build.constants[str(item.target)], str(item.target))

"""Normalizations and softmax."""

from __future__ import annotations

import operator as python
from typing import Any

import torch

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.operators import Call, Result, operator
from qcompile.errors import Refused

aten = torch.ops.aten


@operator("BatchNormalization")
def batch_normalization(call: Call) -> Result:
    if call.integer("training_mode") or call.used_outputs() > 1:
        raise Refused("batch normalization in training mode is not supported", way_out="export the model in evaluation mode")
    x, epsilon, momentum = call[0], call.real("epsilon", 1e-5), call.real("momentum", 0.9)
    target = aten._native_batch_norm_legit_no_training.default
    made = call.call(target, x, *(call[index] for index in range(1, 5)), 1 - momentum, epsilon)
    return call.build.item(made, 0)


@operator("InstanceNormalization")
def instance_normalization(call: Call) -> Result:
    """Normalize each channel by itself: group normalization with as many groups as channels."""
    channels = call.build.static_shape(call[0], [1])[0]
    return call.call(aten.group_norm.default, call[0], channels, call[1], call[2], call.real("epsilon", 1e-5))


@operator("GroupNormalization", since=18)
def group_normalization(call: Call) -> Result:
    """Normalize groups of channels; before operator set 21 scale and bias have one element for each group."""
    groups, scale, bias = call.integer("num_groups"), call[1], call[2]
    channels = call.build.static_shape(call[0], [1])[0]
    if call.version < 21:
        each = channels // groups
        scale, bias = (call.call(aten.repeat_interleave.self_int, value, each) for value in (scale, bias))
    return call.call(aten.group_norm.default, call[0], groups, scale, bias, call.real("epsilon", 1e-5))


@operator("LayerNormalization", since=17)
def layer_normalization(call: Call) -> Result:
    x, scale, bias = call[0], call[1], call.get(2)
    rank = call.build.rank(x)
    axis = call.axis("axis", rank, -1)
    epsilon = call.real("epsilon", 1e-5)
    shape = call.build.static_shape(x, range(axis, rank))
    axes = list(range(axis, rank))
    if call.build.static_shape(scale) == shape and (bias is None or call.build.static_shape(bias) == shape):
        result = call.call(aten.layer_norm.default, x, shape, scale, bias, epsilon)
    else:
        result = call.call(aten.mul.Tensor, call.call(aten.layer_norm.default, x, shape, None, None, epsilon), scale)
        result = result if bias is None else call.call(aten.add.Tensor, result, bias)
    if call.used_outputs() == 1:
        return result
    mean = call.call(aten.mean.dim, x, axes, True)
    variance = call.call(aten.var.correction, x, axes, correction=0, keepdim=True)
    return result, mean, call.call(aten.rsqrt.default, call.call(aten.add.Tensor, variance, epsilon))


@operator("RMSNormalization", since=23)
def rms_normalization(call: Call) -> Result:
    x, scale = call[0], call[1]
    rank = call.build.rank(x)
    shape = call.build.static_shape(x, range(call.axis("axis", rank, -1), rank))
    if call.build.static_shape(scale) == shape:
        return call.call(aten.rms_norm.default, x, shape, scale, call.real("epsilon", 1e-5))
    return call.call(aten.mul.Tensor, call.call(aten.rms_norm.default, x, shape, None, call.real("epsilon", 1e-5)), scale)


@operator("LpNormalization")
def lp_normalization(call: Call) -> Result:
    axis = call.axis("axis", call.build.rank(call[0]), -1)
    norm = call.call(aten.linalg_vector_norm.default, call[0], call.integer("p", 2), [axis], True)
    safe = call.call(aten.where.self, call.call(aten.eq.Scalar, norm, 0), call.call(aten.ones_like.default, norm), norm)
    return call.call(aten.div.Tensor, call[0], safe)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(call: Call) -> Result:
    axes = call.integer_list("axes", [0, 2, 3])
    mean = call.call(aten.mean.dim, call[0], axes, True)
    deviation = call.call(aten.sqrt.default, call.call(aten.var.correction, call[0], axes, correction=0, keepdim=True))
    centered = call.call(aten.sub.Tensor, call[0], mean)
    return call.call(aten.div.Tensor, centered, call.call(aten.add.Tensor, deviation, 1e-9))


@operator("LRN")
def local_response_normalization(call: Call) -> Result:
    """Divide by the mean square over neighbouring channels, ``size`` of them, the odd one after the channel."""
    x, size = call[0], call.integer("size")
    if not 1 <= size <= 1024:
        raise Refused(f"a window of {size} channels is not supported")
    rank = call.build.rank(x)
    before = (size - 1) // 2
    square = call.call(aten.mul.Tensor, x, x)
    padded = call.call(aten.constant_pad_nd.default, square, [0, 0] * (rank - 2) + [before, size - 1 - before])
    channels = call.build.static_shape(x, [1])[0]
    parts = [call.call(aten.slice.Tensor, padded, 1, start, start + channels) for start in range(size)]
    total = parts[0]
    for part in parts[1:]:
        total = call.call(aten.add.Tensor, total, part)
    scaled = call.call(aten.mul.Tensor, total, call.real("alpha", 1e-4) / size)
    base = call.call(aten.add.Tensor, scaled, call.real("bias", 1.0))
    return call.call(aten.div.Tensor, x, call.call(aten.pow.Tensor_Scalar, base, call.real("beta", 0.75)))


@operator("Softmax", "LogSoftmax", since=13)
def softmax(call: Call) -> Result:
    target = aten.softmax.int if call.node.op_type == "Softmax" else aten.log_softmax.int
    axis = call.integer("axis", -1)
    call.axis("axis", call.build.rank(call[0]), -1)
    return call.call(target, call[0], axis)


@operator("Softmax", "LogSoftmax")
def softmax_of_matrix(call: Call) -> Result:
    """Before operator set 13 the axes from ``axis`` on are one: the input is a matrix."""
    target = aten.softmax.int if call.node.op_type == "Softmax" else aten.log_softmax.int
    x, rank = call[0], call.build.rank(call[0])
    axis = call.axis("axis", rank, 1)
    if axis == rank - 1:
        return call.call(target, x, -1)
    rows = flat_size(call, x, range(axis))
    flat = call.build.reshape(x, [rows, flat_size(call, x, range(axis, rank))])
    return call.build.reshape(call.call(target, flat, 1), [call.build.size(x, a) for a in range(rank)])


def flat_size(call: Call, x: Value, axes: Any) -> Any:
    """Return the product of some sizes of x."""
    product: Any = 1
    for axis in axes:
        product = call.build.size_arithmetic(python.mul, product, call.build.size(x, axis))
    return product


@operator("Hardmax")
def hardmax(call: Call) -> Result:
    if call.version < 13 and call.axis("axis", call.build.rank(call[0]), 1) != call.build.rank(call[0]) - 1:
        raise Refused("Hardmax over several axes is not supported")
    axis = call.axis("axis", call.build.rank(call[0]), -1 if call.version >= 13 else 1)
    best = call.call(aten.argmax.default, call[0], axis, True)
    zeros = call.call(aten.zeros_like.default, call[0])
    return call.call(aten.scatter.value, zeros, axis, best, 1.0)

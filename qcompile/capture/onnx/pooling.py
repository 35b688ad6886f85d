"""Pooling over windows and over whole images."""

from __future__ import annotations

import math
from typing import Any

import torch

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.convolution import Window
from qcompile.capture.onnx.operators import Call, Result, operator
from qcompile.errors import Refused

aten = torch.ops.aten

_MAX = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
_AVERAGE = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


def _fits_torch(window: Window) -> bool:
    """Say whether torch takes this padding: the same on both sides and at most half the kernel."""
    return window.symmetric and all(2 * pad <= kernel for pad, kernel in zip(window.begin, window.kernel, strict=True))


def _add_ceil_padding(call: Call, x: Value, window: Window) -> None:
    """Lengthen the end padding so that rounding down gives the number of outputs that rounding up asks for."""
    for axis, size in enumerate(call.build.static_shape(x, range(2, window.rank + 2))):
        padded = size + window.begin[axis] + window.end[axis]
        reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1
        outputs = -(-(padded - reach) // window.stride[axis]) + 1
        # A last window that would begin in the end padding is left out.
        if (outputs - 1) * window.stride[axis] >= size + window.begin[axis]:
            outputs -= 1
        window.end[axis] += max(0, (outputs - 1) * window.stride[axis] + reach - padded)


@operator("MaxPool")
def max_pool(call: Call) -> Result:
    if call.used_outputs() > 1:
        raise Refused("the indices of MaxPool are not supported")
    x = call[0]
    window = Window(call, x, call.integer_list("kernel_shape"))
    dtype = call.build.dtype(x)
    ceil = bool(call.integer("ceil_mode"))
    if not _fits_torch(window) or (ceil and not dtype.is_floating_point):
        if ceil:
            _add_ceil_padding(call, x, window)
        x = window.pad(call, x, -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min)
        window.begin = window.end = [0] * window.rank
        ceil = False
    # torch pools integers of no width; every int8 and uint8 value is exact in float32.
    x = x if dtype.is_floating_point else call.build.cast(x, torch.float32)
    made = call.call(_MAX[window.rank], x, window.kernel, window.stride, window.begin, window.dilation, ceil)
    return call.build.cast(made, dtype)


@operator("AveragePool")
def average_pool(call: Call) -> Result:
    x = call[0]
    window = Window(call, x, call.integer_list("kernel_shape"))
    if max(window.dilation) > 1:
        raise Refused("AveragePool with dilations is not supported")
    target, count_padding = _AVERAGE[window.rank], bool(call.integer("count_include_pad"))
    ceil = bool(call.integer("ceil_mode"))
    if _fits_torch(window):
        return call.call(target, x, window.kernel, window.stride, window.begin, ceil, count_padding)
    zero = [0] * window.rank
    ones = call.call(aten.ones_like.default, x)
    counted = window.pad(call, ones, 1.0) if count_padding else ones
    if ceil and count_padding:
        raise Refused("AveragePool with ceil_mode, count_include_pad and unequal padding is not supported")
    if ceil:
        _add_ceil_padding(call, x, window)
    counted = counted if count_padding else window.pad(call, ones, 0.0)
    sums = call.call(target, window.pad(call, x, 0.0), window.kernel, window.stride, zero)
    counts = call.call(target, counted, window.kernel, window.stride, zero)
    return call.call(aten.div.Tensor, sums, counts)


@operator("LpPool")
def lp_pool(call: Call) -> Result:
    x, power = call[0], call.integer("p", 2)
    window = Window(call, x, call.integer_list("kernel_shape"))
    if max(window.dilation) > 1 or call.integer("ceil_mode"):
        raise Refused("LpPool with dilations or ceil_mode is not supported")
    powers = call.call(aten.pow.Tensor_Scalar, call.call(aten.abs.default, x), power)
    means = call.call(_AVERAGE[window.rank], window.pad(call, powers, 0.0), window.kernel, window.stride)
    sums = call.call(aten.mul.Tensor, means, math.prod(window.kernel))
    return call.call(aten.pow.Tensor_Scalar, sums, 1.0 / power)


def _spatial(call: Call, x: Value) -> list[int]:
    return list(range(2, call.build.rank(x)))


@operator("GlobalAveragePool")
def global_average_pool(call: Call) -> Result:
    if call.build.rank(call[0]) == 4:
        return call.call(aten.adaptive_avg_pool2d.default, call[0], [1, 1])
    return call.call(aten.mean.dim, call[0], _spatial(call, call[0]), True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call) -> Result:
    return call.call(aten.amax.default, call[0], _spatial(call, call[0]), True)


@operator("GlobalLpPool")
def global_lp_pool(call: Call) -> Result:
    result: Any = call.call(aten.linalg_vector_norm.default, call[0], call.integer("p", 2), _spatial(call, call[0]), True)
    return result

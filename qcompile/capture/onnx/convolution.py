"""Convolutions, with ONNX's automatic and asymmetric padding."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.operators import Call, Result, operator
from qcompile.errors import Refused

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


class Window:
    """Sizes of a sliding window over the spatial axes of x: kernel, stride, dilation and both paddings, one number for each axis."""

    def __init__(self, call: Call, x: Value, kernel: list[int]) -> None:
        self.rank = len(kernel)
        if call.build.rank(x) != self.rank + 2 or not 1 <= self.rank <= 3:
            raise Refused(f"a window of {self.rank} axes does not fit an input of {call.build.rank(x)} axes")
        self.kernel = kernel
        self.stride = call.integer_list("strides") or [1] * self.rank
        self.dilation = call.integer_list("dilations") or [1] * self.rank
        if min([1, *self.stride, *self.dilation, *self.kernel]) < 1:
            raise Refused("kernel, strides and dilations must be at least 1")
        self.begin, self.end = self._padding(call, x)

    def _padding(self, call: Call, x: Value) -> tuple[list[int], list[int]]:
        automatic = call.string("auto_pad", "NOTSET")
        if automatic in ("NOTSET", ""):
            pads = call.integer_list("pads") or [0] * (2 * self.rank)
            if len(pads) != 2 * self.rank:
                raise Refused(f"pads has {len(pads)} numbers for {self.rank} axes")
            return pads[: self.rank], pads[self.rank :]
        if automatic == "VALID":
            return [0] * self.rank, [0] * self.rank
        if automatic not in ("SAME_UPPER", "SAME_LOWER"):
            raise Refused(f"auto_pad {automatic} is not known")
        totals = [self._same_padding(call, x, axis) for axis in range(self.rank)]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        return (small, large) if automatic == "SAME_UPPER" else (large, small)

    def _same_padding(self, call: Call, x: Value, axis: int) -> int:
        """Return how much padding gives ceil(size / stride) outputs; with stride 1 that needs no size."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        if self.stride[axis] == 1:
            return reach - 1
        size = call.build.static_shape(x, [axis + 2])[0]
        outputs = -(-size // self.stride[axis])
        return max(0, (outputs - 1) * self.stride[axis] + reach - size)

    @property
    def symmetric(self) -> bool:
        return self.begin == self.end and min(self.begin, default=0) >= 0

    def pad(self, call: Call, x: Value, value: float) -> Any:
        """Return x padded with a value, last axis first as torch writes it."""
        amounts = [n for axis in reversed(range(self.rank)) for n in (self.begin[axis], self.end[axis])]
        return call.call(aten.constant_pad_nd.default, x, amounts, value) if any(amounts) else x


def _kernel(call: Call, weight: Value) -> list[int]:
    kernel = call.build.static_shape(weight)[2:]
    if call.has("kernel_shape") and call.integer_list("kernel_shape") != kernel:
        raise Refused(f"kernel_shape {call.integer_list('kernel_shape')} differs from the weight's {kernel}")
    return kernel


@operator("Conv")
def convolution(call: Call) -> Result:
    x, weight = call[0], call[1]
    window = Window(call, x, _kernel(call, weight))
    padding = window.begin
    if not window.symmetric:
        x, padding = window.pad(call, x, 0.0), [0] * window.rank
    target = _CONVOLUTIONS[window.rank]
    return call.call(target, x, weight, call.get(2), window.stride, padding, window.dilation, call.integer("group", 1))


@operator("ConvTranspose")
def transposed_convolution(call: Call) -> Result:
    """Transposed convolution; paddings that torch cannot express are cut off the full result."""
    x, weight = call[0], call[1]
    kernel = _kernel(call, weight)
    rank = len(kernel)
    stride, dilation = call.integer_list("strides") or [1] * rank, call.integer_list("dilations") or [1] * rank
    extra = call.integer_list("output_padding") or [0] * rank
    full = [dilation[i] * (kernel[i] - 1) + 1 + extra[i] for i in range(rank)]
    begin, end = _transposed_padding(call, x, full, stride)
    target, groups, bias = _TRANSPOSED[rank], call.integer("group", 1), call.get(2)
    if begin == end and min(begin) >= 0 and all(extra[i] < max(stride[i], dilation[i]) for i in range(rank)):
        return call.call(target, x, weight, bias, stride, begin, extra, groups, dilation)
    result = call.call(target, x, weight, bias, stride, [0] * rank, [0] * rank, groups, dilation)
    # The output padding lengthens the end: what is cut there is the end padding less the output padding.
    cut = [n for axis in reversed(range(rank)) for n in (-begin[axis], extra[axis] - end[axis])]
    if bias is not None and max(cut) > 0:
        raise Refused("these paddings of a transposed convolution with a bias are not supported")
    return call.call(aten.constant_pad_nd.default, result, cut) if any(cut) else result


def _transposed_padding(call: Call, x: Value, full: list[int], stride: list[int]) -> tuple[list[int], list[int]]:
    rank = len(full)
    automatic, wanted = call.string("auto_pad", "NOTSET"), call.integer_list("output_shape")
    if not wanted and automatic in ("NOTSET", "VALID", ""):
        pads = call.integer_list("pads") or [0] * (2 * rank)
        return (pads[:rank], pads[rank:]) if automatic != "VALID" else ([0] * rank, [0] * rank)
    sizes = call.build.static_shape(x, range(2, rank + 2))
    wanted = wanted[-rank:] or [size * step for size, step in zip(sizes, stride, strict=True)]
    totals = [step * (size - 1) + reach - out for size, step, reach, out in zip(sizes, stride, full, wanted, strict=True)]
    half = [max(0, total) // 2 for total in totals]
    rest = [max(0, total) - small for total, small in zip(totals, half, strict=True)]
    begin, end = (half, rest) if automatic == "SAME_UPPER" else (rest, half)
    return begin, [min(0, total) + pad for total, pad in zip(totals, end, strict=True)]

"""Convolutions and pooling with the CPU's kernels, which read images channels last."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.cpu.kernels import pooling
from qcompile.backends.cpu.kernels.convolution import convolution, pack_convolution
from qcompile.backends.cpu.kernels.convolution_spec import Convolution
from qcompile.backends.cpu.kernels.depthwise import depthwise, pack_depthwise
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.quantization import code_dtype
from qcompile.backends.cpu.legalize_arguments import (
    Arguments,
    Grid,
    Weight,
    constant_array,
    following,
    has_easy_scale,
    is_plain_tensor,
    product_inputs,
    quantized_epilogue,
)  # fmt: skip
from qcompile.backends.cpu.legalize_sums import SumOfCodes, sum_after
from qcompile.backends.cpu.tiling import cut, note
from qcompile.backends.lowering.shapes import dtype_name
from qcompile.backends.lowering.translate import Legalizer, Walk
from torch import fx

from qcompile.formats import Channel, Integer, Tensor, dequantize, parse_scheme

# ---- convolution ----------------------------------------------------------------------------------------------------------


def _conv2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.conv2d: integer or float input, packed weight, the whole epilogue in the kernel."""
    epilogue = quantized_epilogue(walk, a)
    scheme = parse_scheme(a.weight_scheme)
    if isinstance(epilogue, str):
        return epilogue
    if epilogue.output == "bfloat16":
        return "no kernel of a convolution rounds to bfloat16"
    if not isinstance(scheme.format, Integer) or scheme.granularity not in (Tensor(), Channel(0)):
        return f"no kernel reads weights as '{scheme}'"
    if len(a.padding) == 4:
        return "no kernel pads one side more than the other"
    packed, scale, zero_point = (constant_array(walk, t) for t in (a.weight, a.weight_scale, a.weight_zero_point))
    codes = scheme.format.unpack(torch.from_numpy(packed), a.kernel_width)
    if not a.x_scheme:
        walk.report(f"'{scheme}' with a float input runs with its weight dequantized to float32")
        weight = dequantize(codes, walk.constant(a.weight_scale), walk.constant(a.weight_zero_point), scheme)
        spec = _spec(walk, a.x, weight, a, "float32", False, False, epilogue)
        return spec if isinstance(spec, str) else _call(walk, node, spec, a, (weight.numpy(), None, None))
    x = parse_scheme(a.x_scheme)
    if not is_plain_tensor(x):
        return f"no kernel reads an input as '{x}'"
    spec = _spec(walk, a.x, codes, a, code_dtype(x), a.x_zero_point is not None, zero_point is not None, epilogue)
    if isinstance(spec, str):
        return spec
    if epilogue.codes and (following_sum := sum_after(walk, node, Grid(a.out_scale, a.out_zero_point, parse_scheme(a.out_scheme)))):
        return _call_with_sum(walk, node, spec, a, (codes.numpy(), scale, zero_point), *following_sum)
    return _call(walk, node, spec, a, (codes.numpy(), scale, zero_point))


def _float_conv2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.conv2d and aten.convolution: also swallow an activation and the addition of a residual that directly follow."""
    weight, rank = walk.constant(a.weight), walk.fake(node).ndim
    if getattr(a, "transposed", False) or rank != 4 or weight is None or weight.dtype != torch.float32 or isinstance(a.padding, str):
        return "no kernel for this convolution: it is 2-d with a constant float32 weight"
    if a.bias is not None and walk.constant(a.bias) is None:
        return "the bias of a convolution is not a constant"
    swallowed, activation, residual = following(walk, node)
    epilogue = Epilogue("none" if a.bias is None else "float32", activation, residual is not None)
    arguments = SimpleNamespace(**{**vars(a), "x": a.input, "residual": residual})
    spec = _spec(walk, a.input, weight, a, "float32", False, False, epilogue)
    if isinstance(spec, str):
        return spec
    _call(walk, node, spec, arguments, (weight.numpy(), None, None), swallowed)
    return None


def _spec(
    walk: Walk, x: fx.Node, weight: torch.Tensor, a: Arguments, dtype: str, x_affine: bool, weight_affine: bool, epilogue: Epilogue
) -> Convolution | str:
    _, channels, height, width = walk.shape(x)
    if not all(isinstance(size, int) for size in (channels, height, width)):
        return "no kernel for images whose size is known only at the call"
    stride, padding, dilation = ((p[0], p[-1]) for p in (a.stride, a.padding, a.dilation))
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    place = (channels, weight.shape[0], height, width, kernel, stride, padding, dilation, a.groups)
    try:
        return Convolution(*place, dtype, x_affine, weight_affine, epilogue)
    except ValueError as reason:
        return str(reason)


def _call(walk: Walk, node: fx.Node, spec: Convolution, a: Arguments, weight: Weight, swallowed: Any = ()) -> None:
    """Emit the kernel of ``spec`` and bind the node and those after it that the kernel computes too."""
    easy = spec.epilogue.codes and has_easy_scale(walk, a.out_scale)
    (y,) = _emit(walk, node, spec, a, weight, [], easy=easy)
    for later in (node, *swallowed):
        walk.bind(later, y, channels_last=True)


def _call_with_sum(
    walk: Walk, node: fx.Node, spec: Convolution, a: Arguments, weight: Weight, found: SumOfCodes, addend: fx.Node, its_grid: Grid
) -> None:
    """Emit the kernel of ``spec`` that adds other codes to its own, and bind the nodes of the sum."""
    spec = replace(spec, sum=found.added_to(its_grid))
    sum_inputs = [walk.channels_last(addend), *its_grid.arguments(walk), *(found.grid.arguments(walk) if found.grid is not None else [])]
    scales = [a.out_scale, *([found.grid.scale] if found.grid is not None else [])]
    easy = all(has_easy_scale(walk, scale) for scale in scales)
    found.bind(walk, _emit(walk, node, spec, a, weight, sum_inputs, easy=easy), channels_last=True)


def _emit(walk: Walk, node: fx.Node, spec: Convolution, a: Arguments, weight: Weight, sum_inputs: list[Any], *, easy: bool) -> list[Any]:
    """Emit the kernel of ``spec``, cut as its layer is; return its results."""
    is_depthwise = spec.groups == spec.channels == spec.out_channels
    spec = spec if is_depthwise else cut(walk, node, spec)
    pack, name = (pack_depthwise, "depthwise") if is_depthwise else (pack_convolution, "convolution")
    operands = walk.channels_last(a.x), walk.channels_last(a.residual) if a.residual is not None else None
    bias = constant_array(walk, a.bias)
    inputs = product_inputs(walk, spec, a, operands, lambda: pack(spec, *weight, bias)) + sum_inputs
    label = f"{name}_{spec.x[0]}_{spec.kernel[0]}x{spec.kernel[1]}_{spec.channels}_{spec.out_channels}" + "_add" * (spec.sum is not None)
    kernel = walk.kernel((spec, easy), lambda: depthwise(spec, easy=easy) if is_depthwise else convolution(spec, easy=easy), label)
    note(walk, node, kernel)
    shape = [walk.shape(node)[0], spec.out_height, spec.out_width, spec.out_channels]
    made = walk.call_kernel(kernel, inputs, *((shape, dtype) for dtype in spec.results))
    return made if len(spec.results) > 1 else [made]


# ---- pooling --------------------------------------------------------------------------------------------------------------


def _max_pool2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.max_pool2d of values or codes."""
    _, channels, height, width = walk.shape(a.self)
    fake = walk.fake(node)
    static = all(isinstance(size, int) for size in (channels, height, width))
    if not static or a.ceil_mode or fake.dtype not in (torch.float32, torch.int8, torch.uint8):
        return "no kernel for this pooling: it takes static sizes, rounded down, float32 or 8-bit codes"
    kernel, padding, dilation = ((p[0], p[-1]) for p in (a.kernel_size, a.padding, a.dilation))
    stride = (a.stride[0], a.stride[-1]) if a.stride else kernel
    dtype = dtype_name(fake.dtype)
    spec = (channels, height, width, kernel, stride, padding, dilation, dtype)
    pooled = walk.kernel(("max_pool", spec), lambda: pooling.max_pool(*spec), "max_pool")
    batch, _, rows, columns = walk.shape(node)
    walk.bind(node, walk.call_kernel(pooled, [walk.channels_last(a.self)], ([batch, rows, columns, channels], dtype)), channels_last=True)


def _mean(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.mean over a whole image that lies channels last; any other mean is left to the generic way."""
    image = walk.fake(a.self).ndim == 4 and sorted(d % 4 for d in (a.dim or ())) == [2, 3]
    return _mean_image(walk, node, a.self) if image else _GENERIC


def _adaptive_avg_pool2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    return _mean_image(walk, node, a.self) if list(a.output_size) == [1, 1] else _GENERIC


_GENERIC = ""  # no reason to report: the generic way is as good


def _mean_image(walk: Walk, node: fx.Node, source: fx.Node) -> Any:
    batch, channels, height, width = walk.shape(source)
    static = all(isinstance(size, int) for size in (channels, height, width))
    if not static or not walk.is_channels_last(source) or walk.fake(node).dtype != torch.float32:
        return _GENERIC
    kernel = walk.kernel(("mean_image", channels, height, width), lambda: pooling.mean_image(channels, height, width), "mean_image")
    mean = walk.call_kernel(kernel, [walk.channels_last(source)], ([batch, channels], "float32"))
    return walk.reshape(mean, walk.shape(node))


LEGALIZE_IMAGES: dict[str, Legalizer] = {
    "qc.conv2d": _conv2d,
    "aten.conv2d": _float_conv2d,
    "aten.convolution": _float_conv2d,
    "aten.max_pool2d": _max_pool2d,
    "aten.mean.dim": _mean,
    "aten.adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "aten._adaptive_avg_pool2d": _adaptive_avg_pool2d,
}

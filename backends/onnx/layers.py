"""Products, convolutions, pooling, normalization, attention, embedding."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.onnx.emit import Emitter, converts

# ---- products -------------------------------------------------------------------------------------------------------------


@converts("aten.linear")
def linear(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Two-dimensional products are Gemm, which takes the weight as it is; others multiply by its transpose."""
    x, bias = emitter.value(arguments.input), getattr(arguments, "bias", None)
    if emitter.fake(arguments.input).ndim == 2:
        operands = [x, emitter.value(arguments.weight)] + ([emitter.value(bias)] if bias is not None else [])
        return emitter.op("Gemm", *operands, transB=1)
    weight = emitter.tensor(arguments.weight)
    if weight is not None:
        turned = emitter.constant(weight.t(), name=str(arguments.weight.target))
    else:
        turned = emitter.op("Transpose", emitter.value(arguments.weight), perm=[1, 0])
    product = emitter.op("MatMul", x, turned)
    return product if bias is None else emitter.op("Add", product, emitter.value(bias))


@converts("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    a, b = list(vars(arguments).values())[:2]
    return emitter.op("MatMul", emitter.value(a), emitter.value(b))


@converts("aten.addmm", "aten.baddbmm")
def addmm(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    bias, a, b = list(vars(arguments).values())[:3]
    product = emitter.op("MatMul", emitter.value(a), emitter.value(b))
    if arguments.alpha != 1:
        product = emitter.op("Mul", product, emitter.constant(float(arguments.alpha)))
    bias = emitter.value(bias)
    return emitter.op("Add", product, bias if arguments.beta == 1 else emitter.op("Mul", bias, emitter.constant(float(arguments.beta))))


# ---- convolution and pooling ----------------------------------------------------------------------------------------------


def pair(values: Any, rank: int) -> list[int]:
    """Return a number or list as one number for each of ``rank`` axes; an empty list stands for ones."""
    found = [values] if isinstance(values, int) else list(values)
    return found * rank if len(found) == 1 else found or [1] * rank


@converts("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def convolution(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = emitter.fake(arguments.input).ndim - 2
    padding = pair(arguments.padding, rank)
    operands = [emitter.value(item) for item in (arguments.input, arguments.weight, arguments.bias) if item is not None]
    return emitter.op(
        "Conv",
        *operands,
        kernel_shape=list(emitter.fake(arguments.weight).shape[2:]),
        strides=pair(arguments.stride, rank),
        pads=padding * 2,
        dilations=pair(arguments.dilation, rank),
        group=arguments.groups,
    )


@converts("aten.convolution")
def general_convolution(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if arguments.transposed:
        return transposed_convolution(emitter, arguments)
    return convolution(emitter, arguments)


@converts("aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = emitter.fake(arguments.input).ndim - 2
    operands = [emitter.value(item) for item in (arguments.input, arguments.weight, arguments.bias) if item is not None]
    return emitter.op(
        "ConvTranspose",
        *operands,
        kernel_shape=list(emitter.fake(arguments.weight).shape[2:]),
        strides=pair(arguments.stride, rank),
        pads=pair(arguments.padding, rank) * 2,
        output_padding=pair(arguments.output_padding, rank),
        dilations=pair(arguments.dilation, rank),
        group=arguments.groups,
    )


@converts("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d")
def max_pool(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    rank = emitter.fake(arguments.self).ndim - 2
    kernel = pair(arguments.kernel_size, rank)
    return emitter.op(
        "MaxPool",
        emitter.value(arguments.self),
        kernel_shape=kernel,
        strides=pair(arguments.stride, rank) if arguments.stride else kernel,
        pads=pair(arguments.padding, rank) * 2,
        dilations=pair(arguments.dilation, rank),
        ceil_mode=int(arguments.ceil_mode),
    )


@converts("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
def average_pool(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if getattr(arguments, "divisor_override", None):
        raise emitter.refuse("a divisor of its own has no ONNX form")
    rank = emitter.fake(arguments.self).ndim - 2
    kernel = pair(arguments.kernel_size, rank)
    return emitter.op(
        "AveragePool",
        emitter.value(arguments.self),
        kernel_shape=kernel,
        strides=pair(arguments.stride, rank) if arguments.stride else kernel,
        pads=pair(arguments.padding, rank) * 2,
        ceil_mode=int(arguments.ceil_mode),
        count_include_pad=int(arguments.count_include_pad),
    )


@converts("aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d")
def adaptive_average_pool(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Global pooling, or windows of one size where the output divides the input."""
    shape = emitter.fake(arguments.self).shape
    wanted = pair(arguments.output_size, len(shape) - 2)
    if all(size == 1 for size in wanted):
        return emitter.op("GlobalAveragePool", emitter.value(arguments.self))
    sizes = shape[2:]
    if not all(isinstance(size, int) and size % out == 0 for size, out in zip(sizes, wanted, strict=True)):
        raise emitter.refuse("this adaptive pooling has windows of unequal size")
    kernel = [size // out for size, out in zip(sizes, wanted, strict=True)]
    return emitter.op("AveragePool", emitter.value(arguments.self), kernel_shape=kernel, strides=kernel)


@converts("aten.upsample_nearest2d", "aten.upsample_bilinear2d")
def upsample(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    nearest = emitter.current.target._opname == "upsample_nearest2d"
    aligned = bool(getattr(arguments, "align_corners", False))
    coordinates = "asymmetric" if nearest else "align_corners" if aligned else "half_pixel"
    attributes: dict[str, Any] = {"mode": "nearest" if nearest else "linear", "coordinate_transformation_mode": coordinates}
    attributes |= {"nearest_mode": "floor"} if nearest else {}
    x = emitter.value(arguments.input if hasattr(arguments, "input") else arguments.self)
    factors = getattr(arguments, "scale_factors", None)
    if factors:
        scales = emitter.constant([1.0, 1.0, *map(float, factors)])
        return emitter.op("Resize", x, "", scales, **attributes)
    sizes = emitter.sizes(list(arguments.output_size))
    return emitter.op("Resize", x, "", "", sizes, axes=[2, 3], **attributes)


# ---- normalization --------------------------------------------------------------------------------------------------------


@converts("aten.layer_norm")
def layer_norm(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    shape = list(arguments.normalized_shape)
    scale = emitter.value(arguments.weight) if arguments.weight is not None else emitter.constant(torch.ones(shape))
    operands = [emitter.value(arguments.input), scale]
    operands += [emitter.value(arguments.bias)] if arguments.bias is not None else []
    return emitter.op("LayerNormalization", *operands, axis=-len(shape), epsilon=float(arguments.eps))


@converts("aten.native_layer_norm")
def native_layer_norm(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return [layer_norm(emitter, arguments)]


@converts("aten.rms_norm")
def rms_norm(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    axes = emitter.constant(list(range(-len(arguments.normalized_shape), 0)), torch.int64)
    x = emitter.value(arguments.input)
    mean = emitter.op("ReduceMean", emitter.op("Mul", x, x), axes, keepdims=1)
    epsilon = torch.finfo(torch.float32).eps if arguments.eps is None else arguments.eps
    root = emitter.op("Sqrt", emitter.op("Add", mean, emitter.constant(float(epsilon))))
    normal = emitter.op("Div", x, root)
    return normal if arguments.weight is None else emitter.op("Mul", normal, emitter.value(arguments.weight))


@converts("aten.group_norm", "aten.native_group_norm")
def group_norm(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if not hasattr(arguments, "num_groups"):
        raise emitter.refuse("native_group_norm has no ONNX export", "capture it as group_norm")
    channels = int(emitter.fake(arguments.input).shape[1])
    scale = emitter.value(arguments.weight) if arguments.weight is not None else emitter.constant(torch.ones(channels))
    bias = emitter.value(arguments.bias) if arguments.bias is not None else emitter.constant(torch.zeros(channels))
    return emitter.op(
        "GroupNormalization", emitter.value(arguments.input), scale, bias, num_groups=arguments.num_groups, epsilon=float(arguments.eps)
    )


@converts("aten._native_batch_norm_legit_no_training", "aten.batch_norm")
def batch_norm(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    """Normalize by the running statistics; the operator with three results has only the first one that is used."""
    assert emitter.current is not None
    if getattr(arguments, "training", False):
        raise emitter.refuse("batch normalization in training mode has no export")
    channels = int(emitter.fake(arguments.input).shape[1])
    scale = emitter.value(arguments.weight) if arguments.weight is not None else emitter.constant(torch.ones(channels))
    bias = emitter.value(arguments.bias) if arguments.bias is not None else emitter.constant(torch.zeros(channels))
    statistics = [emitter.value(arguments.running_mean), emitter.value(arguments.running_var)]
    made = emitter.op("BatchNormalization", emitter.value(arguments.input), scale, bias, *statistics, epsilon=float(arguments.eps))
    return made if isinstance(emitter.current.meta["val"], torch.Tensor) else [made]


@converts("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    assert emitter.current is not None
    type = "LogSoftmax" if "log_" in emitter.current.target._opname else "Softmax"
    return emitter.op(type, emitter.value(arguments.self, emitter.fake(emitter.current).dtype), axis=arguments.dim)


# ---- attention and embedding ----------------------------------------------------------------------------------------------


@converts("aten.scaled_dot_product_attention")
def attention(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    if arguments.enable_gqa or arguments.dropout_p:
        raise emitter.refuse("this attention has no ONNX export", "use qc.attention")
    q, k, v = (emitter.value(item) for item in (arguments.query, arguments.key, arguments.value))
    rank, width = emitter.fake(arguments.query).ndim, emitter.fake(arguments.query).shape[-1]
    scale = float(arguments.scale) if arguments.scale is not None else 1 / math.sqrt(int(width))
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = emitter.op("Mul", emitter.op("MatMul", q, emitter.op("Transpose", k, perm=order)), emitter.constant(scale))
    if arguments.attn_mask is not None:
        mask = emitter.value(arguments.attn_mask)
        if emitter.fake(arguments.attn_mask).dtype == torch.bool:
            scores = emitter.op("Where", mask, scores, emitter.constant(-math.inf))
        else:
            scores = emitter.op("Add", scores, mask)
    if arguments.is_causal:
        seen = causal_mask(emitter, q, k, rank - 2, rank - 2, aligned_at_end=False)
        scores = emitter.op("Where", seen, scores, emitter.constant(-math.inf))
    return emitter.op("MatMul", safe_softmax(emitter, scores), v)


def safe_softmax(emitter: Emitter, scores: str) -> str:
    """Return the softmax over the last axis, zeros for a row that sees nothing."""
    weights = emitter.op("Softmax", scores, axis=-1)
    return str(emitter.op("Where", emitter.op("IsNaN", weights), emitter.constant(0.0), weights))


def causal_mask(emitter: Emitter, q: str, k: str, q_axis: int, k_axis: int, *, aligned_at_end: bool, window: int = 0) -> str:
    """Return bool [tokens, keys], True where key j <= query i, or j <= i + keys - tokens for queries aligned at the end.

    A window leaves of these keys the last so many.
    """
    tokens, keys = (
        emitter.op("Squeeze", emitter.op("Shape", value, start=axis, end=axis + 1)) for value, axis in ((q, q_axis), (k, k_axis))
    )
    zero, one = emitter.constant(0, torch.int64), emitter.constant(1, torch.int64)
    rows = emitter.op("Unsqueeze", emitter.op("Range", zero, tokens, one), emitter.constant([1], torch.int64))
    if aligned_at_end:
        rows = emitter.op("Add", rows, emitter.op("Sub", keys, tokens))
    places = emitter.op("Range", zero, keys, one)
    seen = emitter.op("LessOrEqual", places, rows)
    if window:
        seen = emitter.op("And", seen, emitter.op("Greater", places, emitter.op("Sub", rows, emitter.constant(window, torch.int64))))
    return str(seen)


@converts("aten.embedding")
def embedding(emitter: Emitter, arguments: SimpleNamespace) -> Any:
    return emitter.op("Gather", emitter.value(arguments.weight), emitter.value(arguments.indices), axis=0)

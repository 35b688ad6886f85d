"""Converters of products, convolutions, pooling, normalisation and attention."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from qcompile.backends.lowering.converters import NCHW, NHWC, SPATIAL, converts
from qcompile.backends.lowering.shapes import Size
from qcompile.backends.lowering.translate import Walk
from tvm import relax, te, tirx
from tvm.relax import op

from qcompile.errors import Refused

Arguments = SimpleNamespace


def _place(walk: Walk) -> dict[str, str]:
    return {"node": walk.node.name, "operator": str(walk.node.target)}


# ---- products -------------------------------------------------------------------------------------------------------------


@converts("aten.linear")
def _linear(walk: Walk, a: Arguments) -> Any:
    weight = walk.node.args[1]
    transposed = walk.packed(weight, "T", lambda t: t.t()) if walk.constant(weight) is not None else walk.emit(op.permute_dims(a.weight))
    product = op.matmul(a.input, transposed)
    return product if a.bias is None else op.add(walk.emit(product), a.bias)


@converts("aten.mm", "aten.bmm")
def _matrix_product(walk: Walk, a: Arguments) -> Any:
    return op.matmul(a.self, a.mat2)


@converts("aten.matmul", "aten.mv", "aten.dot")
def _matmul(walk: Walk, a: Arguments) -> Any:
    other = next(getattr(a, name) for name in ("other", "vec", "tensor") if hasattr(a, name))
    return op.matmul(a.self, other)


@converts("aten.addmm", "aten.baddbmm")
def _add_product(walk: Walk, a: Arguments) -> Any:
    left, right = (a.mat1, a.mat2) if hasattr(a, "mat1") else (a.batch1, a.batch2)
    product = walk.emit(op.matmul(left, right))
    if a.alpha != 1:
        product = walk.emit(op.multiply(product, relax.const(a.alpha, "float32")))
    added = a.self if a.beta == 1 else op.multiply(a.self, relax.const(a.beta, "float32"))
    return op.add(product, added)


@converts("aten.scaled_dot_product_attention")
def _attention(walk: Walk, a: Arguments) -> Any:
    if a.dropout_p:
        raise Refused("attention with dropout is a training operator", **_place(walk))
    query, key, value = a.query, a.key, a.value
    scale = a.scale if a.scale is not None else 1 / math.sqrt(int(query.ty.shape[-1]))
    rank = len(query.ty.shape)
    heads, key_heads = query.ty.shape[rank - 3], key.ty.shape[rank - 3]
    if a.enable_gqa and int(heads) != int(key_heads):
        key, value = (walk.emit(op.repeat(t, int(heads) // int(key_heads), rank - 3)) for t in (key, value))
    axes = [*range(rank - 2), rank - 1, rank - 2]
    scores = walk.emit(op.matmul(query, walk.emit(op.permute_dims(key, axes))))
    scores = walk.emit(op.multiply(scores, relax.const(scale, "float32")))
    mask = a.attn_mask
    if a.is_causal:
        mask = causal_mask(walk, query.ty.shape[rank - 2], key.ty.shape[rank - 2], from_end=False)
    if mask is not None and str(mask.ty.dtype) == "bool":
        scores = walk.emit(op.where(mask, scores, relax.const(-math.inf, "float32")))
    elif mask is not None:
        scores = walk.emit(op.add(scores, mask))
    return op.matmul(masked_softmax(walk, scores, mask), value)


def masked_softmax(walk: Walk, scores: Any, mask: Any) -> Any:
    """Return softmax over the last axis; a row that is -inf throughout gives zeros, as torch's attention does."""
    weights = walk.emit(op.nn.softmax(scores, -1))
    return weights if mask is None else walk.emit(op.where(op.isnan(weights), relax.const(0, "float32"), weights))


def causal_mask(walk: Walk, tokens: Size, keys: Size, from_end: bool) -> Any:
    """Emit bool [tokens, keys], True where query i sees key j: ``j <= i``, counted from the end if ``from_end``."""

    def mask(tokens: Size, keys: Size) -> Any:
        shift = keys - tokens if from_end else 0
        return te.compute((tokens, keys), lambda i, j: j <= i + shift, name="causal_mask")

    return walk.builder.emit_te(mask, tokens, keys)


# ---- convolution ----------------------------------------------------------------------------------------------------------


@converts("aten.convolution", "aten.conv2d", "aten.conv1d")
def _convolution(walk: Walk, a: Arguments) -> Any:
    if getattr(a, "transposed", False):
        raise Refused("a transposed convolution cannot be lowered", **_place(walk))
    rank = walk.fake(walk.node).ndim - 2
    stride, padding, dilation = (_spread(p, rank) for p in (a.stride, a.padding, a.dilation))
    if isinstance(padding, str):
        raise Refused("padding by name should have been decomposed", **_place(walk))
    if rank == 1:
        y = walk.emit(op.nn.conv1d(a.input, a.weight, stride, padding, dilation, a.groups))
    elif rank == 2:
        y = walk.emit(op.nn.conv2d(a.input, a.weight, stride, padding, dilation, a.groups))
    else:
        raise Refused(f"a convolution over {rank} axes cannot be lowered", **_place(walk))
    return y if a.bias is None else op.add(y, walk.reshape(a.bias, [a.bias.ty.shape[0], *[1] * rank]))


def _spread(value: Any, rank: int) -> Any:
    if isinstance(value, str):
        return value
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


# ---- pooling --------------------------------------------------------------------------------------------------------------


def _window(a: Arguments) -> tuple[list[int], list[int], list[int]]:
    kernel = _spread(a.kernel_size, 2)
    return kernel, _spread(a.stride, 2) if a.stride else kernel, _spread(a.padding, 2)


@converts("aten.max_pool2d", order=SPATIAL)
def _max_pool2d(walk: Walk, a: Arguments) -> Any:
    return _pool(walk, a, *_window(a), _spread(a.dilation, 2), largest=True)


@converts("aten.max_pool2d_with_indices", order=SPATIAL)
def _max_pool2d_with_indices(walk: Walk, a: Arguments) -> list[Any]:
    if any(user.args[1] == 1 and user.users for user in walk.node.users):
        raise Refused("the indices of max pooling cannot be lowered", **_place(walk))
    a.order = NCHW
    return [walk.emit(_pool(walk, a, *_window(a), _spread(a.dilation, 2), largest=True))]


@converts("aten.avg_pool2d", order=SPATIAL)
def _avg_pool2d(walk: Walk, a: Arguments) -> Any:
    return _pool(walk, a, *_window(a), [1, 1], largest=False)


def _pool(walk: Walk, a: Arguments, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], largest: bool) -> Any:
    """Emit a 2-D pooling whose output size is torch's own, ceil mode, divisor and padding count included."""
    fake = walk.fake(walk.node)
    height, width = walk.sizes.shape((fake[0] if isinstance(fake, tuple | list) else fake).shape[2:])
    counts_padding = getattr(a, "count_include_pad", False)
    divisor = getattr(a, "divisor_override", None)

    def compute(x: Any) -> Any:
        last = a.order == NHWC
        batch, channels = x.shape[0], x.shape[3 if last else 1]
        rows, columns = (x.shape[1], x.shape[2]) if last else (x.shape[2], x.shape[3])
        i, j = te.reduce_axis((0, kernel[0]), "i"), te.reduce_axis((0, kernel[1]), "j")

        def read(n: Any, c: Any, h: Any, w: Any, outside: Any) -> Any:
            r, s = h * stride[0] - padding[0] + i * dilation[0], w * stride[1] - padding[1] + j * dilation[1]
            inside = tirx.all(r >= 0, r < rows, s >= 0, s < columns)
            return tirx.if_then_else(inside, x[n, r, s, c] if last else x[n, c, r, s], outside)

        def reduced(n: Any, c: Any, h: Any, w: Any) -> Any:
            if largest:
                return te.max(read(n, c, h, w, tirx.min_value(x.dtype)), axis=[i, j])
            return te.sum(read(n, c, h, w, tirx.const(0, x.dtype)), axis=[i, j])

        def counted(h: Any, w: Any) -> Any:
            if divisor:
                return tirx.const(divisor, x.dtype)
            margin = padding if counts_padding else [0, 0]
            spans = []
            for place, size, d in ((h, rows, 0), (w, columns, 1)):
                start = place * stride[d] - padding[d]
                end = tirx.min(start + kernel[d], size + margin[d])
                spans.append(end - tirx.max(start, -margin[d]))
            return (spans[0] * spans[1]).astype(x.dtype)

        shape = (batch, height, width, channels) if last else (batch, channels, height, width)
        pooled = te.compute(shape, lambda *p: reduced(p[0], p[3] if last else p[1], p[1] if last else p[2], p[2] if last else p[3]), "pool")
        if largest:
            return pooled
        return te.compute(shape, lambda *p: pooled(*p) / counted(p[1] if last else p[2], p[2] if last else p[3]), "average")

    return walk.builder.emit_te(compute, a.self, primfunc_name_hint="max_pool2d" if largest else "avg_pool2d")


@converts("aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d", order=SPATIAL)
def _adaptive_avg_pool2d(walk: Walk, a: Arguments) -> Any:
    if list(a.output_size) == [1, 1]:
        return op.mean(a.self, [1, 2] if a.order == NHWC else [2, 3], True)
    return op.nn.adaptive_avg_pool2d(a.self, tuple(a.output_size), layout=a.order)


@converts("aten.adaptive_avg_pool1d")
def _adaptive_avg_pool1d(walk: Walk, a: Arguments) -> Any:
    return op.nn.adaptive_avg_pool1d(a.self, a.output_size[0], layout="NCW")


@converts("aten.upsample_nearest2d", order=SPATIAL)
def _upsample_nearest2d(walk: Walk, a: Arguments) -> Any:
    height, width = walk.sizes.shape(walk.fake(walk.node).shape[2:])
    return walk.builder.emit_te(
        lambda x: _nearest(x, height, width, a.order == NHWC), a.self, primfunc_name_hint="upsample_nearest2d"
    )  # fmt: skip


def _nearest(x: Any, height: Size, width: Size, last: bool) -> Any:
    rows, columns = (x.shape[1], x.shape[2]) if last else (x.shape[2], x.shape[3])
    if last:
        return te.compute((x.shape[0], height, width, x.shape[3]), lambda n, h, w, c: x[n, h * rows // height, w * columns // width, c])
    return te.compute((x.shape[0], x.shape[1], height, width), lambda n, c, h, w: x[n, c, h * rows // height, w * columns // width])


# ---- normalisation --------------------------------------------------------------------------------------------------------


def _normalize(walk: Walk, x: Any, axes: list[int], epsilon: float) -> tuple[Any, Any, Any]:
    """Emit (x - mean) / sqrt(variance + epsilon) over axes; return it, the mean and the reciprocal deviation."""
    mean = walk.emit(op.mean(x, axes, True))
    centered = walk.emit(op.subtract(x, mean))
    variance = walk.emit(op.mean(op.multiply(centered, centered), axes, True))
    reciprocal = walk.emit(op.rsqrt(op.add(variance, relax.const(epsilon, "float32"))))
    return walk.emit(op.multiply(centered, reciprocal)), mean, reciprocal


def _affine(walk: Walk, y: Any, weight: Any, bias: Any) -> Any:
    if weight is not None:
        y = walk.emit(op.multiply(y, weight))
    return y if bias is None else walk.emit(op.add(y, bias))


@converts("aten.layer_norm", "aten.native_layer_norm")
def _layer_norm(walk: Walk, a: Arguments) -> Any:
    axes = [-i - 1 for i in reversed(range(len(a.normalized_shape)))]
    y, mean, reciprocal = _normalize(walk, a.input, axes, a.eps)
    y = _affine(walk, y, a.weight, a.bias)
    return [y, mean, reciprocal] if "native" in str(walk.node.target) else y


@converts("aten.rms_norm", "aten._fused_rms_norm")
def _rms_norm(walk: Walk, a: Arguments) -> Any:
    axes = [-i - 1 for i in reversed(range(len(a.normalized_shape)))]
    epsilon = 1.1920928955078125e-07 if a.eps is None else a.eps
    square = walk.emit(op.mean(op.multiply(a.input, a.input), axes, True))
    reciprocal = walk.emit(op.rsqrt(op.add(square, relax.const(epsilon, "float32"))))
    y = _affine(walk, walk.emit(op.multiply(a.input, reciprocal)), a.weight, None)
    return [y, reciprocal] if "_fused" in str(walk.node.target) else y


@converts("aten.group_norm", "aten.native_group_norm")
def _group_norm(walk: Walk, a: Arguments) -> Any:
    shape = list(a.input.ty.shape)
    groups = a.num_groups if hasattr(a, "num_groups") else a.group
    grouped = walk.reshape(a.input, [shape[0], groups, tirx.floordiv(shape[1], groups), *shape[2:]])
    y, mean, reciprocal = _normalize(walk, grouped, list(range(2, len(shape) + 1)), a.eps)
    weight, bias = (None if t is None else walk.reshape(t, [shape[1], *[1] * (len(shape) - 2)]) for t in (a.weight, a.bias))
    y = _affine(walk, walk.reshape(y, shape), weight, bias)
    if "native" not in str(walk.node.target):
        return y
    return [y, *(walk.reshape(t, [shape[0], groups]) for t in (mean, reciprocal))]


@converts("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.native_batch_norm")
def _batch_norm(walk: Walk, a: Arguments) -> Any:
    if getattr(a, "training", False):
        raise Refused("batch norm in training mode cannot be lowered", **_place(walk), way_out="call eval()")
    rank = len(a.input.ty.shape)

    def spread(t: Any) -> Any:
        return None if t is None else walk.reshape(t, [t.ty.shape[0], *[1] * (rank - 2)])

    reciprocal = walk.emit(op.rsqrt(op.add(a.running_var, relax.const(a.eps, "float32"))))
    y = walk.emit(op.multiply(op.subtract(a.input, spread(a.running_mean)), spread(reciprocal)))
    y = _affine(walk, y, spread(a.weight), spread(a.bias))
    return y if str(walk.node.target.overloadpacket) == "aten.batch_norm" else [y]


@converts("aten.dropout", "aten.native_dropout")
def _dropout(walk: Walk, a: Arguments) -> Any:
    if a.train:
        raise Refused("dropout in training mode cannot be lowered", **_place(walk), way_out="call eval()")
    return a.input if "native" not in str(walk.node.target) else [a.input]

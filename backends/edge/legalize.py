"""From operators of the integer graph to the edge's kernels.

A legalizer packs the constants of a layer, chooses its function by what must be known when C is written (bits, signs, the processor's
instructions), and passes everything else as numbers. What no legalizer takes and holds integers alone (padding, slices, concatenation,
resizing) is left to the shared lowering and printed as C for its sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from qcompile.backends.edge.kernels import elementwise, floats, pooling
from qcompile.backends.edge.kernels.codes import LEAST_QUICK_SHIFT, Codes
from qcompile.backends.edge.kernels.convolution import Convolution, convolution
from qcompile.backends.edge.kernels.depthwise import LANES, Depthwise, depthwise
from qcompile.backends.edge.kernels.planes import Planes, columns_together, pack_channels, plane_sizes, planes
from qcompile.backends.edge.kernels.products import CHANNELS, Product, pack_rows, padded, product_shape
from qcompile.backends.edge.kernels.softmax import softmax
from qcompile.backends.lowering.shapes import dtype_name
from qcompile.backends.lowering.translate import Legalizer, Walk
from torch import fx

from qcompile.errors import Refused
from qcompile.formats import Channel, Integer, Tensor, Token, parse_scheme
from qcompile.formats.quantize import SMALLEST_SCALE
from qcompile.graph.dialect import code_limits

Arguments = SimpleNamespace

UPDATES = "qcompile.updates"  # attribute of a TIR function: the buffer argument that it writes in place
LARGEST_KERNEL = 9  # columns of a depthwise kernel that are written out


@dataclass(frozen=True)
class Layer:
    """What one call of a kernel does, for the report.

    Attributes:
        name: of the node.
        op: such as ``qc.conv2d``.
        scheme: of the weight, empty where there is none.
        macs: multiplications and additions.
    """

    name: str
    op: str
    scheme: str = ""
    macs: int = 0


@dataclass
class Lowering:
    """What legalizers know of the processor, and what they note (``Walk.tiling``).

    Attributes:
        features: of the processor (``processors.Processor``).
        layers: of each call of an edge kernel, in order.
    """

    features: frozenset[str] = frozenset()
    layers: list[Layer] = field(default_factory=list)


def _call(walk: Walk, key: Any, build: Any, inputs: list[Any], numbers: list[int], results: list[Any], layer: Layer) -> Any:
    """Emit a call of a kernel: arrays, then numbers, then results (shape, dtype); return the first, others are scratch."""
    return _call_all(walk, key, build, inputs, numbers, results, layer)[0]


def _call_all(walk: Walk, key: Any, build: Any, inputs: list[Any], numbers: list[int], results: list[Any], layer: Layer) -> list[Any]:
    """Emit a call of a kernel and return all its results."""
    name = getattr(key, "name", None) or "_".join(str(part) for part in key)
    walk.tiling.layers.append(layer)
    made = walk.call_kernel(walk.kernel(key, build, name), inputs, *results, numbers=numbers)
    return [made] if len(results) == 1 else made


def _dtype(walk: Walk, node: fx.Node) -> str:
    return dtype_name(walk.fake(node).dtype)


def _signed(scheme: str) -> bool:
    return int(parse_scheme(scheme).format.lowest) < 0


def _number(walk: Walk, node: fx.Node | None) -> int:
    return 0 if node is None else int(walk.required_constant(node))


def _limits(walk: Walk, a: Arguments) -> list[int]:
    """Return the zero point of the result, and its lowest and highest code after the activation."""
    zero = _number(walk, a.out_zero_point)
    scale = None if a.out_scale is None else walk.required_constant(a.out_scale)
    return [zero, *code_limits(a.activation, scale, zero, a.out_scheme)]


# ---- products -------------------------------------------------------------------------------------------------------------


def _weight(walk: Walk, a: Arguments, size: int) -> Any:
    """Return codes int8 of a weight, or why no kernel reads them."""
    scheme = parse_scheme(a.weight_scheme)
    if not isinstance(scheme.format, Integer) and str(scheme.format) != "ternary":
        return f"no kernel reads weights as '{scheme}'"
    if scheme.granularity not in (Tensor(), Channel(0)) or a.weight_zero_point is not None:
        return f"no kernel reads weights as '{scheme}': they are symmetric, by tensor or channel"
    return scheme.format.unpack(walk.required_constant(a.weight), size).to(torch.int8).numpy()


def _stored_bits(scheme: str) -> int:
    """Return the bits a kernel stores a code in: the next of 2, 4 and 8."""
    bits = max(2, -(-parse_scheme(scheme).bits // 1))
    return next(stored for stored in (2, 4, 8) if bits <= stored)


def _parameters(walk: Walk, a: Arguments, packed: Any, sums: Any, together: int) -> tuple[Codes, list[Any], list[int]]:
    """Return what is written, the constants of flash, and the numbers of the result.

    The constants are packed codes, bias, multiplier and shift, padded to a multiple of ``together`` channels; the input's zero point goes
    into the bias.
    """
    channels = len(sums)
    bias = np.zeros(channels, np.int64) if a.bias is None else walk.required_constant(a.bias).numpy().astype(np.int64)
    bias = bias - _number(walk, a.x_zero_point) * sums
    if np.abs(bias).max(initial=0) >= 2**31:
        raise Refused("the bias leaves int32", node=walk.node.name, operator=str(walk.node.target))
    multiplier, shift = (np.broadcast_to(walk.required_constant(t).numpy(), (channels,)) for t in (a.multiplier, a.shift))
    zero, low, high = _limits(walk, a)
    codes = Codes(_signed(a.out_scheme), (low, high) == _range(a.out_scheme) and bool((shift >= LEAST_QUICK_SHIFT).all()))
    numbers, shift = ([2 * zero + 1], shift - LEAST_QUICK_SHIFT) if codes.quick else ([zero, low, high], shift)
    by_channel = [("bias", bias.astype(np.int32)), ("multiplier", multiplier), ("shift", shift.astype(np.int8))]
    rest = -channels % together
    arrays = [("weight", packed), *((what, np.pad(array, (0, rest), "edge")) for what, array in by_channel)]
    made = [(what, torch.from_numpy(np.array(array, order="C"))) for what, array in arrays]
    return codes, [walk.parameter(f"{walk.node.name}_{what}", lambda t=tensor: t) for what, tensor in made], numbers  # type: ignore[misc]


def _range(scheme: str) -> tuple[int, int]:
    format = parse_scheme(scheme).format
    return int(format.lowest), int(format.highest)


def _product(walk: Walk, bits: int, signed: bool, rows: int) -> Product:
    return Product(bits, signed, product_shape(walk.tiling.features, signed), min(rows, 2))


def _conv2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.conv2d with a multiplier: dense, or depthwise with one output channel for each input channel."""
    if a.multiplier is None:
        return "its result is not in fixed point"
    batch, channels, height, width = walk.shape(a.x)
    codes = _weight(walk, a, a.kernel_width)
    if isinstance(codes, str):
        return codes
    if batch != 1:
        return "images come one at a time"
    out_channels, _, kernel_height, kernel_width = codes.shape
    _, _, out_height, out_width = walk.shape(node)
    window = [kernel_height, kernel_width, *a.stride, *a.padding[:2], *a.dilation]  # above and left; sizes tell below and right
    sizes = [height, width, channels, out_height, out_width, out_channels, *window]
    x, signed = walk.channels_last(a.x), _signed(a.x_scheme)
    macs = codes.size * out_height * out_width
    layer = Layer(node.name, "qc.conv2d", a.weight_scheme, macs)
    sums = codes.reshape(out_channels, -1).astype(np.int64).sum(1)
    if a.groups == channels == out_channels and a.groups > 1:
        y = _emit_depthwise(walk, a, codes[:, 0], sums, x, sizes, layer)
    elif a.groups != 1:
        return "no kernel for groups of channels"
    else:
        pixels = out_height * out_width
        product = _product(walk, _stored_bits(a.weight_scheme), signed, pixels)
        single = kernel_height == kernel_width == 1 and list(a.stride) == [1, 1] and not any(a.padding)
        direct = single and channels % product.step == 0
        y = _emit_product(walk, a, product, direct, codes.transpose(0, 2, 3, 1), sums, x, sizes, layer)
        y = walk.reshape(y, [1, out_height, out_width, out_channels])
    walk.bind(node, y, channels_last=True)
    return None


def _linear(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.linear with a multiplier: a convolution whose pixels are rows."""
    if a.multiplier is None:
        return _linear_to_float(walk, node, a)
    codes = _weight(walk, a, a.in_features)
    if isinstance(codes, str):
        return codes
    rows = int(np.prod(walk.shape(node)[:-1], dtype=np.int64))
    out_features, in_features = codes.shape
    product = _product(walk, _stored_bits(a.weight_scheme), _signed(a.x_scheme), rows)
    x = walk.reshape(walk.plain(a.x), [rows, in_features])
    sizes = [rows, 1, in_features, rows, 1, out_features, 1, 1, 1, 1, 0, 0, 1, 1]
    layer = Layer(node.name, "qc.linear", a.weight_scheme, codes.size * rows)
    y = _emit_product(walk, a, product, in_features % product.step == 0, codes, codes.astype(np.int64).sum(1), x, sizes, layer)
    return walk.reshape(y, walk.shape(node))


def _emit_depthwise(walk: Walk, a: Arguments, codes: Any, sums: Any, x: Any, sizes: list[int], layer: Layer) -> Any:
    """Emit a depthwise convolution with weights [channels, kernel height, kernel width] and the numbers ``convolution.SIZES``."""
    height, width, channels, out_height, out_width, _, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, *dilation = sizes
    signed, x_zero, bits = _signed(a.x_scheme), _number(walk, a.x_zero_point), _stored_bits(a.weight_scheme)
    result = [1, out_height, out_width, channels]
    vectors = product_shape(walk.tiling.features, signed) == "vectors" and "mve" not in walk.tiling.features and channels % LANES == 0
    if vectors or dilation != [1, 1] or kernel_width > LARGEST_KERNEL:
        written, constants, limits = _parameters(walk, a, codes.transpose(1, 2, 0), sums, 1)
        spec = Depthwise(signed, written, vectors)
        scratch = [([LANES], spec.input_dtype)] if vectors else []
        return _call(
            walk, spec, lambda: depthwise(spec), [x, *constants], [*sizes, x_zero, *limits], [(result, written.dtype), *scratch], layer
        )
    written, constants, limits = _parameters(walk, a, pack_channels(codes.reshape(channels, -1), bits), sums, 1)
    pairs = "dsp" in walk.tiling.features
    made = Planes(bits, signed, pairs, kernel_height, kernel_width, stride_x, columns_together(out_width), written)
    pitch, band, elements = plane_sizes(made, out_height, out_width, width, channels, stride_y, pad_x)
    numbers = [height, width, channels, out_height, out_width, stride_y, pad_y, pad_x, x_zero, pitch, band, *limits]
    results = [(result, written.dtype), ([elements], made.plane_dtype)]
    return _call(walk, made, lambda: planes(made), [x, *constants], numbers, results, layer)


def _emit_product(
    walk: Walk, a: Arguments, product: Product, direct: bool, codes: Any, sums: Any, x: Any, sizes: list[int], layer: Layer
) -> Any:
    """Emit a convolution with weights [out channels, ..], their sums by channel, and the numbers ``convolution.SIZES``."""
    weight = codes.reshape(len(codes), -1)
    pixels, length = sizes[3] * sizes[4], padded(weight.shape[1], product)
    written, constants, limits = _parameters(walk, a, pack_rows(weight, product), sums, CHANNELS)
    spec = Convolution(product, direct, written)
    kernel_width, dilation_x = sizes[7], sizes[13]
    run = kernel_width if dilation_x == 1 else 1
    numbers = [pixels, weight.shape[1], len(codes)] if direct else [*sizes, run, kernel_width // run, length, _number(walk, a.x_zero_point)]
    results = [([pixels, len(codes)], written.dtype), *spec.scratch(length)]
    return _call(walk, spec, lambda: convolution(spec), [x, *constants], [*numbers, *limits], results, layer)


# ---- single codes ---------------------------------------------------------------------------------------------------------


def _together(walk: Walk, *nodes: fx.Node) -> tuple[list[Any], bool]:
    """Return values in one order of memory, NHWC where all exist so, and whether it is that."""
    last = all(walk.is_channels_last(node) for node in nodes)
    return [walk.channels_last(node) if last else walk.plain(node) for node in nodes], last


def _flat(walk: Walk, value: Any) -> Any:
    return walk.reshape(value, [_count(value)])


def _count(value: Any) -> int:
    return int(np.prod([int(size) for size in value.ty.shape], dtype=np.int64))


def _add(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.add with multipliers, of two values of one shape."""
    if not a.multipliers:
        return "its result is not in fixed point"
    if list(walk.shape(a.a)) != list(walk.shape(a.b)):
        return "no kernel adds values of different shapes"
    (one, two), last = _together(walk, a.a, a.b)
    shape, count = list(one.ty.shape), _count(one)
    dtypes = (_dtype(walk, a.a), _dtype(walk, a.b), _dtype(walk, node))
    factors, zeros = a.multipliers, (_number(walk, a.a_zero_point), _number(walk, a.b_zero_point))
    rest = (1 << (a.shift - 1)) - sum(zero * factor for zero, factor in zip(zeros, factors, strict=True))
    zero, low, high = _limits(walk, a)
    whole = rest + (zero << a.shift)
    largest = sum(255 * factor for factor in factors) + abs(whole)  # of any partial sum: codes lie between -128 and 255
    quick = (low, high) == _range(a.out_scheme) and largest < 2**31
    numbers = [count, *factors, *([whole, a.shift] if quick else [rest, a.shift, zero, low, high])]
    key = ("add", *dtypes, *(["quick"] if quick else []))
    inputs = [_flat(walk, one), _flat(walk, two)]
    y = _call(walk, key, lambda: elementwise.add(*dtypes, quick), inputs, numbers, [([count], dtypes[2])], Layer(node.name, "qc.add"))
    walk.bind(node, walk.reshape(y, shape), channels_last=last)
    return None


def _lookup(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.lookup."""
    (x,), last = _together(walk, a.codes)
    dtypes, count = (_dtype(walk, a.codes), _dtype(walk, node)), _count(x)
    table = walk.parameter(f"{node.name}_table", lambda: walk.required_constant(a.table))
    y = _call(walk, ("lookup", *dtypes), lambda: elementwise.lookup(*dtypes), [_flat(walk, x), table], [count],
              [([count], dtypes[1])], Layer(node.name, "qc.lookup"))  # fmt: skip
    walk.bind(node, walk.reshape(y, list(x.ty.shape)), channels_last=last)
    return None


def _softmax(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.softmax."""
    format, columns = parse_scheme(a.out_scheme).format, walk.shape(node)[-1]
    x, dtypes = _flat(walk, walk.plain(a.codes)), (_dtype(walk, a.codes), _dtype(walk, node))
    table = walk.parameter(f"{node.name}_table", lambda: walk.required_constant(a.table))
    count = _count(x)
    numbers = [count // columns, columns, int(format.lowest), int(format.highest)]
    y = _call(walk, ("softmax", *dtypes), lambda: softmax(*dtypes), [x, table], numbers, [([count], dtypes[1])],
              Layer(node.name, "qc.softmax"))  # fmt: skip
    return walk.reshape(y, walk.shape(node))


# ---- pooling --------------------------------------------------------------------------------------------------------------


def _mean(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.mean over an image."""
    shape = walk.shape(a.codes)
    if len(shape) != 4 or sorted(d % 4 for d in a.dims) != [2, 3] or shape[0] != 1:
        return "no kernel for this mean: it runs over the rows and columns of an image"
    _, channels, height, width = shape
    y = _mean_windows(walk, node, a, [height, width, channels, 1, 1, height, width, 1, 1, 0, 0])
    walk.bind(node, walk.reshape(y, walk.shape(node)))
    return None


def _avg_pool2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.avg_pool2d."""
    (batch, channels, height, width), (_, _, rows, columns) = walk.shape(a.codes), walk.shape(node)
    if batch != 1:
        return "images come one at a time"
    windows = [height, width, channels, rows, columns, *a.kernel_size, *a.stride, *a.padding]
    y = _mean_windows(walk, node, a, windows)
    walk.bind(node, walk.reshape(y, [1, rows, columns, channels]), channels_last=True)
    return None


def _mean_windows(walk: Walk, node: fx.Node, a: Arguments, windows: list[int]) -> Any:
    dtypes, format = (_dtype(walk, a.codes), _dtype(walk, node)), parse_scheme(a.out_scheme).format
    numbers = [*windows, a.x_zero_point, a.multiplier, a.shift, a.out_zero_point, int(format.lowest), int(format.highest)]
    x = _flat(walk, walk.channels_last(a.codes))
    count = windows[2] * windows[3] * windows[4]
    op = str(node.target._schema.name).replace("::", ".")
    return _call(
        walk, ("mean_pool", *dtypes), lambda: pooling.mean_pool(*dtypes), [x], numbers, [([count], dtypes[1])], Layer(node.name, op)
    )


def _max_pool2d(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.max_pool2d of codes."""
    batch, channels, height, width = walk.shape(a.self)
    dtype = _dtype(walk, node)
    if batch != 1 or dtype not in ("int8", "uint8"):
        return "no kernel for this maximum: it runs over codes of one image"
    _, _, rows, columns = walk.shape(node)
    pairs = [list(value) * (2 // len(value)) for value in (a.kernel_size, a.stride or a.kernel_size, a.padding, a.dilation)]
    numbers = [height, width, channels, rows, columns, *pairs[0], *pairs[1], *pairs[2], *pairs[3]]
    x = _flat(walk, walk.channels_last(a.self))
    y = _call(walk, ("max_pool", dtype), lambda: pooling.max_pool(dtype), [x], numbers, [([rows * columns * channels], dtype)],
              Layer(node.name, "aten.max_pool2d"))  # fmt: skip
    walk.bind(node, walk.reshape(y, [1, rows, columns, channels]), channels_last=True)
    return None


# ---- decoders: float32 between products of codes --------------------------------------------------------------------------


def _linear_to_float(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.linear of codes with a scale for each row, to float32."""
    x = parse_scheme(a.x_scheme) if a.x_scheme else None
    codes = _weight(walk, a, a.in_features)
    if isinstance(codes, str):
        return codes
    if x is None or not isinstance(x.granularity, Token) or not x.symmetric or x.bits != 8:
        return "a linear layer with a float result reads codes of 8 bits with a scale for each token"
    if a.out_scheme or a.activation not in floats.ACTIVATIONS or (a.bias is not None and _dtype(walk, a.bias) != "float32"):
        return "no kernel has this epilogue"
    rows = int(np.prod(walk.shape(node)[:-1], dtype=np.int64))
    out_features, in_features = codes.shape
    product = _product(walk, _stored_bits(a.weight_scheme), True, rows)
    length = padded(in_features, product)
    if length != in_features:
        return f"its rows of {in_features} codes do not fill steps of {product.step}"
    packed = torch.from_numpy(np.array(pack_rows(codes, product), order="C"))
    scale = walk.required_constant(a.weight_scale).expand(out_features).contiguous()
    inputs = [walk.reshape(walk.plain(a.x), [rows, in_features]), walk.reshape(walk.plain(a.x_scale), [rows]),
              walk.parameter(f"{node.name}_weight", lambda: packed), walk.parameter(f"{node.name}_scale", lambda: scale)]  # fmt: skip
    inputs += [walk.plain(t) for t in (a.bias, a.residual) if t is not None]
    epilogue = {"bias": a.bias is not None, "activation": a.activation, "residual": a.residual is not None}
    results = [([rows, out_features], "float32"), *([([length // 2 * product.pixels], "int32")] if product.pairs else [])]
    layer = Layer(node.name, "qc.linear", a.weight_scheme, codes.size * rows)
    words = [word if value is True else str(value) for word, value in epilogue.items() if value not in (False, "none")]
    key = ("linear_to_float", f"w{product.bits}", f"{product.pixels}x{CHANNELS}", *words)
    y = _call(walk, key, lambda: floats.linear_to_float(product, **epilogue), inputs, [rows, length, out_features], results, layer)
    return walk.reshape(y, walk.shape(node))


def _quantize_dynamic(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.quantize_dynamic to int8 codes with a symmetric scale for each token."""
    if a.scheme != "int8 token sym dynamic":
        return f"no kernel quantizes to '{a.scheme}'"
    width = walk.shape(a.x)[-1]
    rows = _count(walk.plain(a.x)) // width
    results = [([rows, width], "int8"), ([rows], "float32"), ([rows], "int32")]
    made = _call_all(walk, ("quantize_rows",), lambda: floats.quantize_rows(127, SMALLEST_SCALE), [_flat(walk, walk.plain(a.x))],
                     [rows, width], results, Layer(node.name, "qc.quantize_dynamic"))  # fmt: skip
    shapes = [walk.sizes.shape(fake.shape) for fake in walk.fake(node)]
    return [walk.reshape(result, shape) for result, shape in zip(made, shapes, strict=True)]


def _rms_norm(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.rms_norm over the last axis with a weight."""
    if len(a.normalized_shape) != 1 or a.weight is None or _dtype(walk, node) != "float32":
        return "no kernel for this RMS norm: it runs over one axis of float32 with a weight"
    width, x = a.normalized_shape[-1], _flat(walk, walk.plain(a.input))
    epsilon = torch.finfo(torch.float32).eps if a.eps is None else a.eps
    rows = _count(x) // width
    y = _call(walk, ("rms_norm", _text(epsilon)), lambda: floats.rms_norm(epsilon), [x, walk.plain(a.weight)], [rows, width],
              [([rows, width], "float32")], Layer(node.name, "aten.rms_norm"))  # fmt: skip
    return walk.reshape(y, walk.shape(node))


def _embedding(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.embedding: rows of a packed table of signed codes with a scale for each row."""
    scheme = parse_scheme(a.scheme)
    if scheme.bits not in (4, 8) or not _signed(a.scheme) or scheme.granularity != Channel(0) or a.zero_point is not None:
        return f"no kernel gathers from a table in '{scheme}'"
    table = walk.required_constant(a.weight).view(torch.int8)
    indices, count = walk.plain(a.indices), _count(walk.plain(a.indices))
    inputs = [_flat(walk, indices), walk.parameter(f"{node.name}_table", lambda: table), walk.plain(a.scale)]
    y = _call(walk, ("gather_rows", scheme.bits), lambda: floats.gather_rows(scheme.bits), inputs, [count, a.size, table.shape[-1]],
              [([count, a.size], "float32")], Layer(node.name, "qc.embedding", a.scheme))  # fmt: skip
    return walk.reshape(y, walk.shape(node))


def _cache_append(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.cache_append to an input that nobody else reads: in place, the caller's memory holds the result."""
    shape, new = walk.shape(a.cache), walk.shape(a.new)
    if a.cache.op != "placeholder" or len(a.cache.users) > 1 or shape[0] != 1:
        return "the cache is no input, or something else reads it as it was"
    width, dtype = int(np.prod(shape[2:], dtype=np.int64)), _dtype(walk, a.cache)
    kernel = walk.kernel(("append_rows", dtype), lambda: floats.append_rows(dtype).with_attr(UPDATES, 0), f"append_rows_{dtype}")
    walk.tiling.layers.append(Layer(node.name, "qc.cache_append"))
    flat = walk.reshape(walk.plain(a.cache), [shape[0] * shape[1] * width])
    updated = walk.update(kernel, flat, _flat(walk, walk.plain(a.new)), _flat(walk, walk.plain(a.past)), numbers=[shape[1], new[1], width])
    return walk.reshape(updated, shape)


def _attention(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.attention over caches of one text."""
    (batch, tokens, width), keys = walk.shape(a.q), walk.shape(a.k)[1]
    if batch != 1 or a.past is None or not a.causal or a.key_mask is not None:
        return "no kernel for this attention: it is causal, over the caches of one text"
    inputs = [_flat(walk, walk.plain(t)) for t in (a.q, a.k, a.v, a.past)]
    numbers = [tokens, a.heads, a.kv_heads, width // a.heads, keys]
    y = _call(walk, ("attention", _text(a.scale), a.window), lambda: floats.attention(a.scale, a.window), inputs, numbers,
              [([tokens, width], "float32"), ([keys], "float32")], Layer(node.name, "qc.attention"))  # fmt: skip
    return walk.reshape(y, walk.shape(node))


def _text(value: float) -> str:
    """Return a number as a part of a C name."""
    return re.sub(r"\W", "_", repr(value))


LEGALIZE: dict[str, Legalizer] = {
    "qc.conv2d": _conv2d,
    "qc.linear": _linear,
    "qc.add": _add,
    "qc.lookup": _lookup,
    "qc.softmax": _softmax,
    "qc.mean": _mean,
    "qc.avg_pool2d": _avg_pool2d,
    "aten.max_pool2d": _max_pool2d,
    "qc.quantize_dynamic": _quantize_dynamic,
    "qc.embedding": _embedding,
    "qc.cache_append": _cache_append,
    "qc.attention": _attention,
    "aten.rms_norm": _rms_norm,
}

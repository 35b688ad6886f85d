"""Linear layers, normalization, attention and quantizers with the CPU's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from qcompile.backends.cpu.joined_layers import joined
from qcompile.backends.cpu.kernels import attention, hadamard, matmul, normalization, pack, quantization, rotary, softmax, vectors
from qcompile.backends.cpu.kernels import cache as cache_kernel
from qcompile.backends.cpu.kernels.bfloat16 import stored_dtype
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import TERNARY_INPUTS, Linear, Part
from qcompile.backends.cpu.kernels.quantization import code_dtype
from qcompile.backends.cpu.kernels.stored_rows import Stored
from qcompile.backends.cpu.legalize_arguments import (
    Arguments,
    Weight,
    constant_array,
    first_quantize,
    flat,
    following,
    grid_of,
    has_easy_scale,
    is_plain_tensor,
    product,
    product_inputs,
    quantized_epilogue,
    rows_of,
    zero_or,
)  # fmt: skip
from qcompile.backends.cpu.tiling import cut, note
from qcompile.backends.lowering.translate import Legalizer, Walk
from torch import fx

from qcompile.formats import BFloat16, Channel, Group, Integer, Scheme, Tensor, Ternary, Token, parse_scheme
from qcompile.graph.text import bound_arguments

qc = torch.ops.qc

# From so many on, 1 MiB at two bits, a weight is read from memory by each call: then five codes in a byte take 0.81 to 0.89 of the time of
# one row. From a cache, and for many rows, taking them out costs 1.1 to 1.2 times as much.
_TERNARY_CODES = 4 << 20

# ---- linear ---------------------------------------------------------------------------------------------------------------


def linear(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.linear: integer or float input, packed weight of integers or bfloat16, the whole epilogue in the kernel."""
    epilogue = quantized_epilogue(walk, a)
    if isinstance(epilogue, str):
        return epilogue
    scheme = parse_scheme(a.weight_scheme)
    weight = _weight_codes(walk, a, scheme)
    if isinstance(weight, str):
        return weight
    spec = linear_spec(a, scheme, weight, epilogue)
    if isinstance(spec, str):
        return spec
    others = [Layer(other, Arguments(**bound_arguments(other)), ()) for other in joined(node) if other is not node]
    found = [_weight_codes(walk, other.arguments, scheme) for other in others]
    readable = [replace(other, weight=its) for other, its in zip(others, found, strict=True) if not isinstance(its, str)]
    return call_linear(walk, spec, [Layer(node, a, weight), *(readable if len(readable) == len(others) else [])])


@dataclass(frozen=True)
class Layer:
    """A linear layer, its arguments by the names of qc.linear, and what its kernel reads as its weight."""

    node: fx.Node
    arguments: Arguments
    weight: Any

    @property
    def part(self) -> Part:
        return Part(len(self.weight[0]), getattr(self.arguments, "activation", "none"))


def _weight_codes(walk: Walk, a: Arguments, scheme: Scheme) -> Weight | str:
    """Return codes [out, in], scale and zero point (or None) of a weight, or why no kernel reads them.

    8-bit codes are stored less their zero points: then they must fit in int8, as almost all do.
    """
    granularity = scheme.granularity
    if isinstance(scheme.format, BFloat16):
        return constant_array(walk, a.weight), None, None
    grouped = isinstance(granularity, Group) and granularity.axis in (-1, 1)
    if not isinstance(scheme.format, Integer) or not (grouped or granularity in (Tensor(), Channel(0))):
        return f"no kernel reads weights as '{scheme}'"
    packed, scale, zero_point = (constant_array(walk, t) for t in (a.weight, a.weight_scale, a.weight_zero_point))
    codes = scheme.format.unpack(torch.from_numpy(packed), a.in_features)
    if scheme.bits == 8 and zero_point is not None:
        zero_point = granularity.expand(torch.from_numpy(zero_point), tuple(codes.shape))
        codes, zero_point = codes.to(torch.int32) - zero_point, None
    if scheme.bits == 8 and (int(codes.max()) > 127 or int(codes.min()) < -128):
        return "8-bit weights less their zero points do not fit in int8"
    return (codes.to(torch.int8) if scheme.bits == 8 else codes).numpy(), scale, zero_point


def linear_spec(a: Arguments, scheme: Scheme, weight: Weight, epilogue: Epilogue, *, codebook: bool = False) -> Linear | str:
    """Return the kernel of a layer with such a weight, or why there is none; ``codebook``: its codes are places in a table."""
    x = parse_scheme(a.x_scheme) if a.x_scheme else None
    if x is not None and not (isinstance(x.format, Integer | BFloat16) and isinstance(x.granularity, Tensor | Token)):
        return f"no kernel reads an input as '{x}'"
    codes, _, zero_point = weight
    group = scheme.granularity.size if isinstance(scheme.granularity, Group) else 0
    signed = scheme.bits == 8 or scheme.format.lowest < 0
    per_token = x is not None and isinstance(x.granularity, Token)
    dtype, x_affine = code_dtype(x) if x is not None else "float32", x is not None and a.x_zero_point is not None
    try:
        affine = zero_point is not None
        place = (a.in_features, codes.shape[0], dtype, per_token, x_affine)
        if codebook:
            return Linear(*place, bits=4, group=group, weight_signed=False, epilogue=epilogue, codebook=True)
        ternary = isinstance(scheme.format, Ternary) and x is not None and not (group or affine)
        ternary = ternary and codes.size >= _TERNARY_CODES and a.in_features < TERNARY_INPUTS
        return Linear(*place, scheme.bits, group, signed, affine, epilogue, ternary=ternary)
    except ValueError as reason:
        return str(reason)


def call_linear(walk: Walk, spec: Linear, layers: list[Layer], table: Any = None) -> Any:
    """Emit the kernel of the first of ``layers``, whose spec is given, and return its value; or of all together, and bind them.

    ``table`` [16] holds the values of a codebook.
    """
    node, a = layers[0].node, layers[0].arguments
    if len(layers) > 1:
        parts = tuple(layer.part for layer in layers)
        spec = replace(spec, out_features=sum(part.columns for part in parts), parts=parts, tile=None)
        weights, biases = (tuple(getattr(layer.arguments, name) for layer in layers) for name in ("weight", "bias"))
        a = Arguments(**{**vars(a), "weight": weights, "bias": biases})
    spec = cut(walk, node, spec)
    x, rows, _ = rows_of(walk, a.x)
    residual = walk.reshape(walk.plain(a.residual), [rows, spec.out_features]) if a.residual is not None else None

    def constants() -> list[Any]:
        return pack.pack_layers(spec, [(*layer.weight, constant_array(walk, layer.arguments.bias), table) for layer in layers])

    inputs = product_inputs(walk, spec, a, (x, residual), constants)
    easy = spec.epilogue.codes and has_easy_scale(walk, a.out_scale)
    kernel = walk.kernel((spec, easy), lambda: matmul.linear(spec, easy=easy), _linear_name(spec))
    note(walk, node, kernel)
    made = walk.call_kernel(kernel, inputs, *(([rows, part.columns], spec.epilogue.dtype) for part in spec.results))
    shaped = [walk.reshape(y, walk.shape(layer.node)) for y, layer in zip(made if spec.parts else [made], layers, strict=True)]
    if len(layers) == 1:
        return shaped[0]
    for layer, y in zip(layers, shaped, strict=True):
        walk.bind(layer.node, y)
    return None


def _linear_name(spec: Linear) -> str:
    """Return a name that tells a reader of a profile what the kernel is."""
    activations = dict.fromkeys(part.activation for part in spec.results if part.activation != "none")
    together = f"_{len(spec.parts)}" if spec.parts else ""
    kind = "ternary" if spec.ternary else f"{'codebook' if spec.codebook else 'w'}{spec.bits}"
    return "_".join([f"linear_{spec.x}{together}_{kind}_{spec.in_features}x{spec.out_features}", *activations])


def _float_linear(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.linear: also swallows an activation and the addition of a residual that directly follow."""
    weight = walk.constant(a.weight)
    if weight is None or weight.dtype != torch.float32 or (a.bias is not None and walk.constant(a.bias) is None):
        return "the weight or the bias of a linear layer is not a float32 constant"
    swallowed, activation, residual = following(walk, node)
    epilogue = Epilogue("none" if a.bias is None else "float32", activation, residual is not None)
    spec = Linear(weight.shape[1], weight.shape[0], "float32", bits=32, epilogue=epilogue)
    layers = []
    for layer in joined(node):
        its = a if layer is node else Arguments(**bound_arguments(layer))
        arguments = Arguments(x=its.input, weight=its.weight, bias=its.bias, residual=residual, activation=activation)
        layers.append(Layer(layer, arguments, (constant_array(walk, its.weight), None, None)))
    y = call_linear(walk, spec, layers)
    for later in (node, *swallowed) if len(layers) == 1 else ():
        walk.bind(later, y)
    return None


# ---- normalization, attention ---------------------------------------------------------------------------------------------


def _layer_norm(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.layer_norm over the last axis; also writes the codes that a following qc.quantize asks for."""
    width, epsilon = a.normalized_shape[-1], a.eps
    affine = a.weight is not None and a.bias is not None
    if len(a.normalized_shape) != 1 or (a.weight is None) != (a.bias is None) or walk.fake(node).dtype != torch.float32:
        return "no kernel for this layer norm: it runs over one axis of float32 with weight and bias, or neither"
    x, rows, _ = rows_of(walk, a.input)
    inputs = [x, *([walk.plain(a.weight), walk.plain(a.bias)] if affine else [])]
    quantize = first_quantize(node, bfloat16=True)
    grid = grid_of(quantize) if quantize is not None else None
    dtype = code_dtype(grid.scheme) if grid else ""
    kernel = walk.kernel(
        ("layer_norm", width, epsilon, affine, dtype),
        lambda: normalization.layer_norm(width, epsilon, affine=affine, codes=dtype),
        f"layer_norm_{dtype}" if dtype else "layer_norm",
    )
    if quantize is None or grid is None:
        return walk.reshape(walk.call_kernel(kernel, inputs, ([rows, width], "float32")), walk.shape(node))
    inputs += grid.arguments(walk)
    y, codes = walk.call_kernel(kernel, inputs, ([rows, width], "float32"), ([rows, width], stored_dtype(dtype)))
    walk.bind(node, walk.reshape(y, walk.shape(node)))
    walk.bind(quantize, walk.reshape(codes, walk.shape(node)))
    return None


def _rms_norm(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.rms_norm over the last axis with a weight."""
    if len(a.normalized_shape) != 1 or a.weight is None or walk.fake(node).dtype != torch.float32:
        return "no kernel for this RMS norm: it runs over one axis of float32 with a weight"
    width, epsilon = a.normalized_shape[-1], torch.finfo(torch.float32).eps if a.eps is None else a.eps
    x, rows, _ = rows_of(walk, a.input)
    kernel = walk.kernel(("rms_norm", width, epsilon), lambda: normalization.layer_norm(width, epsilon, rms=True), "rms_norm")
    return walk.reshape(walk.call_kernel(kernel, [x, walk.plain(a.weight)], ([rows, width], "float32")), walk.shape(node))


def _attention(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.attention; writes codes where only a following qc.quantize reads the result."""
    depth, masked, cached = int(walk.fake(a.q).shape[-1]) // a.heads, a.key_mask is not None, a.past is not None
    quantize = first_quantize(node, bfloat16=True) if walk.is_inner(node) and len(node.users) == 1 else None
    grid = grid_of(quantize) if quantize is not None else None
    codes = code_dtype(grid.scheme) if grid else ""
    own, rows, own_rows = _own_rows(walk, a)
    if own and masked:
        return "no kernel meets a query's own token in float under a mask"
    (k, stored_k), (v, stored_v) = (_stored_rows(walk, x, a.kv_heads, depth) for x in rows)
    key = ("attention", a.heads, a.kv_heads, depth, a.scale, masked, a.causal, codes, cached, a.window, own, stored_k, stored_v)
    kernel = walk.kernel(
        key,
        lambda: attention.attention(
            a.heads, a.kv_heads, depth, a.scale, key_mask=masked, causal=a.causal, codes=codes, past=cached, window=a.window, own=own,
            stored_k=stored_k, stored_v=stored_v,
        ),
        f"attention_{a.heads}x{depth}" + f"_{codes}" * (codes != "") + "_cached" * cached,
    )  # fmt: skip
    inputs = [walk.plain(a.q), k[0], v[0], *(walk.plain(t) for t in (a.key_mask, a.past, *own_rows) if t is not None), *k[1:], *v[1:]]
    inputs += grid.arguments(walk) if grid else []
    result = walk.call_kernel(kernel, inputs, (walk.shape(node), stored_dtype(codes or "float32")))
    if quantize is None:
        return result
    walk.bind(quantize, result)
    walk.bind(node, result)  # nobody else reads it: any value marks it as done
    return None


def _own_rows(walk: Walk, a: Arguments) -> tuple[str, list[fx.Node], list[fx.Node]]:
    """Return whose tokens attention meets in float beside its keys and values, as its kernel says it; the keys and values; those tokens.

    A cache that attention reads with the new rows in float over it, ``qc.cache_append``, is read only before them.
    """
    if a.own_k is not None:
        return "token", [a.k, a.v], [a.own_k, a.own_v]
    if a.past is not None and all(_is_read_apart(walk, x, a) for x in (a.k, a.v)):
        return "call", [x.args[0] for x in (a.k, a.v)], [x.args[1] for x in (a.k, a.v)]
    return "", [a.k, a.v], []


def _is_read_apart(walk: Walk, node: fx.Node, a: Arguments) -> bool:
    if node.target is not qc.cache_append.default or node.args[2] is not a.past or node.args[0].op == "placeholder":
        return False
    return str(walk.fake(node.args[1]).shape[1]) == str(walk.fake(a.q).shape[1])


def _stored_rows(walk: Walk, node: fx.Node, kv_heads: int, depth: int) -> tuple[list[Any], Stored | None]:
    """Return keys or values as a kernel reads them: codes, scales, zero points and angles where they are dequantized codes, else floats."""
    floats: tuple[list[Any], Stored | None] = ([walk.plain(node)], None)
    rotary = Arguments(**bound_arguments(node)) if node.target is qc.rotary.default else None
    source = rotary.x if rotary else node
    turned = int(walk.fake(rotary.cos).shape[-1]) if rotary else 0
    angles = [rotary.cos, rotary.sin] if rotary else []
    if (rotary and walk.shape(rotary.cos)[0] != 1) or walk.constant(source) is not None:
        return floats
    if source.target is qc.vectors.default:
        stored = Stored(8, signed=False, turned=turned, coupled=int(walk.fake(source.args[1]).shape[-1]))
        return floats if stored.why_not(depth) else ([walk.plain(part) for part in (*source.args, *angles)], stored)
    if source.target is not qc.dequantize.default:
        return floats
    a = Arguments(**bound_arguments(source))
    scheme = parse_scheme(a.scheme)
    per_head = isinstance(scheme.granularity, Group) and scheme.granularity == Group(depth, -1)
    if not isinstance(scheme.format, Integer) or a.table is not None or (scheme.bits < 8 and a.size is None):
        return floats
    if not per_head and not isinstance(scheme.granularity, Token):
        return floats
    stored = Stored(scheme.bits, scheme.format.signed, per_head, a.zero_point is not None, turned)
    if stored.why_not(depth):
        return floats
    parts = [a.codes, a.scale, a.zero_point, *angles]
    return [walk.plain(part) for part in parts if part is not None], stored


def _cache_append(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.cache_append to an input of the model that nobody else reads: in place, the caller gets the same memory back."""
    shape, users = walk.shape(a.new), [Arguments(**bound_arguments(user)) for user in node.users if user.target is qc.attention.default]
    if len(users) == len(node.users) and all(_own_rows(walk, user)[0] == "call" and user.key_mask is None for user in users):
        return ""  # nothing reads it: attention takes the cache and the rows apart
    if a.cache.op != "placeholder" or len(a.cache.users) > 1:
        return "the cache is no input, or something else reads it as it was: it is copied"
    if not all(isinstance(size, int) for size in shape[2:]):
        return "rows of the cache have no constant size"
    cache, new, width = walk.plain(a.cache), walk.plain(a.new), product(shape[2:])
    dtype = str(cache.ty.dtype)
    kernel = walk.kernel(("cache_append", width, dtype), lambda: cache_kernel.cache_append(width, dtype), "cache_append")
    flat_cache = walk.reshape(cache, [*walk.shape(a.cache)[:2], width])
    updated = walk.update(kernel, flat_cache, walk.reshape(new, [*shape[:2], width]), walk.plain(a.past))
    return walk.reshape(updated, walk.shape(node))


def _softmax(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.softmax over a last axis of constant length."""
    width, fake = walk.fake(a.self).shape[-1], walk.fake(node)
    last = a.dim % max(fake.ndim, 1) == fake.ndim - 1
    if not isinstance(width, int) or not last or {walk.fake(a.self).dtype, fake.dtype} != {torch.float32}:
        return "no kernel for this softmax: it runs over a last axis of constant length, in float32"
    x, rows, _ = rows_of(walk, a.self)
    kernel = walk.kernel(("softmax", width), lambda: softmax.softmax(width), "softmax")
    return walk.reshape(walk.call_kernel(kernel, [x], ([rows, width], "float32")), walk.shape(node))


def _rotary(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.rotary."""
    width, turned = int(walk.fake(a.x).shape[-1]), int(walk.fake(a.cos).shape[-1])
    kernel = walk.kernel(("rotary", a.heads, width // a.heads, turned), lambda: rotary.rotary(a.heads, width // a.heads, turned), "rotary")
    return walk.call_kernel(kernel, [walk.plain(t) for t in (a.x, a.cos, a.sin)], (walk.shape(node), "float32"))


def _hadamard(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.hadamard in blocks that a kernel takes; others are products with the matrix."""
    if reason := hadamard.why_no_hadamard(walk.fake(a.x).shape[-1], a.block):
        return f"no kernel: {reason}"
    x, rows, width = rows_of(walk, a.x)
    kernel = walk.kernel(("hadamard", width, a.block), lambda: hadamard.hadamard(width, a.block), "hadamard")
    return walk.reshape(walk.call_kernel(kernel, [x], ([rows, width], "float32")), walk.shape(node))


# ---- quantize, dequantize, embedding --------------------------------------------------------------------------------------


def _quantize(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.quantize with one scale, in whichever order of memory the value has."""
    scheme = parse_scheme(a.scheme)
    if isinstance(scheme.format, BFloat16):
        return _elementwise(walk, node, a.x, walk.kernel("round", quantization.round_to_bfloat16, "quantize_bfloat16"), [], "int16")
    if not is_plain_tensor(scheme):
        return f"no kernel quantizes to '{scheme}'"
    if _is_image(walk, node, a.x):
        return _quantize_image(walk, node, a, scheme)
    kernel = walk.kernel(("quantize", scheme), lambda: quantization.quantize_static(scheme), f"quantize_{code_dtype(scheme)}")
    return _elementwise(walk, node, a.x, kernel, [flat(walk, a.scale), zero_or(walk, a.zero_point)], code_dtype(scheme))


def _is_image(walk: Walk, node: fx.Node, x: fx.Node) -> bool:
    """Return whether a value in the graph's order is a picture of a few channels that only convolutions read."""
    shape = walk.shape(x)
    if len(shape) != 4 or walk.is_channels_last(x) or not all(isinstance(n, int) for n in shape[1:]):
        return False
    few = 2 <= shape[1] <= 4 and shape[2] * shape[3] >= 16
    return few and all(user.target is qc.conv2d.default and bound_arguments(user)["x"] is node for user in node.users)


def _quantize_image(walk: Walk, node: fx.Node, a: Arguments, scheme: Scheme) -> None:
    batch, channels, height, width = walk.shape(a.x)
    spec = (channels, height * width, scheme)
    kernel = walk.kernel(("quantize_image", spec), lambda: quantization.quantize_image(*spec), "quantize_image")
    x = walk.reshape(walk.plain(a.x), [batch, channels, height * width])
    inputs = [x, flat(walk, a.scale), zero_or(walk, a.zero_point)]
    codes = walk.call_kernel(kernel, inputs, ([batch, height * width, channels], code_dtype(scheme)))
    walk.bind(node, walk.reshape(codes, [batch, height, width, channels]), channels_last=True)


def _elementwise(walk: Walk, node: fx.Node, source: fx.Node, kernel: Any, parameters: list[Any], dtype: str) -> Any:
    """Call a kernel over all elements of ``source``, keeping the order of memory it is in."""
    last = walk.is_channels_last(source)
    x = walk.channels_last(source) if last else walk.plain(source)
    shape = list(x.ty.shape)
    count = product(shape)
    result = walk.call_kernel(kernel, [walk.reshape(x, [count]), *parameters], ([count], dtype))
    walk.bind(node, walk.reshape(result, shape), channels_last=last)
    return None


def _dequantize(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.dequantize with one scale, of codes that are not packed."""
    scheme = parse_scheme(a.scheme)
    if isinstance(scheme.format, BFloat16):
        return _elementwise(walk, node, a.codes, walk.kernel("widen", quantization.widen_bfloat16, "dequantize_bfloat16"), [], "float32")
    if not is_plain_tensor(scheme) or (a.size is not None and scheme.bits != 8):
        return f"no kernel dequantizes '{scheme}'"
    kernel = walk.kernel(("dequantize", scheme), lambda: quantization.dequantize(scheme), f"dequantize_{code_dtype(scheme)}")
    return _elementwise(walk, node, a.codes, kernel, [flat(walk, a.scale), zero_or(walk, a.zero_point)], "float32")


def _quantize_dynamic(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.quantize_dynamic, one scale for each token, or for each of the equal runs of its elements."""
    scheme = parse_scheme(a.scheme)
    width, granularity = walk.fake(a.x).shape[-1], scheme.granularity
    runs = isinstance(granularity, Token) or (isinstance(granularity, Group) and granularity.axis == -1)
    if not runs or not isinstance(scheme.format, Integer) or scheme.bits < 2 or not isinstance(width, int):
        return f"no kernel quantizes to '{scheme}'"
    x, rows, _ = rows_of(walk, a.x)
    if isinstance(granularity, Group):
        if width % granularity.size:
            return f"no kernel quantizes runs of {granularity.size} of {width} elements"
        rows, width = rows * (width // granularity.size), granularity.size
        x = walk.reshape(x, [rows, width])
    kernel = walk.kernel(("quantize_dynamic", width, scheme), lambda: quantization.quantize_dynamic(width, scheme), "quantize_dynamic")
    results = walk.call_kernel(kernel, [x], ([rows, width], code_dtype(scheme)), ([rows], "float32"), ([rows], "int32"))
    shapes = [walk.sizes.shape(fake.shape) for fake in walk.fake(node)]
    return [walk.reshape(result, shape) for result, shape in zip(results, shapes, strict=True)]


def _vector_codes(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.vector_codes with a table that is a constant, kept with its vectors side by side."""
    x, rows, width = rows_of(walk, a.x)
    if walk.constant(a.table) is None or not isinstance(width, int):
        return "no kernel finds vectors in a table that is computed"
    coupled = int(walk.fake(a.table).shape[-1])
    kernel = walk.kernel(("vector_codes", width, coupled), lambda: vectors.vector_codes(width, coupled), "vector_codes")
    codes = walk.call_kernel(
        kernel, [x, walk.packed(a.table, "by channel", lambda t: t.transpose(1, 2))], ([rows, width // coupled], "uint8")
    )
    return walk.reshape(codes, walk.shape(node))


def _embedding(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.embedding: gathers rows of the packed table."""
    scheme = parse_scheme(a.scheme)
    granularity = scheme.granularity
    kinds = {Tensor(): "tensor", Channel(0): "row"}
    group = granularity.size if isinstance(granularity, Group) and granularity.axis in (-1, 1) else 0
    if not isinstance(scheme.format, Integer | BFloat16) or (granularity not in kinds and not group) or group % 16:
        return f"no kernel gathers from a table in '{scheme}'"
    scales = kinds.get(granularity, "group")
    affine = a.zero_point is not None
    kernel = walk.kernel(
        ("embedding", a.size, scheme),
        lambda: quantization.embedding(a.size, scheme.bits, signed=scheme.format.lowest < 0, scales=scales, group=group, affine=affine),
        "embedding",
    )
    one_axis = scales != "group"
    parameters = [flat(walk, p) if one_axis else walk.plain(p) for p in (a.scale, a.zero_point) if p is not None]
    if scheme.format.dense:
        table = walk.plain(a.weight)
    else:
        table = walk.packed(a.weight, "codes", lambda packed: scheme.format.unpack(packed, a.size))
    return _gather(walk, node, a.indices, kernel, [table, *parameters], a.size)


def _float_embedding(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.embedding: gathers rows of a float32 table."""
    width = walk.fake(a.weight).shape[-1]
    if walk.fake(a.weight).dtype != torch.float32 or walk.fake(a.indices).dtype != torch.int64:
        return "no kernel for this embedding: it gathers from float32 by int64"
    kernel = walk.kernel(("embedding", width), lambda: quantization.embedding(width, 32), "embedding_float")
    return _gather(walk, node, a.indices, kernel, [walk.plain(a.weight)], width)


def _gather(walk: Walk, node: fx.Node, indices: fx.Node, kernel: Any, table: list[Any], width: int) -> Any:
    shape = walk.shape(indices)
    count = product(shape)
    rows = walk.call_kernel(kernel, [walk.reshape(walk.plain(indices), [count]), *table], ([count, width], "float32"))
    return walk.reshape(rows, walk.shape(node))


LEGALIZE_LAYERS: dict[str, Legalizer] = {
    "qc.attention": _attention,
    "qc.cache_append": _cache_append,
    "qc.hadamard": _hadamard,
    "qc.rotary": _rotary,
    "aten.softmax": _softmax,
    "aten._softmax": _softmax,
    "qc.quantize": _quantize,
    "qc.dequantize": _dequantize,
    "qc.quantize_dynamic": _quantize_dynamic,
    "qc.vector_codes": _vector_codes,
    "qc.embedding": _embedding,
    "aten.linear": _float_linear,
    "aten.layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten.embedding": _float_embedding,
}

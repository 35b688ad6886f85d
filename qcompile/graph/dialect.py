"""The ``qc`` dialect: operators over quantized tensors, each with an exact meaning in plain PyTorch.

These functions define what every kernel computes. Integer codes and accumulators agree bit for bit; float parts follow the
written order of operations, each one rounded to float32 by itself (no fused multiply-add).

Conventions shared by all operators:

- a quantized value is (codes, scale, zero_point) and a scheme text; ``zero_point`` is None for symmetric schemes, else int32;
- weights are stored packed (``Format.pack``), so an operator with a weight also states its last size;
- codes of a codebook are places in the weight's table, int8 [tables, levels], where it has one: row r of n reads table r // (n / tables);
- every product ``x * w`` is accumulated exactly in int32 over ``(x_code - x_zero) * (w_code - w_zero)``;
- the epilogue after an accumulator is, in this order:

      acc = acc + bias                        if bias is int32 (its scale is x_scale * weight_scale, CNN contract)
      y = (float32(acc) * weight_scale) * x_scale
      y = y + bias                            if bias is float32
      y = activation(y)
      y = y + residual                        if there is one
      y = activation(y)                       for an ``add_`` activation (``add_relu`` acts after the residual, not before)
      codes = clamp(round_half_even(y / out_scale) + out_zero_point)     if there is an out scheme

- a format without a scale (``bf16``) has None for scale and zero point; where x and the weight have such formats, their values are
  multiplied and summed from +0 on, and ``y`` is that sum rounded to float32, without scales. A kernel may sum float32 products (those of
  two bfloat16 are exact in float32) in any order, and take sums below 2**-126 for zero: its y is within
  ``(in + 8) * 2**-24 * sum of abs(x * w) + in * 2**-126`` of the meaning's;

- with weight groups along the input, ``y`` is the sum in ascending group order of ``float32(acc_g) * weight_scale_g``,
  then times x_scale;

- an operator that is given a ``multiplier`` and a ``shift`` has no float part: with ``requantize`` of ``qcompile.graph.fixed_point``

      codes = clamp(requantize(acc + bias, multiplier, shift) + out_zero_point, low, high)

  low and high are those of the out scheme's format; relu raises low to ``out_zero_point``, relu6 lowers high as well, to
  ``out_zero_point + round_half_even(6 / out_scale)``. Its scales then only say what the codes mean. The operators that exist in
  integers alone are in ``qcompile.graph.code_operators``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qcompile.formats import Group, Scheme, Tensor, decode, dequantize, parse_scheme, quantize, quantize_dynamic
from qcompile.graph.fixed_point import requantize, sum_fits
from qcompile.graph.hadamard import hadamard_matrix, require_hadamard

LIBRARY = torch.library.Library("qc", "DEF")

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: y.clamp(0, 6),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "add_relu": torch.relu,
    "add_relu6": lambda y: y.clamp(0, 6),
}


VECTORS = 256  # in a table: a code is one byte
_ROWS_AT_ONCE = 64  # whose distances are held: they stay in the cache of the processor

MEANINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}  # the Python function of each operator, through which gradients flow


def define(schema: str, meaning, shape) -> None:
    """Register one operator: its schema, its meaning, and the rule that gives the meta result."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qc::{name}", shape, lib=LIBRARY)
    MEANINGS[getattr(torch.ops.qc, name).default] = meaning


def _code_dtype(scheme: str) -> torch.dtype:
    return parse_scheme(scheme).format.storage


# ---- quantize, dequantize -------------------------------------------------------------------------------------------------


def _quantize(x, scale, zero_point, scheme):
    return quantize(x, scale, zero_point, parse_scheme(scheme))


define(
    "quantize(Tensor x, Tensor? scale, Tensor? zero_point, str scheme) -> Tensor",
    _quantize,
    lambda x, scale, zero_point, scheme: x.new_empty(x.shape, dtype=_code_dtype(scheme)),
)


def _quantize_dynamic(x, scheme):
    """Return codes, scale and zero point (int32, zeros where the scheme is symmetric)."""
    codes, scale, zero_point = quantize_dynamic(x, parse_scheme(scheme))
    if scale is None:
        raise ValueError(f"'{scheme}' has no scale to find: quantize() rounds to it")
    return codes, scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point


def _quantize_dynamic_shape(x, scheme):
    shape = parse_scheme(scheme).granularity.scale_shape(tuple(x.shape))
    return x.new_empty(x.shape, dtype=_code_dtype(scheme)), x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


define("quantize_dynamic(Tensor x, str scheme) -> (Tensor, Tensor, Tensor)", _quantize_dynamic, _quantize_dynamic_shape)


def _codes(codes: torch.Tensor, scheme: Scheme, size: int | None) -> torch.Tensor:
    """Return one code per element; ``size`` is the unpacked length of the last axis, None for codes that are not packed."""
    return codes if size is None else scheme.format.unpack(codes, size)


def _dequantize(codes, scale, zero_point, scheme, size=None, table=None):
    parsed = parse_scheme(scheme)
    return dequantize(_codes(codes, parsed, size), scale, zero_point, parsed, table)


def _dequantize_shape(codes, scale, zero_point, scheme, size=None, table=None):
    dtype = torch.float32 if scale is None else scale.dtype
    return codes.new_empty((*codes.shape[:-1], size) if size is not None else codes.shape, dtype=dtype)


define(
    "dequantize(Tensor codes, Tensor? scale, Tensor? zero_point, str scheme, int? size=None, Tensor? table=None) -> Tensor",
    _dequantize,
    _dequantize_shape,
)


def _pack(codes, scheme):
    """Return codes [.., size] as their format stores them, uint8; ``size`` of dequantize undoes it."""
    return parse_scheme(scheme).format.pack(codes)


define(
    "pack(Tensor codes, str scheme) -> Tensor",
    _pack,
    lambda codes, scheme: codes.new_empty((*codes.shape[:-1], parse_scheme(scheme).format.packed_size(codes.shape[-1])), dtype=torch.uint8),
)


def _vector_codes(x, table):
    """Return for each run of c channels of x [.., runs * c] the place of the nearest vector in the run's table [runs, 256, c], uint8.

    The distance is the sum of squared differences from the first channel on, every operation rounded to float32; of equal ones the
    first place counts. c = 8 makes it one bit for a channel (coupled quantization, Zhang et al. 2024, arXiv 2405.03917, section 3).
    """
    runs, _, c = table.shape
    by_channel = table.permute(2, 0, 1).contiguous()
    codes = []
    for rows in x.reshape(-1, runs, c).split(_ROWS_AT_ONCE):
        distance = (rows[..., 0].unsqueeze(-1) - by_channel[0]).square_()  # [rows, runs, 256]
        for i in range(1, c):
            distance += (rows[..., i].unsqueeze(-1) - by_channel[i]).square_()
        codes.append(distance.argmin(-1).to(torch.uint8))
    return torch.cat(codes).view(*x.shape[:-1], runs)


def _vector_codes_shape(x, table):
    torch._check(
        table.ndim == 3 and table.shape[1] == VECTORS, lambda: f"a table of vectors is [runs, {VECTORS}, c], not {list(table.shape)}"
    )
    torch._check(x.shape[-1] == table.shape[0] * table.shape[2], lambda: f"a table {list(table.shape)} does not fit {x.shape[-1]} channels")
    return x.new_empty((*x.shape[:-1], table.shape[0]), dtype=torch.uint8)


define("vector_codes(Tensor x, Tensor table) -> Tensor", _vector_codes, _vector_codes_shape)


def _vectors(codes, table):
    """Return the vectors of codes [.., runs] in their runs' tables [runs, 256, c], end to end: [.., runs * c]. Undoes ``vector_codes``."""
    return table[torch.arange(len(table)), codes.to(torch.int64)].flatten(-2)


def _vectors_shape(codes, table):
    torch._check(
        table.ndim == 3 and table.shape[1] == VECTORS, lambda: f"a table of vectors is [runs, {VECTORS}, c], not {list(table.shape)}"
    )
    torch._check(codes.shape[-1] == table.shape[0], lambda: f"a table {list(table.shape)} does not fit {codes.shape[-1]} codes")
    return codes.new_empty((*codes.shape[:-1], table.shape[0] * table.shape[2]), dtype=table.dtype)


define("vectors(Tensor codes, Tensor table) -> Tensor", _vectors, _vectors_shape)


# ---- products -------------------------------------------------------------------------------------------------------------


def _centered(codes: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme, table: torch.Tensor | None = None) -> torch.Tensor:
    """Return decode(codes) - zero_point as float64 integers: products and sums of them below 2**53 are exact."""
    values = decode(codes, scheme, table, torch.float64)
    if zero_point is None:
        return values
    return values - scheme.granularity.expand(zero_point, tuple(codes.shape)).to(torch.float64)


def _product_of_values(product, x, x_scheme, w, *geometry):
    """Return the product of x, codes of a format without a scale, and float32 w: summed from +0 on in float64, rounded to float32 once."""
    values = parse_scheme(x_scheme).format.decode(x, torch.float64)
    return (0.0 + product(values, w.to(torch.float64), None, *geometry)).to(torch.float32)


def _epilogue(y, bias, activation, residual, out_scale, out_zero_point, out_scheme):
    if bias is not None and bias.dtype.is_floating_point:
        y = y + bias
    if not activation.startswith("add_"):
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual
    if activation.startswith("add_"):
        y = ACTIVATIONS[activation](y)
    return y if not out_scheme else quantize(y, out_scale, out_zero_point, parse_scheme(out_scheme))


def _fixed_point_codes(acc, multiplier, shift, activation, out_scale, out_zero_point, out_scheme):
    """Return the codes of int32 accumulators, which hold the bias; multiplier and shift broadcast against them."""
    return clamp_codes(requantize(acc, multiplier, shift), activation, out_scale, out_zero_point, out_scheme)


def clamp_codes(steps, activation, out_scale, out_zero_point, out_scheme):
    """Return codes of integers that count steps of the out scale from zero, cut where the format or the activation ends."""
    format, zero = parse_scheme(out_scheme).format, 0 if out_zero_point is None else int(out_zero_point)
    low, high = code_limits(activation, out_scale, zero, out_scheme)
    return (steps + zero).clamp(low, high).to(format.storage)


def code_limits(activation: str, out_scale: torch.Tensor | None, zero_point: int, out_scheme: str) -> tuple[int, int]:
    """Return the lowest and highest code after an activation of ``FIXED_POINT_ACTIVATIONS``; only relu6 reads the scale."""
    format = parse_scheme(out_scheme).format
    low, high = int(format.lowest), int(format.highest)
    if activation != "none":
        low = max(low, zero_point)
    if activation == "relu6":
        assert out_scale is not None
        high = min(high, zero_point + int((6.0 / out_scale.to(torch.float32)).round()))
    return low, high


FIXED_POINT_ACTIVATIONS = ("none", "relu", "relu6")


def _require_fixed_point(multiplier, shift, x_scheme, weight_scheme, bias, residual, out_scheme, activation) -> None:
    """Raise ValueError where a product with a multiplier would have a float part."""
    if shift is None or multiplier.dtype != torch.int32 or shift.dtype != torch.int8 or multiplier.shape != shift.shape:
        raise ValueError("a multiplier is int32 and stands with a shift, int8 of its shape")
    x = parse_scheme(x_scheme) if x_scheme else None
    if x is None or not x.calibrated or not isinstance(x.granularity, Tensor) or not out_scheme:
        raise ValueError("a product with a multiplier takes codes on one static grid to codes")
    if isinstance(parse_scheme(weight_scheme).granularity, Group):
        raise ValueError("a product with a multiplier has no weight groups along the input")
    if residual is not None or (bias is not None and bias.dtype != torch.int32) or activation not in FIXED_POINT_ACTIVATIONS:
        raise ValueError(f"a product with a multiplier has an int32 bias, no residual, and of {', '.join(FIXED_POINT_ACTIVATIONS)} one")


def _linear(x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, bias, residual, out_scale, out_zero_point,
            x_scheme, weight_scheme, in_features, activation="none", out_scheme="", weight_table=None,
            multiplier=None, shift=None):  # fmt: skip
    scheme = parse_scheme(weight_scheme)
    codes = _codes(weight, scheme, in_features)
    if multiplier is not None:
        _require_fixed_point(multiplier, shift, x_scheme, weight_scheme, bias, residual, out_scheme, activation)
        acc = F.linear(_centered(x, x_zero_point, parse_scheme(x_scheme)), _centered(codes, weight_zero_point, scheme, weight_table))
        acc = acc if bias is None else acc + bias
        return _fixed_point_codes(acc, multiplier, shift, activation, out_scale, out_zero_point, out_scheme)
    if not x_scheme or weight_scale is None:  # float activations: the weight is dequantized, then an ordinary product
        w = dequantize(codes, weight_scale, weight_zero_point, scheme, weight_table)
        y = _product_of_values(F.linear, x, x_scheme, w) if x_scheme else F.linear(x, w)
        return _epilogue(y, bias, activation, residual, out_scale, out_zero_point, out_scheme)
    a = _centered(x, x_zero_point, parse_scheme(x_scheme))  # [.., in]
    w = _centered(codes, weight_zero_point, scheme, weight_table)  # [out, in]
    if isinstance(scheme.granularity, Group):
        size = scheme.granularity.size
        y = torch.zeros((*x.shape[:-1], w.shape[0]), dtype=torch.float32)
        for g in range(weight_scale.shape[1]):
            part = slice(g * size, (g + 1) * size)
            y = y + F.linear(a[..., part], w[:, part]).to(torch.float32) * weight_scale[:, g]
    else:
        acc = F.linear(a, w)
        acc = acc + bias if bias is not None and not bias.dtype.is_floating_point else acc
        y = acc.to(torch.float32) * weight_scale
    return _epilogue(y * x_scale, bias, activation, residual, out_scale, out_zero_point, out_scheme)


def _result(x, shape, out_scheme):
    return x.new_empty(shape, dtype=_code_dtype(out_scheme) if out_scheme else torch.float32)


def _linear_shape(x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, bias, residual, out_scale, out_zero_point,
                  x_scheme, weight_scheme, in_features, activation="none", out_scheme="", weight_table=None,
                  multiplier=None, shift=None):  # fmt: skip
    if multiplier is not None:
        _require_fixed_point(multiplier, shift, x_scheme, weight_scheme, bias, residual, out_scheme, activation)
    torch._check(x.shape[-1] == in_features, lambda: f"qc.linear reads {in_features} features, its input has {x.shape[-1]}")
    return _result(x, (*x.shape[:-1], weight.shape[0]), out_scheme)


define(
    "linear(Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor weight, Tensor? weight_scale, Tensor? weight_zero_point, "
    "Tensor? bias, Tensor? residual, Tensor? out_scale, Tensor? out_zero_point, str x_scheme, str weight_scheme, "
    'int in_features, str activation="none", str out_scheme="", Tensor? weight_table=None, '
    "Tensor? multiplier=None, Tensor? shift=None) -> Tensor",
    _linear,
    _linear_shape,
)


def _conv2d(x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, bias, residual, out_scale, out_zero_point,
            x_scheme, weight_scheme, kernel_width, stride, padding, dilation, groups, activation="none", out_scheme="",
            multiplier=None, shift=None):  # fmt: skip
    """Convolution over NCHW; padding adds the real value zero, that is the code zero_point."""
    x, padding = _padded_by_side(x, x_zero_point, x_scheme, padding)
    scheme = parse_scheme(weight_scheme)
    codes = _codes(weight, scheme, kernel_width)
    if multiplier is not None:
        _require_fixed_point(multiplier, shift, x_scheme, weight_scheme, bias, residual, out_scheme, activation)
        a, w = _centered(x, x_zero_point, parse_scheme(x_scheme)), _centered(codes, weight_zero_point, scheme)
        acc = F.conv2d(a, w, None if bias is None else bias.to(torch.float64), stride, padding, dilation, groups)
        multiplier, shift = (t.reshape(-1, 1, 1) if t.ndim else t for t in (multiplier, shift))
        return _fixed_point_codes(acc, multiplier, shift, activation, out_scale, out_zero_point, out_scheme)
    if not x_scheme or weight_scale is None:
        w = dequantize(codes, weight_scale, weight_zero_point, scheme)
        geometry = (stride, padding, dilation, groups)
        y = _product_of_values(F.conv2d, x, x_scheme, w, *geometry) if x_scheme else F.conv2d(x, w, None, *geometry)
    else:
        a = _centered(x, x_zero_point, parse_scheme(x_scheme))
        w = _centered(codes, weight_zero_point, scheme)
        acc = F.conv2d(a, w, None, stride, padding, dilation, groups)
        if bias is not None and not bias.dtype.is_floating_point:
            acc = acc + bias.view(-1, 1, 1)
        per_channel = weight_scale.reshape(-1, 1, 1) if weight_scale.ndim else weight_scale
        y = (acc.to(torch.float32) * per_channel) * x_scale
    bias = bias.view(-1, 1, 1) if bias is not None else None
    return _epilogue(y, bias, activation, residual, out_scale, out_zero_point, out_scheme)


def _padded_by_side(x, zero_point, scheme, padding):
    """Return x with its padding, and none left, where it is given side by side: rows above, columns left, rows below, columns right."""
    if len(padding) == 2:
        return x, padding
    top, left, bottom, right = padding
    zero = 0 if zero_point is None else int(zero_point)
    if scheme and not parse_scheme(scheme).calibrated:
        raise ValueError("padding by side takes codes on a static grid")
    return F.pad(x, (left, right, top, bottom), value=zero), (0, 0)


def _conv2d_shape(x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, bias, residual, out_scale, out_zero_point,
                  x_scheme, weight_scheme, kernel_width, stride, padding, dilation, groups, activation="none", out_scheme="",
                  multiplier=None, shift=None):  # fmt: skip
    if multiplier is not None:
        _require_fixed_point(multiplier, shift, x_scheme, weight_scheme, bias, residual, out_scheme, activation)
    kernel = (weight.shape[-2], kernel_width)
    size = [(x.shape[2 + d] + padding[d] + padding[d - 2] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)]
    return _result(x, (x.shape[0], weight.shape[0], *size), out_scheme)


define(
    "conv2d(Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor weight, Tensor? weight_scale, Tensor? weight_zero_point, "
    "Tensor? bias, Tensor? residual, Tensor? out_scale, Tensor? out_zero_point, str x_scheme, str weight_scheme, "
    "int kernel_width, int[] stride, int[] padding, int[] dilation, int groups, "
    'str activation="none", str out_scheme="", Tensor? multiplier=None, Tensor? shift=None) -> Tensor',
    _conv2d,
    _conv2d_shape,
)


def _matmul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, out_scale, out_zero_point, a_scheme, b_scheme, out_scheme=""):
    """Batched product of two activations with one scale each: ``y = (float32(acc) * b_scale) * a_scale``."""
    acc = _centered(a, a_zero_point, parse_scheme(a_scheme)) @ _centered(b, b_zero_point, parse_scheme(b_scheme))
    y = (acc.to(torch.float32) * b_scale) * a_scale
    return _epilogue(y, None, "none", None, out_scale, out_zero_point, out_scheme)


def _matmul_shape(a, a_scale, a_zero_point, b, b_scale, b_zero_point, out_scale, out_zero_point, a_scheme, b_scheme, out_scheme=""):
    return _result(a, torch.matmul(a.to(torch.float32), b.to(torch.float32)).shape, out_scheme)


define(
    "matmul(Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point, "
    'Tensor? out_scale, Tensor? out_zero_point, str a_scheme, str b_scheme, str out_scheme="") -> Tensor',
    _matmul,
    _matmul_shape,
)


# ---- embedding, addition, rotation, attention -----------------------------------------------------------------------------


def _embedding(indices, weight, scale, zero_point, scheme, size):
    """Gather rows of a packed table [rows, ceil(size * bits / 8)] and dequantize them; scales are per row, group or tensor."""
    parsed = parse_scheme(scheme)
    # Gather first: dequantizing the rows that are read gives the same as reading rows of the dequantized table.
    rows, place = indices.unique(return_inverse=True)
    scale, zero_point = (t[rows] if t is not None and t.ndim else t for t in (scale, zero_point))
    return dequantize(_codes(weight[rows], parsed, size), scale, zero_point, parsed)[place]


define(
    "embedding(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, str scheme, int size) -> Tensor",
    _embedding,
    lambda indices, weight, scale, zero_point, scheme, size: indices.new_empty((*indices.shape, size), dtype=torch.float32),
)


def _add(a, a_scale, a_zero_point, b, b_scale, b_zero_point, out_scale, out_zero_point, a_scheme, b_scheme, out_scheme, activation="none",
         multipliers=(), shift=0):  # fmt: skip
    """Sum of two quantized tensors on a third grid: dequantize both, add, activate, quantize.

    With two multipliers all of it is in int32:

        steps = ((a - a_zero) * multipliers[0] + (b - b_zero) * multipliers[1] + 2**(shift - 1)) >> shift

    Steps are counted from ``out_zero_point`` and cut as those of a product.
    """
    if multipliers:
        _require_sum(multipliers, shift, activation)
        terms = [_centered(a, a_zero_point, parse_scheme(a_scheme)), _centered(b, b_zero_point, parse_scheme(b_scheme))]
        total = terms[0].to(torch.int64) * multipliers[0] + terms[1].to(torch.int64) * multipliers[1]
        return clamp_codes((total + (1 << (shift - 1))) >> shift, activation, out_scale, out_zero_point, out_scheme)
    y = dequantize(a, a_scale, a_zero_point, parse_scheme(a_scheme)) + dequantize(b, b_scale, b_zero_point, parse_scheme(b_scheme))
    return quantize(ACTIVATIONS[activation](y), out_scale, out_zero_point, parse_scheme(out_scheme))


def _require_sum(multipliers, shift, activation) -> None:
    """Raise ValueError where a sum with multipliers would leave int32 or have a float part."""
    if len(multipliers) != 2 or min(multipliers) < 0 or shift < 1 or not sum_fits(multipliers, shift):
        raise ValueError(f"the multipliers {list(multipliers)} and the shift {shift} do not keep a sum of two codes in int32")
    if activation not in FIXED_POINT_ACTIVATIONS:
        raise ValueError(f"a sum with multipliers has an activation of {', '.join(FIXED_POINT_ACTIVATIONS)}, not {activation}")


def _add_shape(a, a_scale, a_zero_point, b, b_scale, b_zero_point, out_scale, out_zero_point, a_scheme, b_scheme, out_scheme,
               activation="none", multipliers=(), shift=0):  # fmt: skip
    if multipliers:
        _require_sum(multipliers, shift, activation)
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape), dtype=_code_dtype(out_scheme))


define(
    "add(Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point, "
    'Tensor out_scale, Tensor? out_zero_point, str a_scheme, str b_scheme, str out_scheme, str activation="none", '
    "int[] multipliers=[], int shift=0) -> Tensor",
    _add,
    _add_shape,
)


def _hadamard(x, block):
    """Multiply each run of ``block`` elements of the last axis by the normalised Hadamard matrix, see ``hadamard_matrix``."""
    return (x.unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.dtype)).flatten(-2)


def _hadamard_type(x, block):
    require_hadamard(block)
    return torch.empty_like(x)


define("hadamard(Tensor x, int block) -> Tensor", _hadamard, _hadamard_type)


def _rotary(x, cos, sin, heads):
    """Rotate pairs of channels of each head by an angle for each token (Su et al. 2021, arXiv 2104.09864, as Llama pairs them).

    x [batch, tokens, heads * d]; cos and sin [1 or batch, tokens, r], r even. Channels i and i + r/2 of the first r of a head are a pair:
    ``x * cos + turned * sin``, two rounded products and their sum, where turned is ``(-x[r/2:r], x[:r/2])``. The others stay as they are.
    """
    x, r = x.unflatten(-1, (heads, -1)), cos.shape[-1]
    first, second = x[..., : r // 2], x[..., r // 2 : r]
    turned = torch.cat([-second, first], -1) * sin.unsqueeze(2)
    return torch.cat([x[..., :r] * cos.unsqueeze(2) + turned, x[..., r:]], -1).flatten(2)


define("rotary(Tensor x, Tensor cos, Tensor sin, int heads) -> Tensor", _rotary, lambda x, cos, sin, heads: torch.empty_like(x))


def _attention(q, k, v, key_mask, heads, kv_heads, scale, causal, past=None, window=0, own_k=None, own_v=None):
    """Multi-head attention over q [batch, tokens, heads * d], k and v [batch, keys, kv_heads * d].

    ``key_mask`` [batch, keys] is True where a key may be seen. ``causal`` hides keys after the query: query i sees key j when
    ``j <= past + i``; with a ``window`` only the last so many of them, ``j > past + i - window``. ``past`` i64[batch] says for each row
    how many tokens came before its queries, for keys and values that are caches with room for more; without it the queries are
    the last of the keys, past = keys - tokens. A query that sees no key gives zeros.

    ``own_k`` and ``own_v`` [batch, tokens, kv_heads * d], of causal attention, stand for k and v where a query meets its own token,
    j = past + i; every other key is that of k and v.
    """
    scores, values, seen = _heads_apart(q, k, v, key_mask, heads, kv_heads, causal, past, window)
    own = _own_places(scores, k, past) if own_k is not None else None
    if own is not None:
        own_k, own_v = (_by_head(t, heads, kv_heads) for t in (own_k, own_v))
        scores = scores.scatter(-1, own, (_by_head(q, heads, heads) * own_k).sum(-1, keepdim=True))
    weights = torch.softmax((scores * scale).masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
    if own is None:
        return (weights @ values).transpose(1, 2).flatten(2)
    others = weights.scatter(-1, own, 0.0)
    return (others @ values + weights.gather(-1, own) * own_v).transpose(1, 2).flatten(2)


def _by_head(t: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Return [batch, rows, kv_heads * d] as [batch, heads, rows, d], each head of keys for all query heads that share it."""
    return t.unflatten(-1, (kv_heads, -1)).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)


def _own_places(scores: torch.Tensor, k: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
    """Return which key is each query's own token, i64 [batch, heads, tokens, 1]."""
    batch, heads, tokens, _ = scores.shape
    before = torch.tensor(k.shape[1] - tokens) if past is None else past.view(-1, 1, 1, 1)
    return (before + torch.arange(tokens).view(1, 1, -1, 1)).expand(batch, heads, -1, -1)


def _heads_apart(q, k, v, key_mask, heads, kv_heads, causal, past, window):
    """Return q @ k.T [batch, heads, tokens, keys], v [batch, heads, keys, d], and which keys each query sees."""
    batch, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    q, k, v = _by_head(q, heads, heads), _by_head(k, heads, kv_heads), _by_head(v, heads, kv_heads)
    seen = torch.ones(batch, 1, tokens, keys, dtype=torch.bool)
    if key_mask is not None:
        seen = seen & key_mask.view(batch, 1, 1, keys)
    if causal:
        before = torch.tensor(keys - tokens) if past is None else past.view(-1, 1, 1, 1)
        last = before + torch.arange(tokens).unsqueeze(1)
        seen = seen & (torch.arange(keys) <= last)
        if window:
            seen = seen & (torch.arange(keys) > last - window)
    return q @ k.transpose(-1, -2), v, seen


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, int heads, int kv_heads, float scale, bool causal, "
    "Tensor? past=None, int window=0, Tensor? own_k=None, Tensor? own_v=None) -> Tensor",
    _attention,
    lambda q, k, v, key_mask, heads, kv_heads, scale, causal, past=None, window=0, own_k=None, own_v=None: torch.empty_like(q),
)


# 255 * 2**f for f in [-1/2, 1/2], highest power first: within a relative 1.1e-4, 0.03 of a code, and exact at 0 (least greatest error).
POWER = (14.027321, 61.7638, 176.78714, 255.0)
FAINTEST = -10.0  # 255 * 2**-10 rounds to 0


def _power_codes(x):
    """Return round_half_even(255 * 2**x) of float32 x <= 0, each operation of the polynomial rounded by itself."""
    x = x.clamp(min=FAINTEST)
    whole = x.round()
    y = torch.full_like(x, POWER[0])
    for coefficient in POWER[1:]:
        y = y * (x - whole) + coefficient
    return (y * torch.exp2(whole)).round()


def _attention_codes(q, q_scale, k, k_scale, v, v_scale, key_mask, heads, kv_heads, scale, causal, past=None, window=0):
    """``qc.attention`` over symmetric int8 codes with one scale for each of q, k and v; float32 result.

        score = sum of q k                                              int32
        step = (q_scale * k_scale) * float32(scale * log2(e))           float32
        weight = round_half_even(255 * 2**(float32(score - greatest) * step))   uint8; 0 of a key that is hidden
        y = float32(sum of weight v) * (v_scale / float32(sum of weight))       zeros where no key is seen

    ``greatest`` is the greatest score that the query sees, so its weight is 255: weights have the fixed scale 1/255 before they are
    divided by their sum, and their sum is that of the codes, so rounded weights add up to 1. 2**x is a polynomial, ``_power_codes``.
    """
    q, k, v = (t.to(torch.float64) for t in (q, k, v))
    scores, v, seen = _heads_apart(q, k, v, key_mask, heads, kv_heads, causal, past, window)
    greatest = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    step = (q_scale * k_scale) * torch.tensor(scale * math.log2(math.e), dtype=torch.float32)
    weights = _power_codes((scores - greatest).clamp(max=0.0).to(torch.float32) * step) * seen
    total = weights.sum(-1, keepdim=True).clamp(min=1.0)
    y = (weights.to(torch.float64) @ v).to(torch.float32) * (v_scale / total)
    return y.transpose(1, 2).flatten(2)


define(
    "attention_codes(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v, Tensor v_scale, Tensor? key_mask, int heads, "
    "int kv_heads, float scale, bool causal, Tensor? past=None, int window=0) -> Tensor",
    _attention_codes,
    lambda q, q_scale, k, k_scale, v, v_scale, key_mask, heads, kv_heads, scale, causal, past=None, window=0: torch.empty_like(
        q, dtype=torch.float32
    ),
)


def _cache_append(cache, new, past):
    """Return ``cache`` [batch, capacity, ..] with ``new`` [batch, tokens, ..] in rows past[b], past[b] + 1, .. of batch row b.

    ``past`` is i64[batch]. What goes beyond the capacity is dropped: callers check for room.
    """
    rows = past.unsqueeze(1) + torch.arange(new.shape[1])
    result = cache.clone()
    for b, places in enumerate(rows):
        fits = (places >= 0) & (places < cache.shape[1])
        result[b, places[fits]] = new[b, fits]
    return result


define("cache_append(Tensor cache, Tensor new, Tensor past) -> Tensor", _cache_append, lambda cache, new, past: torch.empty_like(cache))


# ---- gradients ------------------------------------------------------------------------------------------------------------

for _name in ("attention", "hadamard"):  # their meanings are sums of differentiable operators: passes that learn go through them
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")

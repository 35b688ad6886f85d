"""Quantize and dequantize by a scheme: the meaning of every scale and zero point in the project.

    codes = encode(x / scale + zero_point)        value = scale * (decode(codes) - zero_point)

The division is an IEEE float32 division and rounding is half to even, as ONNX QuantizeLinear says, so that codes agree bit for bit
between this file, ONNX Runtime and every kernel. ``zero_point`` is an integer added after rounding.
A format without a scale (``bf16``) has None for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.formats.granularity import Channel, Group
from qcompile.formats.lookup import look_up
from qcompile.formats.scheme import Scheme

_AT_ONCE = 1 << 22  # codes; a large weight is dequantized a run of rows at a time
SMALLEST_SCALE = 2.0**-100  # a range of zero width still needs a scale whose reciprocal is finite


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor.

    Attributes:
        codes: int8 or uint8, one per element, the tensor's own shape.
        scale: float, of the shape that the granularity gives, or None where the format has none.
        zero_point: int32 of the scale's shape, or None where the scheme is symmetric.
        scheme: how to read them.
        table: int8 [tables, levels] where the codes are places in a table of the tensor's own, see ``qcompile.formats.lookup``.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    scheme: Scheme
    table: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        return dequantize(self.codes, self.scale, self.zero_point, self.scheme, self.table)

    def packed(self) -> torch.Tensor:
        """Return the codes as dense bytes."""
        return self.scheme.format.pack(self.codes)


def choose_scale(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scale and zero point that cover the range [low, high], elementwise.

    Symmetric: the larger magnitude maps to the format's highest value. Affine: the range is widened to hold zero, so
    that zero is coded exactly (Krishnamoorthi 2018, section 2.1).
    """
    format = scheme.format
    if scheme.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / format.highest if format.highest else high.abs().clone()
        if format.lowest == -1 and format.highest == 0:  # int1: codes -1 and 0
            scale = -low.clamp(max=0)
        return _storable(scale, scheme), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _storable((high - low) / (format.highest - format.lowest), scheme)
    zero_point = (format.lowest - low / scale).round().clamp(format.lowest, format.highest)
    return scale, zero_point.to(torch.int32)


def _storable(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    scale = scale.clamp(min=SMALLEST_SCALE)
    smallest = torch.finfo(scheme.scale_dtype).smallest_normal
    return scale.to(scheme.scale_dtype).clamp(min=smallest).to(torch.float32 if scale.dtype != torch.float64 else torch.float64)


def quantize(x: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Return the codes of x; scale and zero point have the granularity's shape."""
    if scale is None:
        return scheme.format.encode(x)
    shape = tuple(x.shape)
    values = x / scheme.granularity.expand(scale, shape)
    if zero_point is None:
        return scheme.format.encode(values)
    return scheme.format.encode(values.round() + scheme.granularity.expand(zero_point, shape))


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None, scheme: Scheme, table: torch.Tensor | None = None
) -> torch.Tensor:
    """Return scale * (decode(code) - zero_point) in the scale's dtype, float32 without one; with a table, the codes are places in it."""
    if scale is None:
        return scheme.format.decode(codes)
    granularity = scheme.granularity
    apart = (isinstance(granularity, Channel) and granularity.axis == 0) or (isinstance(granularity, Group) and granularity.axis == -1)
    if codes.ndim != 2 or codes.numel() <= _AT_ONCE or not apart or table is not None:
        return _dequantize(codes, scale, zero_point, scheme, table)
    values, rows = torch.empty(codes.shape, dtype=scale.dtype), max(_AT_ONCE // codes.shape[1], 1)
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        values[part] = _dequantize(codes[part], scale[part], None if zero_point is None else zero_point[part], scheme, None)
    return values


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme, table: torch.Tensor | None
) -> torch.Tensor:
    shape = tuple(codes.shape)
    values = decode(codes, scheme, table, scale.dtype)
    if zero_point is not None:
        values = values - scheme.granularity.expand(zero_point, shape).to(scale.dtype)
    return values * scheme.granularity.expand(scale, shape)


def decode(codes: torch.Tensor, scheme: Scheme, table: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of codes in units of the scale, by the format or by the tensor's own table."""
    return scheme.format.decode(codes, dtype) if table is None else look_up(codes, table, dtype)


def quantize_dynamic(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return codes, scale and zero point of x with the scale taken from x itself (min and max of each granule)."""
    if not scheme.format.scaled:
        return scheme.format.encode(x), None, None
    scale, zero_point = choose_scale(*scheme.granularity.reduce_range(x), scheme)
    return quantize(x, scale, zero_point, scheme), scale, zero_point


def quantize_tensor(x: torch.Tensor, scheme: Scheme) -> Quantized:
    """Return x rounded to the nearest codes, ranges from its own minimum and maximum."""
    return Quantized(*quantize_dynamic(x, scheme), scheme)


__all__ = ["SMALLEST_SCALE", "Quantized", "choose_scale", "decode", "dequantize", "quantize", "quantize_dynamic", "quantize_tensor"]

"""Formats, granularities, schemes: how tensors are coded, and what that costs."""

from qcompile.formats.format import Format, parse_format, register_family
from qcompile.formats.granularity import Block, Channel, Granularity, Group, Tensor, Token, parse_granularity
from qcompile.formats.integer import Integer
from qcompile.formats.packing import bits_per_weight, pack, stored_bytes, unpack
from qcompile.formats.quantize import Quantized, choose_scale, dequantize, quantize, quantize_dynamic, quantize_tensor
from qcompile.formats.scheme import LayerScheme, Scheme, parse_layer_scheme, parse_scheme

__all__ = [
    "Block", "Channel", "Format", "Granularity", "Group", "Integer", "LayerScheme", "Quantized", "Scheme", "Tensor", "Token",
    "bits_per_weight", "choose_scale", "dequantize", "pack", "parse_format", "parse_granularity", "parse_layer_scheme",
    "parse_scheme", "quantize", "quantize_dynamic", "quantize_tensor", "register_family", "stored_bytes", "unpack",
]  # fmt: skip

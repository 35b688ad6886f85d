"""Formats, granularities, schemes: how tensors are coded, and what that costs."""

from qcompile.formats.bfloat16 import BFloat16
from qcompile.formats.format import Format, parse_format, register_family
from qcompile.formats.granularity import Block, Channel, Granularity, Group, Tensor, Token, parse_granularity
from qcompile.formats.integer import Integer
from qcompile.formats.lookup import Codebook, Lookup, NormalFloat, check_table
from qcompile.formats.packing import bits_per_weight, pack, stored_bytes, unpack
from qcompile.formats.pyramid import Pyramid
from qcompile.formats.quantize import Quantized, choose_scale, decode, dequantize, quantize, quantize_dynamic, quantize_tensor
from qcompile.formats.scheme import LayerScheme, Scheme, parse_layer_scheme, parse_scheme
from qcompile.formats.ternary import Ternary

__all__ = [
    "BFloat16", "Block", "Channel", "Codebook", "Format", "Granularity", "Group", "Integer", "LayerScheme", "Lookup", "NormalFloat",
    "Pyramid", "Quantized", "Scheme", "Tensor", "Ternary", "Token", "bits_per_weight", "check_table", "choose_scale", "decode",
    "dequantize", "pack", "parse_format", "parse_granularity", "parse_layer_scheme", "parse_scheme", "quantize",
    "quantize_dynamic", "quantize_tensor", "register_family", "stored_bytes", "unpack",
]  # fmt: skip

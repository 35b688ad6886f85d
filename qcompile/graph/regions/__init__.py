"""Structure found in a graph from its operators alone, never from model names: scale edges, residual streams, attention, repeated blocks."""

from qcompile.graph.regions.bias import add_to_bias, column_sums, shift_bias, tap_sums
from qcompile.graph.regions.scale import Consumer, ScaleEdge, column_factors, divide_channels, scale_columns, scale_edges, tensor_of

__all__ = [
    "Consumer", "ScaleEdge", "add_to_bias", "column_factors", "column_sums", "divide_channels", "scale_columns", "scale_edges", "shift_bias",
    "tap_sums", "tensor_of",
]  # fmt: skip

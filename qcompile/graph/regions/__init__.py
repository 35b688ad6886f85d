"""Structure found in a graph from its operators, never from model names: scale edges, residual streams, attention, repeated blocks."""

from qcompile.graph.regions.attention import AttentionRegion, attention_regions
from qcompile.graph.regions.bias import add_to_bias, column_sums, shift_bias, tap_sums
from qcompile.graph.regions.blocks import Block, repeated_blocks, sweep_regions
from qcompile.graph.regions.orthogonal import orthogonal_matrix
from qcompile.graph.regions.residual import NormRead, ResidualStream, residual_streams
from qcompile.graph.regions.rotation import fold_affine, map_inputs, map_outputs
from qcompile.graph.regions.scale import Consumer, ScaleEdge, column_factors, divide_channels, scale_columns, scale_edges, tensor_of

__all__ = [
    "AttentionRegion", "Block", "Consumer", "NormRead", "ResidualStream", "ScaleEdge", "add_to_bias", "attention_regions",
    "column_factors", "column_sums", "divide_channels", "fold_affine", "map_inputs", "map_outputs", "orthogonal_matrix",
    "repeated_blocks", "residual_streams", "scale_columns", "scale_edges", "shift_bias", "sweep_regions",
    "tap_sums", "tensor_of",
]  # fmt: skip

"""The graph: FX and the qc dialect, their text form, rewriting, and the structure found in them."""

from qcompile.graph import code_operators, dialect  # noqa: F401  register the qc operators
from qcompile.graph.graph import Graph, tensor_digest
from qcompile.graph.quantizer import Quantizer
from qcompile.graph.stage import Stage
from qcompile.graph.text import parse_graph, print_graph
from qcompile.graph.types import TensorType, parse_tensor_type

__all__ = ["Graph", "Quantizer", "Stage", "TensorType", "parse_graph", "parse_tensor_type", "print_graph", "tensor_digest"]

"""What stored weights must be for their scheme to give them a meaning: checked wherever a graph is read from a file."""

from __future__ import annotations

import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import check_table, parse_scheme
from qcompile.graph.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name

# Operators over packed codes -> names of their arguments: codes, scheme, and the table that the codes are places in.
_STORED = {
    "qc.linear": ("weight", "weight_scheme", "weight_table"),
    "qc.conv2d": ("weight", "weight_scheme", ""),
    "qc.embedding": ("weight", "scheme", ""),
    "qc.dequantize": ("codes", "scheme", "table"),
}


def check_stored(graph: Graph) -> None:
    """Check the bytes and tables of every stored weight.

    Raises:
        Refused: naming the operator whose codes are bytes that mean nothing in its scheme, or whose table is none.
    """
    for node in graph.nodes:
        if node.op == "call_function" and operator_name(node.target) in _STORED:
            try:
                _check(graph, node)
            except ValueError as error:
                raise Refused(str(error), node=node.name, operator=operator_name(node.target)) from error


def _check(graph: Graph, node: fx.Node) -> None:
    arguments = bound_arguments(node)
    codes_name, scheme_name, table_name = _STORED[operator_name(node.target)]
    codes, format = graph.constant(arguments[codes_name]), parse_scheme(arguments[scheme_name]).format
    if codes is not None:
        format.check_packed(codes)
    table = arguments.get(table_name)
    if table is None:
        return
    value = graph.constant(table)
    if value is None:
        raise ValueError("the table of a weight is not a constant")
    check_table(value, format, int(arguments[codes_name].meta["val"].shape[0]))

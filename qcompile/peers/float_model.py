"""The float model as every peer gets it: folded and fused as this project's own ``float`` recipe does, and as an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qcompile.graph import Graph
from qcompile.registry import find_target


def folded(graph: Graph, inputs: Sequence[torch.Tensor]) -> Graph:
    """Return the graph after the ``float`` recipe: a peer gets no worse a graph than this project's own float path."""
    from qcompile.pipeline import Context
    from qcompile.recipe import load_recipe

    result = graph.copy()
    load_recipe("float").parsed_pipeline().run(result, Context(find_target("reference"), example_inputs=inputs))
    return result


def onnx_file(graph: Graph, inputs: Sequence[torch.Tensor], folder: Path) -> Path:
    """Return the path of the float model in ONNX, written once for a folder."""
    path = folder / "float.onnx"
    if not path.exists():
        path.write_bytes(find_target("onnx").export(folded(graph, inputs)))
    return path

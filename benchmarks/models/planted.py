"""Outlier channels for models that have none: small language models seldom grow them, and smoothing and rotation are for them."""

from __future__ import annotations

import torch

from qcompile.graph import Graph
from qcompile.graph.regions import divide_channels, scale_edges

OUTLIERS, FACTOR = 4, 30.0


def plant_outliers(graph: Graph) -> None:
    """Multiply four channels of every normalization by 30 and divide what reads them: the function stays."""
    for edge in scale_edges(graph):
        if edge.kind == "norm":
            scale = torch.ones(edge.channels, dtype=torch.float64)
            scale[torch.randperm(edge.channels, generator=torch.Generator().manual_seed(0))[:OUTLIERS]] = 1 / FACTOR
            divide_channels(graph, edge, scale)

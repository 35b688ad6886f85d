"""This project's own float path: no peer, but the measure of what quantization itself gains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qcompile.graph import Graph
from qcompile.peers import Run
from qcompile.peers.float_model import folded
from qcompile.registry import find_target


def prepare_float(graph: Graph, inputs: Sequence[torch.Tensor], folder: Path) -> Graph:
    """Return the folded graph."""
    return folded(graph, inputs)


def load(graph: Graph, threads: int) -> Run:
    """Return the graph built for the target ``cpu``."""
    return find_target("cpu").build(graph, threads=threads)

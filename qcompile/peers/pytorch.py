"""PyTorch in float32, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qcompile.graph import Graph
from qcompile.peers import Run

Module = Callable[..., Any]


def prepare_eager(graph: Graph, inputs: Sequence[torch.Tensor], folder: Path) -> Module:
    """Return the graph as a module."""
    return graph.module


def prepare_compiled(graph: Graph, inputs: Sequence[torch.Tensor], folder: Path) -> Module:
    """Return the module compiled for the inputs' shapes; the first call takes its time."""
    return torch.compile(graph.module, dynamic=False)


def load(module: Module, threads: int) -> Run:
    """Return a function that runs the module without gradients."""

    def run(values: Sequence[torch.Tensor]) -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return module(*values)

    return run

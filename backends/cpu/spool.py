"""Packed constants that wait on disk until all of them are packed.

Where a graph's weights lie in files, its packed ones would be the one thing in memory that grows with the model: they go to files as
they come, and are read once, to the place where kernels read them (``memory.place``), or copied to the cache of built code.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx

from qcompile.files import cache_folder
from qcompile.graph.file_tensor import LARGE, FileTensor, TensorFile, in_memory
from qcompile.graph.graph import attribute


def keeper(graph_module: fx.GraphModule) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what ``translate`` keeps the constants of a graph with: in files if the graph's are, else in memory."""
    targets = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    return _put_away if any(isinstance(attribute(graph_module, target), FileTensor) for target in targets) else in_memory


def _put_away(tensor: torch.Tensor) -> torch.Tensor:
    """Return a large tensor as one in a file that lives as long as it does, a small one as it is; so too where the disk is full."""
    if isinstance(tensor, FileTensor) or tensor.nbytes < LARGE:
        return tensor
    try:
        # Not in the folder for temporary files: that one may lie in memory.
        handle, name = tempfile.mkstemp(dir=cache_folder(), prefix=".packed.")
    except OSError:
        return tensor
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        kept = FileTensor(TensorFile.of(Path(name)), 0, tensor.dtype, tuple(tensor.shape), tensor.dtype)
    except OSError:
        os.unlink(name)
        return tensor
    weakref.finalize(kept, _remove, name)
    return kept


def _remove(name: str) -> None:
    Path(name).unlink(missing_ok=True)

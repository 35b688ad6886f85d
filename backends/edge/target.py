"""Declaration of the ``edge`` target: folders of C for the processors of ``processors.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from qcompile.backends.edge.boards import find_board
from qcompile.backends.edge.processors import find_processor

from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.target import Executable, Kernel, MemoryLimits, Target

if TYPE_CHECKING:
    from qcompile.arena.from_graph import Kernels

DEFAULT_PROCESSOR = "x86-64"
_CODES = "codes to codes in fixed point"


class EdgeTarget(Target):
    """C for one processor. What it computes is the same on all: the meaning of the integer graph, bit for bit."""

    summary = "C for boards and microcontrollers: no heap, no runtime, one arena of known size; edge:cortex-m4, edge:riscv32imc, .."
    writes_folder = True
    kernels = (
        Kernel("qc.linear", (1, 2, 3, 4, 5, 6, 7, 8), ("tensor", "channel"), "static", f"{_CODES}; weights stored in 2, 4 or 8 bits"),
        Kernel("qc.conv2d", (1, 2, 3, 4, 5, 6, 7, 8), ("tensor", "channel"), "static", f"{_CODES}; dense as linear, depthwise in 8 bits"),
        Kernel(
            "qc.linear", (1, 2, 3, 4, 5, 6, 7, 8), ("tensor", "channel"), "dynamic", "codes with a scale for each token, float32 results"
        ),
        Kernel("qc.embedding", (4, 8), ("channel",), "float", "rows dequantized while they are gathered"),
    )

    def __init__(self, processor: str = DEFAULT_PROCESSOR, limits: MemoryLimits | None = None, *, named: bool = False) -> None:
        self.processor = find_processor(processor)
        self.memory_limits = limits or MemoryLimits()
        self.name = f"edge:{processor}" if named else "edge"

    def variant(self, name: str) -> Target:
        return EdgeTarget(name, self.memory_limits, named=True)

    def with_limits(self, limits: MemoryLimits) -> Target:
        named, processor = self.name != "edge", self.processor.name
        if limits.board:
            board = find_board(limits.board)
            if named and board.processor != processor:
                raise Refused(f"board {board.name} has a {board.processor}, not a {processor}", way_out=f"--target edge:{board.processor}")
            named, processor = True, board.processor
            limits = replace(limits, arena=limits.arena or board.ram_bytes, flash=limits.flash or board.flash_bytes)
        return EdgeTarget(processor, limits, named=named)

    def memory(self) -> Kernels:
        from qcompile.backends.edge.overlaps import kernels_of_nodes

        return kernels_of_nodes(dsp="dsp" in self.processor.features)

    def build(self, graph: Graph, *, threads: int | None = None) -> Executable:
        """Return the same C, compiled for this machine: one thread, whatever is asked for."""
        from qcompile.backends.edge.hosted import Hosted

        return Hosted(graph, self.processor.features)

    def write_folder(self, graph: Graph, golden: Sequence[torch.Tensor], folder: Path, *, name: str = "model") -> dict[str, Any]:
        from qcompile.backends.edge.folder import write_folder

        return write_folder(graph, golden, folder, self.processor, self.memory_limits, self.name, name)

    def verify_folder(self, folder: Path, *, sanitize: bool = False) -> dict[str, Any]:
        from qcompile.backends.edge.verification import verify_folder

        return verify_folder(folder, sanitize=sanitize)


TARGET = EdgeTarget()

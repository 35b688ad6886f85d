"""Declaration of the ``edge`` target: folders of C for the processors of ``processors.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.target import Executable, Target


class EdgeTarget(Target):
    """Writes folders of C, which run on the processor that they are for."""

    name = "edge"
    summary = "C for boards and microcontrollers, run under QEMU"

    def build(self, graph: Graph, *, threads: int | None = None) -> Executable:
        raise Refused("target edge runs nothing on this machine", way_out="qcompile verify FOLDER --qemu runs what was compiled")

    def verify_folder(self, folder: Path, *, sanitize: bool = False) -> dict[str, Any]:
        from qcompile.backends.edge.verification import verify_folder

        return verify_folder(folder, sanitize=sanitize)


TARGET = EdgeTarget()

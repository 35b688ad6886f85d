"""Declaration of the reference target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcompile.formats import LayerScheme
from qcompile.graph import Graph
from qcompile.target import Executable, Kernel, Target

_ALL_BITS = tuple(range(1, 9))
_FORMATS = ("int", "ternary", "nf", "codebook", "pvq")


class ReferenceTarget(Target):
    """Runs every legal graph by the meaning of its operators."""

    name = "reference"
    summary = "PyTorch interpreter of the operators' meanings; slow, defines correctness"
    kernels = (
        *(
            Kernel(operator, _ALL_BITS, ("tensor", "channel", "group", "block"), activation, "meaning in PyTorch", _FORMATS)
            for operator in ("qc.linear", "qc.conv2d", "qc.embedding", "qc.matmul")
            for activation in ("static", "dynamic", "float")
        ),
        Kernel("qc.attention_codes", (), (), "static", "meaning in PyTorch", ()),
        *(
            Kernel(operator, (16,), ("none",), activation, "meaning in PyTorch", ("bf16",))
            for operator in ("qc.linear", "qc.conv2d", "qc.embedding")
            for activation in ("bf16", "float")
        ),
    )

    def supports(self, operator: str, scheme: LayerScheme) -> str | None:
        return None

    def build(self, graph: Graph, *, threads: int | None = None) -> Executable:
        return _Interpreter(graph, threads)


class _Interpreter:
    def __init__(self, graph: Graph, threads: int | None) -> None:
        self.graph, self.threads = graph, threads

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            return list(self.graph(*inputs))
        finally:
            torch.set_num_threads(before)


TARGET = ReferenceTarget()

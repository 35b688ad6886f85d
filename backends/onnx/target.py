"""Declaration of the ``onnx`` target: a QDQ model that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcompile.formats import LayerScheme
from qcompile.graph import Graph
from qcompile.target import Executable, Kernel, Target

_ALL_BITS = tuple(range(1, 9))


class OnnxTarget(Target):
    """Exports to standard ONNX (opset 21, QuantizeLinear and DequantizeLinear) and runs it in ONNX Runtime."""

    name = "onnx"
    summary = "QDQ export (opset 21), run in ONNX Runtime"
    kernels = tuple(
        Kernel(operator, _ALL_BITS, ("tensor", "channel", "group"), activation, "DequantizeLinear, float operator, QuantizeLinear")
        for operator in ("qc.linear", "qc.conv2d", "qc.embedding")
        for activation in ("static", "dynamic", "float")
    )

    def supports(self, operator: str, scheme: LayerScheme) -> str | None:
        """Every scheme has a QDQ form; which of them ONNX Runtime runs in integers is its own choice."""
        return None

    def export(self, graph: Graph) -> bytes:
        """Return the graph as the bytes of a checked ONNX model.

        Raises:
            Refused: naming the node whose operator has no ONNX form.
        """
        from qcompile.backends.onnx.export import export_onnx

        return export_onnx(graph).SerializeToString(deterministic=True)

    def build(self, graph: Graph, *, threads: int | None = None) -> Executable:
        from qcompile.backends.onnx.export import export_onnx
        from qcompile.backends.onnx.runner import OnnxRunner

        runner = OnnxRunner(export_onnx(graph), threads=threads or 0)

        def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.as_tensor(output) for output in runner(*inputs)]

        return run


TARGET = OnnxTarget()

"""Declaration of the ``onnx`` target: models for ONNX Runtime, as QDQ or with exact integer products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcompile.formats import LayerScheme
from qcompile.graph import Graph
from qcompile.target import Executable, Kernel, Target

_ALL_BITS = tuple(range(1, 9))
_FORMATS = ("int", "ternary", "nf", "codebook", "pvq")


class OnnxTarget(Target):
    """Exports to standard ONNX (opset 21) and runs it in ONNX Runtime.

    A file is written in the form ``qdq``, which runtimes fuse as they like, unless the form is given. What runs here has the form
    ``integer``: its codes are those of the reference.
    """

    name = "onnx"
    summary = "ONNX export (opset 21) as QDQ or exact integers, run in ONNX Runtime"
    kernels = tuple(
        Kernel(operator, _ALL_BITS, ("tensor", "channel", "group"), activation, summary, _FORMATS)
        for operator, integer, plain in (
            ("qc.linear", "MatMulInteger; ", "DequantizeLinear, MatMul, QuantizeLinear"),
            ("qc.conv2d", "ConvInteger; ", "DequantizeLinear, Conv, QuantizeLinear"),
            ("qc.embedding", "", "Gather of codes, dequantized"),
        )
        for activation, summary in (("static", integer + plain), ("dynamic", integer + plain), ("float", plain))
    )

    def supports(self, operator: str, scheme: LayerScheme) -> str | None:
        """Every scheme with a scale has a form; products that are not of integers are named in the exported model."""
        without = next((s for s in (scheme.weight, scheme.activation) if s is not None and not s.format.scaled), None)
        return None if without is None else f"onnx has no form of {without.format}: few runtimes multiply it; the target cpu does"

    def export(self, graph: Graph, form: str = "qdq") -> bytes:
        """Return the graph as the bytes of a checked ONNX model of the form ``qdq`` or ``integer``.

        Raises:
            Refused: naming the node whose operator has no ONNX form.
        """
        from qcompile.backends.onnx.export import export_onnx

        return export_onnx(graph, form).SerializeToString(deterministic=True)

    def build(self, graph: Graph, *, threads: int | None = None, form: str = "integer") -> Executable:
        from qcompile.backends.onnx.export import export_onnx
        from qcompile.backends.onnx.runner import OnnxRunner

        runner = OnnxRunner(export_onnx(graph, form), threads=threads or 0)

        def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.as_tensor(output) for output in runner(*inputs)]

        return run


TARGET = OnnxTarget()

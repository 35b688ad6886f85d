"""The ``onnx`` target: export to QDQ models, and running them in ONNX Runtime."""

from qcompile.backends.onnx.export import export_onnx
from qcompile.backends.onnx.runner import OnnxRunner

__all__ = ["OnnxRunner", "export_onnx"]

"""The ``onnx`` target: export to QDQ models, and running them in ONNX Runtime. Loading it loads neither."""

from qcompile.backends.onnx.target import TARGET, OnnxTarget

__all__ = ["TARGET", "OnnxTarget"]

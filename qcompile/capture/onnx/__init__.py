"""Capture of ONNX: files, bytes and model protos become graphs of ATen and qc operators."""

from qcompile.capture.onnx.importer import capture_onnx

__all__ = ["capture_onnx"]

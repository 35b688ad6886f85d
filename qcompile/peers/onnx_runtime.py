"""ONNX Runtime: float32, and quantized by its own tools. Calibration is on the inputs of the timing: fit for times, not for accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qcompile.peers import Run


def load(path: Path, threads: int) -> Run:
    """Return a session of a model file with all of its optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda values: session.run(None, {name: np.asarray(value) for name, value in zip(names, values, strict=True)})


def prepare_float(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Return the float model's path."""
    from qcompile.peers.float_model import onnx_file

    return onnx_file(graph, inputs, folder)


def prepare_dynamic(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Quantize as ``quantize_dynamic`` does by default, weights as int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    result = folder / "onnxruntime-dynamic.onnx"
    quantize_dynamic(prepare_float(graph, inputs, folder), result, weight_type=QuantType.QInt8)
    return result


def prepare_static(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Quantize to QDQ: uint8 activations and int8 weights by channel, the pair with its fastest kernels on x86-64."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = [node.name for node in graph.inputs]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{name: np.asarray(value) for name, value in zip(names, inputs, strict=True)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    result = folder / "onnxruntime-static.onnx"
    if not result.exists():
        source = prepare_float(graph, inputs, folder)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, result, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return result


def prepare_int4(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Quantize the weights of matrix products to symmetric int4 in groups of 32, multiplied with int8 activations."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    result = folder / "onnxruntime-int4.onnx"
    quantizer = MatMulNBitsQuantizer(
        onnx.load(prepare_float(graph, inputs, folder)), bits=4, block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(result))
    return result

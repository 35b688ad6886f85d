"""OpenVINO: float32, int8 by NNCF, int8 from ONNX Runtime's static QDQ; models fixed to the shapes of the timing, its fastest way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from qcompile.peers import Run

_FLOAT = "float"  # a model file whose name begins so runs in float32; any other as OpenVINO chooses


def load(path: Path, threads: int) -> Run:
    """Return a request of a model compiled for the latency of one call."""
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if path.name.startswith(_FLOAT):
        options["INFERENCE_PRECISION_HINT"] = "f32"  # it would take bfloat16 where the processor has it
    request = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", options).create_infer_request()
    return lambda values: request.infer([np.asarray(value) for value in values], share_inputs=True, share_outputs=True)


def _read(source: Path, inputs: Sequence[Any]) -> Any:
    model = openvino.Core().read_model(source)
    model.reshape({port: list(value.shape) for port, value in zip(model.inputs, inputs, strict=True)})
    return model


def _written(model: Any, path: Path) -> Path:
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def prepare_float(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Write the float model in OpenVINO's own format."""
    from qcompile.peers.float_model import onnx_file

    return _written(_read(onnx_file(graph, inputs, folder), inputs), folder / f"{_FLOAT}.xml")


def prepare_nncf(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Quantize with NNCF, as a transformer where the model has attention; calibrated on the inputs of the timing."""
    import nncf

    from qcompile.peers.float_model import onnx_file

    attention = any("attention" in str(node.target) for node in graph.nodes)
    model = _read(onnx_file(graph, inputs, folder), inputs)
    data = nncf.Dataset([[np.asarray(value) for value in inputs]])
    kind = nncf.ModelType.TRANSFORMER if attention else None
    return _written(nncf.quantize(model, data, subset_size=1, model_type=kind), folder / "nncf.xml")


def prepare_qdq(graph: Any, inputs: Sequence[Any], folder: Path) -> Path:
    """Let OpenVINO run what ONNX Runtime's static quantization made."""
    from qcompile.peers.onnx_runtime import prepare_static

    return _written(_read(prepare_static(graph, inputs, folder), inputs), folder / "qdq.xml")

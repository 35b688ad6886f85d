"""Other runtimes, set up on the float model that an artifact was compiled from, to be timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.nearest import nearest_name
from qcompile.registry import find_target

Run = Callable[[Sequence[torch.Tensor]], Any]


def make_peer(name: str, graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    """Return a function that runs the float graph in another runtime.

    Raises:
        Refused: an unknown name, or a package that is not installed.
    """
    if name not in PEERS:
        raise Refused(f"unknown runtime '{name}'", way_out=nearest_name(name, PEERS))
    try:
        return PEERS[name](graph, inputs, threads)
    except ImportError as error:
        raise Refused(f"{name} is not installed", way_out="pip install qcompile[bench]") from error


def _torch(graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    module = graph.module

    def run(values: Sequence[torch.Tensor]) -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return module(*values)

    return run


def _qcompile_float(graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    return find_target("cpu").build(_folded(graph, inputs), threads=threads)


def _onnx_model(graph: Graph, inputs: Sequence[torch.Tensor]) -> bytes:
    return find_target("onnx").export(_folded(graph, inputs))


def _folded(graph: Graph, inputs: Sequence[torch.Tensor]) -> Graph:
    """Return the graph folded and fused as the ``float`` recipe does: a peer gets no worse a graph than this project's own float path."""
    from qcompile.pipeline import Context
    from qcompile.recipe import load_recipe

    folded = graph.copy()
    load_recipe("float").parsed_pipeline().run(folded, Context(find_target("reference"), example_inputs=inputs))
    return folded


def _session(model: bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda values: session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})


def _onnxruntime(graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    return _session(_onnx_model(graph, inputs), threads)


def _onnxruntime_dynamic(graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    """ONNX Runtime's own dynamic quantization: int8 weights by tensor, as ``quantize_dynamic`` does by default."""
    import tempfile
    from pathlib import Path

    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(_onnx_model(graph, inputs))
        quantize_dynamic(source, result, weight_type=QuantType.QInt8)
        return _session(result.read_bytes(), threads)


def _onnxruntime_static(graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    """ONNX Runtime's own static QDQ quantization, calibrated on the inputs of the timing: fit for times, not for accuracy."""
    import tempfile
    from pathlib import Path

    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    names = [node.name for node in graph.inputs]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{name: value.numpy() for name, value in zip(names, inputs, strict=True)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(_onnx_model(graph, inputs))
        quantize_static(source, result, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return _session(result.read_bytes(), threads)


def _openvino(graph: Graph, inputs: Sequence[torch.Tensor], threads: int) -> Run:
    import io

    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(io.BytesIO(_onnx_model(graph, inputs))), "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    return lambda values: request.infer([value.numpy() for value in values])


PEERS: dict[str, Callable[[Graph, Sequence[torch.Tensor], int], Run]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "onnxruntime-int8": _onnxruntime_dynamic,
    "onnxruntime-static-int8": _onnxruntime_static,
    "openvino": _openvino,
    "qcompile-float": _qcompile_float,
}

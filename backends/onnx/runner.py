"""Running of exported models in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from qcompile.errors import Refused

_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

Array = torch.Tensor | np.ndarray[Any, Any]


class OnnxRunner:
    """A model loaded into ONNX Runtime on the CPU.

    Args:
        model: the model, or the path of its file.
        optimization: how far ONNX Runtime rewrites the graph: ``disabled``, ``basic`` (no change of numbers), ``extended`` or ``all``.
        threads: threads of one operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        Refused: ONNX Runtime does not take the model.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str], *, optimization: str = "basic", threads: int = 0) -> None:
        if optimization not in _LEVELS:
            raise Refused(f"unknown optimization '{optimization}'", way_out=f"known are {', '.join(_LEVELS)}")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = _LEVELS[optimization]
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Weights of few bits are multiplied in float32: level 4 would round activations to int8 behind the reader's back.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise Refused(f"ONNX Runtime does not take the model: {str(error).splitlines()[0]}") from error
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.output_names = [value.name for value in self.session.get_outputs()]

    def __call__(self, *inputs: Array, **named: Array) -> tuple[Array, ...]:
        """Run the model; torch tensors in give torch tensors out, NumPy arrays give NumPy arrays."""
        feeds: Mapping[str, Array] = dict(zip(self.input_names, inputs, strict=False)) | named
        if set(feeds) != set(self.input_names) or len(inputs) > len(self.input_names):
            raise Refused(f"the model takes {', '.join(self.input_names)}, not {', '.join(feeds)}")
        as_torch = any(isinstance(value, torch.Tensor) for value in feeds.values())
        arrays = {name: value.detach().numpy() if isinstance(value, torch.Tensor) else value for name, value in feeds.items()}
        results = self.session.run(None, arrays)
        return tuple(torch.from_numpy(np.array(result)) for result in results) if as_torch else tuple(results)

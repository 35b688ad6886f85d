"""Write a model of this folder as an .onnx file, such as ``python benchmarks/models/onnx_file.py resnet20.py:resnet20 resnet20.onnx``."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
from torch import nn


def write(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    """Write a module as ONNX opset 17 with a symbolic batch; batch normalisation is folded by the exporter, as in files from the wild.

    It is the older of torch's two exporters: the newer one needs one more package, and most files in circulation came from this one.
    """
    names = [f"input{i}" for i in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the choice of exporter is deliberate, see above
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)  # a slice with a step stays a node
        torch.onnx.export(
            module,
            inputs,
            str(path),
            opset_version=17,
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "output"]},
            dynamo=False,
        )


def main() -> None:
    """Write FILE:FUNCTION to PATH."""
    if len(sys.argv) != 3:
        raise SystemExit("use: onnx_file.py FILE:FUNCTION PATH")
    file, _, function = sys.argv[1].partition(":")
    spec = importlib.util.spec_from_file_location("model", Path(__file__).parent / file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    write(*getattr(source, function)()[:2], Path(sys.argv[2]))


if __name__ == "__main__":
    main()

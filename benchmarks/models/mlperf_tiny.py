"""Three networks of MLPerf Tiny from the float .tflite files of its reference models, batch normalization folded (Banbury et al. 2021).

- ``resnet8``: input f32[batch,3,32,32], pixels 0 to 255, output f32[batch,10]. Float top-1 on the CIFAR-10 JPEG test pictures: 76.2 %.
- ``vww``: MobileNetV1 x 0.25, a person or none; input f32[batch,3,96,96], pixels over 255, output f32[batch,2].
- ``autoencoder``: of machine sounds, ten dense layers; input f32[batch,640], log mel energies, output f32[batch,640].

A softmax at the end is left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

Model = tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]


def _beside(name: str) -> ModuleType:
    """Return a file of this folder: the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _network(name: str, shape: tuple[int, ...], low: float, high: float) -> Model:
    data = Path(os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    tflite = _beside("tflite_file")
    net = tflite.Network(tflite.read(data / "mlperf_tiny" / name))
    example = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    return net.eval(), (example,), [{0: "batch"}]


def resnet8() -> Model:
    """Return the net and one example input; the batch is dynamic."""
    return _network("pretrainedResnet.tflite", (3, 32, 32), 0, 255)


def vww() -> Model:
    """Return the net and one example input; the batch is dynamic."""
    return _network("vww_96_float.tflite", (3, 96, 96), 0, 1)


def autoencoder() -> Model:
    """Return the net and one example input; the batch is dynamic."""
    return _network("ad01_fp32.tflite", (640,), -40, 10)


def pictures(size: int = 250, split: str = "test", count: int | None = None, step: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield CIFAR-10 as ``resnet8`` reads it: f32[n,3,32,32] of pixels 0 to 255, and labels i64[n]."""
    data = _beside("data")
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in (data.CIFAR10_MEAN, data.CIFAR10_DEVIATION))
    for batch, labels in data.cifar10_batches(size, split, count, step):
        yield ((batch * deviation + mean) * 255).round(), labels

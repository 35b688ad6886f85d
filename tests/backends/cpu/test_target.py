"""What the CPU target says of a built model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qcompile
from qcompile.verification import verify


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "float"])
def test_every_layer_has_a_time(tiny_artifact: Any, recipe: str) -> None:
    artifact = tiny_artifact("two", recipe, "cpu")
    times = artifact.executable.layer_times(artifact.golden_inputs)
    assert sorted(times) == sorted(layer["node"] for layer in artifact.report["layers"])
    assert {layer["op"].partition(".")[2] for layer in artifact.report["layers"]} == {"embedding", "linear"}
    assert all(milliseconds > 0 for milliseconds in times.values())


@pytest.mark.parametrize("weight", ["int1 channel=0 sym", "int4 channel=0 sym", "uint4 channel=0 affine", "int7 tensor sym"])
def test_convolutions_with_weights_of_few_bits(tiny: Any, weight: str) -> None:
    net, (x,), _ = tiny.cnn()
    layers = f"assign-bits{{scheme='weight={weight}; activation=uint8 tensor affine'}},insert-quantizers,quantize-weights,materialize"
    batches = [(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]
    artifact = qcompile.compile(net, (x,), recipe=f"canonicalize,fold-batch-norm,{layers},fuse-epilogue", calibration=batches)
    assert {layer["weight"] for layer in artifact.report["layers"] if layer["op"] == "qc.conv2d"} == {weight}
    found = verify(artifact)
    assert found["ok"], found

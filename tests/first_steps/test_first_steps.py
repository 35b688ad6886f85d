"""Thirty seconds: the main ways in. Read this file to learn how the project is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import qcompile
from qcompile.graph import parse_graph, print_graph, tensor_digest


def test_compile_save_load_call(tiny: ModuleType, tmp_path: Path) -> None:
    module, examples, sizes = tiny.mlp()
    batches = [(torch.randn(8, 8),) for _ in range(4)]
    artifact = qcompile.compile(module, examples, recipe="w8a8", target="reference", calibration=batches, dynamic_shapes=sizes)
    artifact.save(tmp_path / "model.qc")
    x = torch.randn(5, 8)
    y = qcompile.load(tmp_path / "model.qc")(x.numpy())
    assert isinstance(y, np.ndarray)
    with torch.no_grad():
        error = float((torch.from_numpy(y) - module(x)).norm() / module(x).norm())
    assert 0 < error < 0.05  # two layers of 8 bits; random data beyond the calibrated range is clipped


def test_the_command_line(repository: Path, tmp_path: Path) -> None:
    model = f"python:{repository / 'tests' / 'tiny_models.py'}:mlp"
    command = [
        sys.executable,
        "-m",
        "qcompile.cli",
        "compile",
        model,
        "--recipe",
        "w8a8-dynamic",
        "--target",
        "reference",
        "-o",
        "model.qc",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 layers in low bits" in done.stdout
    assert "Warning" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.qc"]


@dataclass(frozen=True)
class HalveWeights(qcompile.Pass):
    """Multiply every linear layer's weight."""

    keeps = qcompile.approximately()
    factor: float = 0.5

    def run(self, graph: qcompile.Graph, context: qcompile.Context) -> int:
        layers = [node for node in graph.nodes if node.target == torch.ops.aten.linear.default]
        for node in layers:
            weight = graph.own_constant(node.args[1], node)
            graph.set_constant(weight, graph.constant(weight) * self.factor)
        return len(layers)


def test_a_pass_of_ones_own(tiny: ModuleType) -> None:
    from qcompile.backends.reference.target import ReferenceTarget

    from qcompile.capture import capture

    module, examples, _ = tiny.mlp()
    graph = capture(module, examples).graph
    steps = qcompile.Pipeline((HalveWeights(factor=0.25),)).run(graph, qcompile.Context(ReferenceTarget()))
    assert [(step.text, step.changes) for step in steps] == [("halve-weights{factor=0.25}", 2)]
    with torch.no_grad():
        module.first.weight.mul_(0.25)
        module.second.weight.mul_(0.25)
        assert torch.equal(graph(*examples)[0], module(*examples))


def test_a_graph_is_text(tiny_artifact: Callable[..., qcompile.Artifact]) -> None:
    graph = tiny_artifact("mlp").graph
    text = print_graph(graph)
    assert "qc.linear" in text
    again = parse_graph(text, {tensor_digest(tensor)[:16]: tensor for tensor in graph.tensors})
    assert print_graph(again) == text


def test_what_is_wrong_is_said_in_one_line() -> None:
    with pytest.raises(qcompile.Refused, match=r"unknown recipe 'w8a9'; did you mean 'w8a8'\?"):
        qcompile.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), recipe="w8a9")

"""Packed constants on disk: the same model, and files that are there as long as they are needed."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qcompile.backends.cpu import spool
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.executable import Executable
from safetensors.torch import load_file, save_file

from qcompile import Artifact
from qcompile.graph.file_tensor import FileTensor
from qcompile.safetensors_file import open_path


def packed_files() -> list[Path]:
    return list(Path(os.environ["QCOMPILE_CACHE"]).glob(".packed.*"))


@pytest.fixture
def graph(tiny_artifact: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A graph, its constants in a file, and every packed one large enough to be put away."""
    monkeypatch.setattr(spool, "LARGE", 1)
    graph = tiny_artifact("wide", "w8a8", "cpu").graph.copy()
    nodes = [node for node in graph.nodes if node.op == "get_attr"]
    save_file({node.name: graph.constant(node).clone() for node in nodes}, tmp_path / "constants")  # type: ignore[union-attr]
    for node, tensor in zip(nodes, map(open_path(tmp_path / "constants").__getitem__, [n.name for n in nodes]), strict=True):
        graph.set_constant(node, tensor)
    return graph


def test_constants_wait_in_files_until_the_first_call(graph: Any, tiny_artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = tiny_artifact("wide", "w8a8", "cpu")
    built = build(graph.module, threads=1)
    assert all(isinstance(tensor, FileTensor) for tensor in built._constants.values())
    assert packed_files()
    built.save(tmp_path / "saved")
    expected = build(artifact.graph.module, threads=1)
    held = load_file(tmp_path / "saved" / "constants.safetensors")
    assert {name: tensor.shape for name, tensor in held.items()} == {name: tensor.shape for name, tensor in expected._constants.items()}
    assert all(torch.equal(tensor, expected._constants[name]) for name, tensor in held.items())
    for made in (built, Executable.load(tmp_path / "saved", threads=1)):
        assert torch.equal(made(*artifact.golden_inputs)[0], expected(*artifact.golden_inputs)[0])
    del built, made
    gc.collect()
    assert not packed_files()


def test_where_nothing_can_be_written_constants_stay_in_memory(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "mkstemp", full)
    built = build(graph.module, threads=1)
    assert not packed_files()
    assert not any(isinstance(tensor, FileTensor) and ".packed." in tensor.file.path.name for tensor in built._constants.values())
    assert built(torch.ones(1, 3, dtype=torch.int64))[0].isfinite().all()

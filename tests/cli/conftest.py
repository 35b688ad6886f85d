"""Models and artifacts that the commands are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qcompile
from qcompile.source_notes import remember_source


@pytest.fixture(scope="module")
def python_model(repository: Path) -> Callable[[str], str]:
    return lambda name: f"python:{repository / 'tests' / 'tiny_models.py'}:{name}"


@pytest.fixture(scope="module")
def mlp(python_model: Callable[[str], str]) -> str:
    return python_model("mlp")


@pytest.fixture(scope="module")
def saved(tiny_artifact: Callable[..., qcompile.Artifact], mlp: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose float model is known on this machine."""
    path = tmp_path_factory.mktemp("saved") / "model.qc"
    tiny_artifact("mlp").save(path)
    remember_source(path, mlp)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

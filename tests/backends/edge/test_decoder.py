"""A trained decoder as C: its step continues a text on an emulated Cortex-M4 with the tokens of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.edge


@pytest.fixture
def compile_step(repository: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]) -> Callable[..., Any]:
    monkeypatch.setenv("QCOMPILE_DATA", str(data_folder))
    model = f"python:{repository / 'tests' / 'models' / 'stories260k.py'}:stories260k"
    options = ["--recipe", "w8a8-dynamic", "--target", "edge:cortex-m4", "--calibrate", "random"]
    return lambda context, folder: cli("compile", model, *options, "--context", context, "-o", folder)


def test_tokens_are_those_of_the_reference(compile_step: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path) -> None:
    assert compile_step(48, tmp_path / "out").code == 0
    found = cli("verify", tmp_path / "out", "--qemu", "--json").json
    assert found["ok"], found
    assert (found["cases"], found["equal"]) == (24, 24)
    assert found["arena_high_water"] <= found["arena_bytes"]


def test_a_text_longer_than_the_model_reads_is_refused(compile_step: Callable[..., Any], tmp_path: Path) -> None:
    done = compile_step(100_000, tmp_path / "long")
    assert done.code == 2
    assert "tokens, not 100000" in done.err
    assert not (tmp_path / "long").exists()

"""What the CPU target says of a built model."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "float"])
def test_every_layer_has_a_time(tiny_artifact: Any, recipe: str) -> None:
    artifact = tiny_artifact("two", recipe, "cpu")
    times = artifact.executable.layer_times(artifact.golden_inputs)
    assert sorted(times) == sorted(layer["node"] for layer in artifact.report["layers"])
    assert {layer["op"].partition(".")[2] for layer in artifact.report["layers"]} == {"embedding", "linear"}
    assert all(milliseconds > 0 for milliseconds in times.values())

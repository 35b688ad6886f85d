"""One loaded artifact may be called from many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import qcompile
from qcompile import Artifact

THREADS, CALLS = 8, 6


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("built", [True, False], ids=["built before", "built by the first call"])
def test_eight_threads_get_what_one_gets(tiny_artifact: Callable[..., Artifact], tmp_path: Path, target: str, built: bool) -> None:
    tiny_artifact("cnn").save(tmp_path / "model.qc")
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal((1 + number % 3, 3, 8, 8)).astype(np.float32) for number in range(THREADS * CALLS)]
    alone = qcompile.load(tmp_path / "model.qc", target=target, threads=1)
    expected = [alone(x) for x in inputs]
    shared = alone if built else qcompile.load(tmp_path / "model.qc", target=target, threads=1)
    together = threading.Barrier(THREADS)

    def work(number: int) -> list[np.ndarray]:
        together.wait(timeout=60)
        return [shared(x) for x in inputs[number::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    for number in range(THREADS):
        for a, b in zip(found[number], expected[number::THREADS], strict=True):
            assert np.array_equal(a, b)


def test_threads_that_build_at_once_build_one_executable(tiny_artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    tiny_artifact("mlp").save(tmp_path / "model.qc")
    shared = qcompile.load(tmp_path / "model.qc")
    together = threading.Barrier(THREADS)

    def work(_: int) -> int:
        together.wait(timeout=60)
        return id(shared.executable)

    with ThreadPoolExecutor(THREADS) as pool:
        assert len(set(pool.map(work, range(THREADS)))) == 1


def test_reference_and_cpu_agree_on_integer_codes(tiny_artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    """Every layer bit for bit, the outputs as far as float sums may differ."""
    from qcompile.verification import verify

    tiny_artifact("cnn").save(tmp_path / "model.qc")
    result = verify(qcompile.load(tmp_path / "model.qc", target="cpu", threads=2))
    assert result["ok"], result
    assert len(result["layers"]) == 5
    x = torch.randn(4, 3, 8, 8)
    a, b = (qcompile.load(tmp_path / "model.qc", target=target)(x) for target in ("reference", "cpu"))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)

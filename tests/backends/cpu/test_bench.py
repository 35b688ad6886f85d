"""What the bench says about kernels and the machine: limits that hold together, and counts that agree with a count by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from qcompile.backends.cpu import limits
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.profile import operations, profile

import qcompile
from qcompile.cli.bench import operator_row
from qcompile.target import Limits, OperatorTime


def test_kernels_of_the_limits_do_all_of_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that the compiler dropped would measure nothing: the results are those of the whole loop."""
    monkeypatch.setattr(limits, "ROUNDS", 3)
    monkeypatch.setattr(limits, "READ_BYTES", 2 * 8 * 64 * 5)
    rng, target = np.random.default_rng(0), tvm.target.Target(isa.target_description())

    def run(kernel: tvm.tirx.PrimFunc, x: np.ndarray, results: int = 16) -> np.ndarray:
        out = tvm.runtime.tensor(np.zeros((2, results), x.dtype))
        tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target)["main"](tvm.runtime.tensor(x), out)
        return out.numpy()

    words = rng.integers(-(1 << 31), 1 << 31, (2, 5 * 8 * 16)).astype(np.int32)
    lines = np.bitwise_xor.reduce(words.reshape(2, 5, 8, 16), 1)
    assert np.array_equal(run(limits.read_kernel(2), words), lines.sum(1, dtype=np.int64).astype(np.int32))
    x = rng.standard_normal((2, 16)).astype(np.float32)
    assert np.allclose(run(limits.float_kernel(2), x), 16 * 15 / 2 + 16 * 3 * x * x, rtol=1e-5)
    if not isa.cannot_run(isa.AVX512_VNNI):
        codes = rng.integers(0, 256, (2, 64)).astype(np.uint8)
        products = (codes.astype(int) * codes.view(np.int8)).reshape(2, 16, 4).sum(2)
        assert np.array_equal(run(limits.int8_kernel(2), codes.view(np.int32)), 16 * 15 // 2 + 16 * 3 * products)
    if not isa.cannot_run(isa.AMX):
        monkeypatch.setattr(limits, "TILE_ROUNDS", 3)
        codes = rng.integers(0, 256, (2, 16, 64)).astype(np.uint8)
        weights = codes.view(np.int8).reshape(2, 16, 16, 4).transpose(0, 1, 3, 2).reshape(2, 64, 16)  # [word, byte] x column
        found = run(limits.tile_kernel(2), codes.view(np.int32).reshape(2, 256), 256)
        assert np.array_equal(found.reshape(2, 16, 16), 3 * (codes.astype(int) @ weights))


def test_operations_of_kernels() -> None:
    assert operations("linear_uint8_w8_32x64_gelu", [(3, 32), (1,), (99,), (3, 64)]) == 2 * 3 * 32 * 64
    assert operations("convolution_u_3x3_16_321", [(1, 8, 8, 16), (99,), (1, 4, 4, 32)]) == 2 * 4 * 4 * 32 * 9 * 16
    assert operations("depthwise_u_5x5_16_16", [(1, 8, 8, 16), (99,), (1, 8, 8, 16)]) == 2 * 8 * 8 * 16 * 25
    assert operations("attention_2x8", [(1, 5, 16), (1, 7, 16), (1, 7, 16), (1, 5, 16)]) == 2 * 2 * 5 * 7 * 16
    assert operations("softmax", [(5, 16), (5, 16)]) is None


def test_profile_counts_a_model() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 8))
    x = torch.randn(2, 4, 6, 6)
    artifact = qcompile.compile(net.eval(), (x,), recipe="float", target="cpu")
    rows = profile(artifact.executable.built, [x], 2)
    counted = {row.kernel.split("_")[0]: row.operations for row in rows if row.operations is not None}
    assert counted == {"convolution": 2 * 2 * 36 * 16 * 9 * 4, "linear": 2 * 2 * 16 * 36 * 8}
    linear = next(row for row in rows if row.kernel.startswith("linear"))
    assert linear.bytes >= 4 * (2 * 576 + 576 * 8 + 2 * 8)
    assert not linear.integer
    assert [row.milliseconds for row in rows] == sorted((row.milliseconds for row in rows), reverse=True)


def test_percent_is_of_the_nearer_limit() -> None:
    machine = Limits(threads=2, read_gb_per_s=10.0, float32_gflops=100.0, int8_gops=400.0)
    product = OperatorTime("linear", 1, 1.0, operations=200_000_000, bytes=1_000_000, integer=True)  # 200 GOPS, 1 GB/s
    stream = OperatorTime("embedding", 1, 1.0, operations=None, bytes=8_000_000, integer=False)  # 8 GB/s
    found = [operator_row(row, [product, stream], machine) for row in (product, stream)]
    assert [(row["percent_of_limit"], row["limit"], row["share"]) for row in found] == [(50.0, "arithmetic", 0.5), (80.0, "memory", 0.5)]
    assert operator_row(OperatorTime("copy", 3, 1.0, None, 0, False), [product], machine)["percent_of_limit"] is None
    assert operator_row(product, [product], None)["limit"] is None
    assert operator_row(product, [product], replace(machine, tile_gops=4000.0))["percent_of_limit"] == 10.0  # of the memory's

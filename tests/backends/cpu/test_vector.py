"""Vector activation functions against float64, and those that must be exact against PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from qcompile.backends.cpu.kernels import isa, vector
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompile.graph.dialect import ACTIVATIONS

COUNT = 1 << 14


def _apply(function: Callable[[vector.Expr], vector.Expr], values: np.ndarray) -> np.ndarray:
    """Run a function of 16 lanes over ``COUNT`` float32 values."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            x, y = (T.match_buffer(T.arg(name, T.handle()), (COUNT,), "float32") for name in ("a", "b"))
            with T.serial(0, COUNT // 16) as i:
                T.buffer_store(y, function(x[T.ramp(i * 16, 1, 16)]), [T.ramp(i * 16, 1, 16)])
    kernel = tvm.compile(tvm.IRModule({"main": builder.get()}), tvm.target.Target(isa.target_description()))["main"]
    result = tvm.runtime.tensor(np.zeros(COUNT, np.float32))
    kernel(tvm.runtime.tensor(values), result)
    return result.numpy()


def _values(bound: float) -> np.ndarray:
    """Return values of all magnitudes up to ``bound``, half of them near zero."""
    spread = np.linspace(-bound, bound, COUNT // 2)
    return np.concatenate([spread, spread / 50]).astype(np.float32)


_BOUNDS = {"tanh": 4e-7, "sigmoid": 2e-7, "gelu": 5e-7, "gelu_tanh": 5e-7, "silu": 5e-7}


@pytest.mark.parametrize("name", _BOUNDS)
def test_activation_errors_are_as_stated(name: str) -> None:
    for bound in (5.0, 100.0):
        x = _values(bound)
        exact = ACTIVATIONS[name](torch.from_numpy(x.astype(np.float64))).numpy()
        scale = np.maximum(1, np.abs(x)) if name in ("gelu", "gelu_tanh", "silu") else 1
        assert (np.abs(_apply(vector.ACTIVATIONS[name], x) - exact) / scale).max() <= _BOUNDS[name]


@pytest.mark.parametrize("name", ["none", "relu", "relu6", "hardswish"])
def test_exact_activations_equal_pytorch(name: str) -> None:
    x = _values(9.0)
    np.testing.assert_array_equal(_apply(vector.ACTIVATIONS[name], x), ACTIVATIONS[name](torch.from_numpy(x)).numpy())


def test_exponential_and_error_function() -> None:
    x = _values(86.0)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(_apply(vector.exp, x) - exact) / exact).max() <= 2 * 2.0**-23
    x = _values(6.0)
    exact = torch.erf(torch.from_numpy(x.astype(np.float64))).numpy()
    assert np.abs(_apply(vector.erf, x) - exact).max() <= 3e-7


def test_exponential_at_its_ends() -> None:
    x = np.full(COUNT, -np.inf, np.float32)
    x[1], x[2] = -200.0, 1000.0
    y = _apply(vector.exp, x)
    np.testing.assert_array_equal(y[:2], 0)
    assert 1e38 < y[2] < np.inf


def test_every_dialect_activation_has_a_vector_form() -> None:
    assert set(vector.ACTIVATIONS) == set(ACTIVATIONS)

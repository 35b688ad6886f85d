"""Vector activation functions against float64, and those that must be exact against PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from qcompile.backends.cpu.kernels import isa, vector
from qcompile.backends.cpu.kernels.registers import exp2
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompile.graph.dialect import ACTIVATIONS

COUNT = 1 << 16
ISAS = sorted({isa.detect(), isa.PORTABLE})  # with a fused multiply-add, and without
Function = Callable[[vector.Expr], vector.Expr]


@functools.cache
def _compiled(function: Function, isa_name: str) -> Callable[..., None]:
    """Return a kernel that runs a function of 16 lanes over ``COUNT`` float32 values."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            x, y = (T.match_buffer(T.arg(name, T.handle()), (COUNT,), "float32") for name in ("a", "b"))
            with T.serial(0, COUNT // 16) as i:
                T.buffer_store(y, function(x[T.ramp(i * 16, 1, 16)]), [T.ramp(i * 16, 1, 16)])
    target = tvm.target.Target(isa.target_description(isa=isa_name))
    return tvm.compile(tvm.IRModule({"main": builder.get()}), target)["main"]


def _apply(function: Function, values: np.ndarray, isa_name: str = ISAS[0]) -> np.ndarray:
    assert values.shape == (COUNT,)
    result = tvm.runtime.tensor(np.full(COUNT, 77, np.float32))
    _compiled(function, isa_name)(tvm.runtime.tensor(values), result)
    return result.numpy()


def _values(bound: float) -> np.ndarray:
    """Return values of all magnitudes up to ``bound``, half of them near zero."""
    spread = np.linspace(-bound, bound, COUNT // 2)
    return np.concatenate([spread, spread / 50]).astype(np.float32)


def _every_exponent() -> np.ndarray:
    """Return every float32 exponent, denormals included, with either sign and 128 mantissas spread over its range, both ends among them."""
    mantissas = np.linspace(0, (1 << 23) - 1, 128).astype(np.uint32)
    bits = np.arange(255, dtype=np.uint32)[:, None] << 23 | mantissas
    values = np.concatenate([bits, bits | np.uint32(1 << 31)]).reshape(-1).view(np.float32)
    return np.concatenate([values, np.zeros(COUNT - values.size, np.float32)])


_BOUNDS = {"tanh": 3e-7, "sigmoid": 1e-7, "gelu": 4e-7, "gelu_tanh": 3e-7, "silu": 2e-7}


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("name", _BOUNDS)
def test_activation_errors_are_as_stated(name: str, isa_name: str) -> None:
    for x in (_values(5.5), _values(100.0), _every_exponent()):
        exact = ACTIVATIONS[name](torch.from_numpy(x.astype(np.float64))).numpy()
        scale = np.maximum(1, np.abs(x)) if name in ("gelu", "gelu_tanh", "silu") else 1
        assert (np.abs(_apply(vector.ACTIVATIONS[name], x, isa_name) - exact) / scale).max() <= _BOUNDS[name]


@pytest.mark.parametrize(("name", "bound"), [("gelu", 5.1), ("gelu_tanh", 4.9)])
def test_gelu_is_exact_near_zero_and_far_from_it(name: str, bound: float) -> None:
    x = _every_exponent()
    y = _apply(vector.ACTIVATIONS[name], x)
    np.testing.assert_array_equal(y[x <= -bound], 0)
    np.testing.assert_array_equal(y[x >= bound], x[x >= bound])
    small = np.abs(x) < 1e-8
    np.testing.assert_array_equal(y[small], x[small] / 2)


@pytest.mark.parametrize("isa_name", ISAS)
def test_powers_of_two_that_softmax_takes(isa_name: str) -> None:
    """``registers.exp2`` over every magnitude it may meet: 1.5 ulp, then no more than the least normal number, then zero; NaN stays."""
    for x in (-np.abs(_values(150.0)), -np.abs(_every_exponent())):
        y, exact = _apply(exp2, x, isa_name).astype(np.float64), np.exp2(x.astype(np.float64))
        normal = x >= -126
        assert (np.abs(y - exact)[normal] / exact[normal]).max() <= 1.5 * 2.0**-23
        assert np.abs(y - exact)[~normal].max() <= 2.0**-126
        np.testing.assert_array_equal(y[x <= -127], 0)
        np.testing.assert_array_equal(y[x == 0], 1)
    assert np.isnan(_apply(exp2, np.full(COUNT, np.nan, np.float32), isa_name)).all()


@pytest.mark.parametrize("name", ["none", "relu", "relu6", "hardswish"])
def test_exact_activations_equal_pytorch(name: str) -> None:
    x = _values(9.0)
    np.testing.assert_array_equal(_apply(vector.ACTIVATIONS[name], x), ACTIVATIONS[name](torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("isa_name", ISAS)
def test_exponential(isa_name: str) -> None:
    for x in (_values(87.3), np.clip(_every_exponent(), -87.3, 88.0)):
        exact = np.exp(x.astype(np.float64))
        assert (np.abs(_apply(vector.exp, x, isa_name) - exact) / exact).max() <= 2.0**-23


def test_exponential_at_its_ends() -> None:
    x = np.full(COUNT, -np.inf, np.float32)
    x[1], x[2] = -200.0, 1000.0
    y = _apply(vector.exp, x)
    np.testing.assert_array_equal(y[:2], 0)
    assert 1e38 < y[2] < np.inf


def test_every_dialect_activation_has_a_vector_form() -> None:
    assert set(vector.ACTIVATIONS) == set(ACTIVATIONS)

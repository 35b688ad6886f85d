"""Layer norm and RMS norm kernels: values against float64, codes bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qcompile.backends.cpu.kernels.isa import PORTABLE, detect
from qcompile.backends.cpu.kernels.normalization import layer_norm

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc

Build = Callable[..., Callable[..., None]]
ISAS = sorted({detect(), PORTABLE})  # the best instruction set of this machine, and the portable code


def untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that no kernel would compute."""
    return torch.full_like(tensor, 77)


BOUND = 2e-6  # of values of order one: a mean of pairwise sums, a square root and four more operations, each within 2**-24


@pytest.mark.parametrize("width", [3, 37, 384])
def test_layer_norm_with_residual_codes_and_total(compile_kernel: Build, width: int) -> None:
    kernel = compile_kernel(layer_norm(width, 1e-5, residual=True, codes="uint8", total=True, isa=ISAS[0]))
    for rows in (1, 21):
        x, residual = torch.randn(rows, width) * 3 + 1, torch.randn(rows, width)
        weight, bias = torch.rand(width), torch.randn(width)
        scale, zero = torch.tensor([0.011]), torch.tensor([131], dtype=torch.int32)
        out, total, codes = untouched(x), untouched(x), untouched(x).to(torch.uint8)
        kernel(x, residual, weight, bias, scale, zero, out, codes, total)
        expected = torch.nn.functional.layer_norm((x + residual).double(), (width,), weight.double(), bias.double(), 1e-5)
        assert float((out - expected).abs().max()) < BOUND * 4
        assert torch.equal(total, x + residual)
        assert torch.equal(codes, torch.ops.qc.quantize(out, scale[0], zero[0], "uint8 tensor affine"))


def test_variance_does_not_cancel(compile_kernel: Build) -> None:
    kernel = compile_kernel(layer_norm(64, 0.0, affine=False, isa=ISAS[-1], codes="int8"), ISAS[-1])
    x = torch.randn(5, 64) + 1000
    out, codes = untouched(x), untouched(x).to(torch.int8)
    scale, zero = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    kernel(x, scale, zero, out, codes)
    expected = torch.nn.functional.layer_norm(x.double(), (64,), eps=0.0)
    assert float((out - expected).abs().max()) < 1000 * 2.0**-24 * 8  # the mean carries the size of x
    assert torch.equal(codes, torch.ops.qc.quantize(out, scale[0], None, "int8 tensor sym"))


def test_rms_norm(compile_kernel: Build) -> None:
    kernel = compile_kernel(layer_norm(100, 1e-6, rms=True))
    x, weight = torch.randn(9, 100), torch.rand(100)
    out = untouched(x)
    kernel(x, weight, out)
    assert float((out - torch.nn.functional.rms_norm(x.double(), (100,), weight.double(), 1e-6)).abs().max()) < BOUND

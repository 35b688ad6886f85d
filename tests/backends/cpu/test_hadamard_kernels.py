"""Hadamard and pooling kernels against the dialect and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.kernels.hadamard import hadamard, symmetric_hadamard
from qcompile.backends.cpu.kernels.pooling import max_pool, mean_image

from qcompile.graph.dialect import hadamard_matrix

Build = Callable[..., Callable[..., None]]


def untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that no kernel would compute."""
    return torch.full_like(tensor, 77)


@pytest.mark.parametrize(("width", "block"), [(3, 1), (24, 8), (64, 16), (192, 64), (512, 512), (8192, 1024)])
def test_hadamard_equals_the_matrix_product(compile_kernel: Build, width: int, block: int) -> None:
    kernel = compile_kernel(hadamard(width, block))
    x = torch.randn(5, width)
    out = untouched(x)
    kernel(x, out)
    steps = math.log2(block) + 2  # each rounds a value no larger than the block's norm
    norm = float(x.unflatten(-1, (-1, block)).norm(dim=-1).max())
    assert float((out - torch.ops.qc.hadamard(x.double(), block)).abs().max()) <= steps * norm * 2.0**-23


@pytest.mark.parametrize("order", [1, 2, 12, 28, 36, 60])
def test_symmetric_matrices_are_their_own_inverse(order: int) -> None:
    matrix = symmetric_hadamard(order).astype(int)
    assert set(matrix.reshape(-1)) <= {-1, 1}
    assert (matrix == matrix.T).all()
    assert (matrix @ matrix == order * np.eye(order)).all()


def test_symmetric_matrices_need_a_prime() -> None:
    for order in (3, 4, 8, 16, 20, 24):
        with pytest.raises(ValueError, match="no symmetric Hadamard matrix"):
            symmetric_hadamard(order)


@pytest.mark.parametrize(("width", "order", "inner"), [(192, 12, 16), (768, 12, 32), (1792, 28, 64), (3072, 12, 128)])
def test_hadamard_of_a_multiple_of_a_power_of_two(compile_kernel: Build, width: int, order: int, inner: int) -> None:
    base, block = symmetric_hadamard(order), order * inner
    kernel = compile_kernel(hadamard(width, block, base=base))
    x = torch.randn(5, width)
    out = untouched(x)
    kernel(x, out)
    matrix = torch.kron(torch.from_numpy(base).double() / math.sqrt(order), hadamard_matrix(inner, torch.float64))
    blocks = x.double().unflatten(-1, (-1, block))
    steps = order + math.log2(inner) + 2  # each rounds a value no larger than the block's norm
    assert float((out - (blocks @ matrix).flatten(-2)).abs().max()) <= steps * float(blocks.norm(dim=-1).max()) * 2.0**-23


def test_hadamard_refuses_other_blocks() -> None:
    with pytest.raises(ValueError, match="no power of two"):
        hadamard(48, 12)
    with pytest.raises(ValueError, match="no power of two times 12"):
        hadamard(960, 240, base=symmetric_hadamard(12))
    with pytest.raises(ValueError, match="share a register"):
        hadamard(96, 96, base=symmetric_hadamard(12))


def test_mean_image(compile_kernel: Build) -> None:
    kernel = compile_kernel(mean_image(37, 7, 5))
    x = torch.randn(3, 7, 5, 37)
    out = torch.full((3, 37), 77.0)
    kernel(x, out)
    assert float((out - x.double().mean((1, 2))).abs().max()) <= 35 * 2.0**-24 * float(x.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_max_pool(compile_kernel: Build, dtype: str) -> None:
    kernel = compile_kernel(max_pool(37, 7, 6, (3, 2), (2, 1), (1, 1), dtype=dtype))
    kind = getattr(torch, dtype)
    x = torch.randn(3, 7, 6, 37) if dtype == "float32" else torch.randint(-128 * (dtype == "int8"), 128, (3, 7, 6, 37)).to(kind)
    expected = torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2).float(), (3, 2), (2, 1), 1).permute(0, 2, 3, 1).to(kind)
    out = untouched(expected.contiguous())
    kernel(x, out)
    assert torch.equal(out, expected)

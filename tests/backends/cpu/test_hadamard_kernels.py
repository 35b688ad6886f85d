"""Hadamard and pooling kernels against the dialect and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.kernels.hadamard import hadamard
from qcompile.backends.cpu.kernels.pooling import max_pool, mean_image

from qcompile.graph import parse_graph
from qcompile.graph.hadamard import hadamard_order

Build = Callable[..., Callable[..., None]]


def untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that no kernel would compute."""
    return torch.full_like(tensor, 77)


POWERS = [(3, 1), (24, 8), (64, 16), (192, 64), (512, 512), (8192, 1024)]
MULTIPLES = [(192, 192), (384, 384), (768, 384), (640, 320), (1792, 1792), (1536, 1536), (832, 832), (960, 960)]


@pytest.mark.parametrize(("width", "block"), POWERS + MULTIPLES)
def test_hadamard_equals_the_matrix_product(compile_kernel: Build, width: int, block: int) -> None:
    kernel = compile_kernel(hadamard(width, block))
    x = torch.randn(5, width)
    out = untouched(x)
    kernel(x, out)
    order = hadamard_order(block)
    steps = order + math.log2(block / order) + 2  # each rounds a value no larger than the block's norm
    norm = float(x.unflatten(-1, (-1, block)).norm(dim=-1).max())
    assert float((out - torch.ops.qc.hadamard(x.double(), block)).abs().max()) <= steps * norm * 2.0**-23


def test_hadamard_refuses_other_blocks() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of size 22 divides 44"):
        hadamard(44, 22)
    with pytest.raises(ValueError, match="no Hadamard matrix of size 32 divides 48"):
        hadamard(48, 32)
    with pytest.raises(ValueError, match="share a register"):
        hadamard(96, 96)


TURNED = """graph @main float(%x: f32[n,192]) where n in 1..64 {
  %y = qc.hadamard(%x) {block=BLOCK} : f32[n,192]
  return %y as "y"
}
"""


@pytest.mark.parametrize(("block", "reason"), [(192, ""), (96, "no kernel: blocks of 96 are less than 16 times 12")])
def test_a_graph_uses_the_kernel_or_says_why_not(block: int, reason: str) -> None:
    graph = parse_graph(TURNED.replace("BLOCK", str(block)), {})
    built = build(graph.module, threads=1)
    assert [fallback.reason.split(":")[:2] for fallback in built.fallbacks] == ([reason.split(":")] if reason else [])
    x = torch.randn(7, 192)
    torch.testing.assert_close(built(x)[0], graph(x)[0], rtol=1e-5, atol=1e-5)


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

"""Batched products of codes against the dialect (``qc.matmul``), bit for bit: odd sizes, extreme codes and zero points."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul_codes import CodeMatmul, code_matmul
from qcompile.backends.cpu.target import TARGET

from qcompile.capture.torch_export import capture_module

Build = Callable[[Any, str], Callable[..., None]]
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}
SIZES = [(1, 1, 1, 1), (3, 5, 7, 2), (2, 33, 64, 49), (1, 130, 3, 96), (2, 31, 130, 33), (1, 9, 1100, 50)]  # batch, m, k, n
SPECS = {
    "uint8 affine x int8": CodeMatmul("uint8", "int8", a_affine=True),
    "int8 x int8, transposed": CodeMatmul("int8", "int8", transposed=True),
    "uint8 x uint8, both affine": CodeMatmul("uint8", "uint8", a_affine=True, b_affine=True),
    "int8 affine x uint8 affine, transposed, shared": CodeMatmul(
        "int8", "uint8", a_affine=True, b_affine=True, transposed=True, shared=True
    ),
    "uint8 x int8 affine to uint8": CodeMatmul("uint8", "int8", b_affine=True, codes="uint8", lowest=0, highest=255),
    "int8 x uint8 to int4 range": CodeMatmul("int8", "uint8", codes="int8", lowest=-8, highest=7),
}


def _check(spec: CodeMatmul, kernel: Callable[..., None], sizes: tuple[int, ...], extreme: bool) -> None:
    """Compare one call with the dialect; ``extreme``: every code and zero point at one end of its range."""
    batch, m, k, n = sizes

    def codes(dtype: str, *shape: int) -> torch.Tensor:
        low, high = RANGES[dtype]
        ends = torch.tensor([low, high])[torch.randint(0, 2, shape)]
        return (ends if extreme else torch.randint(low, high + 1, shape)).to(getattr(torch, dtype))

    b_shape = (n, k) if spec.transposed else (k, n)
    a, b = codes(spec.a, batch, m, k), codes(spec.b, 1 if spec.shared else batch, *b_shape)
    a_zero, b_zero = (
        codes(dtype, 1).to(torch.int32) if affine else None for dtype, affine in ((spec.a, spec.a_affine), (spec.b, spec.b_affine))
    )
    a_scale, b_scale = torch.rand(2, 1) * 0.02 + 0.001
    out = (torch.tensor([0.03 * k**0.5]), torch.tensor([3], dtype=torch.int32)) if spec.codes else (None, None)
    bits = (spec.highest - spec.lowest).bit_length()
    expected = torch.ops.qc.matmul(
        a, a_scale[0], a_zero, b.transpose(1, 2) if spec.transposed else b, b_scale[0], b_zero, *out,
        f"{spec.a} tensor {'affine' if spec.a_affine else 'sym'}", f"{spec.b} tensor {'affine' if spec.b_affine else 'sym'}",
        f"{'u' if spec.codes == 'uint8' else ''}int{bits} tensor affine" if spec.codes else "",
    )  # fmt: skip
    found = torch.full_like(expected, 77)
    arguments = [a, a_scale.clone(), a_zero, b, b_scale.clone(), b_zero, *out, found]
    kernel(*(argument for argument in arguments if argument is not None))
    assert torch.equal(found, expected), sizes


@pytest.mark.parametrize("name", SPECS)
def test_codes_agree_with_the_dialect(compile_for: Build, name: str) -> None:
    spec = SPECS[name]
    kernel = compile_for(code_matmul(spec), spec.isa)
    for sizes, extreme in itertools.product(SIZES, (False, True)):
        _check(spec, kernel, sizes, extreme)


@pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()],
    indirect=True,
)
def test_every_instruction_set(compile_for: Build, instruction_set: str) -> None:
    spec = CodeMatmul("uint8", "uint8", a_affine=True, b_affine=True, transposed=True, isa=instruction_set)
    kernel = compile_for(code_matmul(spec), instruction_set)
    for sizes in ((2, 33, 70, 49), (1, 3, 9, 5)):
        _check(spec, kernel, sizes, extreme=True)


class _Int8Attention(torch.nn.Module):
    """Scores and values of codes, a float product beside them, and float attention that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(120, dtype=torch.int32))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, keys = (torch.ops.qc.quantize(t, self.scale, self.zero, "uint8 tensor affine") for t in (q, k))
        side = (self.scale, self.zero, keys.transpose(1, 2), self.scale, self.zero)
        grid = (self.scale, self.zero, "uint8 tensor affine", "uint8 tensor affine", "uint8 tensor affine")
        attended = torch.ops.qc.attention(q, k, k, None, 2, 2, 0.3, False)
        found = torch.ops.qc.quantize(attended, self.scale, self.zero, "uint8 tensor affine")
        return torch.ops.qc.matmul(codes, *side, *grid), torch.matmul(q, k.transpose(1, 2)), found


def test_built_graphs_take_these_kernels() -> None:
    module = _Int8Attention().eval()
    example = (torch.randn(3, 5, 32), torch.randn(3, 9, 32))
    graph = capture_module(module, example, dynamic_shapes={"q": {1: "tokens"}, "k": {1: "keys"}})
    assert not TARGET.leftovers(graph)
    run = build(graph.module, threads=2)
    for tokens, keys in ((5, 9), (40, 33)):
        q, k = torch.randn(3, tokens, 32), torch.randn(3, keys, 32)
        product, floats, attended = run(q, k)
        expected = module(q, k)
        assert torch.equal(product, expected[0])
        assert float((floats - expected[1]).abs().max()) <= 32 * 2.0**-22 * 32
        assert int((attended.int() - expected[2].int()).abs().max()) <= 1  # float attention may fall on the other side of a tie
    assert {"matmul_uint8_uint8", "matmul_float", "attention_2x16_uint8"} <= {name for name, _ in run.kernel_calls(q, k)}


def test_only_bytes() -> None:
    with pytest.raises(ValueError, match="int8 or uint8"):
        CodeMatmul("float32", "int8")

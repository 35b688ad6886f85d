"""Quantization kernels: bit for bit what ``qcompile.formats`` computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.kernels import quantization
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.isa import PORTABLE, detect
from qcompile.backends.cpu.kernels.registers import argument, function, ramp, size, store
from tvm.tirx.script.builder import ir as T

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc
from qcompile.formats import Quantized, parse_scheme, quantize, quantize_dynamic

Build = Callable[..., Callable[..., None]]
ISAS = sorted({detect(), PORTABLE})  # the best instruction set of this machine, and the portable code


def untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that no kernel would compute."""
    return torch.full_like(tensor, 77)


CODES = {"int8": torch.int8, "uint8": torch.uint8}


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_without_division_equals_division(compile_kernel: Build, isa: str) -> None:
    """Values on and one to three units beside every tie of every code, scales with all kinds of mantissas and exponents."""
    with function("round_rows") as builder:
        rows, width = size("rows"), size("width")
        x, scale = argument("x", (rows, width)), argument("scale", (rows,))
        zero, codes = argument("zero_point", (rows,), "int32"), argument("codes", (rows, width), "uint8")
        with T.serial(rows) as row:
            rounding = CodeRounding(scale[row], zero[row], 0, 255, isa)
            with T.serial(width // 16) as i:
                store(codes, T.cast(rounding.codes(x[row, ramp(i * 16)]), "uint8x16"), row, ramp(i * 16))
    kernel = compile_kernel(builder.get(), isa)
    generator = np.random.default_rng(0)
    for kind in range(3):
        bits = (generator.integers(127 - 100, 127 + 60, 300) << 23).astype(np.uint32)
        mantissa = [generator.integers(0, 1 << 23, 300), generator.integers(0, 8, 300), (1 << 23) - 1 - generator.integers(0, 8, 300)]
        scale_values = (bits | mantissa[kind].astype(np.uint32)).view(np.float32)
        ties = (scale_values[:, None].astype(np.float64) * (np.arange(-256, 256) + 0.5)).astype(np.float32)
        near = [(ties.view(np.int32) + step).view(np.float32) for step in range(-3, 4)]
        far = np.full((300, 16), np.inf, np.float32) * np.where(generator.random((300, 16)) < 0.5, 1, -1)
        values = torch.from_numpy(np.ascontiguousarray(np.concatenate([*near, far.astype(np.float32)], 1)))
        scales, zeros = torch.from_numpy(scale_values), torch.from_numpy(generator.integers(0, 256, 300).astype(np.int32))
        found = untouched(values).to(torch.uint8)
        kernel(values, scales, zeros, found)
        assert torch.equal(found, quantize(values, scales[:, None], zeros[:, None], parse_scheme("uint8 token affine")))


@pytest.mark.parametrize("text", ["int8 tensor sym", "uint8 tensor affine", "int4 tensor affine"])
def test_static_and_back(compile_kernel: Build, text: str) -> None:
    scheme = parse_scheme(text)
    forward, back = compile_kernel(quantization.quantize_static(scheme)), compile_kernel(quantization.dequantize(scheme))
    for count, zero in ((1, -3), (15, 0), (8192 * 3 + 77, 7), (150_000, 7)):
        x, scale = torch.randn(count) * 90, torch.tensor([0.37])
        zero_point = torch.tensor([0 if scheme.symmetric else abs(zero)], dtype=torch.int32)
        codes = untouched(x).to(scheme.format.storage)
        forward(x, scale, zero_point, codes)
        assert torch.equal(codes, torch.ops.qc.quantize(x, scale[0], zero_point[0], text))
        out = untouched(x)
        back(codes, scale, zero_point, out)
        assert torch.equal(out, torch.ops.qc.dequantize(codes, scale[0], zero_point[0], text))


@pytest.mark.parametrize("text", ["int8 token sym dynamic", "uint8 token affine dynamic"])
@pytest.mark.parametrize("width", [45, 256])
def test_dynamic_per_token(compile_kernel: Build, text: str, width: int) -> None:
    scheme = parse_scheme(text)
    forward = compile_kernel(quantization.quantize_dynamic(width, scheme))
    back = compile_kernel(quantization.dequantize_rows(width, scheme))
    x = torch.randn(530, width) * torch.exp(torch.randn(530, 1) * 5) + torch.randn(530, 1)
    x[0], x[1], x[2], x[3] = 0, x[1].abs(), -x[2].abs(), 1e-38
    codes, scale, zero = untouched(x).to(scheme.format.storage), torch.full((530,), 77.0), torch.full((530,), 77, dtype=torch.int32)
    forward(x, codes, scale, zero)
    expected = torch.ops.qc.quantize_dynamic(x, text)
    assert torch.equal(scale, expected[1][:, 0])
    assert torch.equal(zero, expected[2][:, 0])
    assert torch.equal(codes, expected[0])
    out = untouched(x)
    back(codes, scale, zero, out)
    assert torch.equal(out, torch.ops.qc.dequantize(codes, expected[1], expected[2], text))


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("int8 channel=0 sym", 37), ("uint8 channel=0 affine", 64), ("int4 group=16 sym", 45), ("uint4 group=32 affine", 96),
        ("uint3 channel=0 affine", 50), ("int5 tensor sym", 21), ("uint1 channel=0 sym", 40), ("int7 tensor affine", 17),
        ("int2 group=16 sym", 33),
    ],
)  # fmt: skip
def test_embedding_gathers_packed_rows(compile_kernel: Build, text: str, width: int) -> None:
    scheme = parse_scheme(text)
    table = Quantized(*quantize_dynamic(torch.randn(31, width), scheme), scheme)
    kind = str(scheme.granularity).split("=", maxsplit=1)[0]
    kernel = compile_kernel(
        quantization.embedding(
            width, scheme.bits, signed=scheme.format.lowest < 0, scales={"channel": "row", "group": "group", "tensor": "tensor"}[kind],
            group=scheme.granularity.size if kind == "group" else 0, affine=not scheme.symmetric,
        )
    )  # fmt: skip
    flat = (lambda t: t.reshape(1)) if kind == "tensor" else (lambda t: t.contiguous())
    indices = torch.randint(-31, 31, (100,))
    constants = [table.packed(), flat(table.scale)] + ([] if scheme.symmetric else [flat(table.zero_point)])
    out = torch.full((100, width), 77.0)
    kernel(indices, *constants, out)
    assert torch.equal(out, torch.ops.qc.embedding(indices, table.packed(), table.scale, table.zero_point, text, width))


def test_embedding_of_floats(compile_kernel: Build) -> None:
    kernel = compile_kernel(quantization.embedding(20, 32))
    table, indices, out = torch.randn(9, 20), torch.randint(0, 9, (50,)), torch.full((50, 20), 77.0)
    kernel(indices, table, out)
    assert torch.equal(out, table[indices])


@pytest.mark.parametrize("activation", ["none", "relu6"])
def test_quantized_add(compile_kernel: Build, activation: str) -> None:
    schemes = ("int8 tensor sym", "uint8 tensor affine", "uint8 tensor affine")
    kernel = compile_kernel(quantization.quantized_add("int8", "uint8", parse_scheme(schemes[2]), activation))
    a, b = torch.randint(-128, 128, (10_007,)).to(torch.int8), torch.randint(0, 256, (10_007,)).to(torch.uint8)
    scales = [torch.tensor([s]) for s in (0.031, 0.017, 0.0411)]
    zeros = [torch.tensor([z], dtype=torch.int32) for z in (0, 131, 17)]
    codes = untouched(b)
    kernel(a, scales[0], zeros[0], b, scales[1], zeros[1], scales[2], zeros[2], codes)
    expected = torch.ops.qc.add(a, scales[0][0], None, b, scales[1][0], zeros[1][0], scales[2][0], zeros[2][0], *schemes, activation)
    assert torch.equal(codes, expected)

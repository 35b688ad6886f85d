"""Quantization kernels: bit for bit what ``qcompile.formats`` computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.kernels import quantization
from qcompile.backends.cpu.kernels.byte_codes import ByteCodes, by_vector
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding, is_easy
from qcompile.backends.cpu.kernels.isa import PORTABLE, SETS, detect
from qcompile.backends.cpu.kernels.registers import argument, function, ramp, size, store
from tvm.tirx.script.builder import ir as T

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc
from qcompile.formats import Quantized, parse_scheme, quantize, quantize_dynamic
from qcompile.graph.dialect import ACTIVATIONS

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


def byte_codes(dtype: str, code_range: tuple[int, int], activation: str, easy: bool) -> object:
    """Return ``f(x, scale, zero_point, codes)``: rows of 64 values, each with its scale and zero point."""
    with function("byte_codes") as builder:
        rows = size("rows")
        x, scale = argument("x", (rows, 64)), argument("scale", (rows,))
        zero, codes = argument("zero_point", (rows,), "int32"), argument("codes", (rows, 64), dtype)
        with T.serial(rows) as row:
            rounding = ByteCodes(scale[row], zero[row], dtype, code_range, activation, detect(), easy=easy)
            store(codes, by_vector(rounding.bytes([x[row, ramp(16 * i)] for i in range(4)])), row, ramp(0, 64))
    return builder.get()


def hard_and_easy_scales() -> np.ndarray:
    """Return scales with all kinds of mantissas: any, and with their last 15 bits near zero, where the quick quotient may fail."""
    generator = np.random.default_rng(0)
    exponents = generator.integers(127 - 60, 127 + 60, 400).astype(np.uint32) << 23
    near_zero = (generator.integers(0, 256, 400) << 15) + generator.integers(-12, 13, 400)
    mantissas = np.concatenate([generator.integers(0, 1 << 23, 300), near_zero[:80] % (1 << 23), np.zeros(20, np.int64)])
    return (exponents | mantissas.astype(np.uint32)).view(np.float32)


def near_ties(scales: np.ndarray) -> np.ndarray:
    """Return, for each scale, values on every tie of codes, one to three floats beside it, and infinities; whole rows of 64."""
    ties = (scales[:, None].astype(np.float64) * (np.arange(-512, 512) + 0.5)).astype(np.float32)
    near = [(ties.view(np.int32) + step).view(np.float32) for step in range(-3, 4)]
    far = np.tile(np.array([np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 1e-45, -1e-45], np.float32), (len(scales), 8))
    return np.ascontiguousarray(np.concatenate([*near, far], 1))


@pytest.mark.skipif(SETS[detect()].parts != 1, reason="needs registers of 64 bytes")
@pytest.mark.parametrize(
    ("text", "activation", "easy"),
    [
        ("uint8 token affine", "none", True), ("uint8 token affine", "relu6", True), ("int8 token affine", "relu", True),
        ("int4 token affine", "none", True), ("uint8 token affine", "relu", False), ("int8 token sym", "add_relu6", False),
        ("uint8 token affine", "hardswish", False),
    ],
)  # fmt: skip
def test_sixty_four_codes_at_once(compile_kernel: Build, text: str, activation: str, easy: bool) -> None:
    scheme = parse_scheme(text)
    lowest, highest = quantization.code_range(scheme)
    dtype = quantization.code_dtype(scheme)
    kernel = compile_kernel(byte_codes(dtype, (lowest, highest), activation, easy))
    scales = hard_and_easy_scales()
    scales = scales[[is_easy(scale) for scale in scales]] if easy else scales
    values = torch.from_numpy(near_ties(scales))
    zeros = torch.from_numpy(np.random.default_rng(1).integers(lowest, highest + 1, len(scales)).astype(np.int32))
    zeros = zeros * 0 if scheme.symmetric else zeros
    scale = torch.from_numpy(scales)
    expected = quantize(ACTIVATIONS[activation](values), scale[:, None], zeros[:, None], scheme)
    rows = values.shape[1] // 64
    found = torch.full((len(scales) * rows, 64), 77).to(expected.dtype)
    kernel(values.reshape(-1, 64), scale.repeat_interleave(rows), zeros.repeat_interleave(rows), found)
    assert torch.equal(found.reshape(expected.shape), expected)


@pytest.mark.skipif(SETS[detect()].parts != 1, reason="needs registers of 64 bytes")
def test_scales_that_are_not_easy_are_few_and_needed(compile_kernel: Build) -> None:
    """At the float below 2, the quick quotient of 1 is the tie 0.5, and the right one is above it."""
    scales = ((127 << 23) + (77 << 15) + np.arange(1 << 15)).astype(np.uint32).view(np.float32)
    assert sum(not is_easy(scale) for scale in scales) == 13
    assert is_easy(0.25)
    below = np.nextafter(np.float32(2), np.float32(0))
    assert not is_easy(below)
    x, zero = torch.ones(1, 64), torch.zeros(1, dtype=torch.int32)
    for easy, code in ((True, 0), (False, 1)):
        found = torch.full((1, 64), 77, dtype=torch.uint8)
        compile_kernel(byte_codes("uint8", (0, 255), "none", easy))(x, torch.tensor([below]), zero, found)
        assert (found == code).all()
    assert int(quantize(x, torch.tensor(below), zero[0], parse_scheme("uint8 tensor affine"))[0, 0]) == 1


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


@pytest.mark.parametrize(("channels", "pixels"), [(3, 16), (3, 8192 + 8192 + 37), (2, 100), (4, 33)])
@pytest.mark.parametrize("text", ["int8 tensor sym", "uint8 tensor affine"])
def test_images_become_channels_last(compile_kernel: Build, text: str, channels: int, pixels: int) -> None:
    scheme = parse_scheme(text)
    kernel = compile_kernel(quantization.quantize_image(channels, pixels, scheme))
    for batch in (1, 2, 0):
        x, scale = torch.randn(batch, channels, pixels) * 90, torch.tensor([0.37])
        zero_point = torch.tensor([0 if scheme.symmetric else 100], dtype=torch.int32)
        codes = torch.full((batch, pixels, channels), 77).to(scheme.format.storage)
        kernel(x, scale, zero_point, codes)
        assert torch.equal(codes, torch.ops.qc.quantize(x, scale[0], zero_point[0], text).transpose(1, 2))


@pytest.mark.parametrize("text", ["int8 token sym dynamic", "uint8 token affine dynamic"])
@pytest.mark.parametrize("width", [45, 256])
def test_dynamic_per_token(compile_kernel: Build, text: str, width: int) -> None:
    scheme = parse_scheme(text)
    forward = compile_kernel(quantization.quantize_dynamic(width, scheme))
    x = torch.randn(530, width) * torch.exp(torch.randn(530, 1) * 5) + torch.randn(530, 1)
    x[0], x[1], x[2], x[3] = 0, x[1].abs(), -x[2].abs(), 1e-38
    codes, scale, zero = untouched(x).to(scheme.format.storage), torch.full((530,), 77.0), torch.full((530,), 77, dtype=torch.int32)
    forward(x, codes, scale, zero)
    expected = torch.ops.qc.quantize_dynamic(x, text)
    assert torch.equal(scale, expected[1][:, 0])
    assert torch.equal(zero, expected[2][:, 0])
    assert torch.equal(codes, expected[0])


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


@pytest.mark.parametrize(("activation", "values", "codes"), [("none", False, True), ("relu6", True, True), ("relu", True, False)])
def test_quantized_add(compile_kernel: Build, activation: str, values: bool, codes: bool) -> None:
    schemes = ("int8 tensor sym", "uint8 tensor affine", "uint8 tensor affine")
    kernel = compile_kernel(
        quantization.quantized_add("int8", "uint8", parse_scheme(schemes[2]) if codes else None, activation, values=values)
    )
    a, b = torch.randint(-128, 128, (10_007,)).to(torch.int8), torch.randint(0, 256, (10_007,)).to(torch.uint8)
    scales = [torch.tensor([s]) for s in (0.031, 0.017, 0.0411)]
    zeros = [torch.tensor([z], dtype=torch.int32) for z in (0, 131, 17)]
    results = [torch.full((10_007,), 77.0)] * values + [untouched(b)] * codes
    kernel(a, scales[0], zeros[0], b, scales[1], zeros[1], *([scales[2], zeros[2]] if codes else []), *results)
    grids = (a, scales[0][0], None, b, scales[1][0], zeros[1][0], scales[2][0], zeros[2][0])
    if codes:
        assert torch.equal(results[-1], torch.ops.qc.add(*grids, *schemes, activation))
    if values:
        sides = (torch.ops.qc.dequantize(*grids[:3], schemes[0]), torch.ops.qc.dequantize(*grids[3:6], schemes[1]))
        assert torch.equal(results[0], ACTIVATIONS[activation](sides[0] + sides[1]))

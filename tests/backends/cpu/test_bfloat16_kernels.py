"""Linear layers with bfloat16 weights, and rounding to bfloat16, against their meanings; sums within the bound that the dialect states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import tvm
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.attention import attention
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear, Part
from qcompile.backends.cpu.kernels.normalization import layer_norm
from qcompile.backends.cpu.kernels.pack import pack_layers, pack_linear
from qcompile.backends.cpu.kernels.quantization import embedding, round_to_bfloat16, widen_bfloat16

import qcompile.graph.dialect as dialect
from qcompile.formats import BFloat16

Build = Callable[[Any, str], Callable[..., None]]
ALL = pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()],
    indirect=True,
)
ROWS = (1, 2, 3, 9, 37)  # few rows, and ragged blocks and tiles of many
SHAPES = ((33, 50), (128, 32))  # an odd number of inputs, ragged columns; whole tiles of inputs
BF16 = BFloat16()


def _values(*shape: int, spread: float) -> torch.Tensor:
    """Return normal values of magnitudes up to 2**spread either way, so that sums cancel."""
    return torch.randn(shape) * torch.exp2(spread * (2 * torch.rand(shape) - 1))


def _check(spec: Linear, kernel: Callable[..., None], rows: int, spread: float = 1.0) -> None:
    """Compare one call of a layer whose bias and residual, where it has them, are of the magnitude of its sums."""
    x, weight = _values(rows, spec.in_features, spread=spread), BF16.encode(_values(spec.out_features, spec.in_features, spread=spread))
    x = BF16.encode(x) if spec.x == "bfloat16" else x
    bias = torch.randn(spec.out_features) if spec.epilogue.bias != "none" else None
    residual = torch.randn(rows, spec.out_features) if spec.epilogue.residual else None
    constants = map(torch.from_numpy, pack_linear(spec, weight.numpy(), bias=None if bias is None else bias.numpy()))
    out = torch.full((rows, spec.out_features), 77, dtype=getattr(torch, spec.epilogue.dtype))
    kernel(x, *constants, *([residual] if residual is not None else []), out)
    values = BF16.decode(x) if spec.x == "bfloat16" else x
    products = torch.nn.functional.linear(values.double().abs(), BF16.decode(weight).double().abs())
    bound = (spec.in_features + 8) * 2.0**-24 * products + spec.in_features * 2.0**-126
    exact = torch.nn.functional.linear(values.double(), BF16.decode(weight).double(), None if bias is None else bias.double())
    for extra in (t for t in (bias, residual) if t is not None):
        bound = bound + extra.abs() * 2.0**-22
    exact = dialect.ACTIVATIONS[spec.epilogue.activation](exact) + (0 if residual is None else residual)
    if spec.epilogue.output == "bfloat16":
        bound = bound * (1 + 2.0**-8) + exact.abs() * 2.0**-8 + 2.0**-126
        out = BF16.decode(out)
    assert bool(((out - exact).abs() <= bound).all()), (rows, spread)


@ALL
@pytest.mark.parametrize("x", ["float32", "bfloat16"])
def test_sums_are_within_the_stated_bound(compile_for: Build, instruction_set: str, x: str) -> None:
    edge = instruction_sets.SETS[instruction_set].machine == "aarch64"
    for shape in SHAPES[:1] if edge else SHAPES:
        spec = Linear(*shape, x=x, bits=16, isa=instruction_set)
        kernel = compile_for(linear(spec), instruction_set)
        for rows in ROWS[2::2] if edge else ROWS:
            _check(spec, kernel, rows)
            _check(spec, kernel, rows, spread=30.0)


@ALL
@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_the_whole_epilogue(compile_for: Build, instruction_set: str, output: str) -> None:
    """Bias, activation, residual and rounding of the result; relu is exact, so the bound of the sum stays."""
    spec = Linear(35, 21, x="bfloat16", bits=16, epilogue=Epilogue("float32", "relu", True, output), isa=instruction_set)
    kernel = compile_for(linear(spec), instruction_set)
    for rows in (1, 29):
        _check(spec, kernel, rows)


@ALL
def test_codes_of_the_result(compile_for: Build, instruction_set: str) -> None:
    """Values that are small integers have exact sums, so codes are those of the dialect."""
    spec = Linear(70, 33, x="bfloat16", bits=16, epilogue=Epilogue("float32", "relu", True, "uint8"), isa=instruction_set)
    kernel = compile_for(linear(spec), instruction_set)
    for rows in (3, 29):
        x, weight = (BF16.encode(torch.randint(-9, 10, shape).float()) for shape in ((rows, 70), (33, 70)))
        bias, residual = torch.randn(33), torch.randn(rows, 33)
        scale, zero = torch.tensor(2.7), torch.tensor(3, dtype=torch.int32)
        expected = torch.ops.qc.linear(
            x, None, None, weight, None, None, bias, residual, scale, zero, "bf16", "bf16", 70, "relu", "uint8 tensor affine"
        )  # fmt: skip
        found = torch.full_like(expected, 77)
        constants = map(torch.from_numpy, pack_linear(spec, weight.numpy(), bias=bias.numpy()))
        kernel(x, *constants, residual, scale.reshape(1), zero.reshape(1), found)
        assert torch.equal(found, expected)


@ALL
def test_extreme_values(compile_for: Build, instruction_set: str) -> None:
    """The largest and the smallest products, infinities and NaNs; one element of a row is not zero, so every sum is exact."""
    spec = Linear(5, 18, x="bfloat16", bits=16, epilogue=Epilogue(output="float32"), isa=instruction_set)
    kernel = compile_for(linear(spec), instruction_set)
    extremes = torch.tensor([BF16.highest, -BF16.highest, 2.0**-126, 1.0, -0.0, float("inf"), float("nan"), 2.0**-63, 2.0**63])
    weight = torch.zeros(18, 5)
    weight[:, 3] = torch.cat([extremes, -extremes])
    packed = [torch.from_numpy(array) for array in pack_linear(spec, BF16.encode(weight).numpy())]
    for rows in (len(extremes), 3 * len(extremes)):
        x = torch.zeros(rows, 5)
        x[:, 3] = extremes.repeat(rows // len(extremes))
        found = torch.full((rows, 18), 77.0)
        kernel(BF16.encode(x), *packed, found)
        expected = torch.ops.qc.linear(BF16.encode(x), None, None, BF16.encode(weight), *[None] * 6, "bf16", "bf16", 5)
        flushed = torch.where(expected.abs() < 2.0**-126, 0.0, expected)
        assert torch.equal(torch.where(found.abs() < 2.0**-126, 0.0, found).nan_to_num(7, 8, 9), flushed.nan_to_num(7, 8, 9))


# ---- rounding -------------------------------------------------------------------------------------------------------------


@ALL
def test_rounding_gives_the_bits_of_the_format(compile_for: Build, instruction_set: str) -> None:
    """Every upper half with ties and their neighbours below it: denormal numbers, infinities and NaNs among them."""
    upper = torch.arange(-(2**15), 2**15, 1 if instruction_set == "portable" else 7, dtype=torch.int32)
    x = torch.cat([(upper << 16 | lower).view(torch.float32) for lower in (0, 1, 0x7FFF, 0x8000, 0x8001)])
    codes = torch.full(x.shape, 77, dtype=torch.int16)
    compile_for(round_to_bfloat16(), instruction_set)(x, codes)
    assert torch.equal(codes, BF16.encode(x))
    out = torch.full(x.shape, 77.0)
    compile_for(widen_bfloat16(), instruction_set)(codes, out)
    assert torch.equal(out.view(torch.int32), BF16.decode(codes).view(torch.int32))


def test_other_kernels_round_what_they_return(compile_kernel: Build) -> None:
    x, weight, bias = torch.randn(21, 37) * 3 + 1, torch.rand(37), torch.randn(37)
    out, codes = torch.full((21, 37), 77.0), torch.full((21, 37), 77, dtype=torch.int16)
    compile_kernel(layer_norm(37, 1e-5, codes="bfloat16"))(x, weight, bias, out, codes)
    assert torch.equal(codes, BF16.encode(out))
    for tokens in (1, 33):
        q, k, v = torch.randn(2, tokens, 40), torch.randn(2, 50, 40), torch.randn(2, 50, 40)
        out, codes = torch.full(q.shape, 77.0), torch.full(q.shape, 77, dtype=torch.int16)
        compile_kernel(attention(2, 2, 20, 0.2, key_mask=False, causal=False))(q, k, v, out)
        compile_kernel(attention(2, 2, 20, 0.2, key_mask=False, causal=False, codes="bfloat16"))(q, k, v, codes)
        assert torch.equal(codes, BF16.encode(out))
    table, indices = BF16.encode(torch.randn(9, 37)), torch.tensor([3, -1, 8, 0])
    out = torch.full((4, 37), 77.0)
    compile_kernel(embedding(37, 16))(indices, table, out)
    assert torch.equal(out, BF16.decode(table[indices]))


def test_layers_of_one_input_give_the_bits_of_each_alone(compile_for: Build) -> None:
    parts = (Part(40), Part(17, "relu"), Part(96))
    name = instruction_sets.detect()
    spec = Linear(66, 153, x="bfloat16", bits=16, epilogue=Epilogue("float32"), isa=name, parts=parts)
    alone = [replace(spec, out_features=p.columns, parts=(), epilogue=Epilogue("float32", p.activation)) for p in parts]
    layers = [(BF16.encode(torch.randn(p.columns, 66)).numpy(), None, None, torch.randn(p.columns).numpy()) for p in parts]
    together = compile_for(linear(spec), name)
    kernels = [compile_for(linear(one), name) for one in alone]
    for rows in (1, 33):
        x, found = BF16.encode(torch.randn(rows, 66)), [torch.full((rows, p.columns), 77.0) for p in parts]
        together(x, *map(torch.from_numpy, pack_layers(spec, layers)), *found)
        for one, arrays, kernel, got in zip(alone, layers, kernels, found, strict=True):
            expected = torch.full_like(got, 78.0)
            kernel(x, *map(torch.from_numpy, pack_linear(one, *arrays)), expected)
            assert torch.equal(got, expected)


@pytest.mark.skipif(instruction_sets.machine() != "x86_64", reason="code for x86 is made only on x86")
@pytest.mark.parametrize(("name", "instruction"), [("avx512bf16", "vdpbf16ps"), ("amx", "tdpbf16ps"), ("avx512vnni", "vfmadd")])
def test_what_multiplies(name: str, instruction: str) -> None:
    """Code can be made on any processor of the architecture; two kernels of a module may import the same lines."""
    specs = [Linear(64, n, x="bfloat16", bits=16, isa=name) for n in (48, 96)]
    module = tvm.IRModule({f"linear_{s.out_features}": linear(s).with_attr("global_symbol", f"linear_{s.out_features}") for s in specs})
    code = tvm.tirx.build(module, tvm.target.Target(instruction_sets.target_description(isa=name))).inspect_source("asm")
    assert instruction in code
    assert ("dpbf16ps" in code) == (instruction != "vfmadd")
    assert "qcompile_dpbf16ps" not in code


def test_other_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="known are float32, int8, uint8, bfloat16"):
        Linear(2, 2, x="float16")
    for wrong in ({"x": "int8", "bits": 16}, {"x": "bfloat16", "bits": 8}, {"x": "bfloat16", "bits": 16, "group": 64}):
        with pytest.raises(ValueError, match="bfloat16 meets bfloat16"):
            Linear(64, 2, **wrong)

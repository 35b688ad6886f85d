"""Every instruction set of the CPU kernels: extreme values first, then each kernel family against the dialect.

Sets of this machine's architecture run on it, those of aarch64 under QEMU; a set that cannot run here is skipped with the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.attention import attention
from qcompile.backends.cpu.kernels.byte_products import add_byte_products
from qcompile.backends.cpu.kernels.convolution import convolution, pack_convolution
from qcompile.backends.cpu.kernels.convolution_spec import Convolution
from qcompile.backends.cpu.kernels.depthwise import depthwise, pack_depthwise
from qcompile.backends.cpu.kernels.hadamard import hadamard
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_batched import BatchedMatmul, batched_matmul
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.normalization import layer_norm
from qcompile.backends.cpu.kernels.pack import pack_linear
from qcompile.backends.cpu.kernels.pooling import max_pool
from qcompile.backends.cpu.kernels.quantization import quantize_dynamic
from qcompile.backends.cpu.kernels.registers import argument, function, ramp, size, store
from qcompile.backends.cpu.kernels.softmax import softmax
from tvm.tirx.script.builder import ir as T

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc
from qcompile.formats import pack, parse_scheme

Build = Callable[[Any, str], Callable[..., None]]
ALL = pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()],
    indirect=True,
)
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of values that no kernel would compute."""
    return torch.full(shape, 77, dtype=dtype)


def random_codes(dtype: str, *shape: int) -> torch.Tensor:
    low, high = RANGES[dtype]
    return torch.randint(low, high + 1, shape).to(getattr(torch, dtype))


# ---- sums of four byte products ---------------------------------------------------------------------------------------------


@ALL
def test_byte_products_are_exact_for_every_combination_of_extremes(compile_for: Build, instruction_set: str) -> None:
    """Four bytes of x, each lowest or highest, meet four weights, each -128 or 127; running sums wrap and do not saturate."""
    signed = instruction_sets.SETS[instruction_set].signed_x
    with function("products") as builder:
        rows = size("rows")
        start, out = argument("start", (rows, 16), "int32"), argument("out", (rows, 16), "int32")
        x, weight = argument("x", (rows, 16), "int32"), argument("weight", (rows, 64), "int8")
        with T.serial(rows) as row:
            total = add_byte_products(instruction_set, start[row, ramp(0)], x[row, ramp(0)], weight[row, ramp(0, 64)])
            store(out, total, row, ramp(0))
    kernel = compile_for(builder.get(), instruction_set)
    fours = list(itertools.product((0, 1), repeat=4))
    low, high = RANGES["int8" if signed else "uint8"]
    bytes_x = torch.tensor([[[low, high][i] for i in four] for four in fours])  # [16, 4]
    bytes_w = torch.tensor([[[-128, 127][i] for i in four] for four in fours])
    x = bytes_x.to(torch.uint8).reshape(16, 1, 4).expand(16, 16, 4).contiguous().view(torch.int32).reshape(16, 16)
    weight = bytes_w.to(torch.int8).reshape(1, 64).expand(16, 64).contiguous()
    for begin in (0, 2**31 - 1, -(2**31)):
        found = untouched(16, 16, dtype=torch.int32)
        kernel(torch.full((16, 16), begin, dtype=torch.int32), found, x, weight)
        exact = (begin + bytes_x @ bytes_w.T + 2**31) % 2**32 - 2**31
        assert torch.equal(found, exact.to(torch.int32))


# ---- linear layers ----------------------------------------------------------------------------------------------------------

CODES = Epilogue("float32", "relu", True, "int8")
LINEAR = {
    "uint8": Linear(203, 70, epilogue=CODES),
    "int8 by token": Linear(132, 49, x="int8", x_per_token=True, x_affine=False, epilogue=Epilogue("float32")),
    "uint8 x int4 in groups": Linear(200, 40, bits=4, group=32),
    "int8 x uint4 affine": Linear(131, 40, x="int8", bits=4, weight_signed=False, weight_affine=True, epilogue=Epilogue("int32")),
}


def check_linear(compile_for: Build, spec: Linear, x: torch.Tensor, codes: torch.Tensor, extreme: bool) -> None:
    """Compare one call with ``qc.linear``, for random scales and zero points (``extreme``: the lowest or highest)."""
    m, n, low = len(x), spec.out_features, RANGES[spec.x][0]
    groups = (n, spec.groups) if spec.group else (n,)
    x_scale, scale = torch.rand((m, 1) if spec.x_per_token else ()) * 0.02 + 0.001, torch.rand(groups) * 0.01 + 0.001
    zero = torch.tensor(low + 255 if extreme else low + 100, dtype=torch.int32) if spec.x_affine else None
    weight_zero = torch.randint(0, 1 << spec.bits, groups).to(torch.int32) if spec.weight_affine else None
    bias = {"none": None, "float32": torch.randn(n), "int32": torch.randint(-5000, 5000, (n,)).to(torch.int32)}[spec.epilogue.bias]
    residual = torch.randn(m, n) if spec.epilogue.residual else None
    out = (torch.tensor(0.37), torch.tensor(7, dtype=torch.int32)) if spec.epilogue.codes else (None, None)
    sign, by = "" if spec.weight_signed else "u", f"group={spec.group}" if spec.group else "channel=0"
    expected = torch.ops.qc.linear(
        x, x_scale, zero, pack(codes, spec.bits), scale, weight_zero, bias, residual, *out,
        f"{spec.x} {'token' if spec.x_per_token else 'tensor'} {'affine' if spec.x_affine else 'sym'}",
        f"{sign}int{spec.bits} {by} {'affine' if spec.weight_affine else 'sym'}", spec.in_features,
        spec.epilogue.activation, f"{spec.epilogue.output} tensor affine" if spec.epilogue.codes else "",
    )  # fmt: skip
    arrays = pack_linear(spec, *(None if t is None else t.numpy() for t in (codes, scale, weight_zero, bias)))
    arguments = [x, x_scale.reshape(-1), zero if zero is None else zero.reshape(1), *map(torch.from_numpy, arrays), residual]
    arguments += [None if t is None else t.reshape(1) for t in out]
    found = torch.full_like(expected, 77)
    compile_for(linear(spec), spec.isa)(*(argument for argument in arguments if argument is not None), found)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", LINEAR)
@ALL
def test_linear(compile_for: Build, instruction_set: str, name: str) -> None:
    spec = replace(LINEAR[name], isa=instruction_set, tile=None)
    built = []

    def once(primfunc: Any, isa: str) -> Callable[..., None]:
        built.append(compile_for(primfunc, isa)) if not built else None
        return built[0]

    low, high = (-(1 << spec.bits >> 1), (1 << spec.bits >> 1) - 1) if spec.weight_signed else (0, (1 << spec.bits) - 1)
    for m in (1, 3, 29):
        codes = torch.randint(low, high + 1, (spec.out_features, spec.in_features)).to(torch.int8 if spec.weight_signed else torch.uint8)
        check_linear(once, spec, random_codes(spec.x, m, spec.in_features), codes, extreme=False)
        for x_value, w_value in itertools.product(RANGES[spec.x], (low, high) if m > 1 else ()):
            x = torch.full((m, spec.in_features), x_value, dtype=getattr(torch, spec.x))
            check_linear(once, spec, x, torch.full_like(codes, w_value), extreme=True)


FLOAT = {
    "float32": Linear(203, 70, x="float32", bits=32),
    "float x int4 in groups": Linear(200, 40, x="float32", bits=4, group=32),
}


@pytest.mark.parametrize("name", FLOAT)
@ALL
def test_float_linear(compile_for: Build, instruction_set: str, name: str) -> None:
    """Within k + 8 roundings of the sum of magnitudes."""
    spec = replace(FLOAT[name], isa=instruction_set, tile=None)
    kernel = compile_for(linear(spec), instruction_set)
    k, n = spec.in_features, spec.out_features
    if spec.bits == 32:
        weight = torch.randn(n, k)
        arrays = pack_linear(spec, weight.numpy())
    else:
        codes, scale = torch.randint(-8, 8, (n, k)).to(torch.int8), torch.rand(n, spec.groups) * 0.01
        arrays = pack_linear(spec, codes.numpy(), scale.numpy())
        weight = codes * scale.repeat_interleave(spec.group, 1)[:, :k]
    for m in (1, 3, 29):
        x, found = torch.randn(m, k), untouched(m, n)
        kernel(x, *map(torch.from_numpy, arrays), found)
        bound = (x.abs().double() @ weight.abs().double().T) * (k + 8) * 2.0**-24
        assert bool(((found - x.double() @ weight.double().T).abs() <= bound).all())


@ALL
def test_batched_matmul(compile_for: Build, instruction_set: str) -> None:
    kernel = compile_for(batched_matmul(BatchedMatmul(transposed=True, isa=instruction_set)), instruction_set)
    a, b, found = torch.randn(3, 29, 37), torch.randn(3, 41, 37), untouched(3, 29, 41)
    kernel(a, b, found)
    assert float((found - a.double() @ b.double().mT).abs().max()) < 1e-4


# ---- convolutions -----------------------------------------------------------------------------------------------------------

IMAGE_CODES = Epilogue(bias="float32", activation="relu", output="uint8")
CONVOLUTION = {
    "dense uint8": Convolution(18, 33, 6, 5, (3, 3), padding=(1, 1), epilogue=IMAGE_CODES),
    "groups with weight zero points": Convolution(
        6, 9, 7, 6, (3, 3), (1, 2), (2, 3), groups=3, x="int8", weight_affine=True, epilogue=Epilogue(residual=True)
    ),
    "depthwise int8": Convolution(83, 83, 6, 5, (3, 3), padding=(1, 1), groups=83, x="int8", epilogue=IMAGE_CODES),
    "depthwise with weight zero points": Convolution(80, 80, 5, 6, (3, 3), groups=80, weight_affine=True, epilogue=Epilogue()),
}


@pytest.mark.parametrize("name", CONVOLUTION)
@ALL
def test_convolution(compile_for: Build, instruction_set: str, name: str) -> None:
    spec = replace(CONVOLUTION[name], isa=instruction_set)
    build, pack_weight = (depthwise, pack_depthwise) if name.startswith("depthwise") else (convolution, pack_convolution)
    kernel = compile_for(build(spec), instruction_set)
    shape = (2, spec.channels, spec.height, spec.width)
    weights = random_codes("int8", spec.out_channels, spec.group_channels, *spec.kernel)
    check_convolution(kernel, spec, pack_weight, random_codes(spec.x, *shape), weights)
    for x_value, w_value in itertools.product(RANGES[spec.x], (-128, 127)):
        x = torch.full(shape, x_value, dtype=getattr(torch, spec.x))
        check_convolution(kernel, spec, pack_weight, x, torch.full_like(weights, w_value))


def check_convolution(kernel: Callable[..., None], spec: Convolution, pack_weight: Any, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Compare one call with ``qc.conv2d``."""
    n, epilogue = spec.out_channels, spec.epilogue
    x_scale, scale = torch.tensor(0.02), torch.rand(n) * 0.01 + 0.001
    zero = torch.tensor(RANGES[spec.x][0] + 255, dtype=torch.int32) if spec.x_affine else None
    weight_zero = torch.randint(-128, 128, (n,), dtype=torch.int32) if spec.weight_affine else None
    bias = {"none": None, "float32": torch.randn(n), "int32": torch.randint(-5000, 5000, (n,)).to(torch.int32)}[epilogue.bias]
    residual = torch.randn(len(x), n, spec.out_height, spec.out_width) if epilogue.residual else None
    out = (torch.tensor(0.4), torch.tensor(7, dtype=torch.int32)) if epilogue.codes else (None, None)
    expected = torch.ops.qc.conv2d(
        x, x_scale, zero, weight, scale, weight_zero, bias, residual, *out,
        f"{spec.x} tensor {'affine' if spec.x_affine else 'sym'}", f"int8 channel=0 {'affine' if spec.weight_affine else 'sym'}",
        spec.kernel[1], spec.stride, spec.padding, spec.dilation, spec.groups, epilogue.activation,
        f"{epilogue.output} tensor affine" if epilogue.codes else "",
    )  # fmt: skip
    constants = pack_weight(spec, *(None if t is None else t.numpy() for t in (weight, scale, weight_zero, bias)))
    arguments = [nhwc(x), x_scale.reshape(1), zero if zero is None else zero.reshape(1), *map(torch.from_numpy, constants)]
    arguments += [None if residual is None else nhwc(residual), *(None if t is None else t.reshape(1) for t in out)]
    found = torch.full_like(nhwc(expected), 77)
    kernel(*(argument for argument in arguments if argument is not None), found)
    assert torch.equal(found, nhwc(expected))


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


# ---- the other kernels ------------------------------------------------------------------------------------------------------


@ALL
def test_attention(compile_for: Build, instruction_set: str) -> None:
    heads, kv_heads, d = 4, 2, 20
    kernel = compile_for(attention(heads, kv_heads, d, d**-0.5, key_mask=True, causal=True, isa=instruction_set), instruction_set)
    for batch, tokens, keys in ((1, 1, 1), (2, 33, 129), (2, 2, 7)):
        q, k, v = torch.randn(batch, tokens, heads * d), *(torch.randn(batch, keys, kv_heads * d) for _ in range(2))
        mask = torch.rand(batch, keys) > 0.3
        expected = torch.ops.qc.attention(q.double(), k.double(), v.double(), mask, heads, kv_heads, d**-0.5, True)
        found = untouched(*q.shape)
        kernel(q, k, v, mask, found)
        assert float((found - expected).abs().max()) < 1e-5


@ALL
def test_layer_norm_with_codes(compile_for: Build, instruction_set: str) -> None:
    kernel = compile_for(layer_norm(37, 1e-5, residual=True, codes="uint8", isa=instruction_set), instruction_set)
    x, residual, weight, bias = torch.randn(21, 37) * 3 + 1, torch.randn(21, 37), torch.rand(37), torch.randn(37)
    scale, zero = torch.tensor([0.011]), torch.tensor([131], dtype=torch.int32)
    found, codes = untouched(21, 37), untouched(21, 37, dtype=torch.uint8)
    kernel(x, residual, weight, bias, scale, zero, found, codes)
    expected = torch.nn.functional.layer_norm((x + residual).double(), (37,), weight.double(), bias.double(), 1e-5)
    assert float((found - expected).abs().max()) < 1e-5
    assert torch.equal(codes, torch.ops.qc.quantize(found, scale[0], zero[0], "uint8 tensor affine"))


@ALL
def test_dynamic_quantization(compile_for: Build, instruction_set: str) -> None:
    scheme = "uint8 token affine dynamic"
    kernel = compile_for(quantize_dynamic(45, parse_scheme(scheme), instruction_set), instruction_set)
    x = torch.randn(70, 45) * torch.exp(torch.randn(70, 1) * 5) + torch.randn(70, 1)
    x[0], x[1] = 0, x[1].abs()
    codes, scale, zero = untouched(70, 45, dtype=torch.uint8), untouched(70), untouched(70, dtype=torch.int32)
    kernel(x, codes, scale, zero)
    expected = torch.ops.qc.quantize_dynamic(x, scheme)
    assert torch.equal(scale, expected[1][:, 0])
    assert torch.equal(zero, expected[2][:, 0])
    assert torch.equal(codes, expected[0])


@ALL
def test_softmax_hadamard_and_pooling(compile_for: Build, instruction_set: str) -> None:
    x, found = torch.randn(9, 75) * 10, untouched(9, 75)
    compile_for(softmax(75), instruction_set)(x, found)
    assert float((found - torch.softmax(x.double(), -1)).abs().max()) < 1e-6
    x, found = torch.randn(5, 512), untouched(5, 512)
    compile_for(hadamard(512, 256, instruction_set), instruction_set)(x, found)
    norm = float(x.unflatten(-1, (-1, 256)).norm(dim=-1).max())
    assert float((found - torch.ops.qc.hadamard(x.double(), 256)).abs().max()) <= (math.log2(256) + 2) * norm * 2.0**-23
    image, found = random_codes("int8", 2, 7, 6, 21), untouched(2, 4, 3, 21, dtype=torch.int8)
    compile_for(max_pool(21, 7, 6, (3, 3), (2, 2), (1, 1), dtype="int8"), instruction_set)(image, found)
    expected = torch.nn.functional.max_pool2d(image.permute(0, 3, 1, 2).float(), 3, 2, 1).permute(0, 2, 3, 1)
    assert torch.equal(found, expected.to(torch.int8))

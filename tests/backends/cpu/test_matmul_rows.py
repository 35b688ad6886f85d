"""Linear kernels of one to eight rows against the dialect: integers bit for bit, float products within their rounding bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear, Tile
from qcompile.backends.cpu.kernels.pack import pack_linear
from qcompile.backends.cpu.target import TARGET

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc
from qcompile.capture.torch_export import capture_module
from qcompile.formats import dequantize, pack, parse_scheme, quantize_tensor

ROWS = range(1, 9)
ISAS = sorted({isa.detect(), isa.PORTABLE})
_RANGES = {"int8": (-128, 128), "uint8": (0, 256), "float32": (-1, 1)}
Compile = Callable[..., Callable[..., None]]


@dataclass
class Layer:
    """One layer and one input, as the dialect takes them."""

    spec: Linear
    x: torch.Tensor
    x_scale: torch.Tensor
    x_zero: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor

    def scheme(self) -> str:
        spec = self.spec
        granularity = f"group={spec.group}" if spec.group else "channel=0"
        return f"{'' if spec.weight_signed else 'u'}int{spec.bits} {granularity} {'affine' if spec.weight_affine else 'sym'}"

    @cached_property
    def constants(self) -> list[torch.Tensor]:
        zero = None if self.zero is None else self.zero.numpy()
        bias = None if self.spec.epilogue.bias == "none" else self.bias.numpy()
        return [torch.from_numpy(a) for a in pack_linear(self.spec, self.codes.numpy(), self.scale.numpy(), zero, bias)]

    def run(self, kernel: Callable[..., None], m: int) -> torch.Tensor:
        """Call the kernel on the first m rows."""
        spec = self.spec
        granules = m if spec.x_per_token else 1
        inputs = [self.x[:m].clone()]
        if spec.integer:
            inputs += [self.x_scale[:granules].clone(), *([self.x_zero[:granules].clone()] if spec.x_affine else [])]
        inputs += self.constants
        y = torch.full((m, spec.out_features), 77.0)
        kernel(*inputs, y)
        return y

    def meaning(self, m: int) -> torch.Tensor:
        spec = self.spec
        x_scale, x_zero = (t[:m, None] if spec.x_per_token else t[0] for t in (self.x_scale, self.x_zero))
        x_scheme = f"{spec.x} {'token' if spec.x_per_token else 'tensor'} {'affine' if spec.x_affine else 'sym'}"
        return torch.ops.qc.linear(
            self.x[:m], x_scale, x_zero if spec.x_affine else None, pack(self.codes, spec.bits), self.scale, self.zero,
            self.bias if spec.epilogue.bias != "none" else None, None, None, None,
            x_scheme, self.scheme(), spec.in_features, spec.epilogue.activation,
        )  # fmt: skip


def _make(spec: Linear, extreme: bool = False) -> Layer:
    """Return a layer with eight rows of input: random, or every code and zero point at one of its ends."""
    rng = np.random.default_rng(spec.in_features + spec.bits)

    def codes(low: int, high: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        values = rng.choice([low, high - 1], shape) if extreme else rng.integers(low, high, shape)
        return torch.from_numpy(values.astype(dtype))

    n, k = spec.out_features, spec.in_features
    low, high = (-(1 << (spec.bits - 1)), 1 << (spec.bits - 1)) if spec.weight_signed else (0, 1 << spec.bits)
    low = -1 if spec.ternary else low
    shape = (n, spec.groups) if spec.group else (n,)
    x = codes(*_RANGES[spec.x], (8, k), spec.x) if spec.integer else torch.from_numpy(rng.standard_normal((8, k)).astype(np.float32))
    return Layer(
        spec, x, torch.from_numpy((rng.random(8) * 0.02 + 0.001).astype(np.float32)), codes(*_RANGES[spec.x], (8,), "int32"),
        codes(low, high, (n, k), "int8" if spec.weight_signed else "uint8"),
        torch.from_numpy((rng.random(shape) * 0.01 + 0.001).astype(np.float32)),
        codes(low, high, shape, "int32") if spec.weight_affine else None,
        torch.from_numpy(rng.integers(-5000, 5000, n).astype("int32" if spec.epilogue.bias == "int32" else "float32")),
    )  # fmt: skip


_TOKEN = {"x": "int8", "x_per_token": True, "x_affine": False}
_UNSIGNED = {"weight_signed": False, "weight_affine": True}
_F32 = Epilogue("float32", "relu")
_INTEGER = {
    "W8 channel": Linear(203, 70, epilogue=Epilogue("int32")),
    "W8 channel, int8 symmetric": Linear(131, 33, x="int8", x_affine=False, epilogue=_F32),
    "W8 g32, uint8 affine": Linear(161, 50, bits=8, group=32),
    "W8 g64, token": Linear(130, 100, bits=8, group=64, **_TOKEN),
    "W4 g32, token": Linear(200, 70, bits=4, group=32, epilogue=_F32, **_TOKEN),
    "W4 g128, uint8 affine": Linear(300, 97, bits=4, group=128),
    "W4 g64, token affine": Linear(193, 40, x_per_token=True, bits=4, group=64, **_UNSIGNED),
    "W4 channel, uint8 symmetric": Linear(131, 49, x_affine=False, bits=4, epilogue=_F32),
    "W4 channel, affine both": Linear(99, 49, x="int8", bits=4, epilogue=Epilogue("int32"), **_UNSIGNED),
    "W3 g64, token": Linear(255, 47, bits=3, group=64, **_TOKEN),
    "W2 g128, token": Linear(384, 145, bits=2, group=128, **_TOKEN),
    "W2 g32, affine both": Linear(95, 40, x="int8", bits=2, group=32, **_UNSIGNED),
    "W1 g128, token": Linear(256, 50, bits=1, group=128, **_TOKEN),
    "W5 channel": Linear(100, 40, bits=5),
    "W7 affine": Linear(100, 40, bits=7, **_UNSIGNED),
    "ternary, token": Linear(331, 50, bits=2, ternary=True, epilogue=_F32, **_TOKEN),
    "ternary, uint8 affine": Linear(640, 33, bits=2, ternary=True, epilogue=Epilogue("int32")),
}


@pytest.mark.parametrize("name", _INTEGER)
def test_integers_agree_bit_for_bit_at_every_row_count(name: str, compile_kernel: Compile) -> None:
    spec = _INTEGER[name]
    assert spec.few_rows[0] == 1
    kernel = compile_kernel(linear(spec))
    for layer in (_make(spec), _make(spec, extreme=True)):
        for m in ROWS:
            torch.testing.assert_close(layer.run(kernel, m), layer.meaning(m), rtol=0, atol=0)


@pytest.mark.parametrize("isa_name", ISAS)
def test_columns_are_split_into_tasks_that_meet(isa_name: str, compile_kernel: Compile) -> None:
    """The weight is large enough for several tasks, and its blocks of columns are no multiple of them; the last task is short."""
    spec = Linear(1024, 700, bits=4, group=128, isa=isa_name, epilogue=_F32, **_TOKEN)
    spec = replace(spec, tile=replace(spec.tile, threads=4))
    kernel, layer = compile_kernel(linear(spec), isa_name), _make(spec)
    for m in (1, 3, 8):
        torch.testing.assert_close(layer.run(kernel, m), layer.meaning(m), rtol=0, atol=0)


_FLOAT = {f"W{bits}": Linear(161, 70, x="float32", bits=bits) for bits in (1, 2, 3, 4, 8)}
_FLOAT |= {f"W{bits} g32": Linear(161, 70, x="float32", bits=bits, group=32) for bits in (2, 4, 8)}
_FLOAT |= {
    "W1 g64": Linear(192, 33, x="float32", bits=1, group=64),
    "W3 g128": Linear(300, 33, x="float32", bits=3, group=128, epilogue=_F32),
    "W4 g128 affine": Linear(300, 33, x="float32", bits=4, group=128, **_UNSIGNED),
    "W2 affine": Linear(99, 33, x="float32", bits=2, **_UNSIGNED),
    "W5": Linear(100, 33, x="float32", bits=5),
    "W6 g32": Linear(100, 33, x="float32", bits=6, group=32),
    "W7 affine": Linear(100, 33, x="float32", bits=7, **_UNSIGNED),
}


def _magnitude(layer: Layer) -> torch.Tensor:
    """Return the sum over k of abs(x) times what is summed for a weight: its value, or with zero points both terms of it."""
    scheme = parse_scheme(layer.scheme())
    parts = [layer.codes.to(torch.int32)]
    if layer.zero is not None:
        parts.append(scheme.granularity.expand(layer.zero, tuple(layer.codes.shape)))
    weight = sum(part.abs() for part in parts) * scheme.granularity.expand(layer.scale.double(), tuple(layer.codes.shape))
    return layer.x.double().abs() @ weight.T


@pytest.mark.parametrize("name", _FLOAT)
def test_floats_agree_within_rounding_at_every_row_count(name: str, compile_kernel: Compile) -> None:
    """Each of the k terms of a sum is rounded at most k + 8 times by 2**-24, scales, bias and the table's additions included.

    Symmetric weights of zero give exactly zero however large x is: no zero point is taken back by a difference of large sums.
    """
    spec = _FLOAT[name]
    kernel = compile_kernel(linear(spec))
    for layer in (_make(spec), _make(spec, extreme=True)):
        scheme = parse_scheme(layer.scheme())
        weight = dequantize(layer.codes, layer.scale.double(), layer.zero, scheme)
        bias = layer.bias.double() if spec.epilogue.bias != "none" else torch.zeros(())
        exact = layer.x.double() @ weight.T + bias
        exact = torch.relu(exact) if spec.epilogue.activation == "relu" else exact
        bound = (spec.in_features + 8) * 2.0**-24 * (_magnitude(layer) + bias.abs())
        for m in ROWS:
            assert ((layer.run(kernel, m) - exact[:m]).abs() <= bound[:m]).all()
    if not spec.weight_affine and spec.epilogue.bias == "none":
        nothing = replace(layer, codes=torch.zeros_like(layer.codes), x=layer.x * 1e30)
        assert not nothing.run(kernel, 1).any()


def test_rows_that_do_not_fit_beside_the_weights_take_the_other_body() -> None:
    lookup = Linear(4096, 64, x="float32", bits=2, group=128, isa=isa.AVX512_VNNI)
    assert lookup.few_rows == (1, 2, 4, 8)  # tables of 128 KiB and 16 KiB of x for each row, in 2304 KiB
    assert replace(lookup, in_features=1 << 14).few_rows == (1, 2, 4)
    assert replace(lookup, in_features=1 << 17).few_rows == ()
    assert replace(lookup, isa=isa.PORTABLE, tile=None).few_rows == ()  # it has no shuffle of sixteen floats
    assert replace(lookup, bits=8).few_rows == (1, 2, 4, 8)
    assert Linear(4096, 64, bits=2, isa=isa.AVX512_VNNI, tile=Tile(8, 3, 128, packed_bytes=8 << 10)).few_rows == (1, 2, 4)


class _Decoder(torch.nn.Module):
    """A linear layer whose input is quantized while it runs, or stays float."""

    def __init__(self, scheme: str, x_scheme: str) -> None:
        super().__init__()
        weight = quantize_tensor(torch.randn(50, 256, generator=torch.Generator().manual_seed(0)), parse_scheme(scheme))
        self.scheme, self.x_scheme = scheme, x_scheme
        self.register_buffer("codes", weight.packed())
        self.register_buffer("scale", weight.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = torch.ops.qc.quantize_dynamic(x, self.x_scheme)[:2] if self.x_scheme else (x, None)
        nothing = (None,) * 5
        return torch.ops.qc.linear(codes, scale, None, self.codes, self.scale, *nothing, self.x_scheme, self.scheme, 256)


@pytest.mark.parametrize("scheme", ["int2 group=128 sym", "int3 group=64 sym", "int1 channel=0 sym", "int8 group=32 sym"])
def test_built_graphs_run_narrow_weights_on_the_same_kernel_for_any_rows(scheme: str) -> None:
    layer = _Decoder(scheme, "int8 token sym dynamic").eval()
    graph = capture_module(layer, (torch.randn(3, 256),), dynamic_shapes={"x": {0: "rows"}})
    assert not TARGET.leftovers(graph)
    run = build(graph.module, threads=2)
    for m in (1, 8, 20):
        x = torch.randn(m, 256)
        torch.testing.assert_close(run(x)[0], layer(x), rtol=0, atol=0)
    bits = parse_scheme(scheme).bits
    assert [name for name, _ in run.kernel_calls(x) if name.startswith("linear")] == [f"linear_int8_w{bits}_256x50"]

"""Layers that one product computes: the same bits as alone, and only where they read the same and end alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from qcompile.backends.cpu import joined_layers, legalize_layers, tiling
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.kernels import pack
from qcompile.backends.cpu.kernels.isa import KNOWN
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear, Part
from qcompile.backends.cpu.kernels.pack import pack_layers, pack_linear
from torch import nn

import qcompile
from qcompile.recipe import Schemes
from qcompile.verification import verify

PARTS = (Part(40), Part(17, "relu"), Part(96))  # whole vectors, a ragged one, whole blocks
WIDTH = 64


def _layer(spec: Linear, rng: np.random.Generator) -> tuple[Any, ...]:
    """Return weight, scale, zero point and bias of a layer."""
    n, k = spec.out_features, spec.in_features
    shape = (n, spec.groups) if spec.group else (n,)
    bias = rng.standard_normal(n).astype(np.float32)
    if spec.bits == 32:
        return rng.standard_normal((n, k)).astype(np.float32), None, None, bias
    top = 1 << (spec.bits - 1)
    return rng.integers(-top, top, (n, k)).astype(np.int8), rng.random(shape).astype(np.float32), None, bias


@pytest.mark.parametrize("instruction_set", KNOWN, indirect=True)
@pytest.mark.parametrize(("x", "bits", "group"), [("uint8", 8, 0), ("int8", 4, 64), ("float32", 32, 0)])
def test_a_joined_product_gives_the_bits_of_each_layer(
    compile_for: Callable[..., Any], instruction_set: str, x: str, bits: int, group: int
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    spec = Linear(WIDTH, sum(p.columns for p in PARTS), x, bits=bits, group=group, epilogue=Epilogue("float32"), isa=instruction_set,
                  x_affine=x == "uint8", parts=PARTS)  # fmt: skip
    alone = [replace(spec, out_features=p.columns, parts=(), epilogue=Epilogue("float32", p.activation)) for p in PARTS]
    layers = [_layer(one, rng) for one in alone]
    constants = [torch.from_numpy(array) for array in pack_layers(spec, layers)]
    joined = compile_for(linear(spec), instruction_set)
    kernels = [compile_for(linear(one), instruction_set) for one in alone]
    for rows in (1, 5, 33):
        values = torch.randn(rows, WIDTH) if x == "float32" else torch.randint(0, 127, (rows, WIDTH)).to(getattr(torch, x))
        inputs = [values] if x == "float32" else [values, torch.tensor([0.02])]
        inputs += [torch.tensor([100], dtype=torch.int32)] * spec.x_affine * spec.integer
        found = [torch.full((rows, p.columns), 77.0) for p in PARTS]
        joined(*inputs, *constants, *found)
        for one, arrays, kernel, got in zip(alone, layers, kernels, found, strict=True):
            expected = torch.full_like(got, 78.0)
            kernel(*inputs, *map(torch.from_numpy, pack_linear(one, *arrays)), expected)
            assert torch.equal(got, expected), (rows, one.out_features)


@pytest.mark.parametrize(
    ("x", "bits", "group", "affine"),
    [
        ("uint8", 8, 0, False),
        ("int8", 4, 64, False),
        ("int8", 4, 32, True),
        ("int8", 3, 0, True),
        ("float32", 4, 64, False),
        ("float32", 32, 0, False),
    ],
)
@pytest.mark.parametrize("columns", [97, 512])
def test_a_large_layer_is_packed_by_runs_of_columns(
    monkeypatch: pytest.MonkeyPatch, x: str, bits: int, group: int, affine: bool, columns: int
) -> None:
    rng = np.random.default_rng(0)
    spec = Linear(WIDTH, columns, x, bits=bits, group=group, epilogue=Epilogue("float32"), weight_affine=affine, x_affine=x == "uint8")
    weight, scale, _, bias = _layer(spec, rng)
    zero_point = None if not affine else rng.integers(-2, 2, scale.shape).astype(np.int32)
    expected = pack_linear(spec, weight, scale, zero_point, bias)
    monkeypatch.setattr(pack, "_AT_ONCE", 2000)
    found = pack_layers(spec, [(weight, scale, zero_point, bias)])
    assert len(found) == len(expected)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


class Projections(nn.Module):
    """Three layers of one input, and what reads them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias) for n in (WIDTH, 32, 32))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(q * torch.cat([k, v.tanh()], -1))


def _compiled(scheme: str, layers: dict[str, str] | None = None) -> Any:
    torch.manual_seed(0)
    x = torch.randn(6, WIDTH)
    steps = "canonicalize,assign-bits,insert-quantizers,quantize-weights,materialize,clamp-codes,fuse-epilogue"
    recipe = qcompile.Recipe(name="joined", pipeline=steps, schemes=Schemes(linear=scheme, layers=layers or {}))
    return qcompile.compile(Projections(), (x,), recipe=recipe, calibration=[(torch.randn(6, WIDTH),) for _ in range(4)])


def _products(artifact: Any) -> list[str]:
    calls = artifact.executable.built.kernel_calls(*artifact.golden_inputs)
    return [name for name, _ in calls if name.startswith("linear")]


@pytest.mark.parametrize(
    ("scheme", "products"),
    [
        ("W8A8", ["linear_uint8_3_w8_64x128_tanh"]),
        ("W8A8-dynamic", ["linear_int8_3_w8_64x128_tanh"]),
        ("w4g32", ["linear_float32_3_w4_64x128_tanh"]),
        ("float", ["linear_float32_2_w32_64x96", "linear_float32_w32_64x32_tanh"]),
    ],
)
def test_layers_of_one_input_are_one_product(monkeypatch: pytest.MonkeyPatch, scheme: str, products: list[str]) -> None:
    artifact = _compiled(scheme)
    assert [name for name in _products(artifact) if "64x8" not in name] == products
    assert verify(artifact)["ok"]
    (together,) = artifact.executable(artifact.golden_inputs)
    times = artifact.executable.layer_times(artifact.golden_inputs)
    assert sorted(times) == sorted(layer["node"] for layer in artifact.report["layers"])

    def alone(node: Any) -> tuple[Any, ...]:
        return (node,)

    monkeypatch.setattr(legalize_layers, "joined", alone)
    monkeypatch.setattr(tiling, "joined", alone)
    apart = build(artifact.graph.module)
    assert len([name for name, _ in apart.kernel_calls(*artifact.golden_inputs) if name.startswith("linear")]) == 4
    assert torch.equal(together, apart(*artifact.golden_inputs)[0])


def test_layers_of_different_schemes_stay_apart() -> None:
    artifact = _compiled("W8A8", {"k": "W4A8"})
    names = _products(artifact)
    assert len(names) == 3
    assert "linear_uint8_2_w8_64x96_tanh" in names  # q and v
    assert verify(artifact)["ok"]


def test_layers_that_end_in_codes_or_a_residual_stay_alone() -> None:
    """Of these four, the kernel of the first adds a residual, that of the second gives codes; float ones swallow an activation."""

    class Ends(Projections):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin()
            return self.out(self.q(x).relu()) + (x + self.q(x)).sum() + self.v(x).sum()

    torch.manual_seed(0)
    x = torch.randn(6, WIDTH)
    steps = "canonicalize,assign-bits,insert-quantizers,quantize-weights,materialize,clamp-codes,fuse-epilogue"
    for scheme in ("W8A8", "float"):
        recipe = qcompile.Recipe(name="ends", pipeline=steps, schemes=Schemes(linear=scheme))
        artifact = qcompile.compile(Ends(), (x,), recipe=recipe, calibration=[(x,)])
        layers = [node for node in artifact.graph.nodes if "linear" in str(node.target)]
        assert len(layers) == 4
        assert all(joined_layers.joined(node) == (node,) for node in layers)

"""Linear layers with bfloat16 weights against float64, within the rounding that the kernel states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.bfloat16_products import FEATURE
from qcompile.backends.cpu.kernels.matmul_bfloat16 import Bfloat16Linear, bfloat16_linear, pack_bfloat16

Build = Callable[[Any, str], Callable[..., None]]
ROWS = (1, 2, 3, 8, 9, 70)


def _check(spec: Bfloat16Linear, kernel: Callable[..., None], rows: int, spread: float = 1.0) -> None:
    """Compare one call; values of magnitudes up to 2**spread either way, so that sums cancel."""

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape) * torch.exp2(spread * (2 * torch.rand(shape) - 1))

    x, weight, bias = values(rows, spec.in_features), values(spec.out_features, spec.in_features).bfloat16(), values(spec.out_features)
    x = x if spec.x == "float32" else x.bfloat16()
    constants = [torch.from_numpy(array) for array in pack_bfloat16(spec, weight.view(torch.int16).numpy(), bias.numpy())]
    out = torch.full((rows, spec.out_features), 77.0)
    kernel(x if spec.x == "float32" else x.view(torch.int16), *constants, out)
    added = bias.double() if spec.bias else torch.zeros(())
    exact = x.double() @ weight.double().T + added
    bound = (spec.in_features + 8) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + added.abs())
    assert ((out - exact).abs() <= bound).all(), rows


@pytest.mark.parametrize("x", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 50), (130, 96)])
def test_sums_are_within_rounding(compile_kernel: Build, x: str, shape: tuple[int, int]) -> None:
    spec = Bfloat16Linear(*shape, x=x, bias=shape[0] > 1)
    kernel = compile_kernel(bfloat16_linear(spec))
    for rows in ROWS:
        _check(spec, kernel, rows)
        _check(spec, kernel, rows, spread=20.0)


def _compiled_with(feature: str, spec: Bfloat16Linear) -> Callable[..., None]:
    """Return a kernel for this machine and what it has besides LLVM's model of it."""
    target = instruction_sets.target_description()
    target["mattr"] = [*target.get("mattr", []), f"+{feature}"]
    function = bfloat16_linear(spec)
    name = str(function.attrs["global_symbol"])
    kernel = tvm.compile(tvm.IRModule({name: function}), tvm.target.Target(target))[name]

    def call(*arguments: torch.Tensor) -> None:
        aligned = (argument if argument.data_ptr() % 64 == 0 else argument.clone() for argument in arguments)  # NumPy's memory may not be
        kernel(*(tvm.runtime.from_dlpack(argument) for argument in aligned))

    return call


@pytest.mark.skipif(bool(instruction_sets.missing_features(["amx-bf16"])), reason="this processor has no tile registers for bfloat16")
def test_tile_registers() -> None:
    """The same bound, but that denormal bfloat16 count as zero."""
    spec = Bfloat16Linear(131, 50, x="bfloat16", bias=True, tiles=True)
    kernel = _compiled_with("amx-bf16", spec)
    for rows in ROWS:
        _check(spec, kernel, rows, spread=20.0)
    for tiles in (False, True):
        spec = Bfloat16Linear(2, 16, x="bfloat16", tiles=tiles, pairs=False)
        x, weight = torch.full((1, 2), 2.0**-130).bfloat16(), torch.full((16, 2), 2.0**100).bfloat16()
        constants = map(torch.from_numpy, pack_bfloat16(spec, weight.view(torch.int16).numpy()))
        out = torch.full((1, 16), 77.0)
        _compiled_with("amx-bf16", spec)(x.view(torch.int16), *constants, out)
        assert torch.equal(out, torch.full((1, 16), 0.0 if tiles else 2.0**-29))


@pytest.mark.skipif(bool(instruction_sets.missing_features([FEATURE])), reason="this processor multiplies no pairs of bfloat16")
@pytest.mark.parametrize("shape", [(1, 1), (33, 50), (130, 96)])
def test_pairs_in_vectors(shape: tuple[int, int]) -> None:
    spec = Bfloat16Linear(*shape, x="bfloat16", bias=True, tiles=False, pairs=True)
    kernel = _compiled_with(FEATURE, spec)
    for rows in ROWS:
        _check(spec, kernel, rows)
        _check(spec, kernel, rows, spread=20.0)


@pytest.mark.skipif(instruction_sets.machine() != "x86_64", reason="code for x86 is made only on x86")
def test_pairs_become_one_instruction() -> None:
    """Code can be made on any processor of the architecture; two kernels of a module may import the same lines."""
    specs = [Bfloat16Linear(64, n, x="bfloat16", tiles=False, pairs=True, isa="avx512vnni") for n in (48, 96)]
    module = tvm.IRModule(
        {f"linear_{s.out_features}": bfloat16_linear(s).with_attr("global_symbol", f"linear_{s.out_features}") for s in specs}
    )
    compiled = tvm.tirx.build(module, tvm.target.Target({"kind": "llvm", "mcpu": "cooperlake"}))
    code = compiled.inspect_source("asm")
    assert "vdpbf16ps" in code
    assert "qcompile_dpbf16ps" not in code


@pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()],
    indirect=True,
)
def test_every_instruction_set(compile_for: Build, instruction_set: str) -> None:
    for x in ("float32", "bfloat16"):
        spec = Bfloat16Linear(35, 21, x=x, bias=True, tiles=False, pairs=False, isa=instruction_set)
        _check(spec, compile_for(bfloat16_linear(spec), instruction_set), 5)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="known are float32, bfloat16"):
        Bfloat16Linear(2, 2, x="float16")

"""Linear layers with looked-up weights: int8 values bit for bit against ``qc.linear``, floats within rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_codebook import CodebookLinear, codebook_linear, decode, pack_codebook
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.pack import pack_linear

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc
from qcompile.formats import pack

Build = Callable[[Any, str], Callable[..., None]]
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}
ROWS = (1, 2, 3, 8, 9, 70)
INTEGER = {
    "uint8 affine, one table": CodebookLinear(203, 37, x_affine=True),
    "int8, a table for each channel": CodebookLinear(128, 50, x="int8", tables="channel"),
    "int8 affine, a table for each group": CodebookLinear(600, 9, x="int8", x_affine=True, tables="group", group=256),
    "uint8, one table, one column": CodebookLinear(70, 1),
    "int8 by token, a table for each channel": CodebookLinear(140, 20, x="int8", tables="channel", x_per_token=True),
    "uint8 affine by token": CodebookLinear(140, 20, x_affine=True, x_per_token=True),
}
FLOAT = {
    "one table, one scale": CodebookLinear(203, 37, x="float32"),
    "one table, grouped scales": CodebookLinear(500, 20, x="float32", group=128),
    "a table for each channel": CodebookLinear(256, 21, x="float32", tables="channel"),
    "a table for each group": CodebookLinear(700, 17, x="float32", tables="group", group=384),
}


def _weight(spec: CodebookLinear, extreme: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indices, tables and scale; ``extreme``: all values of tables at an end of int8."""
    rng = np.random.default_rng(spec.in_features)
    tables_of = (1 if spec.tables == "tensor" else spec.out_features, *spec.table_shape[1:])
    indices = rng.integers(0, 16, (spec.out_features, spec.in_features)).astype(np.uint8)
    if spec.integer:
        tables = (rng.choice([-128, 127], tables_of) if extreme else rng.integers(-128, 128, tables_of)).astype(np.int8)
    else:
        tables = rng.standard_normal(tables_of).astype(np.float32)
    scale = (rng.random((spec.out_features, spec.scale_shape[1])) * 0.01 + 0.001).astype(np.float32)
    return indices, tables, scale


def _x_arguments(spec: Any, rows: int, extreme: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]:
    """Return codes of x, scales, zero points and their scheme."""
    low, high = RANGES[spec.x]
    ends = torch.tensor([low, high])[torch.randint(0, 2, (rows, spec.in_features))]
    x = (ends if extreme else torch.randint(low, high + 1, ends.shape)).to(getattr(torch, spec.x))
    shape = (rows, 1) if spec.x_per_token else ()
    zero = torch.randint(low, high + 1, shape, dtype=torch.int32) if spec.x_affine else None
    granularity = "token" if spec.x_per_token else "tensor"
    return x, torch.rand(shape) * 0.01 + 0.001, zero, f"{spec.x} {granularity} {'affine' if zero is not None else 'sym'}"


def _check_integer(spec: CodebookLinear, kernel: Callable[..., None], rows: int, extreme: bool) -> None:
    indices, tables, scale = _weight(spec, extreme)
    x, x_scale, zero, x_scheme = _x_arguments(spec, rows, extreme)
    codes = torch.from_numpy(decode(spec, indices, tables))
    expected = torch.ops.qc.linear(
        x, x_scale, zero, pack(codes, 8), torch.from_numpy(scale[:, 0].copy()), None, None, None, None, None,
        x_scheme, "int8 channel=0 sym", spec.in_features,
    )  # fmt: skip
    found = torch.full_like(expected, 77)
    constants = [torch.from_numpy(array) for array in pack_codebook(spec, indices, tables, scale)]
    flat = (None if part is None else part.reshape(-1) for part in (x_scale, zero))
    kernel(*(argument for argument in (x, *flat, *constants, found) if argument is not None))
    assert torch.equal(found, expected), rows


@pytest.mark.parametrize("name", INTEGER)
def test_looked_up_bytes_agree_bit_for_bit(compile_for: Build, name: str) -> None:
    spec = INTEGER[name]
    kernel = compile_for(codebook_linear(spec), spec.isa)
    for rows in ROWS:
        for extreme in (False, True):
            _check_integer(spec, kernel, rows, extreme)


def _check_float(spec: CodebookLinear, kernel: Callable[..., None], rows: int) -> None:
    """Each of the k terms of a sum is rounded at most k + 8 times by 2**-24."""
    indices, tables, scale = _weight(spec, extreme=False)
    x = torch.randn(rows, spec.in_features)
    expanded = scale.repeat(spec.group or spec.in_features, 1)[:, : spec.in_features]
    weight = torch.from_numpy(decode(spec, indices, tables).astype(np.float64) * expanded)
    found = torch.full((rows, spec.out_features), 77.0)
    kernel(x, *(torch.from_numpy(array) for array in pack_codebook(spec, indices, tables, scale)), found)
    bound = (spec.in_features + 8) * 2.0**-24 * (x.double().abs() @ weight.abs().T)
    assert ((found - x.double() @ weight.T).abs() <= bound).all(), rows


@pytest.mark.parametrize("name", FLOAT)
def test_looked_up_floats_agree_within_rounding(compile_for: Build, name: str) -> None:
    spec = FLOAT[name]
    kernel = compile_for(codebook_linear(spec), spec.isa)
    for rows in ROWS:
        _check_float(spec, kernel, rows)


@pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()],
    indirect=True,
)
def test_every_instruction_set(compile_for: Build, instruction_set: str) -> None:
    integer = CodebookLinear(200, 11, x="int8", x_affine=True, tables="channel", isa=instruction_set)
    kernel = compile_for(codebook_linear(integer), instruction_set)
    for rows in (1, 7):
        _check_integer(integer, kernel, rows, extreme=True)
    floats = CodebookLinear(300, 11, x="float32", group=256, isa=instruction_set)
    _check_float(floats, compile_for(codebook_linear(floats), instruction_set), 3)


# ---- one table: an argument of the ordinary kernel ------------------------------------------------------------------------

_BYTES = {
    "uint8 affine": Linear(203, 70, bits=4, codebook=True, epilogue=Epilogue("float32", "relu", True)),
    "int8 by token": Linear(201, 48, x="int8", x_per_token=True, x_affine=False, bits=4, codebook=True),
    "uint8 by token affine, groups": Linear(192, 50, x_per_token=True, bits=4, group=64, codebook=True, epilogue=Epilogue("float32")),
    "int8 affine, small groups, codes": Linear(160, 33, x="int8", bits=4, group=32, codebook=True, epilogue=Epilogue(output="int8")),
    "uint8, whole tiles": Linear(256, 64, x_affine=False, bits=4, codebook=True, epilogue=Epilogue("int32", "relu", output="uint8")),
}
_FLOATS = {
    "channel": Linear(203, 70, x="float32", bits=4, codebook=True, epilogue=Epilogue("float32", "relu", True)),
    "groups of 64": Linear(300, 40, x="float32", bits=4, group=64, codebook=True),
    "groups of 16": Linear(200, 40, x="float32", bits=4, group=16, codebook=True),
}


def _codebook(spec: Linear, extreme: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Return codes, a table without zero, scales, and the scheme."""
    codes = torch.randint(0, 16, (spec.out_features, spec.in_features), dtype=torch.uint8)
    table = torch.tensor([-128] * 8 + [127] * 8 if extreme else [-128, -77, -53, -40, -31, -20, -9, -3, 2, 5, 11, 20, 44, 71, 99, 127])
    scale = torch.rand((spec.out_features, spec.groups) if spec.group else (spec.out_features,)) * 0.01 + 0.001
    return codes, table.to(torch.int8), scale, f"codebook4 {f'group={spec.group}' if spec.group else 'channel=0'} sym"


def _packed(spec: Linear, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor) -> list[torch.Tensor]:
    bias_array = None if bias is None else bias.numpy()
    return [torch.from_numpy(part) for part in pack_linear(spec, codes.numpy(), scale.numpy(), None, bias_array, table.numpy())]


def _bias_and_residual(spec: Linear, rows: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    kinds = {
        "none": None,
        "int32": torch.randint(-5000, 5000, (spec.out_features,), dtype=torch.int32),
        "float32": torch.randn(spec.out_features),
    }
    return kinds[spec.epilogue.bias], torch.randn(rows, spec.out_features) if spec.epilogue.residual else None


def _check_bytes(spec: Linear, kernel: Callable[..., None], rows: int, extreme: bool) -> None:
    codes, table, scale, scheme = _codebook(spec, extreme)
    x, x_scale, x_zero, x_scheme = _x_arguments(spec, rows, extreme)
    bias, residual = _bias_and_residual(spec, rows)
    out = (torch.tensor(0.37), torch.tensor(3, dtype=torch.int32)) if spec.epilogue.codes else (None, None)
    out_scheme = f"{spec.epilogue.output} tensor affine" if spec.epilogue.codes else ""
    expected = torch.ops.qc.linear(
        x, x_scale, x_zero, pack(codes, 4), scale, None, bias, residual, *out, x_scheme, scheme, spec.in_features,
        spec.epilogue.activation, out_scheme, table.unsqueeze(0),
    )  # fmt: skip
    found = torch.full_like(expected, 77)
    flat = [None if part is None else part.reshape(-1) for part in (x_scale, x_zero, *out)]
    arguments = (x, *flat[:2], *_packed(spec, codes, scale, bias, table), residual, *flat[2:], found)
    kernel(*(argument for argument in arguments if argument is not None))
    assert torch.equal(found, expected), rows


@pytest.mark.parametrize("name", _BYTES)
def test_one_table_of_bytes_agrees_bit_for_bit(compile_for: Build, name: str) -> None:
    spec = _BYTES[name]
    kernel = compile_for(linear(spec), spec.isa)
    for rows in ROWS:
        for extreme in (False, True):
            _check_bytes(spec, kernel, rows, extreme)


def _check_floats(spec: Linear, kernel: Callable[..., None], rows: int) -> None:
    """Each of the k terms of a sum is rounded at most k + 8 times by 2**-24."""
    codes, _, scale, _ = _codebook(spec, extreme=False)
    table, x = torch.randn(16).sort().values, torch.randn(rows, spec.in_features)
    bias, residual = _bias_and_residual(spec, rows)
    expanded = scale.reshape(spec.out_features, -1).repeat_interleave(spec.group or spec.in_features, 1)[:, : spec.in_features]
    weight = (table[codes.long()] * expanded).double()
    y = x.double() @ weight.T
    expected = y if bias is None else torch.relu(y + bias) + residual
    found = torch.full((rows, spec.out_features), 77.0)
    kernel(*(a for a in (x, *_packed(spec, codes, scale, bias, table), residual, found) if a is not None))
    bound = (spec.in_features + 8) * 2.0**-24 * (x.double().abs() @ weight.abs().T + 8)
    assert ((found - expected).abs() <= bound).all(), rows


@pytest.mark.parametrize("name", _FLOATS)
def test_one_table_of_floats_agrees_within_rounding(compile_for: Build, name: str) -> None:
    spec = _FLOATS[name]
    kernel = compile_for(linear(spec), spec.isa)
    for rows in ROWS:
        _check_floats(spec, kernel, rows)


@pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()],
    indirect=True,
)
def test_one_table_on_every_instruction_set(compile_for: Build, instruction_set: str) -> None:
    integer = replace(_BYTES["uint8 by token affine, groups"], isa=instruction_set, tile=None)
    kernel = compile_for(linear(integer), instruction_set)
    for rows in (1, 11):
        _check_bytes(integer, kernel, rows, extreme=True)
    floats = replace(_FLOATS["groups of 64"], isa=instruction_set, tile=None)
    _check_floats(floats, compile_for(linear(floats), instruction_set), 3)


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 128"):
        CodebookLinear(256, 8, tables="group", group=64)
    with pytest.raises(ValueError, match="a table for each 'row'"):
        CodebookLinear(256, 8, tables="row")
    with pytest.raises(ValueError, match="have 4 bits"):
        Linear(256, 8, bits=3, codebook=True)
    with pytest.raises(ValueError, match="may hold no zero"):
        Linear(200, 8, bits=4, group=64, codebook=True)

"""Linear layers with looked-up weights: int8 values bit for bit against ``qc.linear`` of the decoded weight, floats within rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul_codebook import CodebookLinear, codebook_linear, decode, pack_codebook

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


def _check_integer(spec: CodebookLinear, kernel: Callable[..., None], rows: int, extreme: bool) -> None:
    indices, tables, scale = _weight(spec, extreme)
    low, high = RANGES[spec.x]
    ends = torch.tensor([low, high])[torch.randint(0, 2, (rows, spec.in_features))]
    x = (ends if extreme else torch.randint(low, high + 1, ends.shape)).to(getattr(torch, spec.x))
    x_scale = torch.tensor([0.013])
    zero = torch.tensor([high if extreme else low + 91], dtype=torch.int32) if spec.x_affine else None
    codes = torch.from_numpy(decode(spec, indices, tables))
    expected = torch.ops.qc.linear(
        x, x_scale[0], zero, pack(codes, 8), torch.from_numpy(scale[:, 0].copy()), None, None, None, None, None,
        f"{spec.x} tensor {'affine' if zero is not None else 'sym'}", "int8 channel=0 sym", spec.in_features,
    )  # fmt: skip
    found = torch.full_like(expected, 77)
    constants = [torch.from_numpy(array) for array in pack_codebook(spec, indices, tables, scale)]
    kernel(*(argument for argument in (x, x_scale, zero, *constants, found) if argument is not None))
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


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 128"):
        CodebookLinear(256, 8, tables="group", group=64)
    with pytest.raises(ValueError, match="a table for each 'row'"):
        CodebookLinear(256, 8, tables="row")

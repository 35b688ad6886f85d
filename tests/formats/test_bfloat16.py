"""bfloat16 as a format: the nearest value, ties to even, by exact arithmetic; and the texts that mean it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.formats import (
    BFloat16,
    LayerScheme,
    Scheme,
    Tensor,
    bits_per_weight,
    dequantize,
    parse_format,
    parse_layer_scheme,
    parse_scheme,
    quantize,
    quantize_tensor,
)  # fmt: skip

FORMAT = BFloat16()
SCHEME = Scheme(FORMAT, Tensor())
SMALLEST = 2.0**-126


def _nearest(x: float) -> float:
    """Return the nearest bfloat16 by exact fractions, ties to even; below half of the smallest zero, beyond the highest infinity."""
    exponent = math.floor(math.log2(abs(x))) if x else 0
    exponent += (Fraction(abs(x)) >= Fraction(2) ** (exponent + 1)) - (Fraction(abs(x)) < Fraction(2) ** exponent) if x else 0
    step = Fraction(2) ** (max(exponent, -126) - 7)
    value = round(Fraction(x) / step) * step  # half to even
    if abs(value) >= Fraction(2) ** 128:
        return math.copysign(math.inf, x)
    return float(value) if abs(value) >= Fraction(SMALLEST) else math.copysign(0.0, x)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_codes_are_of_the_nearest_value(x: float) -> None:
    value = FORMAT.decode(FORMAT.encode(torch.tensor([x])))
    assert float(value) == _nearest(x)
    assert math.copysign(1, float(value)) == math.copysign(1, x)


@given(st.integers(-(2**15), 2**15 - 1), st.sampled_from([0x7FFF, 0x8000, 0x8001, 0]))
def test_ties_and_their_neighbours(upper: int, lower: int) -> None:
    x = torch.tensor([upper << 16 | lower], dtype=torch.int32).view(torch.float32)
    if x.isfinite().all():
        assert float(FORMAT.decode(FORMAT.encode(x))) == _nearest(float(x))


def test_every_code_is_its_own_value_but_denormal_numbers_and_nans() -> None:
    codes = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = FORMAT.decode(codes)
    kept = FORMAT.encode(values)
    denormal, nan = codes & 0x7F80 == 0, values.isnan()
    assert torch.equal(kept[~denormal & ~nan], codes[~denormal & ~nan])
    assert bool((kept[nan] == 0x7FC0).all())
    assert torch.equal(kept[denormal], codes[denormal] & -0x8000)
    assert torch.equal(values[~denormal & ~nan], codes.view(torch.bfloat16).to(torch.float32)[~denormal & ~nan])


def test_values_that_are_no_numbers() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, FORMAT.highest, 3.4e38, -3.4e38, 2.0**-127])
    assert [hex(code & 0xFFFF) for code in FORMAT.encode(x).tolist()] == ["0x7f80", "0xff80", "0x7fc0", "0x7f7f", "0x7f80", "0xff80", "0x0"]
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert FORMAT.encode(nans).tolist() == [0x7FC0] * 3


def test_there_is_no_scale() -> None:
    x = torch.randn(3, 5)
    found = quantize_tensor(x, SCHEME)
    assert found.scale is None
    assert found.zero_point is None
    assert torch.equal(found.packed(), quantize(x, None, None, SCHEME))
    assert torch.equal(found.dequantize(), dequantize(found.codes, None, None, SCHEME))
    assert bool(((found.dequantize() - x).abs() <= x.abs() * 2.0**-8).all())
    assert bits_per_weight(SCHEME, (3, 5)) == 16.0
    assert not SCHEME.calibrated


def test_text() -> None:
    assert parse_format("bf16") == FORMAT
    assert str(SCHEME) == "bf16"
    assert parse_scheme("bf16") == SCHEME
    both = LayerScheme(SCHEME, SCHEME)
    for name in ("bf16", "BF16", "bfloat16", "WBF16ABF16", "w-bf16-a-bf16", str(both)):
        assert parse_layer_scheme(name) == both
    for name in ("WBF16", "WBF16A32", "weight=bf16; activation=float"):
        assert parse_layer_scheme(name) == LayerScheme(SCHEME)


@pytest.mark.parametrize("text", ["bf16 channel=0", "bf16 affine", "bf16 dynamic", "bf16 scale=f16"])
def test_words_about_a_scale_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bf16 has no scale: write 'bf16'"):
        parse_scheme(text)


def test_other_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="stored as the bits of int16"):
        FORMAT.unpack(torch.zeros(2, 2, dtype=torch.int8), 2)

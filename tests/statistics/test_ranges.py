"""Ranges: each against a slow, obvious computation on the data itself."""

import pytest
import torch

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.formats.quantize import choose_scale, dequantize, quantize
from qcompile.statistics import Histogram, ranges
from qcompile.statistics.ranges import find_range

SYMMETRIC, AFFINE = parse_scheme("int8 tensor sym"), parse_scheme("uint8 tensor affine")


def histogram(x: torch.Tensor) -> dict[str, torch.Tensor]:
    collector = Histogram("x").start()
    collector.update(x)
    return collector.result()


def normal_with_outliers(size: int = 20_000) -> torch.Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([40.0, -25.0, 30.0])
    return x


def squared_error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scheme) -> float:  # type: ignore[no-untyped-def]
    scale, zero_point = choose_scale(low, high, scheme)
    return float((x - dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme)).double().square().sum())


def test_minmax_is_the_data() -> None:
    x = normal_with_outliers()
    assert find_range("minmax", histogram(x), AFFINE) == (x.min(), x.max())


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_the_quantile(percentile: float) -> None:
    x = normal_with_outliers()
    low, high = find_range("percentile", histogram(x), SYMMETRIC, percentile)
    assert low == -high
    assert float(high) == pytest.approx(float(x.abs().quantile(percentile / 100)), abs=0.02)  # two bins
    low, high = find_range("percentile", histogram(x), AFFINE, percentile)
    tail = (1 - percentile / 100) / 2
    two_bins = 2 * (40 + 25) / 2048
    assert float(low) == pytest.approx(float(x.quantile(tail)), abs=two_bins)
    assert float(high) == pytest.approx(float(x.quantile(1 - tail)), abs=two_bins)


def test_percentile_100_is_minmax() -> None:
    x = normal_with_outliers()
    assert find_range("percentile", histogram(x), AFFINE, 100.0) == (x.min(), x.max())


@pytest.mark.parametrize(
    "scheme", ["int8 tensor sym", "uint8 tensor affine", "int4 tensor sym", "uint4 tensor affine", "uint2 tensor affine"]
)
def test_mse_range_beats_every_shrink_factor(scheme: str) -> None:
    parsed, x = parse_scheme(scheme), normal_with_outliers()
    found = squared_error(x, *find_range("mse", histogram(x), parsed), parsed)
    tried = min(squared_error(x, x.min() * f, x.max() * f, parsed) for f in torch.linspace(0.05, 1, 96))
    assert found <= tried * 1.01  # the histogram's bins are 1/2048 of the range wide
    assert found < squared_error(x, x.min(), x.max(), parsed)


SEARCHED = [
    "int8 tensor sym",
    "uint8 tensor affine",
    "uint4 tensor affine",
    "int2 tensor sym",
    "int1 tensor sym",
    "uint8 tensor affine scale=f16",
]


@pytest.mark.parametrize("scheme", SEARCHED)
@pytest.mark.parametrize("shift", [0.0, 300.0, -2.0])
def test_mse_range_is_that_of_comparing_every_candidate(scheme: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data, parsed = histogram(normal_with_outliers() + shift), parse_scheme(scheme)
    found = find_range("mse", data, parsed)
    unknown = (torch.zeros(102, dtype=torch.float64), torch.full((102,), torch.inf, dtype=torch.float64))
    monkeypatch.setattr(ranges, "_errors", lambda low, *rest: tuple(bound[: len(low)] for bound in unknown))
    assert find_range("mse", data, parsed) == found


@pytest.mark.parametrize("scheme", SEARCHED)
@pytest.mark.parametrize("shift", [0.0, 300.0, -2.0])
def test_sums_bound_the_expected_error(scheme: str, shift: float) -> None:
    generator, parsed = torch.Generator().manual_seed(0), parse_scheme(scheme)
    values = (torch.randn(4000, generator=generator, dtype=torch.float64) + shift).sort().values
    counts = torch.randint(1, 1000, (4000,), generator=generator).to(torch.float64)
    low, high = (end * torch.linspace(0.1, 1, 50, dtype=torch.float64) for end in (values[0], values[-1]))
    error, rounding = ranges._errors(low, high, ranges._Values(values, counts), parsed)
    exact = torch.tensor([ranges.expected_error(a, b, values, counts, parsed) for a, b in zip(low, high, strict=True)], dtype=torch.float64)
    assert ((error - exact).abs() <= rounding).all()
    assert (rounding <= 1e-6 * exact + 1e-9 * (values.square() * counts).sum()).all()  # so that few candidates stay undecided


def test_mse_range_of_a_one_sided_value() -> None:
    x = normal_with_outliers().relu()
    low, high = find_range("mse", histogram(x), AFFINE)
    assert low == 0
    assert high < x.max()


@pytest.mark.parametrize("scheme", [SYMMETRIC, AFFINE])
def test_entropy_cuts_outliers_and_keeps_the_body(scheme) -> None:  # type: ignore[no-untyped-def]
    x = normal_with_outliers()
    low, high = find_range("entropy", histogram(x), scheme)
    assert 2.5 < high < 20
    assert low == -high


def test_entropy_keeps_a_flat_range() -> None:
    x = torch.linspace(-1, 1, 4096 * 8)
    low, high = find_range("entropy", histogram(x), SYMMETRIC)
    assert float(high) == pytest.approx(1, abs=0.02)
    assert float(low) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_values_have_a_range(kind: str, value: float) -> None:
    low, high = find_range(kind, histogram(torch.full((100,), value)), AFFINE)
    assert torch.isfinite(low)
    assert torch.isfinite(high)
    assert abs(float(low if value < 0 else high) - value) <= 0.01 * abs(value)


def test_refusals() -> None:
    with pytest.raises(Refused, match="not 0"):
        find_range("percentile", histogram(torch.ones(3)), AFFINE, 0)
    with pytest.raises(Refused, match="unknown range"):
        find_range("best", histogram(torch.ones(3)), AFFINE)
    with pytest.raises(Refused, match="no finite range"):
        find_range("minmax", histogram(torch.ones(0)), AFFINE)

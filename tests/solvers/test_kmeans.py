"""k-means: learned tables against what Lloyd's steps promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import check_table, parse_scheme, quantize_tensor
from qcompile.solvers.kmeans import solve

SCHEMES = ["codebook4 channel=0 sym", "codebook3 group=8 sym", "codebook2 tensor sym", "codebook1 channel=0 sym"]
seeds = st.integers(0, 2**31)


def _weight(seed: int) -> torch.Tensor:
    return torch.randn(8, 60, generator=_generator(seed)).pow(3)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gram(seed: int) -> torch.Tensor:
    x = torch.randn(100, 60, generator=_generator(seed)).double() * torch.rand(60, generator=_generator(seed)).double() * 10
    return x.T @ x / 100


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("table_rows", [0, 1, 2])
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_error_is_no_larger_than_that_of_nearest_rounding(scheme: str, table_rows: int, seed: int) -> None:
    parsed, weight, gram = parse_scheme(scheme), _weight(seed), _gram(seed)
    plain = quantize_tensor(weight, parsed).dequantize()
    for statistics, h in (({}, torch.ones(60)), ({"gram": gram}, gram.diagonal())):
        found = solve(weight, statistics, parsed, table_rows=table_rows)
        check_table(found.table, parsed.format, 8)
        assert len(found.table) == 8 // (table_rows or 8)
        assert found.scale.shape == parsed.granularity.scale_shape((8, 60))
        # The importance of dead inputs is raised by 1e-6 of the mean, which may cost as much of the objective.
        assert (h * (weight - found.dequantize()).square()).sum() <= (h * (weight - plain).square()).sum() * (1 + 1e-4)


def test_a_weight_of_two_values_is_learned_exactly() -> None:
    high = torch.rand(6, 1) + 2
    weight = torch.where(torch.rand(6, 40) < 0.3, -high, high)
    found = solve(weight, {}, parse_scheme("codebook1 channel=0 sym"), table_rows=1)
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-6, atol=0)


def test_skewed_weights_gain_much_over_fixed_levels() -> None:
    weight = torch.rand(16, 200, generator=_generator(3)) + 0.2  # all positive: half of the fixed levels lie idle
    scheme = parse_scheme("codebook3 channel=0 sym")
    found, plain = solve(weight, {}, scheme), quantize_tensor(weight, scheme)
    assert (weight - found.dequantize()).square().sum() < 0.4 * (weight - plain.dequantize()).square().sum()


@given(seed=seeds, exponent=st.integers(-8, 8))
@settings(max_examples=5, deadline=None)
def test_scaling_the_weight_scales_the_scale(seed: int, exponent: int) -> None:
    scheme, weight = parse_scheme("codebook4 group=20 sym"), _weight(seed)
    one, other = solve(weight, {}, scheme), solve(weight * 2.0**exponent, {}, scheme)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.table, other.table)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


def test_what_it_does_not_solve_is_refused() -> None:
    with pytest.raises(Refused, match="int4 has none"):
        solve(torch.randn(4, 8), {}, parse_scheme("int4 channel=0 sym"))
    with pytest.raises(Refused, match="do not divide"):
        solve(torch.randn(4, 8), {}, parse_scheme("codebook4 channel=0 sym"), table_rows=3)

"""LNQ: its steps are least squares and descent, what is stored is what was solved for, and it beats where it starts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.solvers import kmeans, lnq
from qcompile.solvers._coordinates import errors
from qcompile.solvers.gptq import row_errors

SCHEMES = ["codebook2 channel=0 sym", "codebook3 channel=0 sym scale=f16", "codebook2 group=8 sym", "codebook2 tensor sym"]
seeds = st.integers(0, 2**31)


def layer(seed: int, out: int = 6, inputs: int = 24) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator).double() @ torch.randn(inputs, inputs, generator=generator).double()
    return torch.randn(out, inputs, generator=generator), {"gram": x.T @ x / len(x)}


def total(weight: torch.Tensor, found: object, gram: torch.Tensor) -> float:
    return float(row_errors(weight, found.dequantize(), gram).sum())  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("table_rows", [0, 1, 2])
@given(seed=seeds)
@settings(max_examples=4, deadline=None)
def test_it_is_stored_as_a_codebook_and_beats_kmeans(scheme: str, table_rows: int, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    found = lnq.solve(weight, statistics, parsed, table_rows=table_rows, damping=0.0)
    start = kmeans.solve(weight, statistics, parsed, table_rows=table_rows)
    assert found.table is not None
    assert found.table.dtype == torch.int8
    assert found.table.shape == (6 // (table_rows or 6), 2**parsed.format.bits)
    assert bool((found.table[:, 1:] >= found.table[:, :-1]).all())
    assert int(found.codes.max()) < 2**parsed.format.bits
    assert found.scale.shape == parsed.granularity.scale_shape(tuple(weight.shape))
    assert torch.equal(found.scale, found.scale.to(parsed.scale_dtype).float())
    assert total(weight, found, statistics["gram"]) < total(weight, start, statistics["gram"])


@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_neither_step_raises_the_error(seed: int) -> None:
    weight, statistics = layer(seed)
    parsed = parse_scheme("codebook2 channel=0 sym")
    W, H = weight.double().unsqueeze(0), statistics["gram"].unsqueeze(0)
    rows = lnq._Rows(W, H, kmeans.solve(weight, statistics, parsed, table_rows=1), 1)

    def error() -> torch.Tensor:
        return errors(W, rows._of_rows(rows.levels).gather(2, rows.codes) * rows.scale, H)

    before = error()
    for step in [rows.choose_levels, *[rows.choose_codes] * 2] * 3:
        step()
        assert (error() <= before * (1 + 1e-6)).all()
        before = error()


def test_levels_are_the_least_squares_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 24, generator=generator).double(), torch.randn(1, 24, generator=generator)
    start = kmeans.solve(weight, {}, parse_scheme("codebook2 channel=0 sym"), table_rows=1)
    rows = lnq._Rows(weight.double().unsqueeze(0), (x.T @ x).unsqueeze(0), start, 1)
    P = torch.nn.functional.one_hot(rows.codes[0, 0], 4).double() * rows.scale[0, 0, 0]
    expected = torch.linalg.lstsq(x @ P, x @ weight[0].double()).solution
    rows.choose_levels()
    torch.testing.assert_close(rows.levels[0], expected.sort().values, rtol=1e-4, atol=1e-6)


def test_more_rounds_do_not_lose() -> None:
    weight, statistics = layer(1)
    parsed = parse_scheme("codebook2 channel=0 sym")
    totals = [total(weight, lnq.solve(weight, statistics, parsed, rounds=n, damping=0.0), statistics["gram"]) for n in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert totals[3] < totals[0]


def test_each_group_of_outputs_is_solved_on_its_own_matrix() -> None:
    (one, a), (other, b) = layer(0), layer(1)
    parsed, weight = parse_scheme("codebook2 channel=0 sym"), torch.cat([one, other])
    right, wrong = (lnq.solve(weight, {"gram": torch.stack(grams)}, parsed) for grams in ([a["gram"], b["gram"]], [b["gram"], a["gram"]]))
    error = [float(row_errors(weight, q.dequantize(), torch.stack([a["gram"], b["gram"]])).sum()) for q in (right, wrong)]
    assert error[0] < 0.5 * error[1]


def test_permuted_and_scaled_weights() -> None:
    weight, statistics = layer(2)
    parsed, order = parse_scheme("codebook3 channel=0 sym"), torch.tensor([3, 1, 5, 0, 2, 4])
    found = lnq.solve(weight, statistics, parsed)
    assert torch.equal(lnq.solve(weight[order], statistics, parsed).codes, found.codes[order])
    scaled = lnq.solve(weight * 8, statistics, parsed)
    assert torch.equal(scaled.codes, found.codes)
    assert torch.equal(scaled.scale, found.scale * 8)


def test_a_weight_of_two_values_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    high = torch.rand(6, 1, generator=generator) + 2
    weight = torch.where(torch.rand(6, 24, generator=generator) < 0.3, -high, high)
    found = lnq.solve(weight, layer(0)[1], parse_scheme("codebook1 channel=0 sym"))
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-6, atol=0)


def test_refusals() -> None:
    weight, statistics = layer(3)
    with pytest.raises(Refused, match="lnq learns the tables of a codebook; int4 has none"):
        lnq.solve(weight, statistics, parse_scheme("int4 channel=0 sym"))
    with pytest.raises(Refused, match="lnq needs the Gram matrix"):
        lnq.solve(weight, {}, parse_scheme("codebook2 channel=0 sym"))
    with pytest.raises(Refused, match="6 rows do not divide into runs of 4"):
        lnq.solve(weight, statistics, parse_scheme("codebook2 channel=0 sym"), table_rows=4)

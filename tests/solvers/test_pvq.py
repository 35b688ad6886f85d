"""PVQ: what it gives can be stored, its turns never raise the error, and it beats rounding run by run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import Quantized, parse_scheme
from qcompile.solvers import ldlq, pvq
from qcompile.solvers._coordinates import errors
from qcompile.solvers._grids import Grids
from qcompile.solvers.gptq import row_errors

SCHEMES = ["pvq8k6g3 channel=0 sym", "pvq8k6g3 group=8 sym scale=f16", "pvq5k4g2 tensor sym", "pvq16k12g3 channel=0 sym"]
seeds = st.integers(0, 2**31)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def layer(seed: int, out: int = 6, inputs: int = 27) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator).double() @ torch.randn(inputs, inputs, generator=generator).double()
    return torch.randn(out, inputs, generator=generator), {"gram": x.T @ x / len(x)}


def total(weight: torch.Tensor, found: Quantized, gram: torch.Tensor) -> float:
    return float(row_errors(weight, found.dequantize(), gram).sum())


@every_scheme
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_its_codes_can_be_stored_and_its_scales_are_of_the_scheme(scheme: str, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    found = pvq.solve(weight, statistics, parsed)
    assert torch.equal(parsed.format.unpack(found.packed(), weight.shape[1]), found.codes)
    assert found.scale.shape == parsed.granularity.scale_shape(tuple(weight.shape))
    assert torch.equal(found.scale, found.scale.to(parsed.scale_dtype).float())


@every_scheme
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_feedback_beats_rounding_run_by_run_and_turns_beat_feedback(scheme: str, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    gram = statistics["gram"]
    plain = pvq.solve(weight, {}, parsed, passes=0)
    once, often = (pvq.solve(weight, statistics, parsed, passes=n, damping=0.0) for n in (0, 3))
    assert total(weight, often, gram) <= total(weight, once, gram)
    assert total(weight, often, gram) < 0.9 * total(weight, plain, gram)


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_a_turn_never_raises_the_error(seed: int) -> None:
    weight, statistics = layer(seed)
    W, H = weight.double().unsqueeze(0), statistics["gram"].unsqueeze(0)
    scheme = parse_scheme("pvq8k6g3 channel=0 sym")
    grids = Grids(scheme, pvq.choose_scale(weight.double(), torch.ones_like(W[0]), scheme, 10), None, (1, *weight.shape))
    q = grids.nearest(W)
    for _ in range(3):
        moved = pvq._descend(W, H, q, grids)
        assert bool((errors(W, moved, H) <= errors(W, q, H) * (1 + 1e-9)).all())
        q = moved


def test_feedback_is_ldlq_where_runs_are_single_weights() -> None:
    """pvq1k1g6 is integers -63 to 63: with one scale, the first rounding is LDLQ's from last to first."""
    weight, statistics = layer(3)
    statistics["gram"] = statistics["gram"] + 0.01 * torch.eye(27, dtype=torch.float64)
    one = parse_scheme("pvq1k1g6 tensor sym")
    W, H = weight.double().unsqueeze(0), statistics["gram"].unsqueeze(0)
    grids = Grids(one, torch.tensor(0.125), None, (1, *weight.shape))
    integers = Grids(parse_scheme("int8 tensor sym"), torch.tensor(0.125), None, (1, *weight.shape))
    expected = ldlq._feedback(W, H, torch.arange(27), integers.round)
    assert torch.equal(pvq._feedback(W, H, grids), expected)


def test_moved_pulses_are_the_best_of_all_single_moves() -> None:
    """One move on every row, against trying all of them on the error itself; the gain stays where it is best."""
    generator = torch.Generator().manual_seed(0)
    scheme = parse_scheme("pvq4k5g2 tensor sym")
    x = torch.randn(1, 40, 4, generator=generator).double()
    root = torch.randn(1, 6, 4, generator=generator).double()
    H, scale = root.transpose(1, 2) @ root, torch.full_like(x, 0.25)
    start = scheme.format.encode(x / scale).double() * scale

    def error(q: torch.Tensor) -> torch.Tensor:
        return (((x - q) @ H) * (x - q)).sum(2)

    gain = (start / scale).abs().sum(2, keepdim=True) / 5
    best, gradient = error(start), (x - start) @ H
    for i in range(4):
        for j in range(4):
            for sign in (-1.0, 1.0):
                p = start / scale / gain.clamp(min=1)
                way = torch.where(p[..., j] == 0, gradient[..., j].sign(), p[..., j].sign())  # away from zero, or down the slope
                able = (p[..., i] != 0) & (i != j) & (way == sign)
                p[..., i] -= p[..., i].sign()
                p[..., j] += sign
                best = torch.where(able, torch.minimum(best, error(p * gain * scale)), best)
    found = pvq.move_pulses(x, start, H, scale, scheme, moves=1)
    assert bool((error(found) <= best + 1e-6).all())
    assert bool((error(found) < error(start) - 1e-6).any())
    codes = (found / scale).round().to(torch.int8)
    assert torch.equal(scheme.format.unpack(scheme.format.pack(codes), 4), codes)


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_representable_weights_come_back_unchanged(seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme("pvq8k6g3 channel=0 sym"), layer(seed, inputs=24)
    codes = parsed.format.encode(2 * weight).float()
    codes[:, :8] = torch.tensor([14.0, -7, 7, 7, -7, 0, 0, 0])  # the largest gain, which the first scale that is tried gives
    found = pvq.solve(codes * 0.25, statistics, parsed)
    assert torch.equal(found.codes.float(), codes)
    assert torch.equal(found.dequantize(), codes * 0.25)


@given(seed=seeds, exponent=st.integers(-8, 8))
@settings(max_examples=5, deadline=None)
def test_scaled_weights_and_permuted_rows(seed: int, exponent: int) -> None:
    parsed, (weight, statistics) = parse_scheme("pvq8k6g3 channel=0 sym"), layer(seed)
    one, other = pvq.solve(weight, statistics, parsed), pvq.solve(weight * 2.0**exponent, statistics, parsed)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pvq.solve(weight[order], statistics, parsed).codes, one.codes[order])


def test_rows_of_zeros_and_dead_inputs() -> None:
    parsed, (weight, statistics) = parse_scheme("pvq8k6g3 channel=0 sym"), layer(1)
    weight[2] = 0
    statistics["gram"][8:16] = statistics["gram"][:, 8:16] = 0
    found = pvq.solve(weight, statistics, parsed)
    assert not found.codes[2].any()
    assert bool(torch.isfinite(found.dequantize()).all())


def test_what_it_does_not_take_is_refused() -> None:
    weight, statistics = layer(0)
    with pytest.raises(Refused, match="int4 is none"):
        pvq.solve(weight, statistics, parse_scheme("int4 channel=0 sym"))
    with pytest.raises(Refused, match="along the input"):
        pvq.solve(weight, statistics, parse_scheme("pvq8k6g3 channel=1 sym"))

"""What every solver keeps, and GPTQ against an independent solution of its problem."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme, parse_scheme
from qcompile.registry import find_solver
from qcompile.solvers.gptq import row_errors
from qcompile.solvers.gptq import solve as solve_gptq
from qcompile.solvers.mse import solve as mse
from qcompile.solvers.nearest import solve as nearest

SCHEMES = [
    "int4 channel=0 sym",
    "int8 channel=0 sym",
    "uint4 channel=0 affine",
    "int4 group=8 sym",
    "uint3 group=5 affine",
    "int3 tensor sym",
]
PLAIN = {"act_order": False, "grid": "nearest"}  # gptq as the paper has it
gptq = functools.partial(solve_gptq, **PLAIN)
OPTIONS = [
    ("nearest", {}),
    ("mse", {}),
    ("mse", {"weighted": False}),
    ("gptq", {}),
    ("gptq", PLAIN),
    ("gptq", {**PLAIN, "act_order": True}),
    ("gptq", {**PLAIN, "static_groups": False, "block": 7}),
    ("ldlq", {}),
    ("ldlq", {"passes": 0, "order": False, "grid": "nearest"}),
    ("comq", {}),
    ("comq", {"greedy": False, "refit": False}),
    ("gpfq", {}),
    ("gpfq", {"order": False}),
]
every_solver = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
seeds = st.integers(0, 2**31)


def layer(seed: int, out: int = 6, inputs: int = 20) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a weight and the Gram matrix of correlated inputs, which are the float model's too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator).double() @ torch.randn(inputs, inputs, generator=generator).double()
    return torch.randn(out, inputs, generator=generator), {"gram": x.T @ x / len(x), "cross": x.T @ x / len(x)}


def objective(weight: torch.Tensor, found: Quantized, gram: torch.Tensor) -> float:
    return float(row_errors(weight, found.dequantize(), gram).sum())


@every_solver
@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_codes_are_in_range_and_shaped_by_the_scheme(name: str, options: dict, scheme: str, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    found = find_solver(name)(weight, statistics, parsed, **options)
    assert found.codes.shape == weight.shape
    assert found.codes.dtype == parsed.format.storage
    assert parsed.format.lowest <= int(found.codes.min()) <= int(found.codes.max()) <= parsed.format.highest
    assert found.scale.shape == parsed.granularity.scale_shape(tuple(weight.shape))
    assert (found.zero_point is None) == parsed.symmetric


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_error_on_its_own_objective_is_no_worse_than_nearest(scheme: str, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    gram, plain = statistics["gram"], nearest(weight, {}, parsed)
    identity, diagonal = torch.eye(len(gram)).double(), torch.diag(torch.diagonal(gram))
    assert objective(weight, mse(weight, {}, parsed), identity) <= objective(weight, plain, identity) * (1 + 1e-9)
    assert objective(weight, mse(weight, statistics, parsed), diagonal) <= objective(weight, plain, diagonal) * (1 + 1e-5)
    for options in ({}, {"act_order": True}, {"static_groups": False}):
        assert objective(weight, gptq(weight, statistics, parsed, **options), gram) < objective(weight, plain, gram)
    for name in ("ldlq", "comq", "gpfq"):
        assert objective(weight, find_solver(name)(weight, statistics, parsed), gram) < objective(weight, plain, gram)


@every_solver
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_representable_weights_come_back_unchanged(name: str, options: dict, seed: int) -> None:
    scheme, (weight, statistics) = parse_scheme("int4 channel=0 sym"), layer(seed)
    codes = (weight * 4).round().clamp(-7, 7)
    codes[:, 0] = 7  # the range reaches the highest code
    weight = codes * 0.25
    found = find_solver(name)(weight, statistics, scheme, **options)
    assert torch.equal(found.codes.float(), codes)
    assert torch.equal(found.dequantize(), weight)


@every_solver
@pytest.mark.parametrize("scheme", ["int4 channel=0 sym", "uint4 group=8 affine"])
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_permuting_outputs_permutes_codes(name: str, options: dict, scheme: str, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    solve = find_solver(name)
    assert torch.equal(solve(weight[order], statistics, parsed, **options).codes, solve(weight, statistics, parsed, **options).codes[order])


@every_solver
@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=seeds, exponent=st.integers(-8, 8))
@settings(max_examples=5, deadline=None)
def test_scaling_the_weight_scales_the_scale(name: str, options: dict, scheme: str, seed: int, exponent: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    solve = find_solver(name)
    one, other = solve(weight, statistics, parsed, **options), solve(weight * 2.0**exponent, statistics, parsed, **options)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


# ---- gptq -----------------------------------------------------------------------------------------------------------------


def obq_in_order(weight: torch.Tensor, H: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round columns from first to last; the inverse of the rest of H is found by elimination (Frantar 2022, equations 2, 3)."""
    W, codes = weight.double().clone(), torch.empty_like(weight)
    inverse = torch.linalg.inv(H)
    for j in range(W.shape[1]):
        codes[:, j] = (W[:, j].float() / scale).round().clamp(scheme.format.lowest, scheme.format.highest)
        error = (W[:, j] - codes[:, j].double() * scale.double()) / inverse[j, j]
        W -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("block", [1, 5, 128])
@given(seed=seeds, inputs=st.integers(1, 16))
@settings(max_examples=15, deadline=None)
def test_gptq_is_obq_in_a_fixed_order(block: int, seed: int, inputs: int) -> None:
    scheme, (weight, statistics) = parse_scheme("int4 channel=0 sym"), layer(seed, inputs=inputs)
    gram = statistics["gram"]
    damped = gram + 0.01 * torch.diagonal(gram).mean() * torch.eye(inputs)
    found = gptq(weight, statistics, scheme, block=block, keep_better=False)
    assert torch.equal(found.codes.float(), obq_in_order(weight, damped, found.scale, scheme))


def test_act_order_is_the_same_on_reordered_inputs() -> None:
    scheme, (weight, statistics) = parse_scheme("int4 channel=0 sym"), layer(0)
    order = torch.diagonal(statistics["gram"]).argsort(descending=True)
    sorted_first = gptq(weight[:, order], {"gram": statistics["gram"][order][:, order]}, scheme)
    assert torch.equal(gptq(weight, statistics, scheme, act_order=True).codes[:, order], sorted_first.codes)


@pytest.mark.parametrize("block", [4, 7, 128])
def test_dynamic_groups_do_not_depend_on_the_block(block: int) -> None:
    scheme, (weight, statistics) = parse_scheme("uint4 group=6 affine"), layer(1)
    one = gptq(weight, statistics, scheme, static_groups=False, block=1)
    other = gptq(weight, statistics, scheme, static_groups=False, block=block)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)
    assert not torch.equal(one.scale, nearest(weight, {}, scheme).scale)


def test_convolution_groups_are_solved_by_themselves() -> None:
    scheme = parse_scheme("int4 channel=0 sym")
    parts = [layer(seed) for seed in (0, 1, 2)]
    whole = gptq(torch.cat([w for w, _ in parts]), {"gram": torch.stack([s["gram"] for _, s in parts])}, scheme, act_order=True)
    assert torch.equal(whole.codes, torch.cat([gptq(w, s, scheme, act_order=True).codes for w, s in parts]))


def test_dead_inputs_round_to_nearest_and_disturb_nothing() -> None:
    scheme, (weight, statistics) = parse_scheme("int4 group=4 sym"), layer(2)
    gram = statistics["gram"].clone()
    gram[4:8], gram[:, 4:8] = 0, 0
    found = gptq(weight, {"gram": gram}, scheme)
    alive = [i for i in range(20) if not 4 <= i < 8]
    assert torch.equal(found.codes[:, 4:8], nearest(weight, {}, scheme).codes[:, 4:8])
    assert torch.equal(found.codes[:, alive], gptq(weight[:, alive], {"gram": gram[alive][:, alive]}, scheme).codes)
    assert torch.equal(gptq(weight, {"gram": gram * 0}, scheme).codes, nearest(weight, {}, scheme).codes)


def test_damping_grows_until_the_hessian_is_definite_and_says_so() -> None:
    scheme, (weight, _) = parse_scheme("int4 channel=0 sym"), layer(3)
    gram, lines = torch.eye(20, dtype=torch.float64), []
    gram[0, 1] = gram[1, 0] = 1.05
    gptq(weight, {"gram": gram}, scheme, say=lines.append)
    assert lines == ["the Hessian needed a damping of 0.1 instead of 0.01 to be positive definite"]
    gram[0, 1] = gram[1, 0] = 3
    with pytest.raises(Refused, match="not positive semidefinite"):
        gptq(weight, {"gram": gram}, scheme)


def test_rank_deficient_data_is_solved() -> None:
    scheme, (weight, _) = parse_scheme("int4 channel=0 sym"), layer(4)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).double()
    found = gptq(weight, {"gram": x.T @ x}, scheme)
    assert objective(weight, found, x.T @ x) < 0.5 * objective(weight, nearest(weight, {}, scheme), x.T @ x)


def test_refusals_of_gptq() -> None:
    weight, statistics = layer(5)
    scheme = parse_scheme("int4 channel=0 sym")
    with pytest.raises(Refused, match="needs the Gram matrix"):
        gptq(weight, {}, scheme)
    with pytest.raises(Refused, match=r"\[1, 3, 3\] does not fit the weight \[6, 20\]"):
        gptq(weight, {"gram": torch.eye(3)}, scheme)
    with pytest.raises(Refused, match="not finite"):
        gptq(weight, {"gram": statistics["gram"] * float("nan")}, scheme)
    with pytest.raises(Refused, match="not channel=1"):
        gptq(weight, statistics, dataclasses.replace(scheme, granularity=parse_scheme("int4 channel=1").granularity))
    with pytest.raises(Refused, match="grid of gptq"):
        gptq(weight, statistics, scheme, grid="best")

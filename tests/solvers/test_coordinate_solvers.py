"""LDLQ, COMQ and GPFQ beside independent forms of the same methods, on explicit inputs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.solvers import comq, gpfq, gptq, ldlq
from qcompile.solvers._coordinates import descend, errors, fit
from qcompile.solvers._grids import Grids
from qcompile.solvers.gptq import row_errors
from qcompile.solvers.nearest import solve as nearest

WIDE, NARROW = parse_scheme("int8 channel=0 sym"), parse_scheme("int3 channel=0 sym")
seeds = st.integers(0, 2**31)


def layer(seed: int, out: int = 5, inputs: int = 16, rows: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and correlated inputs X [rows, in], float64."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, inputs, generator=generator).double() @ torch.randn(inputs, inputs, generator=generator).double()
    return torch.randn(out, inputs, generator=generator), X


def gram(X: torch.Tensor) -> torch.Tensor:
    return X.T @ X / len(X)


@given(seed=seeds, inputs=st.integers(2, 20))
@settings(max_examples=8, deadline=None)
def test_ldlq_is_gptq_on_reversed_columns(seed: int, inputs: int) -> None:
    weight, X = layer(seed, inputs=inputs)
    weight = weight * 0.5  # no code clamps: feedback makes weights larger than they were
    H = gram(X)
    scale_row = torch.full((5, 1), 8.0)  # a column that nothing else meets gives the grid room
    weight, H = torch.cat([weight, scale_row], 1), torch.block_diag(H, torch.ones(1, 1).double())
    mine = ldlq.solve(weight, {"gram": H}, WIDE, order=False, passes=0, grid="nearest", damping=0.01)
    theirs = gptq.solve(weight.flip(1), {"gram": H.flip(0, 1)}, WIDE, act_order=False, grid="nearest", damping=0.01, keep_better=False)
    kept = row_errors(weight, mine.dequantize(), H) < row_errors(weight, nearest(weight, {}, WIDE).dequantize(), H)
    assert torch.equal(mine.codes[kept], theirs.codes.flip(1)[kept])


def test_an_incoherent_basis_loses_less() -> None:
    """QuIP's section 4: with outliers in weight and inputs, W U^T rounded on U H U^T and turned back is nearer than W rounded on H."""
    totals = {True: 0.0, False: 0.0}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weight, X = layer(seed, out=16, inputs=64, rows=300)
        weight = weight * (1 + 9 * (torch.rand(weight.shape, generator=generator) < 0.03))
        U = torch.linalg.qr(torch.randn(64, 64, generator=generator).double())[0]
        for turned in totals:
            basis = U if turned else torch.eye(64).double()
            found = ldlq.solve((weight.double() @ basis.T).float(), {"gram": basis @ gram(X) @ basis.T}, parse_scheme("int2 channel=0 sym"))
            totals[turned] += float(row_errors(weight, found.dequantize().double() @ basis, gram(X)).sum())
    assert totals[True] < 0.6 * totals[False]


@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_more_passes_never_raise_the_error(seed: int) -> None:
    weight, X = layer(seed)
    found = [ldlq.solve(weight, {"gram": gram(X)}, NARROW, passes=n, damping=0.0) for n in range(4)]
    totals = [float(row_errors(weight, q.dequantize(), gram(X)).sum()) for q in found]
    assert all(later <= earlier for earlier, later in itertools.pairwise(totals))
    assert totals[3] < totals[0]


@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_a_turn_of_descent_never_raises_the_error(seed: int) -> None:
    weight, X = layer(seed)
    W, H = weight.double().unsqueeze(0), gram(X).unsqueeze(0)
    grids = Grids.choose("test", weight, {}, NARROW, "nearest", 1)
    q = grids.nearest(W)
    order = torch.rand(1, 5, 16, generator=torch.Generator().manual_seed(seed)).argsort(2)
    for turn in (torch.arange(16), order):
        lower = descend(W, q, H, grids.round, turn)
        assert (errors(W, lower, H) <= errors(W, q, H) * (1 + 1e-12)).all()
        assert torch.equal(grids.nearest(lower), lower)
        q = lower


def test_fit_is_least_squares_on_the_inputs() -> None:
    weight, X = layer(1)
    basis = torch.randn(1, 5, 16, 3, generator=torch.Generator().manual_seed(1)).double()
    W, H = weight.double().unsqueeze(0), gram(X).unsqueeze(0)
    for row, found in enumerate(fit(W, H, basis, ridge=0.0)):
        expected = torch.linalg.lstsq(X @ basis[0, row], X @ weight[row].double()).solution
        torch.testing.assert_close(found, expected)
    tall = torch.cat([X @ basis[0, row] for row in range(5)])
    expected = torch.linalg.lstsq(tall, torch.cat([X @ weight[row].double() for row in range(5)])).solution
    torch.testing.assert_close(fit(W, H, basis, shared=5, ridge=0.0)[0], expected)


def comq_on_inputs(w: torch.Tensor, X: torch.Tensor, step: float, low: int, high: int, sweeps: int) -> torch.Tensor:
    """Return the codes of one channel as the paper's algorithm 1 finds them, on its inputs; the step is solved for after each sweep."""
    order = (X.norm(dim=0) * w.abs()).argsort(descending=True)
    q = w / step
    for sweep in range(sweeps):
        for i in order.tolist():
            rest = X @ w - step * (X @ q - X[:, i] * q[i])
            q[i] = (X[:, i] @ rest / (step * X[:, i].square().sum())).round().clamp(low, high)
        if sweep + 1 < sweeps:
            step = float((X @ w) @ (X @ q) / (X @ q).square().sum())
    return q


@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_comq_on_the_gram_matrix_is_comq_on_the_inputs(seed: int) -> None:
    weight, X = layer(seed)
    found = comq.solve(weight, {"gram": gram(X)}, NARROW, sweeps=1, grid="nearest", damping=0.0, refit=False)
    plain = nearest(weight, {}, NARROW)
    for row in range(5):
        expected = comq_on_inputs(weight[row].double(), X, float(plain.scale[row]), -4, 3, 1)
        error = (X @ (weight[row].double() - expected * float(plain.scale[row]))).square().mean()
        if error < row_errors(weight, plain.dequantize(), gram(X))[row]:
            assert torch.equal(found.codes[row].double(), expected)


def test_greedy_order_beats_cyclic_after_one_sweep() -> None:
    errors_of = {True: 0.0, False: 0.0}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight, X = layer(seed, out=16, inputs=32)
        X = X * torch.randn(32, generator=generator).double().exp()  # inputs of unlike magnitudes: there the order matters
        for greedy in errors_of:
            found = comq.solve(weight, {"gram": gram(X)}, NARROW, sweeps=1, greedy=greedy, refit=False, grid="nearest", damping=0.0)
            errors_of[greedy] += float(row_errors(weight, found.dequantize(), gram(X)).sum())
    assert errors_of[True] < 0.8 * errors_of[False]


@pytest.mark.parametrize("scheme", ["int3 channel=0 sym", "uint3 group=8 affine", "int4 tensor sym"])
def test_refitted_scales_lower_the_error(scheme: str) -> None:
    totals = {True: 0.0, False: 0.0}  # descent ends in one of many minima: fitted scales lead to lower ones on the whole
    for seed in range(8):
        weight, X = layer(seed)
        for refit in totals:
            found = comq.solve(weight, {"gram": gram(X)}, parse_scheme(scheme), refit=refit, damping=0.0)
            totals[refit] += float(row_errors(weight, found.dequantize(), gram(X)).sum())
    assert totals[True] < totals[False]


def gpfq_on_inputs(w: torch.Tensor, X: torch.Tensor, Y: torch.Tensor, step: float, low: int, high: int) -> torch.Tensor:
    """Return the codes of one neuron as the paper's equation 9 follows the path, on explicit inputs."""
    u, q = torch.zeros(len(X)).double(), torch.zeros_like(w)
    for t in range(len(w)):
        wished = Y[:, t] @ (u + w[t] * X[:, t]) / Y[:, t].square().sum()
        q[t] = (wished / step).round().clamp(low, high)
        u = u + w[t] * X[:, t] - step * q[t] * Y[:, t]
    return q


@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_gpfq_on_gram_matrices_follows_the_path_of_the_inputs(seed: int) -> None:
    weight, X = layer(seed)
    Y = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)).double()
    statistics = {"gram": gram(Y), "cross": Y.T @ X / len(X)}
    found = gpfq.solve(weight, statistics, NARROW, grid="nearest", order=False)
    for row in range(5):
        expected = gpfq_on_inputs(weight[row].double(), X, Y, float(found.scale[row]), -4, 3)
        assert torch.equal(found.codes[row].double(), expected)


def test_the_error_of_gpfq_falls_as_one_over_the_inputs() -> None:
    """Relative squared error of Gaussian layers with 32 samples, N = 64 .. 1024 (the paper's theorem 2; the card's check)."""
    sizes, found = torch.tensor([64.0, 256.0, 1024.0]), []
    for size in sizes.int().tolist():
        generator = torch.Generator().manual_seed(size)
        X, weight = torch.randn(32, size, generator=generator).double(), torch.randn(16, size, generator=generator)
        q = gpfq.solve(weight, {"gram": gram(X), "cross": gram(X)}, parse_scheme("int4 tensor sym"), grid="nearest", order=False)
        exact = X @ weight.double().T
        found.append(float((X @ q.dequantize().double().T - exact).square().sum() / exact.square().sum()))
    x, y = sizes.log(), torch.tensor(found).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -1.15 < slope < -0.85


def test_a_radius_gives_one_step_to_the_layer() -> None:
    weight, X = layer(4)
    statistics = {"gram": gram(X), "cross": gram(X)}
    found = gpfq.solve(weight, statistics, parse_scheme("int4 channel=0 sym"), radius=1.16)
    assert torch.allclose(found.scale, 1.16 * weight.abs().amax(1).mean() / 7)


def test_groups_of_outputs_are_solved_by_themselves() -> None:
    parts = [layer(seed) for seed in range(3)]
    weight, H = torch.cat([w for w, _ in parts]), torch.stack([gram(X) for _, X in parts])
    for solve in (ldlq.solve, comq.solve, gpfq.solve):
        options = {"order": False} if solve is not comq.solve else {}
        whole = solve(weight, {"gram": H, "cross": H}, NARROW, **options)
        alone = [solve(w, {"gram": gram(X), "cross": gram(X)}, NARROW, **options).codes for w, X in parts]
        assert torch.equal(whole.codes, torch.cat(alone))


@pytest.mark.parametrize("solve", [ldlq.solve, comq.solve, gpfq.solve])
def test_refusals(solve: object) -> None:
    weight, X = layer(5)
    H = gram(X)
    with pytest.raises(Refused, match="needs the Gram matrix"):
        solve(weight, {}, NARROW)  # type: ignore[operator]
    with pytest.raises(Refused, match="does not fit the weight"):
        solve(weight, {"gram": torch.eye(3), "cross": torch.eye(3)}, NARROW)  # type: ignore[operator]
    with pytest.raises(Refused, match="not finite"):
        solve(weight, {"gram": H * float("nan"), "cross": H}, NARROW)  # type: ignore[operator]
    with pytest.raises(Refused, match="not channel=1"):
        solve(weight, {"gram": H, "cross": H}, parse_scheme("int4 channel=1 sym"))  # type: ignore[operator]
    with pytest.raises(Refused, match="grid of"):
        solve(weight, {"gram": H, "cross": H}, NARROW, grid="best")  # type: ignore[operator]


def test_gpfq_needs_the_float_models_inputs() -> None:
    weight, X = layer(6)
    with pytest.raises(Refused, match="cross products with the float model"):
        gpfq.solve(weight, {"gram": gram(X)}, NARROW)

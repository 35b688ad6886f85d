from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from qcompile.capture import capture
from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.statistics.model_ranges import DEVIATIONS, ModelRanges, Spread, clamped_normal

LIMITS = st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-math.inf, 1.5), (-1.0, 1.0), (-math.inf, math.inf), (2.0, 3.0)])


def by_integration(mean: float, std: float, low: float, high: float) -> tuple[float, float]:
    """Return mean and standard deviation of clamp(x, low, high) by numerical integration over the inside, plus the two point masses."""
    x = stats.norm(mean, std)
    edges = [(bound, mass) for bound, mass in ((low, x.cdf(low)), (high, x.sf(high))) if math.isfinite(bound)]
    a, b = max(low, mean - 12 * std), min(high, mean + 12 * std)

    def moment(power: int) -> float:
        inside = (
            integrate.quad(lambda t: t**power * x.pdf(t), a, b, points=[mean] if a < mean < b else None, limit=200)[0] if a < b else 0.0
        )
        return inside + sum(bound**power * mass for bound, mass in edges)

    first = moment(1)
    return first, math.sqrt(max(0.0, moment(2) - first**2))


@given(st.floats(-8, 8), st.floats(0.05, 5), LIMITS)
def test_moments_of_a_clamped_normal(mean: float, std: float, limits: tuple[float, float]) -> None:
    found = clamped_normal(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64), *limits)
    expected = by_integration(mean, std, *limits)
    assert float(found[0]) == pytest.approx(expected[0], abs=1e-6)
    assert float(found[1]) == pytest.approx(expected[1], abs=2e-4)  # a difference of squares: 1e-8 of them under the root


def test_moments_of_a_clamped_normal_by_drawing() -> None:
    x = np.random.default_rng(0).normal(1.0, 2.0, 400_000)
    found = clamped_normal(torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64), 0.0, 6.0)
    clamped = x.clip(0, 6)
    assert float(found[0]) == pytest.approx(clamped.mean(), abs=5 * clamped.std() / math.sqrt(len(x)))
    assert float(found[1]) == pytest.approx(clamped.std(), rel=0.01)


def test_a_value_without_spread_is_clamped_itself() -> None:
    mean = torch.tensor([-2.0, 0.5, 9.0], dtype=torch.float64)
    first, std = clamped_normal(mean, torch.zeros(3, dtype=torch.float64), 0.0, 6.0)
    assert torch.allclose(first, torch.tensor([0.0, 0.5, 6.0], dtype=torch.float64))
    assert float(std.max()) < 1e-5


# ---- carried through a graph ----------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 6, 1)
        self.head = torch.nn.Linear(6, 3)
        with torch.no_grad():
            for tensor, low, high in (
                (self.norm.weight, 0.2, 2.0),
                (self.norm.bias, -1.0, 1.0),
                (self.norm.running_mean, -1, 1),
                (self.norm.running_var, 0.5, 2),
            ):
                tensor.uniform_(low, high)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.norm(self.stem(x)))
        b = self.body(a)
        c = torch.cat([a, b], 1)
        return self.head((b + b).mean((2, 3))), c


@pytest.fixture
def ranges() -> tuple[Graph, ModelRanges, Net]:
    from qcompile.backends.reference.target import ReferenceTarget
    from qcompile.passes.canonicalize import Canonicalize
    from qcompile.passes.fold_batch_norm import FoldBatchNorm

    from qcompile.pipeline import Context, Pipeline

    net, x = Net().eval(), torch.rand(2, 2, 5, 5)
    graph = capture(net, (x,)).graph
    Pipeline((Canonicalize(), FoldBatchNorm())).run(graph, Context(ReferenceTarget()))
    return graph, ModelRanges(graph, (x,)), net


def spread(ranges: Any, operator: str, number: int = 0) -> Spread:
    graph, found, _ = ranges
    return found.spreads[[node for node in graph.nodes if operator in str(node.target)][number]]


def test_the_range_of_an_input_is_its_examples(ranges: Any) -> None:
    graph, found, _ = ranges
    low, high = found.range(graph.inputs[0])
    assert 0 <= low < 0.1
    assert 0.9 < high <= 1


def test_batch_normalization_says_the_spread_of_its_convolution(ranges: Any) -> None:
    net, conv = ranges[2], spread(ranges, "conv2d")
    assert torch.allclose(conv.mean, net.norm.bias.detach().double())
    assert torch.allclose(conv.std, net.norm.weight.detach().abs().double())
    assert torch.allclose(conv.high, conv.mean + DEVIATIONS * conv.std)


def test_relu_cuts_the_range_and_moves_the_mean(ranges: Any) -> None:
    conv, relu = spread(ranges, "conv2d"), spread(ranges, "relu")
    assert float(relu.low.min()) == 0
    assert torch.equal(relu.high, conv.high.clamp(min=0))
    for i in range(4):
        assert float(relu.mean[i]) == pytest.approx(by_integration(float(conv.mean[i]), float(conv.std[i]), 0, math.inf)[0], abs=1e-6)


def test_a_product_carries_mean_and_variance(ranges: Any) -> None:
    """Against drawing each input channel by itself from its clamped normal."""
    net, conv, body = ranges[2], spread(ranges, "conv2d"), spread(ranges, "conv2d", 1)
    drawn = (torch.randn(200_000, 4, dtype=torch.float64) * conv.std + conv.mean).relu()
    with torch.no_grad():
        out = drawn @ net.body.weight.double().flatten(1).T + net.body.bias.double()
    assert torch.allclose(body.mean, out.mean(0), atol=0.02)
    assert torch.allclose(body.std, out.std(0), rtol=0.02)


def test_sums_concatenations_and_means(ranges: Any) -> None:
    relu, body, total, joined = spread(ranges, "relu"), spread(ranges, "conv2d", 1), spread(ranges, "add"), spread(ranges, "cat")
    assert torch.allclose(total.mean, 2 * body.mean)
    assert torch.allclose(total.std, math.sqrt(2) * body.std)
    assert bool((total.high <= 2 * body.high + 1e-9).all())
    assert torch.equal(joined.mean, torch.cat([relu.mean, body.mean]))
    assert torch.equal(spread(ranges, "mean").high, total.high)
    assert len(spread(ranges, "linear").mean) == 3


def test_what_no_rule_carries_is_refused(ranges: Any) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(x) * 2

    x = torch.rand(1, 2, 3, 3)
    graph = capture(Odd(), (x,)).graph
    found = ModelRanges(graph, (x,))
    node = next(node for node in graph.nodes if "exp" in str(node.target))
    with pytest.raises(Refused, match=r"exp \(aten\.exp\.default\): its range cannot be found without data; give calibration data"):
        found.range(node)


# ---- without notes: measured on noise -------------------------------------------------------------------------------------


class Shortcut(torch.nn.Module):
    """Branch and shortcut hold the same values, so their sum has twice the deviation, not the square root of two of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(2, 4, 1)
        self.same = torch.nn.Conv2d(4, 4, 1, bias=False)
        torch.nn.init.dirac_(self.same.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.stem(x)
        return a + self.same(a)


def test_without_notes_sums_are_as_correlated_as_on_noise() -> None:
    net, x = Shortcut().eval(), torch.randn(4, 2, 16, 16) * 3 + 1
    graph = capture(net, (x,)).graph
    found = graph, ModelRanges(graph, (x,)), net
    conv, total = spread(found, "conv2d"), spread(found, "add")
    assert torch.allclose(total.mean, 2 * conv.mean, rtol=1e-5)
    assert torch.allclose(total.std, 2 * conv.std, rtol=1e-5)
    with torch.no_grad():
        out = net.stem(x).double().transpose(0, 1).flatten(1)
    assert torch.allclose(conv.std, out.std(1), rtol=0.1)  # noise has the moments of the example's channels


def test_ranges_on_noise_are_the_same_every_time_and_never_narrower_than_the_papers() -> None:
    x = torch.randn(2, 2, 8, 8)
    graph = capture(Shortcut().eval(), (x,)).graph
    state = torch.random.get_rng_state()
    first, second = ModelRanges(graph, (x,), 3.0), ModelRanges(graph, (x,))
    assert torch.equal(torch.random.get_rng_state(), state)
    for node, spread in first.measured.items():
        assert torch.equal(spread.high, second.measured[node].high)
        assert torch.allclose(spread.high, spread.mean + DEVIATIONS * spread.std)


def test_a_graph_with_notes_is_not_run_on_noise(ranges: Any) -> None:
    assert not ranges[1].measured


def test_a_graph_over_tokens_is_not_run_on_noise() -> None:
    graph = capture(torch.nn.Embedding(7, 4), (torch.zeros(1, 3, dtype=torch.int64),)).graph
    assert not ModelRanges(graph, (torch.zeros(1, 3, dtype=torch.int64),)).measured

"""The passes that scale channels beside smooth: cross-scale (CrossQuant) and learn-scales (AffineQuant's diagonal)."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.passes._straight_through import round_dynamic
from qcompile.passes.cross_scale import CrossScale, channel_scale, kernel_share
from qcompile.passes.learn_scales import LearnScales

from qcompile.errors import Refused
from qcompile.formats import parse_scheme, quantize_tensor
from qcompile.graph import print_graph
from qcompile.pipeline import Context, Pipeline

TEXT = """graph @main float(%x: f32[n,16]) where n in 1..512 {
  %g = const @g
  %w = const @w
  %v = const @v
  %norm = aten.rms_norm(%x) {normalized_shape=[16], weight=%g, eps=1e-05} : f32[n,16]
  %up = aten.linear(%norm, %w) : f32[n,8]
  %act = aten.gelu(%up) : f32[n,8]
  %y = aten.linear(%act, %v) : f32[n,4]
  return %y as "y"
}
"""
PRODUCT = TEXT.replace("aten.rms_norm(%x) {normalized_shape=[16], weight=%g, eps=1e-05}", "aten.mul.Tensor(%x, %g)")
WEIGHT, ACTIVATION = "int4 channel=0 sym", "int4 token sym dynamic"


@pytest.fixture
def outliers(build):
    """A normalization with two outlier channels, read by a linear; after a GELU no scale can pass."""
    generator = torch.Generator().manual_seed(3)
    gain, w = torch.ones(16), torch.randn(8, 16, generator=generator)
    gain[[3, 9]] = 30
    return build(TEXT, g=gain, w=w / gain, v=torch.randn(4, 8, generator=generator))


def data(rows: int = 200) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(5))


def run(graph, item):
    after, context = graph.copy(), Context(target=None, calibration=[(data(),)])
    (step,) = Pipeline((item,)).run(after, context)
    assert Pipeline((item,)).run(after.copy(), context)[0].changes == 0
    return after, step.changes, context


def rounded_error(graph, x: torch.Tensor) -> float:
    """Return the relative squared error of the first linear with its weight and input rounded."""
    gain, w = (graph.constant(node) for node in graph.nodes if node.op == "get_attr" and str(node.target) in ("g", "w"))
    normalized = torch.nn.functional.rms_norm(x, [16], gain, 1e-5)
    exact = normalized @ w.T
    seen, stored = (quantize_tensor(v, parse_scheme(s)).dequantize() for v, s in ((normalized, ACTIVATION), (w, WEIGHT)))
    return float((seen @ stored.T - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("item", [CrossScale(), CrossScale(alpha=0.5), LearnScales(weight=WEIGHT, activation=ACTIVATION, steps=20)])
def test_outputs_stay_and_outliers_cost_less(outliers, item) -> None:
    after, changes, _ = run(outliers, item)
    assert changes == 1
    x = data()
    torch.testing.assert_close(after(x)[0], outliers(x)[0], rtol=1e-4, atol=1e-5)
    assert rounded_error(after, x) < rounded_error(outliers, x) / 4


def test_golden(build, golden) -> None:
    gain = torch.ones(16)
    gain[3] = 900
    graph = build(PRODUCT, g=gain, w=torch.ones(8, 16), v=torch.ones(4, 8))
    after, context = graph.copy(), Context(target=None, calibration=[(torch.ones(2, 16),)])
    Pipeline((CrossScale(alpha=0.5),)).run(after, context)
    assert [int(after.constants[name][..., 3].max()) for name in ("g", "w")] == [30, 30]  # the rest is 1
    golden("passes/cross_scale", f"{print_graph(graph, comments=False)}->\n{print_graph(after, comments=False)}")


def test_alpha_of_one_is_a_scale_for_each_token() -> None:
    assert torch.equal(channel_scale(torch.tensor([4.0, 9.0, 0.0]), 1.0), torch.ones(3))
    assert channel_scale(torch.tensor([4.0, 9.0, 0.0]), 0.5).tolist() == [2, 3, 1]


def test_the_kernel_is_what_rounds_to_zero() -> None:
    """127 steps to the largest value: 0.4 steps round to zero, 0.6 do not; zeros do not count."""
    assert kernel_share(torch.tensor([[127.0, 0.4, 0.6, 0.0]]), 8) == pytest.approx(1 / 3)
    assert kernel_share(torch.zeros(2, 3), 8) == 0


def test_the_kernel_is_noted(outliers) -> None:
    _, _, context = run(outliers, CrossScale(bits=4))
    after, before = (float(number) for number in re.findall(r"([\d.]+) %", context.notes[0][1]))
    assert after < before / 2
    assert before > 50  # two channels of sixteen set the scale of every row


def test_alpha_out_of_range_is_refused(outliers) -> None:
    with pytest.raises(Refused, match="alpha is 0 to 1"):
        run(outliers, CrossScale(alpha=1.5))


def test_learning_beats_where_it_starts_and_is_repeated(outliers) -> None:
    errors = []
    for steps in (0, 60, 60):
        after, _, _ = run(outliers, LearnScales(weight=WEIGHT, activation=ACTIVATION, steps=steps, rate=0.02))
        errors.append(rounded_error(after, data()))
    assert errors[1] < 0.95 * errors[0]
    assert errors[1] == errors[2]


def test_nothing_is_scaled_where_nothing_helps(build) -> None:
    """Weights of zero have no error to lower."""
    graph = build(PRODUCT, g=torch.ones(16), w=torch.zeros(8, 16), v=torch.ones(4, 8))
    _, changes, _ = run(graph, LearnScales(weight="int8 channel=0 sym", activation="float"))
    assert changes == 0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([WEIGHT, "uint4 group=8 affine", "int8 tensor sym"]), st.integers(0, 1000))
def test_straight_through_gives_the_rounded_value_and_a_gradient(scheme: str, seed: int) -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    rounded = round_dynamic(x, parse_scheme(scheme))
    torch.testing.assert_close(rounded, quantize_tensor(x.detach(), parse_scheme(scheme)).dequantize())
    rounded.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert float((x.grad == 1).double().mean()) > 0.5  # all but the extremes, which set the step

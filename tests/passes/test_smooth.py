from __future__ import annotations

import pytest
import torch
from qcompile.passes.clip_weights import ClipWeights, best_bound
from qcompile.passes.smooth import Smooth, smoothing_scale
from torch import nn

from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused
from qcompile.formats import parse_scheme, quantize_tensor
from qcompile.graph import Graph
from qcompile.graph.text import bound_arguments
from qcompile.pipeline import Context, Pipeline, sqnr_db


class Net(nn.Module):
    """A normalization with four outlier channels, two linears that read it, and a down projection after their gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 16)
        outliers = torch.ones(32)
        outliers[[3, 7, 20, 31]] = 30
        self.norm.weight.data *= outliers
        for linear in (self.up, self.gate):
            linear.weight.data /= outliers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.down(torch.sigmoid(self.gate(y)) * self.up(y))


@pytest.fixture
def graph() -> Graph:
    return capture_module(Net(), (torch.randn(2, 32),), [{0: "batch"}])


def run(graph: Graph, item, x: torch.Tensor) -> tuple[Graph, int, Context]:
    after, context = graph.copy(), Context(target=None, calibration=[(x,)])  # type: ignore[arg-type]
    steps = Pipeline((item,)).run(after, context)
    assert Pipeline((item,)).run(after.copy(), context)[0].changes == 0
    return after, steps[0].changes, context


def rounded_error(graph: Graph, x: torch.Tensor, weight: str, activation: str = "") -> float:
    """Return the relative squared error of the output with the weights, and where asked the linears' inputs, rounded."""
    rounded = graph.copy()
    for node in rounded.nodes:
        if node.op == "call_function" and "aten.linear" in str(node.target):
            w = bound_arguments(node)["weight"]
            rounded.set_constant(w, quantize_tensor(rounded.constant(w), parse_scheme(weight)).dequantize())
    values = {}
    for node in rounded.nodes:  # a plain interpreter, so that inputs can be rounded on the way
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = rounded.constant(node)
        elif node.op == "call_function":
            args = [values.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args]
            kwargs = {k: values.get(a, a) if isinstance(a, torch.fx.Node) else a for k, a in node.kwargs.items()}
            if activation and "aten.linear" in str(node.target):
                args[0] = quantize_tensor(args[0], parse_scheme(activation)).dequantize()
            values[node] = node.target(*args, **kwargs)
    exact = graph(x)[0]
    return float((values[rounded.outputs[0]] - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("item", [Smooth(), Smooth(alpha=0.8), Smooth(search=True), Smooth(method="awq", weight="int4 group=16 sym")])
def test_float_outputs_stay(graph, item) -> None:
    x = torch.randn(64, 32)
    after, changes, _ = run(graph, item, x)
    assert changes == 2  # the normalization, the ungated side
    assert sqnr_db(graph(x)[0], after(x)[0]) > 110


@pytest.mark.parametrize("item", [Smooth(), Smooth(search=True)])
def test_planted_outliers_cost_five_times_less(graph, item) -> None:
    x = torch.randn(256, 32)
    after, _, _ = run(graph, item, x)
    schemes = "int8 channel=0 sym", "int8 tensor sym"
    assert rounded_error(after, x, *schemes) < rounded_error(graph, x, *schemes) / 5


def test_awq_helps_low_bit_weights(graph) -> None:
    x = torch.randn(256, 32) * (1 + 9 * (torch.arange(32) % 8 == 0))
    after, _, _ = run(graph, Smooth(method="awq", weight="int3 group=16 sym"), x)
    assert rounded_error(after, x, "int3 group=16 sym") < rounded_error(graph, x, "int3 group=16 sym")


def test_formula() -> None:
    scale = smoothing_scale(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5)
    assert scale.tolist() == [2, 1]


def test_unknown_method_is_refused(graph) -> None:
    with pytest.raises(Refused, match="unknown method 'best' of smooth"):
        run(graph, Smooth(method="best"), torch.randn(2, 32))


def test_does_not_smooth_past_a_gelu() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    _, changes, context = run(capture_module(net, (torch.randn(2, 8),)), Smooth(), torch.randn(2, 8))
    assert changes == 0
    assert context.log.why_not("linear") == ["scale-edge: %gelu (aten.gelu) reads it"]


def test_clipping_lowers_the_error_of_low_bit_weights() -> None:
    net = nn.Linear(64, 32)
    net.weight.data = torch.distributions.StudentT(3.0).sample((32, 64))
    graph = capture_module(net, (torch.randn(2, 64),), [{0: "batch"}])
    x = torch.randn(512, 64)
    after, changes, _ = run(graph, ClipWeights(weight="int3 group=32 sym"), x)
    assert changes == 1
    exact = graph(x)[0]

    def error(run: Graph) -> float:
        w = quantize_tensor(run.constants["weight"], parse_scheme("int3 group=32 sym")).dequantize()
        return float((nn.functional.linear(x, w, run.constants["bias"]) - exact).square().mean())

    assert error(after) < error(graph) * 0.9


def test_bound_of_a_flat_group_is_its_maximum() -> None:
    w = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.equal(best_bound(w, torch.randn(64, 4), 4, parse_scheme("int4 group=4 sym")), torch.ones(1, 4))


def test_a_scheme_without_groups_is_left_alone(graph) -> None:
    _, changes, context = run(graph, ClipWeights(weight="int4 tensor sym"), torch.randn(8, 32))
    assert changes == 0
    assert context.log.why_not("linear") == ["clip-weights: 'int4 tensor sym' has no groups along the inputs that divide 32"]

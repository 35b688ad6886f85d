from __future__ import annotations

import pytest
import torch
from qcompile.passes.correct_bias import CorrectBias
from torch import nn

from qcompile.capture.torch_export import capture_module
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments
from qcompile.pipeline import Context
from qcompile.statistics import collect

SCHEME = parse_scheme("int3 tensor sym")


def simulated(*layers: nn.Module, x: torch.Tensor) -> Graph:
    """Capture a chain and put quantizers on all its weights."""
    graph = capture_module(nn.Sequential(*layers), (x,), [{0: "batch"}])
    for node in graph.nodes:
        if node.op == "call_function" and "weight" in bound_arguments(node):
            weight = bound_arguments(node)["weight"]
            node.replace_input_with(weight, graph.call_quantizer(Quantizer(SCHEME), weight, before=node, name=f"{weight.target}_q"))
    graph.stage = Stage.SIMULATED
    return graph


def corrected(graph: Graph, x: torch.Tensor, means: str) -> tuple[Graph, Context]:
    after, context = graph.copy(), Context(target=None, example_inputs=(x,))  # type: ignore[arg-type]
    item = CorrectBias(means=means)
    context.statistics = collect(after, item.requests(after, context), [(x,)]) if means == "data" else None
    item.run(after, context)
    assert item.run(after, context) == 0
    return after, context


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (lambda bias: [nn.Linear(16, 8, bias=bias)], (4096, 16)),
        (lambda bias: [nn.Conv2d(16, 8, 3, bias=bias)], (64, 16, 8, 8)),
        (lambda bias: [nn.Conv2d(16, 16, 3, groups=16, bias=bias)], (64, 16, 8, 8)),
        (lambda bias: [nn.Conv2d(16, 8, 1, groups=2, bias=bias)], (64, 16, 8, 8)),
    ],
)
def test_data_takes_the_mean_error_away(layers, shape, bias) -> None:
    x = torch.randn(shape) + 2
    parts = layers(bias)
    exact = nn.Sequential(*parts)(x).detach()
    graph = simulated(*parts, x=x[:2])
    after, _ = corrected(graph, x, "data")

    def shift(run: Graph) -> float:
        error = (run(x)[0] - exact).movedim(1, 0).flatten(1)
        return float(error.mean(1).abs().max())

    assert shift(after) < shift(graph) / 30


def test_rectified_normal_gives_the_mean_without_data() -> None:
    first, second = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 1)
    x = torch.randn(256, 4, 4, 4)
    y = first(x).detach()
    exact = second(torch.relu(y)).detach()
    graph = simulated(first, nn.ReLU(), second, x=x[:2])
    node = graph.node("conv2d")
    graph.replace(bound_arguments(node)["weight"], bound_arguments(node)["weight"].args[0])  # only the second weight is quantized
    graph.clean()
    channels = y.movedim(1, 0).flatten(1)
    node.meta["notes"] |= {"bn_mean": channels.mean(1), "bn_std": channels.std(1)}
    after, _ = corrected(graph, x, "model")

    def shift(run: Graph) -> torch.Tensor:
        return (run(x)[0] - exact).mean((0, 2, 3)).abs()

    assert float(shift(after).mean()) < float(shift(graph).mean()) / 5


def test_unknown_means_are_left_alone() -> None:
    x = torch.randn(2, 8)
    graph = simulated(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), x=x)
    _, context = corrected(graph, x, "model")
    assert context.log.why_not("linear_1") == ["correct-bias: the mean of its input is not known without data"]

"""AddLowRank: what the branch gives back, in the order that LQER promises, and that it lowers like other layers."""

import itertools

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.add_low_rank import AddLowRank, low_rank
from qcompile.passes.materialize import Materialize
from qcompile.passes.quantize_weights import QuantizeWeights
from torch import nn

from qcompile.calibration import from_iterable
from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Quantizer, Stage, print_graph
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline
from qcompile.statistics import collect


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(512, 24, generator=generator) @ torch.randn(24, 24, generator=generator) * torch.linspace(0.1, 4, 24)


def build(x: torch.Tensor, scheme: str = "int3 channel=0 sym") -> Graph:
    torch.manual_seed(0)
    graph = capture_module(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)), (x[:2],), [{0: "batch"}])
    for node in linears(graph):
        weight = bound_arguments(node)["weight"]
        quantizer = Quantizer(parse_scheme(scheme))
        node.replace_input_with(weight, graph.call_quantizer(quantizer, weight, before=node, name=f"{weight.target}_quantizer"))
    graph.stage = Stage.SIMULATED
    graph.clean()
    return graph


def linears(graph: Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == "aten.linear"]


def run(graph: Graph, x: torch.Tensor, item: AddLowRank) -> Graph:
    after = graph.copy()
    context = Context(target=None, calibration=from_iterable([(x,)]))  # type: ignore[arg-type]
    steps = Pipeline((QuantizeWeights(), item)).run(after, context)
    assert steps[1].changes == 2
    assert Pipeline((item,)).run(after, context)[0].changes == 0
    return after


def exact(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))(x).detach()


def error(graph: Graph, x: torch.Tensor) -> float:
    return float((graph(x)[0] - exact(x)).square().mean())


@pytest.mark.parametrize("weigh", ["none", "magnitude", "gram"])
def test_full_rank_in_float_gives_the_float_model(x: torch.Tensor, weigh: str) -> None:
    after = run(build(x), x, AddLowRank(rank=24, weigh=weigh, factors="float"))
    torch.testing.assert_close(after(x)[0], exact(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weigh", ["none", "magnitude", "gram"])
def test_a_higher_rank_loses_less(x: torch.Tensor, weigh: str) -> None:
    plain = build(x)
    found = [error(plain, x)] + [error(run(build(x), x, AddLowRank(rank=k, weigh=weigh)), x) for k in (2, 5, 9, 16)]
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


def test_knowing_the_input_loses_less(x: torch.Tensor) -> None:
    found = {weigh: error(run(build(x), x, AddLowRank(rank=4, weigh=weigh)), x) for weigh in ("none", "magnitude", "gram")}
    assert found["gram"] < found["magnitude"] < found["none"] < error(build(x), x)


def test_the_branch_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    E, S = torch.randn(9, 7, generator=generator).double(), torch.randn(7, 7, generator=generator).double()
    down, up = low_rank(E, S, 3)
    assert down.shape == (3, 7)
    assert up.shape == (9, 3)
    assert torch.linalg.matrix_norm((E - up @ down) @ S) == pytest.approx(float(torch.linalg.svdvals(E @ S)[3:].square().sum().sqrt()))


def test_text_and_materialized_form(x: torch.Tensor) -> None:
    after = run(build(x), x, AddLowRank(rank=4))
    text = print_graph(after, comments=False)
    assert "aten.linear(%input_1, %linear.low_rank_down_quantizer) : f32[batch,4]" in text
    assert "aten.add.Tensor(%linear, %linear_3) : f32[batch,16]" in text
    before = after(x)[0]
    Pipeline((Materialize(),)).run(after, Context(target=ReferenceTarget()))
    assert print_graph(after, comments=False).count("qc.linear(") == 6
    torch.testing.assert_close(after(x)[0], before, rtol=1e-4, atol=1e-4)


def test_layers_of_many_bits_are_left_alone(x: torch.Tensor) -> None:
    graph = build(x, "int8 channel=0 sym")
    text = print_graph(graph)
    assert AddLowRank(weigh="none").run(graph, Context(target=None)) == 0  # type: ignore[arg-type]
    assert print_graph(graph) == text


def test_refusals(x: torch.Tensor) -> None:
    graph, context = build(x), Context(target=None)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="not 'input'"):
        AddLowRank(weigh="input").requests(graph, context)
    with pytest.raises(Refused, match="at least 1, not 0"):
        AddLowRank(rank=0, weigh="none").run(graph, context)
    assert [type(r).__name__ for r in AddLowRank(weigh="gram").requests(graph, context)] == ["Gram", "Gram"]
    assert collect(graph, AddLowRank().requests(graph, context), [(x,)])

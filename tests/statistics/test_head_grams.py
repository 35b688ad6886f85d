"""The output side of BoA's Hessian beside the same sums with the rotations written out."""

import pytest
import torch
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.recognize_attention import RecognizeAttention

from qcompile.calibration import from_iterable
from qcompile.capture import capture
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context
from qcompile.statistics.head_grams import head_grams

TOKENS, D, HEADS = 9, 4, 4


class Rotary(torch.nn.Module):
    """Causal attention of four query heads on two key heads, whose two halves are rotated by position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (torch.nn.Linear(8, size, bias=False) for size in (HEADS * D, HEADS * D // 2, HEADS * D // 2))
        self.o = torch.nn.Linear(HEADS * D, 8, bias=False)
        for layer in (self.q, self.k):  # the channels of a head resemble one another
            layer.weight.data = torch.block_diag(*[torch.ones(D, D) + 0.3 * torch.eye(D)] * (len(layer.weight) // D)) @ layer.weight.data
        angles = torch.outer(torch.arange(TOKENS).float(), torch.tensor([0.1, 0.03])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        x = layer(x).unflatten(-1, (-1, D)).transpose(1, 2)
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat((-right, left), -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.v(x).unflatten(-1, (-1, D)).transpose(1, 2)
        q, k = self.rotated(x, self.q), self.rotated(x, self.k)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.fixture
def model() -> Rotary:
    return Rotary().eval()


@pytest.fixture
def data() -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, TOKENS, 8, generator=generator),) for _ in range(2)]


def build(model: Rotary, data: list[tuple[torch.Tensor]], scheme: str = "int2 tensor sym") -> tuple[Graph, list[torch.fx.Node]]:
    """Return the graph with a coarse quantizer on every weight, and its linears: q, k, v, o by their outputs."""
    graph = capture(model, data[0]).graph
    RecognizeAttention().run(graph, Context(target=None))  # type: ignore[arg-type]
    linears = [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == "aten.linear"]
    for node in linears:
        weight = bound_arguments(node)["weight"]
        quantizer = graph.call_quantizer(Quantizer(parse_scheme(scheme)), weight, before=node, name=f"{node.name}_quantizer")
        node.replace_input_with(weight, quantizer)
    graph.stage = Stage.SIMULATED
    graph.clean()
    return graph, linears


def rotations(model: Rotary) -> torch.Tensor:
    """Return R_t [tokens, d, d], columns first."""
    zero = torch.zeros(2, 2)
    turn = torch.cat([torch.cat([zero, -torch.eye(2)], 1), torch.cat([torch.eye(2), zero], 1)])
    return (torch.diag_embed(model.cos) + torch.diag_embed(model.sin) @ turn).double()


def test_queries_and_keys_count_what_they_meet(model: Rotary, data: list) -> None:
    graph, linears = build(model, data)
    found = head_grams(graph, linears, from_iterable(data))
    assert len(found) == 2
    q, k = (next(m for layer, m in found.items() if len(m) == heads) for heads in (HEADS, HEADS // 2))
    R = rotations(model)
    with torch.no_grad():
        met = {name: torch.cat([model.rotated(x, getattr(model, name)).transpose(0, 1).flatten(1, 2) for (x,) in data], 1) for name in "qk"}
    squares = {name: x.double().transpose(1, 2) @ x.double() for name, x in met.items()}
    for head in range(HEADS):
        expected = (R.transpose(1, 2) @ squares["k"][head // 2] @ R).mean(0)
        torch.testing.assert_close(q[head], expected, rtol=1e-4, atol=1e-4)
    for head in range(HEADS // 2):
        expected = (R.transpose(1, 2) @ (squares["q"][2 * head] + squares["q"][2 * head + 1]) @ R).mean(0)
        torch.testing.assert_close(k[head], expected, rtol=1e-4, atol=1e-4)


def test_boa_takes_them_for_queries_and_keys_alone(model: Rotary, data: list) -> None:
    codes = {}
    for solver in ("gptq", "boa"):
        graph, linears = build(model, data, "int4 channel=0 sym")
        QuantizeWeights(solver=solver).run(graph, Context(target=None, calibration=from_iterable(data)))  # type: ignore[arg-type]
        codes[solver] = {node.name: graph.quantizer(bound_arguments(node)["weight"]).codes for node in linears}  # type: ignore[union-attr]
    projections = [node.name for node in linears][:3]  # values, queries, keys
    same = [torch.equal(codes["gptq"][name], codes["boa"][name]) for name in projections]
    assert sorted(same) == [False, False, True]


def test_a_graph_without_attention_has_none(data: list) -> None:
    graph = capture(torch.nn.Linear(8, 8), data[0]).graph
    assert head_grams(graph, list(graph.nodes), from_iterable(data)) == {}

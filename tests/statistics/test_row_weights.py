"""Row weights: attention received and gradients, against the same sums written out; and what a Gram matrix makes of them."""

import pytest
import torch
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.recognize_attention import RecognizeAttention

from qcompile.calibration import from_iterable
from qcompile.capture import capture
from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context
from qcompile.statistics import Gram, collect
from qcompile.statistics.collectors import RowWeights
from qcompile.statistics.row_weights import attention_weights, gradient_weights, weigher

WIDTH, HEADS, TOKENS = 8, 2, 11


class Block(torch.nn.Module):
    """One layer of a language model, causal, with two heads that share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(17, WIDTH)
        self.q, self.k, self.v = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH // 2), torch.nn.Linear(WIDTH, WIDTH // 2)
        self.o, self.up, self.head = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 17)

    def weights(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (1, -1)).transpose(1, 2) for layer in (self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 2 + torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        return scores.softmax(-1), v

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (1, -1)).transpose(1, 2) for layer in (self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return self.head(torch.relu(self.up(x)))


@pytest.fixture
def model() -> Block:
    return Block().eval()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 17, (3, TOKENS), generator=generator),) for _ in range(2)]


def simulated(model: Block, data: list[tuple[torch.Tensor, ...]], recognize: bool = True) -> Graph:
    """Return the graph with a coarse quantizer on every linear's weight."""
    graph = capture(model, data[0]).graph
    if recognize:
        RecognizeAttention().run(graph, Context(target=None))  # type: ignore[arg-type]
    for node in linears(graph):
        weight = bound_arguments(node)["weight"]
        quantizer = Quantizer(parse_scheme("int2 tensor sym"))
        node.replace_input_with(weight, graph.call_quantizer(quantizer, weight, before=node, name=f"{node.name}_quantizer"))
    graph.stage = Stage.SIMULATED
    graph.clean()
    return graph


def linears(graph: Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == "aten.linear"]


@pytest.mark.parametrize("recognize", [True, False])
def test_attention_is_what_a_token_receives_in_the_float_model(model: Block, data: list, recognize: bool) -> None:
    graph = simulated(model, data, recognize)
    found = attention_weights(graph, linears(graph), from_iterable(data), least=0.1)
    assert len(found) == 6
    for number, (tokens,) in enumerate(data):
        mass = model.weights(model.embed(tokens))[0].sum((1, 2))
        low, high = mass.amin(1, keepdim=True), mass.amax(1, keepdim=True)
        expected = 0.1 + 0.9 * (mass - low) / (high - low)
        expected = (expected / expected.mean(1, keepdim=True)).reshape(-1, 1)
        for weights in found.values():
            torch.testing.assert_close(weights.batches[number], expected, rtol=1e-4, atol=1e-5)
    assert len({weights.name for weights in found.values()}) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_float_model(model: Block, data: list, groups: int) -> None:
    graph = simulated(model, data)
    layers = linears(graph)
    found = gradient_weights(graph, layers, from_iterable(data), groups)
    squares = []
    for (tokens,) in data:
        kept = {}
        hook = model.up.register_forward_hook(lambda module, given, out, kept=kept: kept.setdefault("up", out))
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        hook.remove()
        (gradient,) = torch.autograd.grad(loss, kept["up"])
        squares.append(gradient.square().unflatten(-1, (groups, -1)).mean(-1).flatten(0, 1))
    mean = torch.cat(squares).mean()
    for mine, expected in zip(found[layers[4]].batches, squares, strict=True):
        torch.testing.assert_close(mine, expected / mean, rtol=1e-4, atol=1e-6)
    assert found[layers[5]].batches[0].shape == (3 * TOKENS, 1)  # 17 outputs do not divide into 2 runs


def test_a_weighted_gram_is_the_weighted_sum(model: Block, data: list) -> None:
    graph = simulated(model, data)
    generator = torch.Generator().manual_seed(2)
    weights = RowWeights("mine", tuple(torch.rand(3 * TOKENS, 2, generator=generator) for _ in data))
    node = bound_arguments(linears(graph)[0])["input"].name
    found = collect(graph, [Gram(node, weights=weights), Gram(node)], from_iterable(data))
    x = torch.cat([model.embed(tokens).reshape(-1, WIDTH) for (tokens,) in data]).double()
    s = torch.cat(weights.batches).double()
    for group in range(2):
        expected = x.T @ (x * s[:, group : group + 1]) / len(x)
        torch.testing.assert_close(found[Gram(node, weights=weights)]["gram"][group], expected, rtol=1e-6, atol=1e-9)
    ones = RowWeights("ones", tuple(torch.ones(3 * TOKENS, 1) for _ in data))
    same = collect(graph, [Gram(node, weights=ones)], from_iterable(data))[Gram(node, weights=ones)]
    assert torch.equal(same["gram"], found[Gram(node)]["gram"])  # weights of one change no bit


def test_cross_products_are_with_the_float_model(model: Block, data: list) -> None:
    graph = simulated(model, data)
    request = Gram(bound_arguments(linears(graph)[5])["input"].name, cross=True)
    found = collect(graph, [request], from_iterable(data))[request]
    inputs, exact = [], []
    for (tokens,) in data:
        layer = model.head.register_forward_hook(lambda module, given, out: exact.append(given[0].reshape(-1, WIDTH)))
        model(tokens)
        layer.remove()
        inputs.append(_value(graph, request.node, tokens).reshape(-1, WIDTH))
    x, z = torch.cat(inputs).double(), torch.cat(exact).double()
    assert not torch.allclose(x, z, rtol=1e-2)
    torch.testing.assert_close(found["cross"], x.T @ z / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["gram"], x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def _value(graph: Graph, name: str, tokens: torch.Tensor) -> torch.Tensor:
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Recorder(graph.module).run(tokens)
    return found[name].detach()


@pytest.mark.parametrize("rows", ["attention", "gradient"])
def test_the_pass_solves_with_row_weights(model: Block, data: list, rows: str) -> None:
    codes = {}
    for kind in ("equal", rows):
        graph = simulated(model, data)
        QuantizeWeights(solver="gptq", rows=kind).run(graph, Context(target=None, calibration=from_iterable(data)))  # type: ignore[arg-type]
        codes[kind] = torch.cat([graph.quantizer(bound_arguments(n)["weight"]).codes.flatten() for n in linears(graph)])  # type: ignore[union-attr]
    assert not torch.equal(codes["equal"], codes[rows])


def test_refusals(model: Block, data: list) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    x = [(torch.randn(2, 4),)]
    graph = capture(net, x[0]).graph
    with pytest.raises(Refused, match="no attention in the graph"):
        attention_weights(graph, linears(graph), from_iterable(x))
    with pytest.raises(Refused, match="those of a language model"):
        gradient_weights(graph, linears(graph), from_iterable(x))
    with pytest.raises(Refused, match="not 'tokens'"):
        weigher("tokens", 1)

from __future__ import annotations

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes._straight_through import round_through
from qcompile.passes.tweak_norms import TweakNorms
from torch import nn

from qcompile.calibration import from_iterable
from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Quantizer, print_graph
from qcompile.pipeline import Context, parse_pipeline
from qcompile.registry import find_pass

QUANTIZED = 'canonicalize, recognize-attention, assign-bits{scheme="%s"}, insert-quantizers, quantize-weights'
LOW_BITS = "weight=int2 group=8 sym; activation=int8 token sym dynamic"


class Block(nn.Module):
    """Causal attention of two heads and an MLP, both behind a normalization."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = norm(16), norm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        q, k, v = (p(y).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Net(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(norm), Block(norm)]), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data(count: int = 24) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(2, 48, 16, generator=generator) * torch.linspace(0.2, 3, 16),) for _ in range(count)]


def context() -> Context:
    return Context(target=ReferenceTarget(), calibration=from_iterable(data()))


@pytest.fixture
def quantized(request) -> tuple[Graph, Graph]:
    """A graph of two blocks, and the same with weights of two bits."""
    torch.manual_seed(0)
    graph = capture_module(Net(getattr(request, "param", nn.RMSNorm)), data(1)[0], [{0: "batch", 1: "tokens"}])
    made = graph.copy()
    parse_pipeline(QUANTIZED % LOW_BITS, find_pass).run(made, context())
    return graph, made


def moment_error(graph: Graph, exact: Graph) -> float:
    """Return how far means and variances of the outputs are from the float graph's, on data that was not tuned on."""
    x = torch.randn(32, 48, 16, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.2, 3, 16)
    a, b = (run(x)[0].flatten(0, 1) for run in (graph, exact))
    return float((a.mean(0) - b.mean(0)).abs().sum() + (a.var(0) - b.var(0)).abs().sum())


@pytest.mark.parametrize("quantized", [nn.RMSNorm, nn.LayerNorm], indirect=True)
def test_only_gains_and_biases_change_and_moments_come_closer(quantized) -> None:
    exact, before = quantized
    after, told = before.copy(), context()
    (step,) = parse_pipeline("tweak-norms{rate=0.003}", find_pass).run(after, told)
    old, new = before.constants, after.constants
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert step.changes == len(changed)
    assert all("first" in name or "second" in name for name in changed)
    assert len(told.notes) == 2
    assert moment_error(after, exact) < 0.995 * moment_error(before, exact)


def test_a_second_run_changes_nothing_and_says_why(quantized) -> None:
    after, told = quantized[1].copy(), context()
    item = parse_pipeline("tweak-norms{rate=0.003}", find_pass)
    item.run(after, told)
    gains = after.constants
    assert item.run(after, told)[0].changes == 0
    assert all(torch.equal(value, gains[name]) for name, value in after.constants.items())
    assert "tweak-norms: the block is tuned already" in [reason for reasons in told.log.reasons.values() for reason in reasons]


def test_equal_data_give_equal_gains(quantized) -> None:
    texts = []
    for _ in range(2):
        made = quantized[1].copy()
        parse_pipeline("tweak-norms", find_pass).run(made, context())
        texts.append(print_graph(made))
    assert texts[0] == texts[1]


def test_a_rate_that_only_harms_leaves_the_gains(quantized) -> None:
    made = quantized[1].copy()
    (step,) = parse_pipeline("tweak-norms{rate=1000.0}", find_pass).run(made, context())
    assert step.changes == 0
    assert all(torch.equal(value, quantized[1].constants[name]) for name, value in made.constants.items())


def test_it_needs_data(quantized) -> None:
    with pytest.raises(Refused, match="calibration"):
        TweakNorms().run(quantized[1].copy(), Context(target=ReferenceTarget()))


def test_gradients_pass_a_static_grid_inside_its_range() -> None:
    x = torch.tensor([0.26, -0.4, 3.0]).requires_grad_()
    rounded = round_through(x, Quantizer(parse_scheme("int8 tensor sym"), torch.tensor(0.01), None))
    torch.testing.assert_close(rounded.detach(), torch.tensor([0.26, -0.4, 1.27]))
    rounded.sum().backward()
    assert x.grad.tolist() == [1, 1, 0]

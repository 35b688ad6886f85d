"""Networks as C, compiled for this machine: results that overlap what they read, and patches, give the codes of the reference."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from qcompile.backends.edge.fit import lower_within, plan_of
from qcompile.backends.edge.hosted import Hosted
from qcompile.backends.edge.kernels import planes
from qcompile.backends.edge.lower import lower
from qcompile.backends.edge.overlaps import kernels_of_nodes, overlaps
from qcompile.backends.edge.target import EdgeTarget
from qcompile.backends.lowering.arena import describe_sequence, plan_arena
from qcompile.passes.split_patches import Split
from torch import nn

import qcompile
from qcompile.arena import plan_work
from qcompile.arena.from_graph import plan_graph
from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.graph.text import bound_arguments

pytestmark = [pytest.mark.edge, pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")]


class Net(nn.Module):
    """Strided, pointwise, depthwise (both kinds), dilated and pooled layers, with a sum and a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 24, 1)
        self.depth, self.project = nn.Conv2d(24, 24, 5, 1, 2, groups=24), nn.Conv2d(24, 8, 1)
        self.wide, self.dilated = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 2, 2, groups=16)
        self.shrink, self.pool = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.MaxPool2d(2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.project(torch.relu(self.depth(torch.relu(self.expand(x)))))
        x = torch.sigmoid(self.dilated(nn.functional.hardswish(self.wide(x))))
        return self.head(self.pool(torch.relu(self.shrink(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net, x = Net().eval(), torch.randn(1, 3, 39, 42)
        for parameter in net.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
    return qcompile.compile(net, (x,), recipe="w8a8-edge", target="reference", calibration=[(x,)]).graph


def assert_same(c: Graph, reference: Graph, dsp: bool) -> None:
    built = Hosted(c, dsp=dsp)
    for seed in range(3):
        x = torch.randn(1, 3, 39, 42, generator=torch.Generator().manual_seed(seed)) * 2
        assert torch.equal(built([x])[0], reference(x)[0])


@pytest.mark.parametrize("dsp", [False, True])
def test_results_overlap_what_they_read(graph: Graph, dsp: bool) -> None:
    assert_same(graph, graph, dsp)
    program = lower(graph, dsp=dsp)
    apart = plan_arena(program.sequence, 16)
    assert program.arena_bytes < 0.75 * sum(region.length for region in apart.regions)
    kinds = {call.kernel.split("_")[0] for call in program.sequence.calls if overlaps(call)}
    assert {"convolution", "pointwise", "depthwise", "add", "lookup"} <= kinds


@pytest.mark.parametrize("dsp", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (3, 1), (2, 2)])
def test_patches_as_c(graph: Graph, dsp: bool, rows: int, columns: int) -> None:
    last = [node.name for node in graph.nodes if node.op == "call_function" and not Split(node.name, rows, columns).refuses(graph)][5]
    split = Split(last, rows, columns).applied(graph)
    assert_same(split, graph, dsp)
    program = lower(split, dsp=dsp)
    copies = [call.kernel for call in program.sequence.calls if "slice" in call.kernel or "concat" in call.kernel]
    assert bool(copies) == (columns > 1), "rows cost no copies"
    assert len(program.sequence.parts) == (0 if columns > 1 else rows)


def test_a_plane_in_bands_overlaps_nothing(graph: Graph, monkeypatch: Any) -> None:
    whole = lower(graph, dsp=False).arena_bytes
    monkeypatch.setattr(planes, "WORTH_WHOLE", 10**6)
    monkeypatch.setattr(planes, "PLANE_BYTES", 128)
    assert_same(graph, graph, False)
    assert lower(graph, dsp=False).arena_bytes > whole


@pytest.mark.parametrize("dsp", [False, True])
def test_the_estimate_of_a_graph_is_near_its_plan(graph: Graph, dsp: bool) -> None:
    """Close enough to choose patches by; what is written is planned from the calls themselves."""
    planned = plan_work(describe_sequence(lower(graph, dsp=dsp).sequence, overlaps), alignment=16, exact=True).bytes
    assert plan_graph(graph, kernels_of_nodes(dsp=dsp), alignment=16).bytes == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("dsp", [False, True])
def test_a_limit_is_met_by_patches(graph: Graph, dsp: bool) -> None:
    target = EdgeTarget("cortex-m4" if dsp else "cortex-m0+")
    whole = lower_within(graph, target, None, dsp=dsp)
    limit = whole.arena_bytes * 4 // 5
    program = lower_within(graph, target, limit, dsp=dsp)
    assert program.arena_bytes <= limit
    assert len(program.sequence.calls) > len(whole.sequence.calls)
    assert lower_within(graph, target, whole.arena_bytes, dsp=dsp).arena_bytes == whole.arena_bytes
    x = torch.randn(1, 3, 39, 42)
    codes = codes_of(graph, x)
    assert torch.equal(program.graph(codes)[0], whole.graph(codes)[0])


def codes_of(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    """Return the codes of an input, as the program's graph takes them."""
    (quantize,) = graph.inputs[0].users
    a = bound_arguments(quantize)
    return torch.ops.qc.quantize(x, graph.constant(a["scale"]), graph.constant(a["zero_point"]), a["scheme"])


def test_a_limit_that_nothing_meets_names_the_operator(graph: Graph) -> None:
    with pytest.raises(Refused) as refusal:
        lower_within(graph, EdgeTarget("cortex-m4"), 300, dsp=True)
    plan = plan_of(lower(graph, dsp=True))
    assert refusal.value.node == plan.work.steps[plan.peak].name
    assert f"the arena takes {plan.bytes} bytes, the limit is 300" in str(refusal.value)
    assert "--arena-limit" in refusal.value.way_out
    graph.node(refusal.value.node)


def test_the_plan_of_a_program_has_the_names_of_layers(graph: Graph) -> None:
    program = lower(graph, dsp=True)
    plan = plan_of(program)
    assert set(plan.offsets.values()) == {place.offset for place in program.arena.places.values()}
    assert {step.name for step in plan.work.steps} == {layer.name for layer in program.layers}
    assert any(span.name.startswith("scratch of ") for span in plan.spans)

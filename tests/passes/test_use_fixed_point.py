"""Graphs of integers alone: quantizers everywhere, and what stands between codes computed on codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.use_fixed_point import UseFixedPoint, left_in_float
from torch import nn

from qcompile.calibration import from_iterable
from qcompile.capture.torch_export import capture_module
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline, sqnr_db
from qcompile.recipe import load_recipe

RECIPE = load_recipe("w8a8-edge")


class Net(nn.Module):
    """A convolution of 3 to 6 channels, something of one or both of x and the convolution's result, and if asked a layer after it."""

    def __init__(self, between: Callable[..., torch.Tensor], after: nn.Module | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.between, self.after = between, after
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.between(self.conv(x), self.other(x))
        return y if self.after is None else self.after(y)


def data(count: int = 4) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 8, 8, generator=generator),) for _ in range(count)]


def run(net: nn.Module, *, range: str = "minmax", upto: str = "fuse-epilogue") -> tuple[Graph, Graph, Context]:
    """Return the graph before the pass and after it; a second run must change nothing, and the text must parse."""
    graph = capture_module(net.eval(), data(1)[0], None)
    passes = RECIPE.parsed_pipeline().passes
    names = [item.name() for item in passes]
    context = Context(ReferenceTarget(), RECIPE, from_iterable(data()), data(1)[0])
    Pipeline(
        tuple(p if p.name() != "insert-quantizers" else type(p)(range=range, everywhere=True) for p in passes[: names.index(upto) + 1])
    ).run(graph, context)
    before = graph.copy()
    if upto == "fuse-epilogue":
        Pipeline((*passes[: names.index(upto) + 1], UseFixedPoint())).check_order()
        graph.stage = before.stage
        changes = UseFixedPoint().run(graph, context)
        graph.clean()
        assert changes > 0
        assert UseFixedPoint().run(graph.copy(), context) == 0
    text = print_graph(graph)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in graph.tensors})) == text
    return before, graph, context


def operators(graph: Graph) -> list[str]:
    return [operator_name(n.target) for n in graph.nodes if n.op == "call_function" and "quantize" not in operator_name(n.target)]


def largest_difference(before: Graph, after: Graph) -> int:
    """Return by how many codes the two differ at most, over the outputs; the last node is the same dequantize in both."""
    x, worst = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)), 0
    for start in (0, 2, 4, 6):
        for a, b, node in zip(before(x[start : start + 2]), after(x[start : start + 2]), after.outputs, strict=True):
            scale = after.constant(bound_arguments(node)["scale"])
            assert scale is not None
            worst = max(worst, int(((a - b) / scale).abs().max().round()))
    return worst


# What stands after the convolutions, and the operators that it must become. Tables and moves keep every code; others may round a half
# the other way (1 code), which a layer behind them may turn into more.
CASES: list[tuple[str, Callable[..., torch.Tensor], list[str], int]] = [
    ("relu", lambda y, z: torch.relu(y) + z, ["qc.conv2d", "qc.conv2d", "qc.add"], 2),
    ("add-relu6", lambda y, z: F.relu6(y + z), ["qc.conv2d", "qc.conv2d", "qc.add"], 2),
    ("hardswish", lambda y, z: F.hardswish(y), ["qc.conv2d", "qc.lookup"], 1),
    ("chain", lambda y, z: torch.sigmoid(2 * torch.tanh(y) + 0.3), ["qc.conv2d", "qc.lookup"], 1),
    ("max-pool", lambda y, z: F.max_pool2d(torch.relu(y), 3, 2, 1), ["qc.conv2d", "aten.max_pool2d"], 1),
    ("avg-pool", lambda y, z: F.avg_pool2d(y, 2), ["qc.conv2d", "qc.avg_pool2d"], 1),
    ("avg-pool-padded", lambda y, z: F.avg_pool2d(y, 3, 2, 1), ["qc.conv2d", "qc.avg_pool2d"], 1),
    ("global-pool", lambda y, z: F.adaptive_avg_pool2d(y, 1).flatten(1), ["qc.conv2d", "qc.mean", "aten.view"], 1),
    ("mean", lambda y, z: y.mean((2, 3)), ["qc.conv2d", "qc.mean"], 1),
    ("mean-of-channels", lambda y, z: y.mean(1, keepdim=True), ["qc.conv2d", "qc.mean"], 1),
    ("cat", lambda y, z: torch.cat([y, z], 1), ["qc.conv2d", "qc.conv2d", "aten.cat"], 1),
    ("pad", lambda y, z: F.pad(y, (1, 2, 0, 1)), ["qc.conv2d", "aten.constant_pad_nd"], 1),
    ("resize", lambda y, z: F.interpolate(y, scale_factor=2), ["qc.conv2d", "qc.resize_nearest"], 1),
    ("view", lambda y, z: y.permute(0, 2, 3, 1).flatten(1), ["qc.conv2d", "aten.permute", "aten.view"], 1),
    ("slice", lambda y, z: y[:, 1:3, ::2], ["qc.conv2d", "aten.slice.Tensor", "aten.slice.Tensor"], 1),
    ("softmax", lambda y, z: torch.softmax(y.mean((2, 3)), -1), ["qc.conv2d", "qc.mean", "qc.softmax"], 2),
    ("twice", lambda y, z: torch.tanh(y + y), ["qc.conv2d", "qc.lookup"], 1),
]


@pytest.mark.parametrize(("between", "expected", "codes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_stands_between_codes_is_computed_on_codes(between: Any, expected: list[str], codes: int) -> None:
    before, after, _ = run(Net(between))
    assert left_in_float(after) == []
    found = operators(after)
    assert [name for name in found if name != "aten.reshape"] == expected or [n.replace("reshape", "view") for n in found] == expected
    assert all(bound_arguments(n)["multiplier"] is not None for n in after.nodes if n.target is torch.ops.qc.conv2d.default)
    assert largest_difference(before, after) <= codes


def test_a_layer_behind_keeps_the_promise() -> None:
    """Differences of one code stay as small as the promise says: 20 dB."""
    after_pool = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Hardswish(), nn.Flatten(), nn.Linear(128, 5))
    net = Net(lambda y, z: F.avg_pool2d(F.relu6(y + z), 2), after_pool)
    before, after, _ = run(net)
    assert left_in_float(after) == []
    assert operators(after).count("qc.linear") == 1
    x = data(1)[0]
    assert sqnr_db(before(*x)[0], after(*x)[0]) > 25
    with torch.no_grad():
        exact = net(*x)
    assert sqnr_db(exact, after(*x)[0]) > 20


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-9])
@pytest.mark.parametrize("linear", [False, True])
def test_a_bias_beside_faint_weights_is_kept(largest: float, linear: bool) -> None:
    """Channels that training left dead: all that they give is their bias."""
    after = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 4)) if linear else nn.Conv2d(6, 4, 3)
    net = Net(lambda y, z: torch.relu(y), after)
    layer: Any = after[1] if linear else after
    layer.weight.data[1], layer.bias.data[1] = layer.weight.data[1] / layer.weight.data[1].abs().max() * largest, 3.0
    _, graph, _ = run(net)
    assert left_in_float(graph) == []
    x = data(1)[0]
    with torch.no_grad():
        exact = net(*x)
    step = graph.constant(bound_arguments(graph.outputs[0])["scale"])
    assert step is not None
    assert float((graph(*x)[0][:, 1] - exact[:, 1]).abs().max()) <= 0.51 * float(step)
    assert sqnr_db(exact, graph(*x)[0]) > 20


def test_golden(golden: Any) -> None:
    before, after, _ = run(Net(lambda y, z: F.hardswish(F.max_pool2d(y, 2)).mean((2, 3))))
    texts = (print_graph(graph, comments=False) for graph in (before, after))
    golden("passes/use_fixed_point", "->\n".join(texts))


@pytest.mark.parametrize(("between", "operator", "reason"), [
    (lambda y, z: F.layer_norm(y, (8, 8)), "aten.layer_norm", "no form on codes"),
    (lambda y, z: y * z, "aten.mul.Tensor", "no form on codes"),
    (lambda y, z: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False), "aten.avg_pool2d", "count fewer elements"),
    (lambda y, z: F.avg_pool2d(y, 3, 2, ceil_mode=True), "aten.avg_pool2d", "reach beyond the edge"),
    (lambda y, z: F.avg_pool2d(y, 2, divisor_override=3), "aten.avg_pool2d", "a number of its own"),
    (lambda y, z: F.pad(y, (1, 1), value=2.0), "aten.pad", "other values than zero"),
    (lambda y, z: torch.softmax(y, 1), "aten.softmax.int", "not over the last axis"),
    (lambda y, z: F.adaptive_avg_pool2d(y, 2), "aten.adaptive_avg_pool2d", "more than one place"),
])  # fmt: skip
def test_what_stays_float_says_why(between: Any, operator: str, reason: str) -> None:
    _, after, _ = run(Net(between))
    stayed = {operator_name(node.target): node.meta["notes"]["reason"] for node in left_in_float(after)}
    assert reason in stayed[operator]


# ---- where quantizers stand -----------------------------------------------------------------------------------------------


def grid(graph: Graph, name: str) -> tuple[float, int]:
    quantizer = next(q for n in graph.nodes if (q := graph.quantizer(n)) and str(n.target) == name)
    return float(quantizer.scale), int(quantizer.zero_point)


def names(graph: Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if graph.quantizer(n) and not str(n.target).endswith("weight_quantizer")]


def test_every_value_has_one_quantizer_but_parts_of_an_operator() -> None:
    _, graph, _ = run(Net(lambda y, z: torch.tanh(torch.sigmoid(torch.relu(y) + z))), upto="insert-quantizers")
    assert sorted(names(graph)) == ["add.quantizer", "conv2d_1.quantizer", "relu.quantizer", "tanh.quantizer", "x.quantizer"]


def test_moves_and_concatenations_share_a_grid() -> None:
    net = Net(lambda y, z: torch.cat([F.max_pool2d(y, 3, 1, 1), torch.relu(3 * z)], 1).flatten(1))
    _, graph, _ = run(net, upto="insert-quantizers")
    found = {grid(graph, name) for name in names(graph) if not name.startswith("x.")}
    assert len(names(graph)) == 7
    assert len(found) == 2  # and that of z, which is read before its function
    joined = torch.cat([net(x) for (x,) in data()]).detach()
    assert grid(graph, "max_pool2d.quantizer")[0] == pytest.approx(float((joined.max() - joined.min().clamp(max=0)) / 255), rel=1e-5)


def test_probabilities_have_their_own_grid_and_returned_values_their_whole_range() -> None:
    net = Net(lambda y, z: torch.softmax(y.mean((2, 3)), -1))
    _, graph, _ = run(net, range="mse", upto="insert-quantizers")
    assert grid(graph, "softmax.quantizer") == (1 / 256, -128)
    seen = torch.cat([net.conv(x).mean((2, 3)) for (x,) in data()]).detach()
    scale, zero = grid(graph, "mean.quantizer")
    assert scale == pytest.approx(float((seen.max().clamp(min=0) - seen.min().clamp(max=0)) / 255), rel=1e-5)
    assert (-128 - zero) * scale <= float(seen.min().clamp(max=0)) + scale

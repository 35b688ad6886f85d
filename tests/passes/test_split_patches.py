"""Patches compute the same codes, and the arena fits."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.order_operators import OrderOperators
from qcompile.passes.split_patches import Split, SplitPatches
from torch import nn

import qcompile
from qcompile.arena.from_graph import describe_graph, plan_graph, planned_bytes
from qcompile.arena.order import order_steps
from qcompile.errors import Refused
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.graph.types import TensorType
from qcompile.pipeline import Context, Pass


class Net(nn.Module):
    """An inverted residual between two strided convolutions, then a mean and a linear layer."""

    def __init__(self, kernel: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel, stride, kernel // 2)
        self.expand, self.depth = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 5, 1, 2, groups=16)
        self.project, self.down = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.project(torch.relu(self.depth(torch.relu(self.expand(x)))))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


def quantized(net: nn.Module, *size: int) -> Graph:
    """Return the integer graph of a net over one picture of this size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in net.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
        x = torch.randn(1, 3, *size)
    return qcompile.compile(net.eval(), (x,), recipe="w8a8", target="reference", calibration=[(x,)]).graph


def run(graph: Graph, item: Pass) -> tuple[Graph, int]:
    after = graph.copy()
    changes = item.run(after, Context(target=ReferenceTarget()))
    after.clean()
    after.infer_types()
    return after, changes


def images(graph: Graph) -> list[str]:
    """Return the nodes that a graph may be split at."""
    return [node.name for node in graph.nodes if node.op == "call_function" and not Split(node.name, 1, 1).refuses(graph)]


@pytest.fixture(scope="module")
def net() -> Graph:
    return quantized(Net(), 23, 18)


@given(data=st.data())
@settings(max_examples=25)
def test_patches_give_the_same_codes(net: Graph, data: Any) -> None:
    last = data.draw(st.sampled_from(images(net)))
    height, width = net.node(last).meta["val"].shape[2:]
    rows, columns = data.draw(st.integers(1, min(4, height))), data.draw(st.integers(1, min(3, width)))
    after, changes = run(net, SplitPatches(last=last, rows=rows, columns=columns))
    assert changes == (rows * columns > 1)
    x = torch.randn(1, 3, 23, 18, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 2
    assert torch.equal(after(x)[0], net(x)[0])


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (5, 2), (7, 3)])
def test_other_windows(kernel: int, stride: int) -> None:
    graph = quantized(Net(kernel, stride), 20, 21)
    x = torch.randn(1, 3, 20, 21, generator=torch.Generator().manual_seed(5))
    for last, (rows, columns) in itertools.product(images(graph), [(2, 1), (3, 2)]):
        assert torch.equal(run(graph, SplitPatches(last=last, rows=rows, columns=columns))[0](x)[0], graph(x)[0]), last


def test_patches_overlap_no_more_than_they_must(net: Graph) -> None:
    after, _ = run(net, SplitPatches(last=images(net)[-1], rows=2))
    convolutions = [node for node in after.nodes if node.op == "call_function" and operator_name(node.target) == "qc.conv2d"]
    heights = [int(node.meta["val"].shape[2]) for node in convolutions]
    assert heights == [8, 8, 6, 6, 3, 9, 9, 7, 7, 3], "rows of stem, expansion, depthwise, projection and the last, by patch"
    padding = [bound_arguments(node)["padding"] for node in convolutions]
    assert padding[0] == [1, 1, 0, 0]
    assert padding[5] == [0, 1, 1, 0]


def test_golden(golden) -> None:
    text = """graph @main integer(%x: u8[1,3,8,8]) {
  %s = const f32[] @{s}
  %z = const i32[] @{z}
  %v = const f32[4] @{v}
  %w = const i8[4,3,3,3] @{w}
  %u = const i8[2,4,3,3] @{u}
  %t = const f32[2] @{t}
  %a = qc.conv2d(%x, %s, %z, %w, %v, none, none, none, %s, %z) OPTIONS : u8[1,4,8,8]
  %b = qc.conv2d(%a, %s, %z, %u, %t, none, none, none, %s, %z) OPTIONS : u8[1,2,8,8]
  return %b as "b"
}
"""
    options = (
        '{x_scheme="uint8 tensor affine", weight_scheme="int8 channel=0 sym", kernel_width=3, stride=[1, 1], padding=[1, 1], '
        'dilation=[1, 1], groups=1, activation="relu", out_scheme="uint8 tensor affine"}'
    )
    values = {
        "s": torch.tensor(0.05), "z": torch.tensor(7, dtype=torch.int32), "v": torch.full((4,), 0.5), "t": torch.full((2,), 0.25),
        "w": torch.arange(108, dtype=torch.int8).view(4, 3, 3, 3), "u": torch.arange(72, dtype=torch.int8).view(2, 4, 3, 3),
    }  # fmt: skip
    digests = {name: tensor_digest(value)[:16] for name, value in values.items()}
    for name, digest in digests.items():
        text = text.replace(f"{{{name}}}", digest)
    graph = parse_graph(text.replace("OPTIONS", options), {digests[name]: value for name, value in values.items()})
    after, changes = run(graph, SplitPatches(last="b", rows=2))
    assert changes == 1
    printed = print_graph(after, comments=False)
    golden("passes/split_patches", f"{print_graph(graph, comments=False)}->\n{printed}")
    assert print_graph(parse_graph(printed, {tensor_digest(t)[:16]: t for t in after.tensors}), comments=False) == printed
    assert run(after, SplitPatches(last="b", rows=2))[1] == 0, "a second run changes nothing"


def test_an_arena_limit_takes_the_fewest_patches(net: Graph) -> None:
    whole = planned_bytes(net, alignment=4)
    assert run(net, SplitPatches(arena_limit=whole))[1] == 0
    limit = whole * 3 // 4
    after, changes = run(net, SplitPatches(arena_limit=limit))
    assert changes == 1
    assert planned_bytes(after, alignment=4) <= limit < whole
    patches = next(node.meta["notes"]["patches"] for node in after.nodes if "patches" in node.meta["notes"])
    count = int(patches.split("x")[0]) * int(patches.split("x")[1])
    fewer = [
        planned_bytes(Split(last, rows, fewer // rows).applied(net), alignment=4)
        for last in images(net)
        for fewer in range(2, count)
        for rows in range(1, fewer + 1)
        if fewer % rows == 0 and not Split(last, rows, fewer // rows).refuses(net)
    ]
    assert all(bytes > limit for bytes in fewer)
    x = torch.randn(1, 3, 23, 18)
    assert torch.equal(after(x)[0], net(x)[0])


def test_a_limit_that_no_patches_reach_is_refused(net: Graph) -> None:
    with pytest.raises(Refused, match=r"the arena takes \d+ bytes, the limit is 100: at this operator \d+ bytes live .*; no patches help"):
        run(net, SplitPatches(arena_limit=100))
    images_alone = quantized(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)), 12, 12)
    with pytest.raises(Refused, match=r"the limit is 30: .*; the least that patches need is \d+ bytes \(\d+ x \d+ patches up to"):
        run(images_alone, SplitPatches(arena_limit=30))


@pytest.mark.parametrize(("last", "reason"), [("mean", "not an image|not computed"), ("nowhere", "no such node")])
def test_what_cannot_be_split_is_refused(net: Graph, last: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        run(net, SplitPatches(last=last, rows=2))


def test_an_image_that_is_read_later_is_no_last_one(net: Graph) -> None:
    """The stem's image is read by the expansion and by the sum: only the sum is behind both."""
    stem, *inside = [
        node.name for node in net.nodes if node.op == "call_function" and operator_name(node.target) in ("qc.conv2d", "qc.add")
    ]
    assert stem in images(net)
    assert "read behind it too" in Split(inside[0], 2, 1).refuses(net)


def test_a_symbolic_size_is_refused() -> None:
    net = Net()
    x = torch.randn(1, 3, 16, 16)
    graph = qcompile.compile(net, (x,), recipe="w8a8", target="reference", calibration=[(x,)], dynamic_shapes=[{0: "batch"}]).graph
    with pytest.raises(Refused, match=r"its size .* is not known"):
        planned_bytes(graph)
    fixed = Graph(graph.module, [TensorType(torch.float32, (1, 3, 16, 16))], stage=graph.stage, output_names=graph.output_names)
    assert planned_bytes(fixed) > 0


# ---- order ------------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Four wide branches, each shrunk, made breadth first."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Conv2d(3, 32, 3, padding=1) for _ in range(4))
        self.narrow = nn.ModuleList(nn.Conv2d(32, 2, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = [torch.relu(layer(x)) for layer in self.wide]
        narrow = [layer(w) for layer, w in zip(self.narrow, wide, strict=True)]
        return (narrow[0] + narrow[1]) + (narrow[2] + narrow[3])


def test_branches_are_ordered_depth_first() -> None:
    graph = quantized(Branches(), 8, 8)
    before = plan_graph(graph)
    after, changes = run(graph, OrderOperators())
    assert changes > 0
    assert planned_bytes(after) < before.bytes / 2
    assert planned_bytes(after) >= order_steps(describe_graph(graph).work).peak
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(after(x)[0], graph(x)[0])
    assert run(after, OrderOperators())[1] == 0


def test_a_chain_keeps_its_order(net: Graph) -> None:
    assert run(net, OrderOperators())[1] == 0


# ---- trained nets -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mcunet_fits_by_patches(data_folder, repository) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("mcunet", repository / "benchmarks" / "models" / "mcunet.py")
    assert spec is not None
    models: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)  # type: ignore[union-attr]
    model, (x,), _ = models.mcunet()
    net = SimpleNamespace(graph=qcompile.compile(model, (x,), recipe="w8a8", target="reference", calibration=[(x,)]).graph)
    whole = planned_bytes(net.graph, alignment=4)
    after, changes = run(net.graph, SplitPatches(arena_limit=192 * 1024))
    assert whole > 192 * 1024 >= planned_bytes(after, alignment=4)
    assert changes == 1
    assert torch.equal(after(x)[0], net.graph(x)[0])

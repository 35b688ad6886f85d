from __future__ import annotations

from typing import Any

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.assign_bits import AssignBits
from qcompile.passes.insert_quantizers import InsertQuantizers

from qcompile.calibration import from_iterable
from qcompile.errors import Refused
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.pipeline import Context, Pipeline
from qcompile.recipe import Recipe

LINEAR = """graph @main float(%x: f32[n,4]) where n in 1..64 {
  %w = const @w
  %v = const @v
  %y = aten.linear(%x, %w) : f32[n,4]
  %z = aten.linear(%x, %v) : f32[n,4]
  return %y as "y", %z as "z"
}
"""
IMAGE = """graph @main float(%x: f32[n,2,4,4]) where n in 1..64 {
  %w = const @w
  %v = const @v
  %u = const @u
  %a = aten.conv2d(%x, %w) {padding=[1, 1]} : f32[n,2,4,4]
  %b = aten.conv2d(%a, %v) {padding=[1, 1]} : f32[n,2,4,4]
JOIN
  %c = aten.conv2d(%r, %u) {padding=[1, 1]} : f32[n,2,4,4]
  return %c as "c"
}
"""
SUM = """  %s = aten.add.Tensor(%a, %b) : f32[n,2,4,4]
  %r = aten.relu(%s) : f32[n,2,4,4]"""
CAT = """  %r = aten.cat([%a, %b]) {dim=1} : f32[n,4,4,4]"""


def linear(build: Any) -> Graph:
    return build(LINEAR, w=torch.eye(4), v=-torch.eye(4))


def image(build: Any, join: str = SUM) -> Graph:
    generator = torch.Generator().manual_seed(0)
    w, v, u = (torch.randn(2, 4 if join == CAT and name == "u" else 2, 3, 3, generator=generator) for name in "wvu")
    return build(IMAGE.replace("JOIN", join), w=w, v=v, u=u)


def run(
    graph: Graph, item: InsertQuantizers | None = None, *, data: Any = None, examples: Any = (), scheme: str = "W8A8", **schemes: Any
) -> tuple[Graph, int]:
    recipe = Recipe(name="test", pipeline="assign-bits", schemes=schemes) if schemes else None
    context = Context(ReferenceTarget(), recipe, from_iterable(data) if data is not None else None, examples)
    after = graph.copy()
    steps = Pipeline((AssignBits("" if schemes else scheme), item or InsertQuantizers())).run(after, context)
    text = print_graph(after)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in after.tensors})) == text
    return after, steps[-1].changes


def quantizers(graph: Graph) -> dict[str, str]:
    return {str(n.target): str(q.scheme) for n in graph.nodes if (q := graph.quantizer(n))}


def grid(graph: Graph, name: str) -> tuple[float, int]:
    quantizer = graph.quantizer(graph.node(name))
    assert quantizer is not None
    assert quantizer.scale is not None
    assert quantizer.zero_point is not None
    return float(quantizer.scale), int(quantizer.zero_point)


DATA = [torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.0, 4.1, 0.0, 0.0]])]


def test_golden(build: Any, golden: Any) -> None:
    graph = linear(build)
    after, _ = run(graph, data=DATA)
    golden("passes/insert_quantizers", f"{print_graph(graph, comments=False)}->\n{print_graph(after, comments=False)}")


def test_a_value_read_twice_has_one_quantizer_with_the_range_of_the_data(build: Any) -> None:
    after, changes = run(linear(build), data=DATA)
    assert changes == 3
    assert quantizers(after) == {
        "x.quantizer": "uint8 tensor affine",
        "w_quantizer": "int8 channel=0 sym",
        "v_quantizer": "int8 channel=0 sym",
    }
    assert grid(after, "x.quantizer") == (pytest.approx(5.1 / 255, rel=1e-6), 50)
    assert [user.name for user in after.node("x").users] == [after.node("x.quantizer").name]


def test_a_weight_that_layers_share_has_one_quantizer_for_each_scheme(build: Any) -> None:
    graph = build(LINEAR.replace("%v)", "%w)"), w=torch.eye(4), v=-torch.eye(4))
    after, changes = run(graph, scheme="W4A16")
    assert changes == 1
    assert {user.name for user in after.node("w_quantizer").users} == {"y", "z"}
    apart, changes = run(graph, linear="W4A16", layers={"z": "W8A16"})
    assert changes == 2
    assert sorted(quantizers(apart).values()) == ["int4 channel=0 sym", "int8 channel=0 sym"]


def test_the_result_is_close_and_rounded(build: Any) -> None:
    graph = linear(build)
    after, _ = run(graph, data=DATA)
    x = torch.tensor([[0.013, -0.7, 3.21, 1.0]])
    for exact, found in zip(graph(x), after(x), strict=True):
        assert not torch.equal(exact, found)
        assert float((exact - found).abs().max()) <= 5.1 / 255  # half a step of x, and of the weight


def test_dynamic_quantizers_need_no_data(build: Any) -> None:
    after, changes = run(linear(build), scheme="W8A8-dynamic")
    assert changes == 3
    assert quantizers(after)["x.quantizer"] == "int8 token sym dynamic"
    assert after.quantizer(after.node("x.quantizer")).scale is None


def test_weight_only_schemes_leave_activations_alone(build: Any) -> None:
    after, changes = run(linear(build), scheme="W4A16")
    assert changes == 2
    assert set(quantizers(after)) == {"w_quantizer", "v_quantizer"}


def test_float_layers_are_left_alone(build: Any) -> None:
    after, changes = run(linear(build), linear="float")
    assert changes == 0
    assert not quantizers(after)


def test_two_schemes_of_one_value_are_refused(build: Any) -> None:
    with pytest.raises(
        Refused, match="x: two layers want it as 'uint8 tensor affine' and as 'int8 token sym dynamic'; give both one scheme"
    ):
        run(linear(build), data=DATA, linear="W8A8", layers={"v": "W8A8-dynamic"})


def test_static_ranges_without_data_are_refused(build: Any) -> None:
    with pytest.raises(Refused, match="insert-quantizers needs calibration data"):
        run(linear(build))


def test_a_second_run_is_refused_by_its_stage(build: Any) -> None:
    after, _ = run(linear(build), data=DATA)
    with pytest.raises(Refused, match="insert-quantizers takes a graph of stage float, here it is simulated"):
        Pipeline((InsertQuantizers(),)).run(after, Context(ReferenceTarget()))


@pytest.mark.parametrize(("range", "wide"), [("minmax", True), ("percentile", False), ("mse", True), ("entropy", True)])
def test_every_kind_of_range(build: Any, range: str, wide: bool) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 9.0
    after, _ = run(linear(build), InsertQuantizers(range=range, percentile=99.0), data=[x])
    scale, _ = grid(after, "x.quantizer")
    full = (9.0 - float(x.min())) / 255
    assert scale == pytest.approx(full, rel=1e-5) if range == "minmax" else scale <= full * 1.0001
    assert wide or scale < full / 1.5


# ---- images: sums and concatenations --------------------------------------------------------------------------------------

BATCH = [torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5))]


def test_operands_and_result_of_a_sum_between_convolutions_are_quantized(build: Any) -> None:
    after, _ = run(image(build), data=BATCH)
    activations = {"x.quantizer", "a.quantizer", "b.quantizer", "r.quantizer"}  # the sum itself is rounded after its relu
    assert set(quantizers(after)) == activations | {"w_quantizer", "v_quantizer", "u_quantizer"}
    add = after.node("s")
    assert all(after.quantizer(operand) for operand in add.args)
    assert after.quantizer(after.node("c").args[0])


def test_operands_of_a_concatenation_share_the_grid_of_its_result(build: Any) -> None:
    after, _ = run(image(build, CAT), data=BATCH)
    grids = {grid(after, f"{name}.quantizer") for name in ("a", "b", "r")}
    assert len(grids) == 1
    assert grid(after, "x.quantizer") not in grids


def test_a_sum_before_float_layers_is_left_alone(build: Any) -> None:
    after, _ = run(image(build), data=BATCH, conv2d="W8A8", layers={"u": "float"})
    assert "r.quantizer" not in quantizers(after)
    assert "b.quantizer" not in quantizers(after)


def test_a_sum_of_rows_is_left_alone(build: Any) -> None:
    text = LINEAR.replace("  return", "  %s = aten.add.Tensor(%y, %z) : f32[n,4]\n  %t = aten.linear(%s, %w) : f32[n,4]\n  return")
    after, _ = run(build(text.replace('%y as "y"', '%t as "t"'), w=torch.eye(4), v=-torch.eye(4)), data=DATA)
    assert "s.quantizer" in quantizers(after)
    assert "y.quantizer" not in quantizers(after)


# ---- ranges from the model ------------------------------------------------------------------------------------------------


def test_ranges_from_the_model_need_no_data(build: Any) -> None:
    graph = image(build)
    node = graph.node("a")
    node.meta["notes"] |= {"bn_mean": torch.tensor([1.0, -1.0]), "bn_std": torch.tensor([0.5, 2.0])}
    graph.node("b").meta["notes"] |= {"bn_mean": torch.zeros(2), "bn_std": torch.ones(2)}
    example = torch.rand(1, 2, 4, 4)
    after, _ = run(graph, InsertQuantizers(range="model"), examples=(example,))
    assert grid(after, "a.quantizer")[0] == pytest.approx(
        (11.0 + 13.0) / 255, rel=1e-5
    )  # -1 - 6 * 2 to -1 + 6 * 2; the other channel lies inside
    assert grid(after, "x.quantizer")[0] == pytest.approx(float(example.max()) / 255, rel=1e-5)
    assert grid(after, "r.quantizer")[1] == 0


def test_ranges_that_the_model_does_not_say_are_refused(build: Any) -> None:
    text = LINEAR.replace("  %y = aten.linear(%x,", "  %e = aten.exp(%x) : f32[n,4]\n  %y = aten.linear(%e,")
    with pytest.raises(Refused, match=r"e \(aten\.exp\.default\): its range cannot be found without data; give calibration data"):
        run(build(text, w=torch.eye(4), v=torch.eye(4)), InsertQuantizers(range="model"), examples=(torch.randn(2, 4),))

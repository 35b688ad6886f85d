from __future__ import annotations

from typing import Any

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.assign_bits import AssignBits

from qcompile.errors import Refused
from qcompile.pipeline import Context, Pipeline
from qcompile.recipe import Recipe
from qcompile.target import Kernel

TEXT = """graph @main float(%tokens: i64[n,5], %image: f32[n,3,6,6]) where n in 1..64 {
  %table = const @table
  %body.first.weight = const @first
  %body.second.weight = const @second
  %stem.weight = const @stem
  %rows = aten.embedding(%table, %tokens) : f32[n,5,8]
  %a = aten.linear(%rows, %body.first.weight) : f32[n,5,8]
  %b = aten.linear(%a, %body.second.weight) : f32[n,5,8]
  %c = aten.conv2d(%image, %stem.weight) : f32[n,4,4,4]
  return %b as "b", %c as "c"
}
"""


def constants() -> dict[str, torch.Tensor]:
    return {"table": torch.ones(10, 8), "first": torch.ones(8, 8), "second": 2 * torch.ones(8, 8), "stem": torch.ones(4, 3, 3, 3)}


def run(graph: Any, *, scheme: str = "", target: Any = None, **schemes: Any) -> tuple[Any, Context, int]:
    recipe = Recipe(name="test", pipeline="assign-bits", schemes=schemes) if schemes else None
    context, after = Context(target or ReferenceTarget(), recipe), graph.copy()
    (step,) = Pipeline((AssignBits(scheme),)).run(after, context)
    return after, context, step.changes


def chosen(graph: Any) -> dict[str, str]:
    return {node.name: node.meta["notes"]["scheme"] for node in graph.nodes if "scheme" in node.meta["notes"]}


W8 = "weight=int8 channel=0 sym; activation=uint8 tensor affine"
W4 = "weight=int4 channel=0 sym; activation=float"
TABLE = "weight=int8 channel=0 sym; activation=float"


def test_golden(build: Any, run_pass: Any, golden: Any) -> None:
    golden("passes/assign_bits", run_pass(build(TEXT, **constants()), AssignBits("W8A8")).golden_text)


def test_keeps_every_bit(build: Any, run_pass: Any) -> None:
    ran = run_pass(build(TEXT, **constants()), AssignBits("W4A8"))
    assert ran.changes == 4
    assert ran.sqnr(torch.randint(0, 10, (2, 5)), torch.randn(2, 3, 6, 6)) == float("inf")


def test_kinds_and_patterns_of_a_recipe_choose_and_the_last_pattern_wins(build: Any) -> None:
    graph = build(TEXT, **constants())
    after, _, changes = run(graph, linear="W8A8", conv2d="W8A8", embedding="W4A16", layers={"body.*": "W4A16", "*.second": "float"})
    assert changes == 4
    assert chosen(after) == {"rows": W4, "a": W4, "b": "weight=float; activation=float", "c": W8}
    assert after.node("b").meta["notes"]["reason"] == "float by schemes.layers['*.second']"
    assert after.node("a").meta["notes"]["layer"] == "body.first"
    assert "reason" not in after.node("a").meta["notes"]


def test_depthwise_convolutions_are_a_kind_of_their_own_where_the_recipe_has_it(build: Any) -> None:
    text = """graph @main float(%image: f32[n,4,6,6]) where n in 1..64 {
  %w = const @w
  %v = const @v
  %a = aten.conv2d(%image, %w) {groups=4} : f32[n,4,4,4]
  %b = aten.conv2d(%a, %v) {groups=2} : f32[n,4,2,2]
  return %b as "b"
}
"""
    graph = build(text, w=torch.ones(4, 1, 3, 3), v=torch.ones(4, 2, 3, 3))
    assert chosen(run(graph, conv2d="W4A16", depthwise="W8A8")[0]) == {"a": W8, "b": W4}
    assert chosen(run(graph, conv2d="W4A16")[0]) == {"a": W4, "b": W4}
    assert chosen(run(graph, conv2d="W4A16", depthwise="W8A8", layers={"w": "W4A16"})[0]) == {"a": W4, "b": W4}


@pytest.mark.parametrize("pattern", ["body.first.weight", "body.first", "a", "*first*"])
def test_a_pattern_may_name_the_weight_the_module_or_the_node(build: Any, pattern: str) -> None:
    after, _, _ = run(build(TEXT, **constants()), layers={pattern: "W8A8"})
    assert [name for name, text in chosen(after).items() if text == W8] == ["a"]


def test_a_pattern_that_fits_no_layer_is_warned_about_with_the_nearest_names(build: Any) -> None:
    layers = {"body.*": "W8A8", "*.secnd": "float", "sten*": "float", "[": "float"}
    after, context, changes = run(build(TEXT, **constants()), linear="W4A16", layers=layers)
    assert context.warnings == [
        "schemes.layers['*.secnd'] fits no layer; the nearest of the 4 layers are 'body.second', 'stem', 'table'",
        "schemes.layers['sten*'] fits no layer; the nearest of the 4 layers are 'stem', 'table', 'body.second'",
        "schemes.layers['['] fits no layer; the nearest of the 4 layers are 'table', 'stem', 'body.second'",
    ]
    assert (chosen(after)["a"], chosen(after)["b"], changes) == (W8, W8, 4)


def test_a_plain_name_that_fits_no_layer_is_refused(build: Any) -> None:
    message = r"schemes\.layers\['body\.frist'\] fits no layer; the nearest of the 4 layers are 'body\.first', "
    with pytest.raises(Refused, match=message):
        run(build(TEXT, **constants()), layers={"body.frist": "W8A8"})


def test_patterns_of_a_model_without_layers_are_warned_about(build: Any) -> None:
    graph = build('graph @main float(%x: f32[2]) {\n  %y = aten.relu(%x) : f32[2]\n  return %y as "y"\n}\n')
    _, context, _ = run(graph, layers={"*": "W8A8"})
    assert context.warnings == ["schemes.layers['*'] fits no layer; the model has no layer that takes a scheme"]


def test_one_scheme_for_all_layers_says_that_patterns_are_not_read(build: Any) -> None:
    recipe = Recipe(name="test", pipeline="assign-bits", schemes={"layers": {"nothing": "W4A16"}})
    context = Context(ReferenceTarget(), recipe)
    Pipeline((AssignBits("W8A8"), AssignBits("W8A8"))).run(build(TEXT, **constants()), context)
    assert context.warnings == ["schemes.layers is not read: assign-bits{scheme=W8A8} gives every layer one scheme"]


def test_kinds_of_layer_that_the_model_lacks_are_no_reason_to_warn(build: Any) -> None:
    graph = build(TEXT.replace("  %c = aten.conv2d(%image, %stem.weight) : f32[n,4,4,4]\n", "").replace(', %c as "c"', ""), **constants())
    _, context, changes = run(graph, linear="W8A8", conv2d="W8A8", embedding="W8A16", layers={"*first*": "W8A8"})
    assert (context.warnings, changes) == ([], 3)


def test_a_table_is_stored_and_never_has_an_activation(build: Any) -> None:
    after, _, _ = run(build(TEXT, **constants()), scheme="W4A8-dynamic")
    assert chosen(after)["rows"] == TABLE
    after, _, _ = run(build(TEXT, **constants()), embedding="W8A8")
    assert chosen(after)["rows"] == TABLE


@pytest.mark.parametrize(("group", "granularity"), [(4, "group=4"), (8, "channel=0"), (128, "channel=0")])
def test_a_group_longer_than_a_row_is_a_channel(build: Any, group: int, granularity: str) -> None:
    after, _, _ = run(build(TEXT, **constants()), linear=f"W4A16g{group}")
    assert chosen(after)["a"] == f"weight=int4 {granularity} sym; activation=float"


def test_without_recipe_and_scheme_it_is_w8a8(build: Any) -> None:
    after, _, _ = run(build(TEXT, **constants()))
    assert chosen(after) == {"rows": TABLE, "a": W8, "b": W8, "c": W8}


def test_a_scheme_can_be_assigned_again(build: Any) -> None:
    graph, _, _ = run(build(TEXT, **constants()), linear="float", conv2d="W8A8", embedding="W8A16")
    assert "reason" in graph.node("a").meta["notes"]
    after, _, changes = run(graph, scheme="W8A8")
    assert changes == 2
    assert "reason" not in after.node("a").meta["notes"]


def test_does_not_fire_where_the_weight_is_computed(build: Any, run_pass: Any) -> None:
    text = TEXT.replace("  %a = ", "  %w = aten.relu(%body.first.weight) : f32[8,8]\n  %a = ").replace(
        "(%rows, %body.first.weight)", "(%rows, %w)"
    )
    ran = run_pass(build(text, **constants()), AssignBits("W8A8"))
    assert ran.changes == 3
    assert ran.context.notes == [("a", "stays float: the weight is not a constant")]
    assert "a" not in chosen(ran.after)


class Small(ReferenceTarget):
    """A target with two kernels."""

    name = "small"
    kernels = (Kernel("qc.linear", (8,), ("channel",), "static"), Kernel("qc.linear", (4,), ("group",), "float"))
    supports = ReferenceTarget.__mro__[1].supports


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"linear": "W3A16g4"}, r"a \(aten\.linear\): small has no kernel for qc\.linear with weight=int3 group=4 sym; activation=float; "
                                r"the nearest that runs: weights of 4 bits by group, float activations; "
                                r"change schemes\.linear in the recipe"),
        ({"linear": "W8A8-dynamic"}, r"the nearest that runs: weights of 8 bits by channel, static activations"),
        ({"conv2d": "W8A8"}, r"c \(aten\.conv2d\): small has no low-bit kernel for qc\.conv2d; change schemes\.conv2d in the recipe"),
        ({"layers": {"body.second": "W4A8g4"}}, r"change schemes\.layers\['body\.second'\] in the recipe"),
    ],
)  # fmt: skip
def test_a_scheme_without_a_kernel_is_refused(build: Any, schemes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        run(build(TEXT, **constants()), target=Small(), **schemes)


def test_a_scheme_with_a_kernel_or_none_is_taken(build: Any) -> None:
    after, _, _ = run(build(TEXT, **constants()), target=Small(), linear="W8A8", layers={"body.second": "W4A16g4"})
    assert chosen(after)["b"] == "weight=int4 group=4 sym; activation=float"


@pytest.mark.parametrize(("scheme", "message"), [("W8B8", "unknown scheme name 'W8B8'"), ("W8A9", "1 to 8 bits, not 9")])
def test_an_unknown_scheme_is_refused(build: Any, scheme: str, message: str) -> None:
    with pytest.raises(Refused, match=rf"{message}.*change assign-bits\{{scheme={scheme}\}}"):
        run(build(TEXT, **constants()), scheme=scheme)

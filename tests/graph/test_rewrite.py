from __future__ import annotations

import pytest
import torch

from qcompile.errors import Refused
from qcompile.graph import Graph, parse_graph, tensor_digest
from qcompile.graph.rewrite import Any_, Const, Op, RewriteLog, Rule, apply_rules, match_pattern

aten = torch.ops.aten
WEIGHT = torch.ones(4)


def graph_of(*lines: str, result: str = "y") -> Graph:
    digest = tensor_digest(WEIGHT)[:16]
    body = "\n".join(f"  {line}" for line in (f"%w = const f32[4] @{digest}", *lines))
    return parse_graph(f'graph @main float(%x: f32[n,4]) where n in 1..8 {{\n{body}\n  return %{result} as "y"\n}}\n', {digest: WEIGHT})


T = "f32[n,4]"
RELU_NEG = Rule(
    "relu-neg", Op("aten.relu", self=Op("aten.neg", self=Any_("x"))), lambda g, m: g.call(aten.abs.default, m["x"], before=m.root)
)


def test_a_rule_fires_and_is_counted() -> None:
    graph, log = graph_of(f"%a = aten.neg(%x) : {T}", f"%y = aten.relu(%a) : {T}"), RewriteLog()
    assert apply_rules(graph, [RELU_NEG], log) == 1
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.abs.default]
    assert log.matched["relu-neg"] == 1
    assert log.tried["relu-neg"] >= 1
    assert apply_rules(graph, [RELU_NEG], log) == 0


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([f"%a = aten.abs(%x) : {T}", f"%y = aten.relu(%a) : {T}"], "relu-neg: %a (aten.abs) is not aten.neg"),
        ([f"%a = aten.neg(%x) : {T}", f"%r = aten.relu(%a) : {T}", f"%y = aten.add.Tensor(%a, %r) : {T}"], "relu-neg: a has other users"),
    ],
)
def test_a_rule_that_does_not_fire_says_why(lines, reason) -> None:
    graph, log = graph_of(*lines), RewriteLog()
    assert apply_rules(graph, [RELU_NEG], log) == 0
    relu = next(n.name for n in graph.nodes if n.target is aten.relu.default)
    assert log.why_not(relu) == [reason]


def test_shared_operators_match_where_the_pattern_allows_it() -> None:
    graph = graph_of(f"%a = aten.neg(%x) : {T}", f"%r = aten.relu(%a) : {T}", f"%y = aten.add.Tensor(%a, %r) : {T}")
    pattern = Op("aten.relu", self=Op("aten.neg", shared=True, name="inner"))
    assert match_pattern(graph, pattern, graph.node("r"))["inner"] is graph.node("a")


def test_guards_keep_a_rule_from_firing() -> None:
    guarded = Rule("guarded", RELU_NEG.pattern, RELU_NEG.replace, lambda g, m: "it is Sunday")
    graph, log = graph_of(f"%a = aten.neg(%x) : {T}", f"%y = aten.relu(%a) : {T}"), RewriteLog()
    assert apply_rules(graph, [guarded], log) == 0
    assert log.why_not("y") == ["guarded: it is Sunday"]


@pytest.mark.parametrize("operands", ["%x, %w", "%w, %x"])
def test_commutative_operands_match_in_either_order(operands) -> None:
    graph = graph_of(f"%y = aten.add.Tensor({operands}) : {T}")
    pattern = Op("aten.add.Tensor", self=Any_("x"), other=Const("w"), commutative=True)
    match = match_pattern(graph, pattern, graph.node("y"))
    assert (match["x"], match["w"]) == (graph.node("x"), graph.node("w"))
    strict = Op("aten.add.Tensor", self=Any_("x"), other=Const("w"))
    assert isinstance(match_pattern(graph, strict, graph.node("y")), str) == (operands == "%w, %x")


def test_one_name_stands_for_one_value() -> None:
    graph = graph_of(f"%a = aten.neg(%x) : {T}", f"%y = aten.mul.Tensor(%a, %x) : {T}")
    square = Op("aten.mul.Tensor", self=Any_("x"), other=Any_("x"))
    assert match_pattern(graph, square, graph.node("y")) == "two different values stand for 'x'"


def test_arguments_have_names_and_defaults() -> None:
    graph = graph_of(f"%y = aten.softmax.int(%x) {{dim=-1}} : {T}")
    match = match_pattern(graph, Op("aten.softmax.int", name="s"), graph.node("y"))
    assert match.arguments("s") == {"self": graph.node("x"), "dim": -1, "dtype": None}


def test_rules_that_undo_each_other_are_refused() -> None:
    there = Rule("there", Op("aten.relu", self=Any_("x")), lambda g, m: g.call(aten.neg.default, m["x"], before=m.root))
    back = Rule("back", Op("aten.neg", self=Any_("x")), lambda g, m: g.call(aten.relu.default, m["x"], before=m.root))
    with pytest.raises(Refused, match="the rules back, there never come to rest"):
        apply_rules(graph_of(f"%y = aten.relu(%x) : {T}"), [there, back])


def test_logs_add_up() -> None:
    graph, one, two = graph_of(f"%a = aten.neg(%x) : {T}", f"%y = aten.relu(%a) : {T}"), RewriteLog(), RewriteLog()
    apply_rules(graph, [RELU_NEG], one)
    two += one
    two += one
    assert two.matched["relu-neg"] == 2

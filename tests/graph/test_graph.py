from __future__ import annotations

import pytest
import torch

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Quantizer, Stage, TensorType, parse_graph, parse_tensor_type, print_graph, tensor_digest

aten = torch.ops.aten
WEIGHT = torch.arange(12.0).reshape(3, 4)


def two_layers() -> Graph:
    text = f"""graph @main float(%x: f32[n,4]) where n in 1..64 {{
  %w = const f32[3,4] @{tensor_digest(WEIGHT)[:16]}
  %a = aten.linear(%x, %w) : f32[n,3]
  %b = aten.linear(%x, %w) : f32[n,3]
  %y = aten.add.Tensor(%a, %b) : f32[n,3] !{{kept="yes"}}
  return %y as "y"
}}
"""
    return parse_graph(text, {tensor_digest(WEIGHT)[:16]: WEIGHT})


def test_digest_tells_dtype_shape_and_content_apart() -> None:
    x = torch.arange(4, dtype=torch.int32)
    variants = [x, x.reshape(2, 2), x.view(torch.float32), x + 1, x.to(torch.int64)]
    assert len({tensor_digest(v) for v in variants}) == len(variants)
    assert tensor_digest(x.clone()) == tensor_digest(x)
    strided = torch.arange(8, dtype=torch.int32)[::2]
    assert tensor_digest(strided) == tensor_digest(strided.clone())


def test_digest_follows_writes_in_place() -> None:
    x = torch.zeros(3)
    before = tensor_digest(x)
    x += 1
    assert tensor_digest(x) == tensor_digest(torch.ones(3)) != before


def test_new_nodes_get_type_scope_and_maker() -> None:
    graph = two_layers()
    graph.maker = "test-pass"
    graph.node("a").meta["scope"] = "layer"
    node = graph.call(aten.relu.default, graph.node("a"), before=graph.node("b"), like=graph.node("a"))
    assert graph.type_text(node) == "f32[n,3]"
    assert (node.meta["scope"], node.meta["made_by"]) == ("layer", "test-pass")


def test_a_call_that_does_not_type_names_the_operator() -> None:
    graph = two_layers()
    with pytest.raises(Refused, match=r"aten\.linear"):
        graph.call(aten.linear.default, graph.node("a"), graph.node("w"), before=graph.node("y"))


def test_a_shared_constant_is_copied_before_it_changes() -> None:
    graph = two_layers()
    mine = graph.own_constant(graph.node("w"), graph.node("a"))
    graph.set_constant(mine, 2 * WEIGHT)
    x = torch.randn(5, 4)
    assert torch.allclose(graph(x)[0], 3 * x @ WEIGHT.t())
    assert torch.equal(graph.constant(graph.node("w")), WEIGHT)
    assert graph.own_constant(mine, graph.node("a")) is mine
    assert sorted(graph.constants) == ["w", "w_1"]


def test_a_constant_of_another_shape_changes_the_type() -> None:
    graph = two_layers()
    graph.set_constant(graph.node("w"), torch.zeros(7, 4))
    graph.infer_types()
    assert graph.type_text(graph.node("y")) == "f32[n,7]"


def test_names_under_taken_names_get_a_number() -> None:
    graph = two_layers()
    names = ["w", "w", "w.inner", "w.inner.most", "block.w", "block"]
    assert [graph.add_constant(name, torch.zeros(1)).target for name in names] == [
        "w_1",
        "w_2",
        "w_inner",
        "w_inner_most",
        "block.w",
        "block_1",
    ]


def test_replace_hands_over_notes_and_spares_the_new_node() -> None:
    graph = two_layers()
    y = graph.node("y")
    new = graph.call(aten.relu.default, y, before=graph.output)
    graph.replace(y, new)
    graph.clean()
    assert graph.outputs == (new,)
    assert new.args == (y,)
    assert new.meta["notes"] == {"kept": "yes"}


def test_clean_drops_what_nothing_reads() -> None:
    graph = two_layers()
    graph.add_constant("unused", torch.zeros(3))
    graph.call(aten.relu.default, graph.node("a"), before=graph.output)
    graph.clean()
    assert sorted(graph.constants) == ["w"]
    assert "relu" not in print_graph(graph)
    assert not hasattr(graph.module, "unused")


def test_a_copy_is_edited_by_itself() -> None:
    graph = two_layers()
    twin = graph.copy()
    assert twin.digest == graph.digest
    twin.set_constant(twin.node("w"), WEIGHT + 1)
    twin.node("y").meta["notes"]["kept"] = "no"
    assert torch.equal(graph.constant(graph.node("w")), WEIGHT)
    assert graph.node("y").meta["notes"] == {"kept": "yes"}


def test_tensors_hold_all_that_the_text_names() -> None:
    graph = two_layers()
    graph.node("a").meta["notes"]["mean"] = torch.ones(3)
    text = print_graph(graph)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in graph.tensors})) == text


def test_unknown_names_are_refused() -> None:
    with pytest.raises(Refused, match="no such node"):
        two_layers().node("z")


def test_sizes_that_cpp_rules_cannot_take_are_typed() -> None:
    text = """graph @main float(%x: f32[n,4,4]) where n in 1..64 {
  %s = aten.slice.Tensor(%x) {dim=1, start=0, end=1} : f32[n,1,4]
  %y = aten.baddbmm(%s, %x, %x) : f32[n,4,4]
  return %y as "y"
}
"""
    assert print_graph(parse_graph(text, {})) == text


# ---- types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["f32[n,3,224,224]", "i64[]", "bool[batch,seq]", "u8[4]", "bf16[n]"])
def test_type_text_round_trip(text) -> None:
    assert str(parse_tensor_type(text)) == text


@pytest.mark.parametrize("text", ["f32", "f33[2]", "f32[2", "[2]", ""])
def test_wrong_types_are_refused(text) -> None:
    with pytest.raises(ValueError, match="is no tensor type"):
        parse_tensor_type(text)


def test_sizes_are_expressions_of_symbols() -> None:
    text = """graph @main float(%x: f32[batch,seq,4], %z: f32[more,seq,4]) where batch in 1..8, seq in 1..512, more in 1..8 {
  %c = aten.cat([%x, %z]) : f32[batch+more,seq,4]
  %y = aten.flatten.using_ints(%c) {start_dim=1} : f32[batch+more,4*seq]
  return %y as "y"
}
"""
    graph = parse_graph(text, {})
    assert print_graph(graph) == text
    assert graph(torch.ones(2, 5, 4), torch.ones(3, 5, 4))[0].shape == (5, 20)
    assert graph.input_types[0] == TensorType(torch.float32, ("batch", "seq", 4))


# ---- stages ---------------------------------------------------------------------------------------------------------------


def stage_text(stage: str, call: str) -> str:
    return f'graph @main {stage}(%x: f32[4]) {{\n  %y = {call}\n  return %y as "y"\n}}\n'


QUANTIZE_DYNAMIC = 'qc.quantize_dynamic(%x) {scheme="int8 tensor sym dynamic"} : (i8[4], f32[], i32[])\n  %z = py.getitem(%y, 0) : i8[4]'


@pytest.mark.parametrize(("stage", "legal"), [("float", False), ("simulated", False), ("integer", True)])
def test_integer_operators_are_legal_in_the_integer_stage(stage, legal) -> None:
    text = stage_text(stage, QUANTIZE_DYNAMIC).replace("return %y", "return %z")
    if legal:
        assert parse_graph(text, {}).stage == Stage.INTEGER
        return
    with pytest.raises(Refused, match=f"qc.quantize_dynamic is not allowed in stage {stage}"):
        parse_graph(text, {})


@pytest.mark.parametrize("stage", ["float", "simulated", "integer"])
def test_rotations_are_legal_everywhere(stage) -> None:
    parse_graph(stage_text(stage, "qc.hadamard(%x) {block=4} : f32[4]"), {})


@pytest.mark.parametrize(("stage", "legal"), [(Stage.FLOAT, False), (Stage.SIMULATED, True), (Stage.INTEGER, False)])
def test_quantizers_are_legal_while_simulated(stage, legal) -> None:
    graph = two_layers()
    quantizer = Quantizer(parse_scheme("int8 tensor sym"), torch.tensor(0.1))
    node = graph.call_quantizer(quantizer, graph.node("x"), before=graph.node("a"), name="q")
    graph.node("a").replace_input_with(graph.node("x"), node)
    graph.stage = stage
    if legal:
        graph.check()
        return
    with pytest.raises(Refused, match="a quantizer is not allowed"):
        graph.check()

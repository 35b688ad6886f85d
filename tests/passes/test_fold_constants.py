from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.fold_constants import FoldConstants

from qcompile.graph import parse_graph
from qcompile.pipeline import Context, Pipeline


def test_golden(build, run_pass, golden) -> None:
    text = """graph @main float(%x: f32[n,4]) where n in 1..64 {
  %w = const @w
  %twin = const @twin
  %v = aten.arange() {end=4} : i64[4]
  %f = aten._to_copy(%v) {dtype=dtype:float32} : f32[4]
  %s = aten.mul.Tensor(%w, %f) : f32[3,4]
  %a = aten.linear(%x, %s) : f32[n,3]
  %b = aten.linear(%x, %twin) : f32[n,3]
  %c = aten.linear(%x, %w) : f32[n,3]
  %d = aten.add.Tensor(%a, %b) : f32[n,3]
  %y = aten.add.Tensor(%d, %c) : f32[n,3]
  return %y as "y"
}
"""
    w = torch.arange(12.0).reshape(3, 4)
    ran = run_pass(build(text, w=w, twin=w.clone()), FoldConstants())
    golden("passes/fold_constants", ran.golden_text)
    assert ran.sqnr(torch.randn(3, 4)) == math.inf


def test_a_value_larger_than_its_operands_is_not_stored(build, run_pass) -> None:
    text = """graph @main float(%x: f32[n,4]) where n in 1..64 {
  %w = const @w
  %e = aten.expand(%w) {size=[100, 4]} : f32[100,4]
  %s = aten.sum.dim_IntList(%e) {dim=[0]} : f32[4]
  %y = aten.add.Tensor(%x, %s) : f32[n,4]
  return %y as "y"
}
"""
    graph = build(text, w=torch.randn(1, 4))
    small = run_pass(graph, FoldConstants(limit=64))
    assert small.changes == 0
    assert small.context.log.why_not("e") == ["fold-constants: its value is larger than its operands and 64 bytes"]
    assert run_pass(graph, FoldConstants()).operators == ["aten.add.Tensor"]


def test_random_values_and_different_arguments_stay_apart(build, run_pass) -> None:
    text = """graph @main float(%x: f32[4]) {
  %r = aten.rand() {size=[4]} : f32[4]
  %q = aten.rand() {size=[4]} : f32[4]
  %d = aten.sub.Tensor(%r, %q) : f32[4]
  %i = aten.mul.Tensor(%x, 1) : f32[4]
  %j = aten.mul.Tensor(%x, 1.0) : f32[4]
  %s = aten.add.Tensor(%i, %j) : f32[4]
  %y = aten.add.Tensor(%d, %s) : f32[4]
  return %y as "y"
}
"""
    ran = run_pass(build(text), FoldConstants())
    assert ran.changes == 0


def test_nodes_with_different_notes_stay_apart(build, run_pass) -> None:
    text = """graph @main float(%x: f32[4]) {
  %a = aten.relu(%x) : f32[4] !{scheme="int8 tensor sym"}
  %b = aten.relu(%x) : f32[4]
  %y = aten.add.Tensor(%a, %b) : f32[4]
  return %y as "y"
}
"""
    assert run_pass(build(text), FoldConstants()).changes == 0


def test_sizes_that_are_known_are_numbers(build, run_pass) -> None:
    text = """graph @main float(%x: f32[n,4,6]) where n in 1..64 {
  %four = aten.sym_size.int(%x) {dim=1} : int 4
  %size = py.mul(%four, 6) : int 24
  %y = aten.view(%x) {size=[-1, %size]} : f32[n,24]
  return %y as "y"
}
"""
    ran = run_pass(build(text), FoldConstants())
    assert ran.operators == ["aten.view"]
    assert "size=[-1, 24]" in ran.text


@given(st.lists(st.tuples(st.sampled_from(["add", "mul", "sub"]), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_random_graphs_keep_every_bit(steps) -> None:
    """Values 0 and 1 are inputs, 2 and 3 constants, equal ones; each step combines two of those before it."""
    lines, names = ["%c2 = const f32[3] @{d}", "%c3 = const f32[3] @{d}"], ["x", "z", "c2", "c3"]
    for i, (name, a, b) in enumerate(steps):
        lines.append(f"%v{i} = aten.{name}.Tensor(%{names[a % len(names)]}, %{names[b % len(names)]}) : f32[3]")
        names.append(f"v{i}")
    from qcompile.graph import tensor_digest

    constant = torch.tensor([0.3, -1.7, 2.0])
    digest = tensor_digest(constant)[:16]
    body = "\n".join(f"  {line.replace('{d}', digest)}" for line in lines)
    text = f'graph @main float(%x: f32[3], %z: f32[3]) {{\n{body}\n  return %{names[-1]} as "y"\n}}\n'
    graph = parse_graph(text, {digest: constant})
    after = graph.copy()
    Pipeline((FoldConstants(),)).run(after, Context(target=None))
    x, z = torch.randn(3), torch.randn(3)
    assert torch.equal(graph(x, z)[0], after(x, z)[0])
    calls = [(n.target, n.args) for n in after.nodes if n.op == "call_function"]
    assert len(calls) == len(set(calls)), "two equal operators are left"

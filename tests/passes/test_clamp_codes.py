from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.clamp_codes import ClampCodes

from qcompile.graph import Graph, parse_graph, tensor_digest
from qcompile.graph.text import operator_name
from qcompile.pipeline import Context

TEXT = """graph @main integer(%y: f32[n,2,4,4]) where n in 1..64 {{
  %bound = const f32[1,2,1,1] @{bound}
  %s = const f32[] @{s}
  %z = const i32[] @{z}
  %clamp = aten.clamp.Tensor(%y, {low}, %bound) : f32[n,2,4,4]
  %q = qc.quantize(%clamp, %s, %z) {{scheme="uint8 tensor affine"}} : u8[n,2,4,4]
  return %q as "q"
}}
"""


def build(bound: list[float], scale: float = 0.01, zero_point: int = 10, low: str = "none") -> Graph:
    values = {"bound": torch.tensor(bound).view(1, 2, 1, 1), "s": torch.tensor(scale), "z": torch.tensor(zero_point, dtype=torch.int32)}
    digests = {name: tensor_digest(value)[:16] for name, value in values.items()}
    return parse_graph(TEXT.format(low=low, **digests), {digests[name]: value for name, value in values.items()})


def run(graph: Graph) -> tuple[int, Context]:
    context = Context(target=ReferenceTarget())
    changes = ClampCodes().run(graph, context)
    graph.clean()
    return changes, context


def operators(graph: Graph) -> list[str]:
    return [operator_name(node.target) for node in graph.nodes if node.op == "call_function"]


@given(st.lists(st.floats(-0.5, 4), min_size=2, max_size=2), st.floats(1e-3, 0.1), st.integers(0, 255))
def test_codes_are_equal_bit_for_bit(bound: list[float], scale: float, zero_point: int) -> None:
    graph = build(bound, scale, zero_point)
    y = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2
    before = graph(y)[0]
    assert run(graph)[0] == 1
    assert "aten.clamp.Tensor" not in operators(graph)
    assert torch.equal(graph(y)[0], before)
    assert run(graph)[0] == 0


def test_the_bound_acts_on_codes() -> None:
    graph = build([1.0, 0.5])
    run(graph)
    assert operators(graph) == ["qc.quantize", "aten.minimum"]
    codes = next(value for name, value in graph.constants.items() if name.endswith("_codes"))
    assert codes.dtype == torch.uint8
    assert codes.flatten().tolist() == [110, 60]


def test_bounds_at_the_end_of_the_grid_leave_nothing() -> None:
    graph = build([2.45, 6.0])
    run(graph)
    assert operators(graph) == ["qc.quantize"]


def test_a_lower_bound_stays_and_says_why() -> None:
    graph = build([1.0, 0.5], low="%bound")
    changes, context = run(graph)
    assert changes == 0
    assert any("no constant upper bound alone" in line for line in context.log.why_not("q"))

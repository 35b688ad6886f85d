from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.recognize_rotary import RecognizeRotary

from qcompile.graph import parse_graph, print_graph
from qcompile.graph.text import operator_name
from qcompile.pipeline import Context, Pipeline

X = "f32[n,4,t,8]"


def text(body: str) -> str:
    return f"""graph @main float(%x: {X}, %cos: f32[1,t,8], %sin: f32[1,t,8]) where n in 1..64, t in 1..16 {{
  %c = aten.unsqueeze(%cos) {{dim=1}} : f32[1,1,t,8]
  %s = aten.unsqueeze(%sin) {{dim=1}} : f32[1,1,t,8]
{body}  return %y as "y"
}}
"""


HALVES = """  %low = aten.slice.Tensor(%x) {dim=3, start=0, end=4} : f32[n,4,t,4]
  %high = aten.slice.Tensor(%x) {dim=3, start=4, end=9223372036854775807} : f32[n,4,t,4]
  %neg = aten.neg(%high) : f32[n,4,t,4]
"""
PLAIN = f"""{HALVES}  %turned = aten.cat([%neg, %low]) {{dim=-1}} : {X}
  %a = aten.mul.Tensor(%x, %c) : {X}
  %b = aten.mul.Tensor(%turned, %s) : {X}
  %y = aten.add.Tensor(%a, %b) : {X}
"""
# Gemma's order of operands, and the sum turned round.
SWAPPED = PLAIN.replace("(%x, %c)", "(%c, %x)").replace("(%a, %b)", "(%b, %a)")
# The other way round turns by the opposite angle: another function.
OPPOSITE = PLAIN.replace("[%neg, %low]", "[%low, %neg]")
UNEQUAL = PLAIN.replace("end=4}", "end=3}").replace("%low = aten.slice.Tensor(%x) {dim=3, start=0, end=3} : f32[n,4,t,4]",
                                                     "%low = aten.slice.Tensor(%x) {dim=3, start=1, end=5} : f32[n,4,t,4]")  # fmt: skip


def run(body: str) -> tuple[Any, Any, list[Any]]:
    graph = parse_graph(text(body), {})
    changed = graph.copy()
    steps = Pipeline((RecognizeRotary(),)).run(changed, Context(ReferenceTarget()))
    return graph, changed, steps


@pytest.mark.parametrize("body", [PLAIN, SWAPPED])
def test_rotary_positions_become_one_operator_bit_for_bit(body: str) -> None:
    graph, changed, steps = run(body)
    names = Counter(operator_name(node.target) for node in changed.nodes if node.op == "call_function")
    assert names["qc.rotary"] == 1
    assert not names["aten.cat"]
    assert steps[0].changes > 0
    x, cos, sin = torch.randn(2, 4, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    assert torch.equal(graph(x, cos, sin)[0], changed(x, cos, sin)[0])
    assert Pipeline((RecognizeRotary(),)).run(changed, Context(ReferenceTarget()))[0].changes == 0


@pytest.mark.parametrize("body", [OPPOSITE, UNEQUAL])
def test_what_is_not_rotary_stays(body: str) -> None:
    _, changed, steps = run(body)
    assert steps[0].changes == 0
    assert "qc.rotary" not in print_graph(changed)

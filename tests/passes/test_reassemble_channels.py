from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.reassemble_channels import ReassembleChannels, _plan, _similar_pairs

from qcompile.errors import Refused
from qcompile.formats import parse_scheme, quantize_tensor
from qcompile.graph import print_graph
from qcompile.pipeline import Context, Pipeline
from qcompile.registry import find_target

TEXT = """graph @main float(%x: f32[n,16]) where n in 1..512 {
  %g = const @g
  %w = const @w
  %v = const @v
  %norm = aten.mul.Tensor(%x, %g) : f32[n,16]
  %up = aten.linear(%norm, %w) : f32[n,8]
  %gate = aten.linear(%norm, %v) : f32[n,8]
  %y = aten.mul.Tensor(%up, %gate) : f32[n,8]
  return %y as "y"
}
"""
SCHEMES = {"weight": "int4 channel=0 sym", "activation": "int4 token sym dynamic", "share": 0.25}


@pytest.fixture
def graph(build):
    """One gain of 8: its channel sets the step of every row. Channels 4 and 7 are the same, and so are their columns."""
    generator = torch.Generator().manual_seed(3)
    gain, w, v = torch.ones(16), torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)
    gain[2] = 8
    for weight in (w, v):
        weight[:, 7] = weight[:, 4]
    return build(TEXT, g=gain, w=w, v=v)


def data() -> torch.Tensor:
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)
    x[:, 7] = x[:, 4]
    return x


def run(graph, item):
    after, context = graph.copy(), Context(target=ReferenceTarget(), calibration=[(data(),)])
    (step,) = Pipeline((item,)).run(after, context)
    assert Pipeline((item,)).run(after.copy(), context)[0].changes == 0
    return after, step.changes, context


def rounded(graph, x: torch.Tensor) -> torch.Tensor:
    """Return the output with what both linears read, and their weights, rounded."""
    made = graph.copy()
    linears = [node for node in made.nodes if node.op == "call_function" and "aten.linear" in str(node.target)]
    values: dict = {}
    for node in made.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = made.constant(node)
        elif node.op == "call_function":
            args = [values.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args]
            if node in linears:
                args = [
                    quantize_tensor(a, parse_scheme(SCHEMES[s])).dequantize() for a, s in zip(args, ("activation", "weight"), strict=False)
                ]
            values[node] = node.target(*args)
    return values[made.outputs[0]]


def test_splitting_alone_keeps_the_function(graph) -> None:
    after, changes, _ = run(graph, ReassembleChannels(merge=False, **SCHEMES))
    assert changes == 1
    x = data()
    torch.testing.assert_close(after(x)[0], graph(x)[0], rtol=1e-5, atol=1e-5)
    assert after.constants["w"].shape[1] > 16


def test_merging_keeps_the_width_and_rounding_costs_less(graph, golden) -> None:
    after, changes, context = run(graph, ReassembleChannels(**SCHEMES))
    assert changes == 1
    assert after.constants["w"].shape == (8, 16)
    assert "1 channels split" in context.notes[0][1]
    text = print_graph(after, comments=False)
    golden("passes/reassemble_channels", re.sub(r" @\w+", "", f"{print_graph(graph, comments=False)}->\n{text}"))
    x = data()
    exact = graph(x)[0]
    assert float((rounded(after, x) - exact).norm()) < 0.9 * float((rounded(graph, x) - exact).norm())


def test_the_first_pair_is_the_one_of_equal_channels() -> None:
    x, w = data(), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    assert _similar_pairs(x, w)[0].tolist() == [4, 7]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1] * 8 + [2, 4]), min_size=16, max_size=16), st.booleans())
def test_plans_are_exact_where_partners_are_equal(copies: list[int], merge: bool) -> None:
    """Channels 2 i and 2 i + 1 are equal everywhere, so that merging loses nothing either."""
    generator = torch.Generator().manual_seed(7)
    x, w = (torch.randn(5, 8, generator=generator).repeat_interleave(2, 1) for _ in range(2))
    counts = torch.tensor(copies)
    plan = _plan(counts, _similar_pairs(x, w), merge=merge)
    added = sum(copies) - 16
    if plan is None:
        free = sum(a == b == 1 for a, b in zip(copies[::2], copies[1::2], strict=True))
        assert added == 0 or (merge and added > free)
        return
    assert plan.channels(x).shape[1] == 16 + (0 if merge else added)
    torch.testing.assert_close(plan.channels(x) @ plan.columns(w).T, x @ w.T)
    assert plan.split == sum(count > 1 for count in copies)


def test_nothing_is_split_where_channels_are_alike(build) -> None:
    ones = torch.ones(8, 16)
    after, changes, context = run(build(TEXT, g=torch.ones(16), w=ones, v=ones), ReassembleChannels(**SCHEMES))
    assert changes == 0
    assert context.log.why_not("norm")[0] == "reassemble-channels: no threshold lowers the error of what reads it"
    assert "index_select" not in print_graph(after)


def test_the_cpu_computes_it(graph) -> None:
    after, _, _ = run(graph, ReassembleChannels(**SCHEMES))
    x = data()
    torch.testing.assert_close(find_target("cpu").build(after)((x,))[0], after(x)[0], rtol=1e-5, atol=1e-5)


def test_a_share_out_of_range_is_refused(graph) -> None:
    with pytest.raises(Refused, match="share is above 0"):
        run(graph, ReassembleChannels(share=0.7))

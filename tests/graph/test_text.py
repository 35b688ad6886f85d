from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Quantizer, parse_graph, print_graph, tensor_digest

WEIGHT = torch.arange(12.0).reshape(3, 4)
DIGEST = tensor_digest(WEIGHT)[:16]
TEXT = f"""# after: capture, fold-batch-norm
graph @main float(%x: f32[n,4], %mask: i64[n]) where n in 1..64 {{
  %layer.weight = const f32[3,4] @{DIGEST}  # layer [capture]
  %n_1 = aten.sym_size.int(%x) {{dim=0}} : int n  # [capture]
  %linear = aten.linear(%x, %layer.weight) : f32[n,3] !{{bn_mean=@{DIGEST}, reason="a \\"quoted\\" word"}}  # layer [capture]
  %view = aten.view(%linear) {{size=[%n_1, -1, 1]}} : f32[n,3,1]
  %parts = aten.split.Tensor(%view) {{split_size=1, dim=1}} : (f32[n,1,1], f32[n,1,1], f32[n,1,1])
  %first = py.getitem(%parts, 0) : f32[n,1,1]
  %cast = aten._to_copy(%first) {{dtype=dtype:float64, device=device:cpu}} : f64[n,1,1]
  %filled = aten.masked_fill.Scalar(%cast, %mask) {{value=-inf}} : f64[n,n,1]
  return %filled as "a name", %x as "x"
}}
"""
LINES = TEXT.replace("%mask: i64", "%mask: bool").replace(
    "(%cast, %mask) {value=-inf} : f64[n,n,1]", "(%cast, %hide) {value=-inf} : f64[n,1,1]"
)
GOOD = LINES.replace("  %filled", "  %hide = aten.eq.Scalar(%first) {other=0.5} : bool[n,1,1]\n  %filled")


def test_text_round_trip() -> None:
    graph = parse_graph(GOOD, {DIGEST: WEIGHT})
    assert print_graph(graph) == GOOD
    assert graph.history == ("capture", "fold-batch-norm")
    assert graph.symbols.ranges == {"n": (1, 64)}
    assert graph.output_names == ["a name", "x"]
    note = graph.node("linear").meta["notes"]["bn_mean"]
    assert torch.equal(note, WEIGHT)


def test_comments_change_nothing_but_themselves() -> None:
    graph = parse_graph(GOOD, {DIGEST: WEIGHT})
    bare = parse_graph(print_graph(graph, comments=False), {DIGEST: WEIGHT})
    assert bare.digest == graph.digest
    assert "capture" not in print_graph(bare)


def test_a_graph_read_from_text_computes_the_same() -> None:
    graph = parse_graph(GOOD, {DIGEST: WEIGHT})
    x = torch.randn(5, 4)
    result, same = graph(x, torch.ones(5, dtype=torch.bool))
    assert torch.equal(result.flatten(), (x @ WEIGHT[0]).to(torch.float64))
    assert torch.equal(same, x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("f32[n,3] !", "f32[n,5] !"), r"the text says f32\[n,5\] where the type is f32\[n,3\]"),
        ((f"const f32[3,4] @{DIGEST}", "const f32[3,4] @0123456789abcdef"), "no constant with digest"),
        (("const f32[3,4]", "const f32[4,3]"), "the text says"),
        (("aten.linear", "aten.nonsense"), "unknown operator aten.nonsense"),
        (("aten.linear", "os.system"), "unknown operator os.system"),
        (("(%x, %layer.weight)", "(%z, %layer.weight)"), "line 5 of the graph is not understood"),
        (("dtype:float64", "word:float64"), "unknown word"),
        (("graph @main float", "graph @main wooden"), "line 2"),
        (('  return %filled as "a name", %x as "x"\n', ""), "no whole graph"),
        (("%view = ", "%linear = "), "two nodes have the name %linear"),
        (("{dim=0}", "{dim=7}"), "Dimension out of range"),
    ],
)
def test_damaged_texts_are_refused(change, reason) -> None:
    assert change[0] in GOOD
    with pytest.raises(Refused, match=reason):
        parse_graph(GOOD.replace(*change, 1), {DIGEST: WEIGHT})


def test_a_constant_of_the_wrong_content_is_refused() -> None:
    with pytest.raises(Refused, match="no constant with digest"):
        parse_graph(GOOD, {DIGEST: WEIGHT + 1})


@given(st.integers(0, len(GOOD) - 2))
def test_every_cut_is_refused(length) -> None:
    """A file that is cut short is refused in one way; only the closing brace may be missing."""
    cut = GOOD[:length]
    if cut.rstrip().endswith('as "x"'):
        return
    with pytest.raises(Refused):
        parse_graph(cut, {DIGEST: WEIGHT})


def test_quantizers_have_text() -> None:
    graph = parse_graph(GOOD.replace("float(", "simulated("), {DIGEST: WEIGHT})
    scheme = parse_scheme("uint8 tensor affine")
    quantizer = Quantizer(scheme, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32))
    node = graph.call_quantizer(quantizer, graph.node("x"), before=graph.node("linear"), name="layer.input")
    graph.node("linear").replace_input_with(graph.node("x"), node)
    graph.clean()
    text = print_graph(graph)
    assert "%layer.input = quantizer(%x, scale=@" in text
    again = parse_graph(text, {tensor_digest(t)[:16]: t for t in graph.tensors})
    assert print_graph(again) == text
    x = torch.randn(3, 4)
    assert torch.equal(graph(x, torch.ones(3, dtype=torch.bool))[0], again(x, torch.ones(3, dtype=torch.bool))[0])

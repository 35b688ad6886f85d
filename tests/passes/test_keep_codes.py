from __future__ import annotations

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.keep_codes import KeepCodes
from qcompile.passes.materialize import Materialize

from qcompile import Refused
from qcompile.formats import Quantized, parse_scheme, quantize_tensor
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline

TEXT = """graph @main float(%x: f32[n,8]) where n in 1..64 {{
  %w.weight = const f32[6,8] @{w} !{{codes=@{codes}, scale=@{scale}, stored="{scheme}"{zero}}}
  %v = const f32[6,8] @{v}
  %a = aten.linear(%x, %w.weight) : f32[n,6]
  %b = aten.linear(%x, %v) : f32[n,6]
  %c = aten.linear(%x, %w.weight) : f32[n,6]
  %d = aten.add.Tensor(%a, %b) : f32[n,6]
  %e = aten.add.Tensor(%d, %c) : f32[n,6]
  return %e as "y"
}}
"""


def build(quantized: Quantized, value: torch.Tensor | None = None) -> Graph:
    values = {"w": quantized.dequantize() if value is None else value, "v": torch.ones(6, 8), "codes": quantized.codes}
    values |= {"scale": quantized.scale} | ({} if quantized.zero_point is None else {"zero": quantized.zero_point})
    digests = {name: tensor_digest(tensor)[:16] for name, tensor in values.items()}
    zero = f", zero_point=@{digests['zero']}" if "zero" in digests else ""
    text = TEXT.format(**digests | {"zero": zero}, scheme=quantized.scheme)
    return parse_graph(text, {digests[name]: tensor for name, tensor in values.items()})


def quantized(scheme: str) -> Quantized:
    return quantize_tensor(torch.randn(6, 8), parse_scheme(scheme))


@pytest.mark.parametrize("scheme", ["int4 group=4 sym", "uint4 group=4 affine scale=f16", "int8 channel=0 sym", "ternary tensor sym"])
def test_codes_are_stored_as_they_came(scheme: str) -> None:
    weight = quantized(scheme)
    graph = build(weight)
    x = torch.randn(3, 8)
    before = graph(x)[0]
    context = Context(target=ReferenceTarget())
    Pipeline((KeepCodes(), Materialize())).run(graph, context, check=[(x,)])
    assert torch.equal(graph(x)[0], before)
    layers = [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == "qc.linear"]
    assert len(layers) == 2  # both readers
    for layer in layers:
        arguments = bound_arguments(layer)
        assert arguments["weight_scheme"] == scheme
        assert torch.equal(weight.scheme.format.unpack(graph.constant(arguments["weight"]), 8), weight.codes)
        assert torch.equal(graph.constant(arguments["weight_scale"]), weight.scale)
        assert layer.meta["notes"]["layer"] == "w"


def test_the_graph_after_it() -> None:
    graph = build(quantized("int4 group=4 sym"))
    KeepCodes().run(graph, Context(target=ReferenceTarget()))
    text = print_graph(graph)
    assert text.count("quantizer(%w.weight, scale=@") == 2
    assert "stored=" not in text
    assert "aten.linear(%x, %v) : f32[n,6]\n" in text  # a weight without codes stays as it is


def test_a_weight_that_was_changed_is_refused() -> None:
    weight = quantized("int4 group=4 sym")
    value = weight.dequantize()
    value[5, 7] *= 1 + 2**-23
    with pytest.raises(Refused, match=r"w\.weight: a pass before has changed the weight"):
        KeepCodes().run(build(weight, value), Context(target=ReferenceTarget()))


def test_a_model_without_codes_is_refused() -> None:
    graph = build(quantized("int4 group=4 sym"))
    graph.node("w.weight").meta["notes"].clear()
    with pytest.raises(Refused, match="no weight of the model has codes to keep"):
        KeepCodes().run(graph, Context(target=ReferenceTarget()))

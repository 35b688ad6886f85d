"""Attention and products of two computed values through assign-bits, insert-quantizers, materialize and fuse-epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.assign_bits import AssignBits
from qcompile.passes.fuse_epilogue import FuseEpilogue
from qcompile.passes.insert_quantizers import InsertQuantizers
from qcompile.passes.materialize import Materialize
from qcompile.passes.quantize_cache import QuantizeCache
from qcompile.passes.quantize_weights import QuantizeWeights

from qcompile import Refused
from qcompile.calibration import from_iterable
from qcompile.generation import decoder_entries
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.pipeline import Context, Pipeline, sqnr_db
from qcompile.recipe import Recipe

ATTENTION = """graph @main float(%x: f32[n,t,8], %seen: bool[n,t]) where n in 1..8, t in 1..64 {
  %wq = const @wq
  %wk = const @wk
  %wv = const @wv
  %wo = const @wo
  %q = aten.linear(%x, %wq) : f32[n,t,8]
  %k = aten.linear(%x, %wk) : f32[n,t,4]
  %v = aten.linear(%x, %wv) : f32[n,t,4]
  %a = qc.attention(%q, %k, %v, %seen) {heads=4, kv_heads=2, scale=0.5, causal=false} : f32[n,t,8]
  %y = aten.linear(%a, %wo) : f32[n,t,8]
  return %y as "y"
}
"""
PRODUCT = """graph @main float(%x: f32[n,3,6], %z: f32[n,6,5]) where n in 1..8 {
  %w = const @w
  %p = aten.OPERATOR(%x, %z) : f32[n,3,5]
  %y = aten.linear(%p, %w) : f32[n,3,4]
  return %y as "y"
}
"""
INT8 = "weight=float; activation=int8 tensor sym"
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = [(torch.randn(2, 9, 8, generator=GENERATOR), torch.rand(2, 9, generator=GENERATOR) > 0.2) for _ in range(4)]
MATRICES = [(torch.randn(2, 3, 6, generator=GENERATOR), torch.randn(2, 6, 5, generator=GENERATOR)) for _ in range(4)]
STEPS = (AssignBits(), InsertQuantizers(), QuantizeWeights(), Materialize(), FuseEpilogue())


def attention(build: Any, text: str = ATTENTION) -> Graph:
    generator = torch.Generator().manual_seed(1)
    sizes = {"wq": (8, 8), "wk": (4, 8), "wv": (4, 8), "wo": (8, 8)}
    return build(text, **{name: torch.randn(size, generator=generator) for name, size in sizes.items()})


def run(graph: Graph, data: Any, steps: Any = STEPS, **schemes: Any) -> Graph:
    after = graph.copy()
    context = Context(ReferenceTarget(), Recipe(name="test", pipeline="assign-bits", schemes=schemes), from_iterable(data))
    Pipeline(steps).run(after, context)
    text = print_graph(after)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in after.tensors})) == text
    return after


def test_attention_golden(build: Any, golden: Callable[[str, str], None]) -> None:
    simulated = run(attention(build), TOKENS, STEPS[:2], linear="W8A8", attention=INT8)
    integer = run(attention(build), TOKENS, linear="W8A8", attention=INT8)
    golden("quantize_attention", print_graph(simulated) + "\n" + print_graph(integer))


@pytest.mark.parametrize("operator", ["matmul", "bmm"])
def test_a_product_of_two_computed_values_is_of_codes(build: Any, operator: str) -> None:
    graph = build(PRODUCT.replace("OPERATOR", operator), w=torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
    affine = "weight=float; activation=uint8 tensor affine"
    after = run(graph, MATRICES, linear="W8A8", matmul=affine)
    text = print_graph(after)
    assert "qc.matmul(" in text
    assert f"aten.{operator}" not in text
    assert 'out_scheme="uint8 tensor affine"' in text  # the linear's codes, written by the product
    assert sqnr_db(graph(*MATRICES[0])[0], after(*MATRICES[0])[0]) > 30


def test_attention_in_integers_is_near_the_float_one(build: Any) -> None:
    graph = attention(build)
    kept, after = (run(graph, TOKENS, linear="float", attention=scheme) for scheme in ("float", INT8))
    assert torch.equal(kept(*TOKENS[0])[0], graph(*TOKENS[0])[0])
    assert "qc.attention_codes(" in print_graph(after)
    assert 30 < sqnr_db(graph(*TOKENS[0])[0], after(*TOKENS[0])[0]) < 60


def test_products_stay_float_unless_the_recipe_says_otherwise(build: Any) -> None:
    for schemes in ({"linear": "W8A8"}, {"linear": "W8A8", "layers": {"*": "W8A8"}}, {"attention": INT8, "layers": {"a": "float"}}):
        assert " qc.attention(" in print_graph(run(attention(build), TOKENS, **schemes))
    by_pattern = run(attention(build), TOKENS, layers={"a": INT8})
    assert "qc.attention_codes(" in print_graph(by_pattern)


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        ({"attention": "W8A8"}, "has no weight"),
        ({"attention": "weight=float; activation=uint8 tensor affine"}, "reads codes 'int8 tensor sym'"),
        ({"attention": "weight=float; activation=int8 token sym dynamic"}, "one scale each"),
        ({"matmul": "weight=int8 tensor sym; activation=int8 tensor sym", "attention": "float"}, "has no weight"),
    ],
)
def test_schemes_that_no_product_has_are_refused(build: Any, schemes: dict[str, str], reason: str) -> None:
    graph = build(PRODUCT.replace("OPERATOR", "matmul"), w=torch.eye(5)[:4]) if "matmul" in schemes else attention(build)
    with pytest.raises(Refused, match=reason):
        run(graph, TOKENS, **schemes)


def test_keys_on_grids_of_tokens_stay_float(build: Any) -> None:
    """What quantize-cache puts on keys and values is no static grid; attention reads them dequantized."""
    graph = attention(build, ATTENTION.replace("causal=false", "causal=true"))
    after = run(graph, TOKENS, (QuantizeCache(), Materialize()))
    assert " qc.attention(" in print_graph(after)


DECODER = """graph @main float(%tokens: i64[batch,seq]) where batch in 1..8, seq in 1..32 {
  %table = const @table
  %wk = const @wk
  %e = aten.embedding(%table, %tokens) : f32[batch,seq,16]
  %k = aten.linear(%e, %wk) : f32[batch,seq,8]
  %a = qc.attention(%e, %k, %k) {heads=4, kv_heads=2, scale=0.5, causal=true} : f32[batch,seq,16]
  %y = aten.linear(%a, %table) : f32[batch,seq,11]
  return %y as "y"
}
"""


def test_a_decoder_keeps_the_codes_in_its_caches(build: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    graph = build(DECODER, table=torch.randn(11, 16, generator=generator), wk=torch.randn(8, 16, generator=generator))
    tokens = torch.randint(0, 11, (2, 12), generator=generator)
    made = run(graph, [(tokens,)], attention=INT8)
    whole = made(tokens)[0]
    entries = decoder_entries(made, 32)
    assert [str(cache.type) for cache in entries.caches] == ["i8[batch,capacity,8]"] * 2
    caches = [torch.zeros(2, 12, 8, dtype=torch.int8) for _ in entries.caches]
    past = torch.tensor([5, 3])
    logits, *caches = entries.prefill(tokens[:, :5], torch.zeros_like(past), past, *caches)
    for _ in range(6):
        for row in range(2):
            torch.testing.assert_close(logits[row], whole[row, int(past[row]) - 1], rtol=1e-5, atol=1e-5)
        logits, *caches = entries.decode(tokens.gather(1, past.unsqueeze(1)), past, *caches)
        past = past + 1

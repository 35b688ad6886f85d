from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.materialize import Materialize
from qcompile.passes.quantize_cache import QuantizeCache

from qcompile import Refused
from qcompile.calibration import from_iterable
from qcompile.generation import decoder_entries
from qcompile.graph import parse_graph, print_graph, tensor_digest
from qcompile.pipeline import Context, Pipeline, parse_pipeline, sqnr_db
from qcompile.registry import find_pass
from qcompile.statistics.row_weights import FloatModel
from qcompile.statistics.sweep import FloatInterpreter

TEXT = """graph @main float(%tokens: i64[batch,seq]) where batch in 1..8, seq in 1..32 {
  %table = const @table
  %wq = const @wq
  %wk = const @wk
  %wv = const @wv
  %e = aten.embedding(%table, %tokens) : f32[batch,seq,16]
  %q = aten.linear(%e, %wq) : f32[batch,seq,16]
  %k = aten.linear(%e, %wk) : f32[batch,seq,8]
  %v = aten.linear(%e, %wv) : f32[batch,seq,8]
  %a = qc.attention(%q, %k, %v) {heads=4, kv_heads=2, scale=0.5, causal=true} : f32[batch,seq,16]
  %y = aten.linear(%a, %table) : f32[batch,seq,11]
  return %y as "y"
}
"""


@pytest.fixture
def graph(build: Callable[..., Any]) -> Any:
    sizes = {"table": (11, 16), "wq": (16, 16), "wk": (8, 16), "wv": (8, 16)}
    return build(TEXT, **{name: torch.randn(size) for name, size in sizes.items()})


@pytest.mark.parametrize(
    ("options", "key", "bytes_per_token"),
    [
        ({}, "uint8 group=4 affine dynamic", 2 * (8 + 2 * 4 + 2 * 4)),
        ({"key": 4, "value": 2, "symmetric": True}, "int4 group=4 sym dynamic", 4 + 2 + 2 * 2 * 4),
        ({"key": 8, "value": 3, "per": "token"}, "uint8 token affine dynamic", 8 + 3 + 2 * (4 + 4)),
    ],
)
def test_entries_keep_codes_and_compute_what_the_whole_text_does(
    graph: Any, options: dict[str, Any], key: str, bytes_per_token: int
) -> None:
    made, context = graph.copy(), Context(target=ReferenceTarget())
    steps = Pipeline((QuantizeCache(**options), Materialize())).run(made, context)
    assert steps[0].changes == 2
    assert f'scheme="{key}"' in print_graph(made)
    tokens = torch.randint(0, 11, (2, 12))
    whole = made(tokens)[0]
    assert not torch.equal(whole, graph(tokens)[0])
    entries = decoder_entries(made, 32)
    assert entries.bytes_per_token == bytes_per_token
    caches = [torch.zeros(2, 12, *cache.type.shape[2:], dtype=cache.type.dtype) for cache in entries.caches]
    past = torch.tensor([5, 3])
    logits, *caches = entries.prefill(tokens[:, :5], torch.zeros_like(past), past, *caches)
    for _ in range(6):
        for row in range(2):
            torch.testing.assert_close(logits[row], whole[row, int(past[row]) - 1], rtol=1e-5, atol=1e-5)
        logits, *caches = entries.decode(tokens.gather(1, past.unsqueeze(1)), past, *caches)
        past = past + 1


TURNED = (
    TEXT.replace("  %q =", """  %angle = const @angle
  %t = aten.sym_size.int(%tokens) {dim=1} : int seq
  %rows = aten.slice.Tensor(%angle) {dim=0, start=0, end=%t} : f32[seq,4]
  %angles = aten.unsqueeze(%rows) {dim=0} : f32[1,seq,4]
  %cos = aten.cos(%angles) : f32[1,seq,4]
  %sin = aten.sin(%angles) : f32[1,seq,4]
  %q =""")
    .replace("  %a = qc.attention(%q, %k,", """  %tq = qc.rotary(%q, %cos, %sin) {heads=4} : f32[batch,seq,16]
  %tk = qc.rotary(%k, %cos, %sin) {heads=2} : f32[batch,seq,8]
  %a = qc.attention(%tq, %tk,""")
)  # fmt: skip


@pytest.mark.parametrize("rotary", ["before", "after"])
def test_keys_before_or_after_rotary_positions(build: Callable[..., Any], rotary: str) -> None:
    sizes = {"table": (11, 16), "wq": (16, 16), "wk": (8, 16), "wv": (8, 16), "angle": (32, 4)}
    graph = build(TURNED, **{name: torch.randn(size) for name, size in sizes.items()})
    Pipeline((QuantizeCache(key=4, rotary=rotary), Materialize())).run(graph, Context(target=ReferenceTarget()))
    names = {node.name: node for node in graph.nodes}
    quantized = names["quantize_dynamic"].args[0]
    assert quantized is (names["k"] if rotary == "before" else names["tk"])
    tokens = torch.randint(0, 11, (2, 12))
    whole, entries = graph(tokens)[0], decoder_entries(graph, 32)
    caches = [torch.zeros(2, 12, *cache.type.shape[2:], dtype=cache.type.dtype) for cache in entries.caches]
    past = torch.tensor([5, 3])
    logits, *caches = entries.prefill(tokens[:, :5], torch.zeros_like(past), past, *caches)
    for _ in range(6):
        for row in range(2):
            torch.testing.assert_close(logits[row], whole[row, int(past[row]) - 1], rtol=1e-5, atol=1e-5)
        logits, *caches = entries.decode(tokens.gather(1, past.unsqueeze(1)), past, *caches)
        past = past + 1


def test_keys_without_rotary_positions_are_refused(graph: Any) -> None:
    with pytest.raises(Refused, match="no keys have rotary positions"):
        Pipeline((QuantizeCache(rotary="before"),)).run(graph, Context(target=ReferenceTarget()))


def test_it_stands_beside_quantizers_of_layers(graph: Any) -> None:
    """Four-bit weights, eight-bit activations and a four-bit cache in one graph."""
    text = "canonicalize, recognize-attention, assign-bits{scheme=w4a8-g32-dynamic}, insert-quantizers, quantize-cache{key=4, value=4}"
    made, context = graph.copy(), Context(target=ReferenceTarget())
    pipeline = parse_pipeline(f"{text}, quantize-weights, materialize", find_pass)
    pipeline.check_order()
    pipeline.run(made, context)
    printed = print_graph(made)
    assert printed.count('scheme="uint4 group=4 affine dynamic"') >= 2
    assert printed.count("qc.linear(") == 4
    assert decoder_entries(made, 32).bytes_per_token == 2 * (4 + 2 * 4 + 2 * 4)
    with pytest.raises(Refused, match="insert-quantizers takes a graph of stage float, here it is simulated"):
        parse_pipeline("canonicalize, recognize-attention, assign-bits, quantize-cache, insert-quantizers", find_pass).check_order()


def test_attention_that_sees_ahead_has_no_cache(build: Callable[..., Any]) -> None:
    sizes = {"table": (11, 16), "wq": (16, 16), "wk": (8, 16), "wv": (8, 16)}
    graph = build(TEXT.replace("causal=true", "causal=false"), **{name: torch.randn(size) for name, size in sizes.items()})
    assert Pipeline((QuantizeCache(),)).run(graph, Context(target=ReferenceTarget()))[0].changes == 0


@pytest.mark.parametrize("options", [{"key": 1}, {"value": 9}, {"per": "channel"}, {"rotary": "during"}])
def test_options_out_of_range_are_refused(graph: Any, options: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        Pipeline((QuantizeCache(**options),)).run(graph, Context(target=ReferenceTarget()))


def in_steps(graph: Any, decoder: Any, tokens: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """Return the logits after each call of the entries, which take so many tokens of every row."""
    caches = [torch.zeros(len(tokens), tokens.shape[1], *cache.type.shape[2:], dtype=cache.type.dtype) for cache in decoder.caches]
    past, found = torch.zeros(len(tokens), dtype=torch.int64), []
    for part in tokens.split(counts, 1):
        count = torch.full_like(past, part.shape[1])
        logits, *caches = decoder.prefill(part, past, count, *caches)
        alone = decoder.decode(part, past, *caches)[0] if part.shape[1] == 1 else logits
        assert torch.equal(logits, alone)
        past = past + count
        found.append(logits)
    return found


@pytest.mark.parametrize("options", [{"key": 4, "value": 3}, {"key": 2, "value": 2, "per": "token"}, {"key": 2, "rotary": "before"}])
def test_past_only_leaves_the_step_at_hand_in_float(build: Callable[..., Any], options: dict[str, Any]) -> None:
    """Token by token it is the graph over whole texts; all tokens in one call see no code at all."""
    sizes = {"table": (11, 16), "wq": (16, 16), "wk": (8, 16), "wv": (8, 16), "angle": (32, 4)}
    graph = build(TURNED, **{name: torch.randn(size) for name, size in sizes.items()})
    everything, made = graph.copy(), graph.copy()
    for each, past_only in ((everything, False), (made, True)):
        steps = Pipeline((QuantizeCache(**options, past_only=past_only), Materialize())).run(each, Context(target=ReferenceTarget()))
        assert steps[0].changes == 2
    tokens = torch.randint(0, 11, (2, 12))
    exact, whole, entries = graph(tokens)[0], made(tokens)[0], decoder_entries(made, 32)
    assert entries.past_only
    assert not decoder_entries(everything, 32).past_only
    assert entries.bytes_per_token == decoder_entries(everything, 32).bytes_per_token
    torch.testing.assert_close(whole[:, 0], exact[:, 0], rtol=1e-5, atol=1e-5)  # the first token has no past
    assert not torch.allclose(whole[:, 1:], exact[:, 1:], rtol=1e-2, atol=1e-2)
    for place, logits in enumerate(in_steps(made, entries, tokens, [1] * 12)):
        torch.testing.assert_close(logits, whole[:, place], rtol=1e-5, atol=1e-5)
    (together,) = in_steps(made, entries, tokens, [12])
    torch.testing.assert_close(together, exact[:, -1], rtol=1e-5, atol=1e-5)
    first, second = in_steps(made, entries, tokens, [7, 5])
    torch.testing.assert_close(first, exact[:, 6], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(second, exact[:, -1], rtol=1e-3, atol=1e-3)


def test_past_only_changes_nothing_a_second_time(graph: Any) -> None:
    again = Pipeline((QuantizeCache(key=4, past_only=True),) * 2).run(graph, Context(target=ReferenceTarget()))
    assert [step.changes for step in again] == [2, 0]
    text = print_graph(graph)
    assert "own_k=%k, own_v=%v" in text
    constants = {tensor_digest(t)[:16]: t for t in graph.tensors}
    assert print_graph(parse_graph(text, constants)) == text


# ---- codes of coupled channels --------------------------------------------------------------------------------------------


def with_data() -> Context:
    """Return a context with calibration data: more tokens than a table has vectors."""
    batches = [(torch.randint(0, 11, (4, 32)),) for _ in range(4)]
    return Context(target=ReferenceTarget(), calibration=from_iterable(batches))


@pytest.mark.parametrize(
    ("options", "bytes_per_token"),
    [({"coupled": 2}, 4 + 4), ({"coupled": 4, "past_only": True, "fisher": True}, 2 + 2), ({"coupled": 4, "rotary": "before"}, 2 + 2)],
)
def test_coupled_channels_are_one_byte(build: Callable[..., Any], options: dict[str, Any], bytes_per_token: int) -> None:
    """Eleven tokens have eleven values and fewer keys than vectors: where keys are not turned, tables hold every one of them."""
    sizes = {"table": (11, 16), "wq": (16, 16), "wk": (8, 16), "wv": (8, 16), "angle": (32, 4)}
    graph = build(TURNED, **{name: torch.randn(size) for name, size in sizes.items()})
    made, context = graph.copy(), with_data()
    steps = Pipeline((QuantizeCache(**options), Materialize())).run(made, context)
    assert steps[0].changes == 2
    assert sum("tables of vectors, 8192 bytes" in note for _, note in context.notes) == 2
    tokens = torch.randint(0, 11, (2, 12))
    whole, exact = made(tokens)[0], graph(tokens)[0]
    if options.get("rotary") == "before":
        torch.testing.assert_close(whole, exact, rtol=1e-4, atol=1e-4)
    else:
        assert 12 < sqnr_db(exact, whole) < 80
    entries = decoder_entries(made, 32)
    assert entries.bytes_per_token == bytes_per_token
    for place, logits in enumerate(in_steps(made, entries, tokens, [1] * 12)):
        torch.testing.assert_close(logits, whole[:, place], rtol=1e-4, atol=1e-4)
    text = print_graph(made)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in made.tensors})) == text
    again = Pipeline((QuantizeCache(**options),)).run(graph, context)[0].changes, Pipeline((QuantizeCache(**options),)).run(graph, context)
    assert (again[0], again[1][0].changes) == (2, 0)


def test_codes_of_vectors_are_no_part_of_the_float_model(graph: Any) -> None:
    made, tokens = graph.copy(), torch.randint(0, 11, (2, 12))
    Pipeline((QuantizeCache(coupled=4, rows=5),)).run(made, with_data())
    assert not torch.equal(made(tokens)[0], graph(tokens)[0])
    for interpreter in (FloatInterpreter, FloatModel):
        torch.testing.assert_close(interpreter(made.module).run(tokens)[0], graph(tokens)[0])


def test_tables_learn_from_tokens_that_count(build: Callable[..., Any]) -> None:
    """Weights by the gradient change the tables of keys, which have more values than vectors; equal data give equal tables."""
    sizes = {"table": (11, 16), "wq": (16, 16), "wk": (8, 16), "wv": (8, 16), "angle": (32, 4)}
    graph, tables = build(TURNED, **{name: torch.randn(size) for name, size in sizes.items()}), []
    for fisher in (False, False, True):
        made = graph.copy()
        torch.manual_seed(1)
        Pipeline((QuantizeCache(coupled=4, fisher=fisher, rows=400),)).run(made, with_data())
        (table,) = (value for name, value in made.constants.items() if name == "tk.vectors")
        tables.append(table.flatten(1).sort(1).values)
    assert torch.equal(tables[0], tables[1])
    assert not torch.allclose(tables[0], tables[2])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"coupled": 3}, "2, 4 or 8 channels of a cache share a code, not 3"),
        ({"coupled": 4, "key": 4}, "codes of coupled channels have neither bits nor scales to choose"),
        ({"coupled": 4, "per": "token"}, "codes of coupled channels have neither bits nor scales to choose"),
        ({"coupled": 8}, "runs of 8 channels do not divide heads of 4"),
        ({"fisher": True}, "fisher weighs what tables of coupled channels are learned from"),
        ({"coupled": 4, "rows": 0}, "tables are learned from at least one token, not 0"),
    ],
)
def test_options_of_coupled_channels_are_refused_in_one_line(graph: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason) as caught:
        Pipeline((QuantizeCache(**options),)).run(graph, with_data())
    assert "\n" not in str(caught.value)


def test_coupled_channels_need_data(graph: Any) -> None:
    with pytest.raises(Refused, match="quantize-cache needs calibration data"):
        Pipeline((QuantizeCache(coupled=4),)).run(graph, Context(target=ReferenceTarget()))

"""The entries of a decoder against its graph over whole texts, and against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qcompile.passes.rotate import Rotate

import qcompile
from qcompile import Graph, Refused
from qcompile.generation import Decoder, decoder_entries
from qcompile.graph import parse_graph, print_graph
from qcompile.graph.graph import tensor_digest
from qcompile.graph.text import DIGEST_LENGTH, operator_name
from qcompile.pipeline import Context, Pipeline
from qcompile.registry import find_target

from .conftest import KINDS

TOLERANCE = 1e-4  # of logits near 1: sums in another order


def float_graph(folder: Any) -> Graph:
    return qcompile.compile(str(folder), recipe="float", target="reference").graph


def continue_texts(run: Callable[..., Any], decoder: Decoder, tokens: torch.Tensor, lengths: list[int], steps: int) -> list[torch.Tensor]:
    """Prefill rows of different lengths, then decode; return the logits of every step."""
    caches = [torch.zeros(len(tokens), 40, *c.type.shape[2:], dtype=c.type.dtype) for c in decoder.caches]  # type: ignore[arg-type]
    past = torch.tensor(lengths)
    found, *caches = run("prefill", tokens[:, : max(lengths)].contiguous(), torch.zeros_like(past), past, *caches)
    logits = [found]
    for _ in range(steps):
        found, *caches = run("decode", tokens.gather(1, past.unsqueeze(1)), past, *caches)
        logits.append(found)
        past = past + 1
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_entries_continue_texts_as_transformers_does(decoder: Callable[..., Any], kind: str) -> None:
    """Grouped and shared keys, windows, rotary and learned positions: all found by what they do."""
    folder, model = decoder(kind)
    entries = decoder_entries(float_graph(folder), 64)
    tokens = torch.randint(0, 101, (2, 30))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    lengths = [13, 6]
    found = continue_texts(lambda entry, *inputs: getattr(entries, entry)(*inputs), entries, tokens, lengths, 9)
    for step, logits in enumerate(found):
        for row, length in enumerate(lengths):
            assert float((logits[row] - expected[row, length - 1 + step]).abs().max()) < TOLERANCE, (step, row)


@pytest.mark.parametrize(("kind", "entry"), [("mistral", "prefill"), ("gpt2", "decode")])
def test_the_cpu_computes_the_entries_and_updates_caches_in_place(decoder: Callable[..., Any], kind: str, entry: str) -> None:
    entries = decoder_entries(float_graph(decoder(kind)[0]), 64)
    built, places = find_target("cpu").build(getattr(entries, entry)), set()
    tokens = torch.randint(0, 101, (3, 30))

    def run(name: str, *inputs: torch.Tensor) -> Any:
        if name != entry:
            return getattr(entries, name)(*inputs)
        outputs = built(inputs)
        assert [o.data_ptr() for o in outputs[1:]] == [i.data_ptr() for i in inputs[-len(entries.caches) :]], "a cache was copied"
        places.add(outputs[1].data_ptr())
        return outputs

    found = continue_texts(run, entries, tokens, [1, 12, 7], 6)
    expected = continue_texts(lambda name, *inputs: getattr(entries, name)(*inputs), entries, tokens, [1, 12, 7], 6)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < TOLERANCE
    assert len(places) == 1


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt_neox", "gemma", "qwen3", "gpt2"])
def test_rotary_positions_are_one_operator(decoder: Callable[..., Any], kind: str) -> None:
    """Two layers, queries and keys; whole heads and parts of heads; GPT-2 has learned positions."""
    names = Counter(operator_name(node.target) for node in float_graph(decoder(kind)[0]).nodes if node.op == "call_function")
    assert names["qc.rotary"] == (0 if kind == "gpt2" else 4)
    assert not names["aten.neg"]


@pytest.mark.parametrize(("kind", "changes"), [("llama", 7), ("qwen3", 7), ("phi", 7), ("gemma", 7), ("gpt2", 5)])
def test_rotated_decoders_keep_their_logits_and_their_entries(decoder: Callable[..., Any], kind: str, changes: int) -> None:
    """The stream, two of each: values (gpt2 has them in one projection with queries and keys), down projections, keys."""
    graph = float_graph(decoder(kind)[0])
    tokens = torch.randint(0, 101, (2, 20))
    expected = graph(tokens)[0]
    (step,) = Pipeline((Rotate(keys=True),)).run(graph, Context(target=find_target("reference")))
    assert step.changes == changes
    assert float((graph(tokens)[0] - expected).norm() / expected.norm()) < 1e-5
    lengths = [9, 4]
    entries = decoder_entries(graph, 64)
    assert print_graph(entries.decode).count("qc.hadamard(") == 2 + 2 * 2
    found = continue_texts(lambda entry, *inputs: getattr(entries, entry)(*inputs), entries, tokens, lengths, 3)
    for step_number, logits in enumerate(found):
        for row, length in enumerate(lengths):
            assert float((logits[row] - expected[row, length - 1 + step_number]).abs().max()) < TOLERANCE


def test_a_rotated_decoder_in_few_bits_runs_on_the_cpu(decoder: Callable[..., Any]) -> None:
    text = "canonicalize, fold-constants, recognize-attention, rotate{keys=true}, assign-bits{scheme=w4a8-g32-dynamic}, insert-quantizers"
    pipeline = f"{text}, quantize-cache{{key=4, value=4}}, quantize-weights, materialize, fuse-epilogue"
    artifact = qcompile.compile(str(decoder("llama")[0]), recipe=pipeline, target="cpu")
    tokens = torch.randint(0, 101, (2, 20))
    expected = artifact.graph(tokens)[0]
    assert float((artifact.executable([tokens])[0] - expected).norm() / expected.norm()) < 0.02  # codes on the border of two


def test_entries_have_a_text_form(decoder: Callable[..., Any]) -> None:
    entries = decoder_entries(float_graph(decoder("llama")[0]), 64)
    for graph in (entries.prefill, entries.decode):
        text = print_graph(graph)
        constants = {tensor_digest(t)[:DIGEST_LENGTH]: t for t in graph.tensors}
        assert print_graph(parse_graph(text, constants)) == text
    assert entries.bytes_per_token == 2 * 2 * 16 * 4  # two layers, keys and values, two heads of eight float32


def test_only_the_last_tokens_go_through_the_head(decoder: Callable[..., Any]) -> None:
    text = print_graph(decoder_entries(float_graph(decoder("llama")[0]), 64).prefill)
    assert "f32[batch,1,101]" in text
    assert "f32[batch,seq,101]" not in text


TABLE = torch.arange(101 * 8, dtype=torch.float32).view(101, 8)
DIGEST = tensor_digest(TABLE)[:DIGEST_LENGTH]


def parsed(body: str, inputs: str = "%tokens: i64[batch,seq]") -> Graph:
    """Return a graph of these lines after %t, a table f32[101,8], and %e, the rows of it for %tokens."""
    lines = [f"%t = const f32[101,8] @{DIGEST}", "%e = aten.embedding(%t, %tokens) : f32[batch,seq,8]", *body.splitlines()]
    head = f"graph @main float({inputs}) where batch in 1..8, seq in 1..64 {{"
    return parse_graph("\n".join([head, *(f"  {line.strip()}" for line in lines), "}", ""]), {DIGEST: TABLE})


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ('return %e as "y"', "%tokens: i64[batch,seq], %mask: i64[batch,seq]", "a decoder takes tokens"),
        (
            """%a = qc.attention(%e, %e, %e) {heads=2, kv_heads=2, scale=1.0, causal=false} : f32[batch,seq,8]
            return %a as "y" """,
            "%tokens: i64[batch,seq]",
            "no cache can stand for that",
        ),
        (
            """%m = aten.mean.dim(%e) {dim=[1]} : f32[batch,8]
            return %m as "y" """,
            "%tokens: i64[batch,seq]",
            "no logits for each token",
        ),
    ],
)
def test_what_is_no_decoder_is_refused(body: str, inputs: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        decoder_entries(parsed(body, inputs), 64)


def test_positions_that_depend_on_the_length_are_refused() -> None:
    """Positions counted from the end of the text change with every token: no table can stand for them."""
    body = """%n = aten.sym_size.int(%tokens) {dim=1} : int seq
    %i = aten.arange() {end=%n, dtype=dtype:int64} : i64[seq]
    %flipped = aten.flip(%i) {dims=[0]} : i64[seq]
    %p = aten.embedding(%t, %flipped) : f32[seq,8]
    %s = aten.add.Tensor(%e, %p) : f32[batch,seq,8]
    return %s as "y" """
    with pytest.raises(Refused, match="depends on the length of the text"):
        decoder_entries(parsed(body), 64)

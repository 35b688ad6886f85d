"""Decoders whose caches are small: entries on the CPU against their meaning, and against the graph over whole texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import Artifact
from qcompile.generation import Decoder, Generator
from qcompile.generation.artifact_model import ArtifactModel
from qcompile.pipeline import sqnr_db

FOUND = "canonicalize, fold-constants, fold-batch-norm, recognize-attention, recognize-rotary"
ALIKE_DB = 30.0  # codes on the border of two may fall on either side, and change what follows a little; a wrong row leaves less than 10


def made(folder: Path, cache: str, **options: Any) -> Artifact:
    return qcompile.compile(str(folder), recipe=f"{FOUND}, {cache}, materialize", target="cpu", **options)


def in_calls(run: Callable[..., Any], decoder: Decoder, tokens: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """Return the logits after each call of ``prefill``, which takes so many tokens."""
    caches = [torch.zeros(len(tokens), tokens.shape[1] + 3, *c.type.shape[2:], dtype=c.type.dtype) for c in decoder.caches]  # type: ignore[arg-type]
    past, found = torch.zeros(len(tokens), dtype=torch.int64), []
    for part, count in zip(tokens.split(counts, 1), counts, strict=True):
        logits, *caches = run(part.contiguous(), past, torch.full_like(past, count), *caches)
        found.append(logits)
        past = past + count
    return found


def check_calls(artifact: Artifact, tokens: torch.Tensor, counts: list[int]) -> ArtifactModel:
    model = ArtifactModel(artifact, tokens.shape[1] + 3)
    decoder = model.decoder
    expected = in_calls(decoder.prefill, decoder, tokens, counts)
    found = in_calls(lambda *inputs: model.executable(inputs), decoder, tokens, counts)
    for a, b in zip(expected, found, strict=True):
        assert sqnr_db(a, b) > ALIKE_DB
    whole = artifact.executable([tokens])[0]
    assert sqnr_db(artifact.graph(tokens)[0], whole) > ALIKE_DB
    if counts[-1] == 1 and not decoder.past_only:
        assert sqnr_db(whole[:, -1], found[-1]) > ALIKE_DB
    return model


def test_past_only_in_heads_that_no_kernel_reads_as_codes(decoder: Callable[..., Any]) -> None:
    """Heads of eight channels, and a window."""
    check_calls(
        made(decoder("mistral")[0], "quantize-cache{key=4, value=4, past_only=true}"), torch.randint(0, 101, (2, 20)), [9, 1, 2, 7, 1]
    )


@pytest.mark.parametrize("options", ["key=4, value=2, rotary=before", "key=3, value=3, per=token"])
def test_past_only(decoder: Callable[..., Any], options: str) -> None:
    """Caches are read as they lie, beside the tokens of the call in float; token by token it is the graph over whole texts."""
    artifact = made(decoder("wide")[0], f"quantize-cache{{{options}, past_only=true}}")
    tokens = torch.randint(0, 101, (2, 40))
    model = check_calls(artifact, tokens, [30, 1, 2, 6, 1])
    assert not [note for note in model.executable.built.fallbacks if "attention" in note.operator]
    alone = in_calls(lambda *inputs: model.executable(inputs), model.decoder, tokens[:, :6], [1] * 6)
    whole = artifact.graph(tokens[:, :6])[0]
    assert all(sqnr_db(whole[:, place], logits) > ALIKE_DB for place, logits in enumerate(alone))


def test_past_only_in_wikilm(data_folder: Path) -> None:
    artifact = made(data_folder / "wikilm-5m", "quantize-cache{key=4, value=4, past_only=true}")
    generator, prompts = Generator(artifact), ["The species of", "In 1999 the"]
    together = generator.generate(prompts, max_tokens=8, ignore_end=True)
    assert [each.tokens for each in together] == [generator.generate(p, max_tokens=8, ignore_end=True)[0].tokens for p in prompts]
    tokens = torch.tensor([generator.tokens_of("The species of the genus are found in the forests of")])
    model = generator.model
    expected = in_calls(model.decoder.prefill, model.decoder, tokens, [tokens.shape[1] - 1, 1])
    found = in_calls(lambda *inputs: model.executable(inputs), model.decoder, tokens, [tokens.shape[1] - 1, 1])
    assert all(sqnr_db(a, b) > ALIKE_DB for a, b in zip(expected, found, strict=True))


def test_coupled_channels(decoder: Callable[..., Any]) -> None:
    """Attention reads the vectors of codes as they lie, turns keys, and sees the tokens of the call in float."""
    data = [(torch.randint(0, 101, (4, 32)),) for _ in range(4)]
    artifact = made(decoder("wide")[0], "quantize-cache{coupled=4, rotary=before, past_only=true}", calibration=data)
    model = check_calls(artifact, torch.randint(0, 101, (2, 24)), [14, 1, 2, 6, 1])
    assert model.decoder.bytes_per_token == 2 * 2 * 2 * 32 // 4  # layers, keys and values, heads
    assert not [note for note in model.executable.built.fallbacks if note.operator in ("qc.attention.default", "qc.vector_codes.default")]

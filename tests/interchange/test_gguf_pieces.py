"""Tokenizers of pieces with scores: tokens as llama.cpp's algorithm gives them, and the same metadata back."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from qcompile.interchange.gguf_file import Typed
from qcompile.interchange.gguf_tokenizer import read_tokenizer, write_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")

PIECES = "_the th he _t in ing _king _ t h e i n g k ki \u00e9 _k _th".replace("_", "\u2581").split()
NAMES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<|user|>", "[PAD]"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 5]
SCORES = [0.0] * 259 + [-float((7 * rank) % len(PIECES)) for rank in range(len(PIECES))] + [0.0, 0.0]
METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": NAMES, "tokenizer.ggml.token_type": KINDS, "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
TEXTS = ["the king", "thing", " the  inking", "caf\u00e9 the", "\u6f22 in\nthe", "k", "singing the kith"]


def reference(text: str) -> list[int]:
    """Join the neighbours whose piece has the highest score, the leftmost first; then pieces, and bytes of what is none."""
    score = {name: SCORES[number] for number, name in enumerate(NAMES) if KINDS[number] == 1}
    parts = list(("\u2581" + text).replace(" ", "\u2581"))
    while joined := [(-score[a + b], place) for place, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]:
        place = min(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [number for part in parts for number in ([NAMES.index(part)] if part in score else [3 + byte for byte in part.encode()])]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_of_the_scores(text: str) -> None:
    data = read_tokenizer(METADATA)
    assert data is not None
    made = tokenizers.Tokenizer.from_str(data.decode())
    assert made.encode(text).ids == [1, *reference(text)]
    assert made.decode(made.encode(text).ids) == text


def test_special_and_unused_tokens() -> None:
    made = tokenizers.Tokenizer.from_str((read_tokenizer(METADATA) or b"").decode())
    assert NAMES.index("<|user|>") in made.encode("<|user|>the").ids
    assert made.token_to_id("[PAD]") is None
    without = read_tokenizer(METADATA | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}) or b""
    assert tokenizers.Tokenizer.from_str(without.decode()).encode("the").ids == [NAMES.index(part) for part in ("th", "e")]


def test_metadata_come_back_in_the_order_of_their_scores() -> None:
    data = read_tokenizer(METADATA)
    written, note = write_tokenizer(data, len(NAMES), [2])
    assert not note
    plain = {name: value.value if isinstance(value, Typed) else value for name, value in written.items()}
    assert plain["tokenizer.ggml.model"] == "llama"
    assert plain["tokenizer.ggml.tokens"][:-1] == NAMES[:-1]
    assert plain["tokenizer.ggml.token_type"] == KINDS
    assert (plain["tokenizer.ggml.bos_token_id"], plain["tokenizer.ggml.eos_token_id"], plain["tokenizer.ggml.add_bos_token"]) == (
        1,
        2,
        True,
    )
    before, after = (tokenizers.Tokenizer.from_str((given or b"").decode()) for given in (data, read_tokenizer(plain)))
    assert [before.encode(text).ids for text in TEXTS] == [after.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("change", ["mixed ranks", "another normalizer", "split before"])
def test_what_scores_cannot_say_is_left_out(change: str) -> None:
    content = json.loads(read_tokenizer(METADATA) or b"")
    if change == "mixed ranks":
        merges = content["model"]["merges"]
        merges.append(["\u2581", "the"] if ["\u2581t", "he"] in merges else merges[0])
        content["model"]["merges"] = [*merges[-1:], *merges[:-1], merges[0]]
    elif change == "another normalizer":
        content["normalizer"] = {"type": "Lowercase"}
    else:
        content["pre_tokenizer"] = {"type": "Whitespace"}
    written, note = write_tokenizer(json.dumps(content).encode(), len(NAMES), [2])
    assert written["tokenizer.ggml.model"] == "no_vocab"
    assert "none that llama.cpp knows" in note


def test_damaged_metadata_give_no_tokenizer() -> None:
    for name, value in (("scores", SCORES[:-1]), ("tokens", [*NAMES[:-1], "<s>"]), ("token_type", None), ("tokens", [1] * len(NAMES))):
        assert read_tokenizer(METADATA | {f"tokenizer.ggml.{name}": value}) is None

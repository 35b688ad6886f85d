"""Tokenizers of GGUF files: pieces with scores (SentencePiece), as a ``tokenizer.json`` and as the metadata that llama.cpp reads.

llama.cpp joins the two neighbours whose joined piece has the highest score, the leftmost of several, and writes what is no piece as its
bytes. Hugging Face's BPE joins by the rank of a pair. Each way to halve a piece becomes a pair, ranked by the piece's score; where one
piece has several, their order says which goes first, which a score cannot: such a text may be cut in another way. Source: llama.cpp,
``llm_tokenizer_spm`` in ``src/llama-vocab.cpp``; transformers, ``SentencePieceExtractor`` in ``convert_slow_tokenizer.py``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.interchange.gguf_file import Typed

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
_I32, _F32 = 5, 6


def read_pieces(metadata: Mapping[str, Any], opening: dict[str, Any] | None) -> bytes | None:
    """Return the ``tokenizer.json`` of pieces with scores, or None where the metadata are not whole.

    Args:
        metadata: of the file.
        opening: the post-processor that puts the begin token before a text.
    """
    tokens, scores, kinds = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if not all(isinstance(given, list) and given for given in (tokens, scores, kinds)):
        return None
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    assert isinstance(kinds, list)
    if not len(tokens) == len(scores) == len(kinds) == len(set(tokens)) or not all(isinstance(token, str) for token in tokens):
        return None
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **plain, "special": kind != _USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    first = [{"type": "Prepend", "prepend": SPACE}] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None, "post_processor": opening,
        "normalizer": {"type": "Sequence", "normalizers": [*first, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokens[unknown] if isinstance(unknown, int) and unknown < len(tokens) else None,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens) if kinds[number] != _UNUSED},
            "merges": _pairs(tokens, scores, kinds),
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode()


def _pairs(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[list[str]]:
    """Return every pair of pieces that makes a piece, those of higher scores first."""
    pieces = {token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL}
    found = []
    for token in sorted(pieces, key=lambda token: (-scores[pieces[token]], pieces[token])):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in pieces and right in pieces]
        found += [list(pair) for pair in sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))]
    return found


def write_pieces(content: Mapping[str, Any], vocabulary: int) -> dict[str, Any] | None:
    """Return the metadata of a ``tokenizer.json`` of pieces, or None where scores cannot say what it does.

    Args:
        content: the file, its model a BPE that falls back to bytes.
        vocabulary: how many tokens the model's table has; those that the tokenizer does not name are unused.
    """
    model = content["model"]
    prefix = _spaces(content.get("normalizer"))
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    made = [token for token, _ in itertools.groupby("".join(merge) for merge in merges)]
    if prefix is None or content.get("pre_tokenizer") or len(set(made)) != len(made):
        return None
    added = {int(token["id"]): token for token in content.get("added_tokens", [])}
    names = {int(number): token for token, number in model["vocab"].items()} | {number: token["content"] for number, token in added.items()}
    ranks = {token: float(-rank) for rank, token in enumerate(made)}
    size = max(vocabulary, max(names, default=0) + 1)
    unknown = model["vocab"].get(model.get("unk_token"))

    def kind(number: int) -> int:
        if number == unknown:
            return _UNKNOWN
        if number in added:
            return _CONTROL if added[number].get("special") else _USER_DEFINED
        return _UNUSED if number not in names else _BYTE if _BYTE_NAME.fullmatch(names[number]) else _NORMAL

    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [names.get(number, f"[PAD{number}]") for number in range(size)],
        "tokenizer.ggml.scores": Typed(_F32, [ranks.get(names.get(number, ""), -1.0 - len(made)) for number in range(size)]),
        "tokenizer.ggml.token_type": Typed(_I32, [kind(number) for number in range(size)]),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return found | ({"tokenizer.ggml.unknown_token_id": unknown} if unknown is not None else {})


def _spaces(normalizer: Mapping[str, Any] | None) -> bool | None:
    """Return whether a normalizer puts a space before a text, beside writing spaces as pieces have them; None for any other."""
    steps = (normalizer or {}).get("normalizers") if (normalizer or {}).get("type") == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    return True if steps == [prepend, replace] else False if steps == [replace] else None

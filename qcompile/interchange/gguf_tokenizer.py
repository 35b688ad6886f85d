"""Tokenizers of GGUF files: byte-level BPE, as a ``tokenizer.json`` and as the metadata that llama.cpp reads.

``gguf_pieces`` has the other kind, pieces with scores. llama.cpp knows how to split a text before the merges by name
(``tokenizer.ggml.pre``), Hugging Face by regular expression; the table below has both. Source: llama.cpp, ``src/llama-vocab.cpp``;
tokenizers, ``pre_tokenizers::byte_level``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from qcompile.interchange.gguf_file import Typed
from qcompile.interchange.gguf_pieces import read_pieces, write_pieces

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}
_ALIASES = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_I32 = 5


def read_tokenizer(metadata: Mapping[str, Any]) -> bytes | None:
    """Return the ``tokenizer.json`` of a byte-level BPE or of pieces with scores, or None where a file has another tokenizer or none."""
    if metadata.get("tokenizer.ggml.model") == "llama":
        whole = {"tokenizer.ggml.add_bos_token": True, **metadata}  # what llama.cpp takes where such a file does not say
        return read_pieces(whole, _opening(whole, metadata.get("tokenizer.ggml.tokens") or []))
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    split = _pre_tokenizer(_ALIASES.get(pre, pre))
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split is None or not _texts(tokens) or not _texts(merges):
        return None
    if not isinstance(kinds, list) or len(set(tokens)) != len(tokens) or any(" " not in merge for merge in merges):
        return None
    unused = {token for token, kind in zip(tokens, kinds, strict=False) if kind == _UNUSED}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **plain, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": split,
        "post_processor": _opening(metadata, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(tokens) if token not in unused},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode()


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _pre_tokenizer(name: str) -> dict[str, Any] | None:
    def level(use_regex: bool) -> dict[str, Any]:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}

    if name == "gpt-2":
        return level(True)
    if name not in _SPLITS:
        return None
    split = {"type": "Split", "pattern": {"Regex": _SPLITS[name]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level(False)]}


def _opening(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any] | None:
    """Return the post-processor that puts the begin token before a text, where the file asks for it."""
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token") or not isinstance(begin, int) or not 0 <= begin < len(tokens):
        return None
    special, text = {"SpecialToken": {"id": tokens[begin], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing", "single": [special, text], "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[begin]: {"id": tokens[begin], "ids": [begin], "tokens": [tokens[begin]]}},
    }  # fmt: skip


def write_tokenizer(data: bytes | None, vocabulary: int, end_tokens: Sequence[int]) -> tuple[dict[str, Any], str]:
    """Return the metadata of a ``tokenizer.json``, and a line for the user where llama.cpp cannot be told of it.

    Args:
        data: the file, or None.
        vocabulary: how many tokens the model's table has; those that the tokenizer does not name are unused.
        end_tokens: of the model.
    """
    ends = {"tokenizer.ggml.eos_token_id": end_tokens[0]} if end_tokens else {}
    none = {"tokenizer.ggml.model": "no_vocab", **ends}
    if data is None:
        return none, "the artifact holds no tokenizer: llama.cpp will take token numbers only"
    content = json.loads(data)
    model, pre = content.get("model") or {}, _name_of(content)
    vocab = model.get("vocab")
    begin = _begin(content)
    opening = {"tokenizer.ggml.add_bos_token": begin is not None, **({"tokenizer.ggml.bos_token_id": begin} if begin is not None else {})}
    if (
        model.get("type") == "BPE"
        and model.get("byte_fallback")
        and isinstance(vocab, dict)
        and (pieces := write_pieces(content, vocabulary))
    ):
        return pieces | ends | opening, ""
    if model.get("type") != "BPE" or pre is None or not isinstance(vocab, dict) or content.get("normalizer") or model.get("byte_fallback"):
        return none, "the tokenizer is none that llama.cpp knows: it will take token numbers only"
    added = {int(token["id"]): token for token in content.get("added_tokens", [])}
    names = {int(number): token for token, number in vocab.items()} | {number: token["content"] for number, token in added.items()}
    kinds = {number: _CONTROL if token.get("special") else _USER_DEFINED for number, token in added.items()}
    size = max(vocabulary, max(names, default=0) + 1)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names.get(number, f"[PAD{number}]") for number in range(size)],
        "tokenizer.ggml.token_type": Typed(_I32, [kinds.get(n, _NORMAL if n in names else _UNUSED) for n in range(size)]),
        "tokenizer.ggml.merges": merges,
        **ends,
    }
    return found | opening, ""


def _name_of(content: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of how a tokenizer splits texts, or None."""
    pre = content.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or [] if pre.get("type") == "Sequence" else [pre]
    if [part.get("type") for part in parts] == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space"):
        return "gpt-2"
    if [part.get("type") for part in parts] == ["Split", "ByteLevel"]:
        pattern = (parts[0].get("pattern") or {}).get("Regex")
        return next((name for name, split in _SPLITS.items() if split == pattern), None)
    return None


def _begin(content: Mapping[str, Any]) -> int | None:
    """Return the token that a tokenizer puts before every text, or None."""
    post = content.get("post_processor") or {}
    posts = post.get("processors") or [] if post.get("type") == "Sequence" else [post]
    for item in posts:
        single = item.get("single") or [{}]
        name = (single[0].get("SpecialToken") or {}).get("id")
        ids = ((item.get("special_tokens") or {}).get(name) or {}).get("ids") or []
        if item.get("type") == "TemplateProcessing" and ids:
            return int(ids[0])
    return None

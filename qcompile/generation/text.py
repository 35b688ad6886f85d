"""Tokens as text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompile.errors import Refused

_BROKEN = "\ufffd"  # what a decoder gives for bytes that are not yet a whole character
_LONGEST_CHARACTER = 4  # tokens of one byte each: more cannot be missing of a character


def read_tokenizer(data: bytes) -> Any:
    """Return the tokenizer of a ``tokenizer.json``, without padding and truncation.

    Raises:
        Refused: the package is missing, or the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise Refused("texts need the package tokenizers", way_out="pip install qcompile[hf]") from error
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the Rust side raises plain Exception
        raise Refused("the artifact's tokenizer cannot be read", way_out="compile the model again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TextStream:
    """Says what each new token adds to a text.

    Tokens are decoded together with a few before them: some tokenizers write a space before a word only inside a text, and a character may
    have its bytes in several tokens. Nothing is given out before its character is whole.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._start = max(0, len(self._tokens) - _LONGEST_CHARACTER - 1)
        self._done = len(self._tokens)

    def add(self, token: int, *, last: bool = False) -> str:
        """Return what the token adds, "" while a character is not whole; ``last`` gives out what there is."""
        self._tokens.append(token)
        if self._tokenizer is None:
            return ""
        before = self._decode(self._tokens[self._start : self._done])
        text = self._decode(self._tokens[self._start :])
        if text.endswith(_BROKEN) and not last and len(self._tokens) - self._done < _LONGEST_CHARACTER:
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

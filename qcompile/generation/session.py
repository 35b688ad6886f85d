"""A batch of texts being continued: their caches, and the model that reads and extends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from qcompile.errors import Refused

CHUNK = 512  # tokens of a prompt in one call: many enough for full speed, few enough that activations stay small
AGREEMENT_DB = 20.0  # of logits from caches with those of the whole text: codes on ties may fall on other sides, mixed tokens share nothing
ONE_BY_ONE = 16  # tokens of the golden text that are read one at a time
GROWTH = 256  # a cache grows by this many tokens, or by half of what it has
ALIGNMENT = 64  # bytes: kernels copy what lies elsewhere

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CacheRow:
    """What one token takes in one cache: its dtype and the sizes after ``[batch, capacity]``."""

    dtype: str
    sizes: tuple[int, ...]


class Model(Protocol):
    """A decoder ready to run, shared by sessions: one build serves prompts and single tokens, so weights are in memory once.

    Attributes:
        context: the most tokens of a text.
        vocabulary: how many tokens there are.
        caches: in the order in which ``step`` takes and returns them.
        tokenizer: the bytes of ``tokenizer.json``, where there is one.
        end_tokens: tokens that end a text.
        past_only: tokens of one call see one another in float, so only a text that is read token by token gives the logits of the graph
            over whole texts.
    """

    @property
    def past_only(self) -> bool: ...

    @property
    def context(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def caches(self) -> Sequence[CacheRow]: ...

    @property
    def tokenizer(self) -> bytes | None: ...

    @property
    def end_tokens(self) -> Sequence[int]: ...

    def build(self) -> None:
        """Do what the first step would do before it runs.

        Raises:
            Refused: the code does not continue the artifact's golden text as the graph over whole texts does.
        """

    def step(self, tokens: Array, past: Array, counts: Array, caches: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Continue texts: return logits f32[batch,vocabulary] after the last token of each, and the caches with the new tokens.

        Args:
            tokens: i64[batch,seq], padded on the right.
            past: i64[batch], tokens of each text that the caches hold.
            counts: i64[batch], how many of the new tokens are the text's own, 1 or more.
            caches: arrays [batch,capacity,..].
        """


def check_model(model: Model, tokens: Array, expected: Array) -> None:
    """Read a text in two parts and compare with its logits by the graph over whole texts: an operator that mixes tokens shows here.

    Where tokens of one call see one another in float, its first tokens are read one by one.

    Args:
        model: is called.
        tokens: i64[1,seq].
        expected: f32[seq,vocabulary].

    Raises:
        Refused: they are not the same.
    """
    tokens = tokens[:, : model.context]
    length = tokens.shape[1]
    if length < 2:
        return
    length = min(length, ONE_BY_ONE) if model.past_only else length
    counts = [1] * length if model.past_only else [length - 1, 1]
    caches = [empty_cache(row, 1, length) for row in model.caches]
    past = np.zeros(1, np.int64)
    for part in np.split(tokens[:, :length], np.cumsum(counts)[:-1], axis=1):
        logits, caches = model.step(np.ascontiguousarray(part), past, np.array([part.shape[1]]), caches)
        past = past + part.shape[1]
    if np.isfinite(logits[0]).all() and _agreement_db(expected[length - 1], logits[0]) < AGREEMENT_DB:
        raise Refused("an operator beside attention mixes tokens: no cache can stand for that", way_out="run it over whole texts")


def _agreement_db(expected: Array, found: Array) -> float:
    """Return 10 log10 of the power of the expected values over that of the difference."""
    noise = np.square(expected.astype(np.float64) - found).sum()
    signal = np.square(expected.astype(np.float64)).sum()
    return float("inf") if not noise else 10 * float(np.log10(signal / noise)) if signal else -float("inf")


def empty_cache(row: CacheRow, batch: int, capacity: int) -> Array:
    """Return a cache without tokens, on an address that is a multiple of 64."""
    shape, dtype = (batch, capacity, *row.sizes), np.dtype(row.dtype)
    # Zeros: the meaning of attention multiplies rows that are hidden by zero, which NaN would survive.
    memory = np.zeros(prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class Session:
    """Texts of one batch.

    Attributes:
        lengths: i64[batch], how many tokens of each text the caches hold.
    """

    def __init__(self, model: Model, batch: int) -> None:
        self._model, self._batch = model, batch
        self.lengths = np.zeros(batch, np.int64)
        self._capacity = 0
        self._caches = [empty_cache(row, batch, 1) for row in model.caches]

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches take now."""
        return sum(cache.nbytes for cache in self._caches)

    def extend(self, texts: Sequence[Sequence[int]]) -> Array:
        """Take new tokens for each text and return the logits f32[batch,vocabulary] after the last of each.

        Long ones are taken in chunks. A text without new tokens stays as it is; its logits are zeros.

        Raises:
            Refused: a text would become longer than the context. Nothing is changed then.
        """
        counts = np.array([len(text) for text in texts])
        total = self.lengths + counts
        if int(total.max()) > self._model.context:
            row = int(total.argmax())
            raise Refused(
                f"the text has {int(total[row])} tokens, the context is {self._model.context}", node=f"prompt {row}",
                way_out="shorten the prompt, or ask for fewer tokens",
            )  # fmt: skip
        self._reserve(int(total.max()))
        logits: Array | None = None
        for start in range(0, int(counts.max()), CHUNK):
            found = self._step([text[start : start + CHUNK] for text in texts])
            taken = counts > start
            if logits is not None or not taken.all():
                found = np.where(taken[:, None], found, np.float32(0) if logits is None else logits)
            logits = found
        assert logits is not None
        return logits

    def _step(self, texts: Sequence[Sequence[int]]) -> Array:
        counts = np.array([len(text) for text in texts], np.int64)
        tokens = np.zeros((self._batch, int(counts.max())), np.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
        # A row without new tokens gets one of padding: it is written behind its text, where nothing reads, and overwritten later.
        logits, self._caches = self._model.step(tokens, self.lengths, np.maximum(counts, 1), self._caches)
        self.lengths = self.lengths + counts
        return logits

    def _reserve(self, tokens: int) -> None:
        """Make the caches at least this long."""
        if tokens <= self._capacity:
            return
        capacity = min(max(tokens, self._capacity + max(GROWTH, self._capacity // 2)), self._model.context)
        for number, (cache, row) in enumerate(zip(self._caches, self._model.caches, strict=True)):
            grown = empty_cache(row, self._batch, capacity)
            grown[:, : self._capacity] = cache[:, : self._capacity]
            self._caches[number] = grown
        self._capacity = capacity

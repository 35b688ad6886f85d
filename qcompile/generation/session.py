"""A batch of texts being continued: their caches, and the model's entry that reads and extends them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from qcompile.artifact import Artifact
from qcompile.errors import Refused
from qcompile.generation.entries import Decoder, decoder_entries, longest_text
from qcompile.pipeline import sqnr_db
from qcompile.registry import find_target
from qcompile.target import Executable

CHUNK = 512  # tokens of a prompt in one call: many enough for full speed, few enough that activations stay small
AGREEMENT_DB = 20.0  # of logits from caches with those of the whole text: codes on ties may fall on other sides, mixed tokens share nothing
ONE_BY_ONE = 16  # tokens of the golden text that are read one at a time
GROWTH = 256  # a cache grows by this many tokens, or by half of what it has


class Model:
    """A decoder ready to run, shared by sessions: one build serves prompts and single tokens, so weights are in memory once.

    Args:
        artifact: a compiled decoder.
        context: the most tokens of a text, by default what the model was made for.

    Raises:
        Refused: the artifact is no decoder, or the context is longer than the model's.
    """

    def __init__(self, artifact: Artifact, context: int | None = None) -> None:
        self.artifact = artifact
        longest = longest_text(artifact.graph)
        if context is not None and not 0 < context <= longest:
            raise Refused(f"a context of {context} tokens is not possible: the model takes texts of 1 to {longest} tokens")
        self.context = context or longest

    @cached_property
    def decoder(self) -> Decoder:
        return decoder_entries(self.artifact.graph, self.context)

    @cached_property
    def executable(self) -> Executable:
        """The entry ``prefill``, built.

        Raises:
            Refused: it does not continue the artifact's golden text as the graph over whole texts does.
        """
        target = find_target(self.artifact.target).with_tiles(self.artifact.tiles)
        built = target.build(self.decoder.prefill, threads=self.artifact.threads)
        self._check(built)
        return built

    def _check(self, run: Executable) -> None:
        """Read the golden text in two parts and compare with its golden logits: an operator that mixes tokens otherwise shows here.

        Where tokens of one call see one another in float, its first tokens are read one by one.
        """
        tokens = self.artifact.golden_inputs[0][:1, : self.context]
        length = tokens.shape[1]
        if length < 2:
            return
        length = min(length, ONE_BY_ONE) if self.decoder.past_only else length
        counts = [1] * length if self.decoder.past_only else [length - 1, 1]
        caches = [torch.zeros(1, length, *map(int, cache.type.shape[2:]), dtype=cache.type.dtype) for cache in self.decoder.caches]
        past = torch.zeros(1, dtype=torch.int64)
        for part, count in zip(tokens[:, :length].split(counts, 1), counts, strict=True):
            logits, *caches = run([part.contiguous(), past, torch.tensor([count]), *caches])
            past = past + count
        expected = self.artifact.golden_outputs[0][0, length - 1]
        if torch.isfinite(logits).all() and sqnr_db(expected, logits[0]) < AGREEMENT_DB:
            raise Refused("an operator beside attention mixes tokens: no cache can stand for that", way_out="run it over whole texts")


class Session:
    """Texts of one batch.

    Attributes:
        lengths: i64[batch], how many tokens of each text the caches hold.
    """

    def __init__(self, model: Model, batch: int) -> None:
        self._model, self._batch = model, batch
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._capacity = 0
        self._caches = [self._empty(shape[2:], cache.type.dtype, 1) for cache in model.decoder.caches for shape in [cache.type.shape]]

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches take now."""
        return sum(cache.nbytes for cache in self._caches)

    def extend(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take new tokens for each text and return the logits [batch, vocabulary] after the last of each.

        Long ones are taken in chunks. A text without new tokens stays as it is; its logits are zeros.

        Raises:
            Refused: a text would become longer than the context. Nothing is changed then.
        """
        counts = torch.tensor([len(text) for text in texts])
        total = self.lengths + counts
        if int(total.max()) > self._model.context:
            row = int(total.argmax())
            raise Refused(
                f"the text has {int(total[row])} tokens, the context is {self._model.context}", node=f"prompt {row}",
                way_out="shorten the prompt, or ask for fewer tokens",
            )  # fmt: skip
        self._reserve(int(total.max()))
        logits: torch.Tensor | None = None
        for start in range(0, int(counts.max()), CHUNK):
            found = self._step([text[start : start + CHUNK] for text in texts])
            taken = (counts > start).unsqueeze(1)
            logits = torch.where(taken, found, torch.zeros(()) if logits is None else logits)
        assert logits is not None
        return logits

    def _step(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        counts = torch.tensor([len(text) for text in texts])
        tokens = torch.zeros(self._batch, int(counts.max()), dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        # A row without new tokens gets one of padding: it is written behind its text, where nothing reads, and overwritten later.
        logits, *self._caches = self._model.executable([tokens, self.lengths, counts.clamp(min=1), *self._caches])
        self.lengths = self.lengths + counts
        return logits

    def _reserve(self, tokens: int) -> None:
        """Make the caches at least this long."""
        if tokens <= self._capacity:
            return
        capacity = min(max(tokens, self._capacity + max(GROWTH, self._capacity // 2)), self._model.context)
        for number, cache in enumerate(self._caches):
            grown = self._empty(cache.shape[2:], cache.dtype, capacity)
            grown[:, : self._capacity] = cache[:, : self._capacity]
            self._caches[number] = grown
        self._capacity = capacity

    def _empty(self, rest: Sequence[int | str], dtype: torch.dtype, capacity: int) -> torch.Tensor:
        # Zeros: the meaning of attention multiplies rows that are hidden by zero, which NaN would survive.
        return torch.zeros((self._batch, capacity, *(int(size) for size in rest)), dtype=dtype)

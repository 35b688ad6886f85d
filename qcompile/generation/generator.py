"""Continue texts, token by token.

generator = Generator.open("model.qc")
for piece in generator.stream("The species of", max_tokens=50):
print(piece.text, end="")
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import Refused
from qcompile.generation.sampling import Sampler, Sampling
from qcompile.generation.session import Model, Session
from qcompile.generation.stored import open_stored
from qcompile.generation.text import TextStream, read_tokenizer

if TYPE_CHECKING:
    from qcompile.artifact import Artifact

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """One new token.

    Attributes:
        row: which prompt it continues.
        token: its number.
        text: what it adds to the text; "" while a character is not yet whole, and without a tokenizer.
        end: why the text ends with it: ``length``, ``end`` (an end token), ``stop`` (a stop text), ``context``; "" where it goes on.
    """

    row: int
    token: int
    text: str
    end: str = ""


@dataclass
class Speed:
    """Tokens and seconds of one generation."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Continuation:
    """What was generated for one prompt."""

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: str = ""


class Generator:
    """Continues texts with a compiled decoder; ``open`` takes less memory and time than making one from a loaded artifact.

    Attributes:
        tokenizer: of the package ``tokenizers``; None where the artifact holds none, and prompts are token numbers.
        speed: tokens and seconds of the last generation.
        cache_bytes: what its caches took.
        vocabulary: how many tokens the model has.

    Args:
        artifact: a compiled decoder.
        context: the most tokens of a text, prompt included; by default what the model was made for.

    Raises:
        Refused: the artifact is no decoder.
    """

    def __init__(self, artifact: Artifact, *, context: int | None = None) -> None:
        from qcompile.generation.artifact_model import ArtifactModel

        self._use(ArtifactModel(artifact, context))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        target: str | None = None,
        threads: int | None = None,
        trust_code: bool = False,
        context: int | None = None,
    ) -> Generator:
        """Return a generator of an artifact in a file; see ``qcompile.load`` for all but ``context``.

        Where a target can, its code is built in a process of its own, and runs without PyTorch and compiler: the process holds the
        weights, the caches and some 50 MiB.

        Raises:
            Refused: as ``qcompile.load``; or the artifact is no decoder.
        """
        made = cls.__new__(cls)
        stored = open_stored(Path(path), target=target, context=context, threads=threads)
        if stored is not None:
            made._use(stored)
        else:
            from qcompile.artifact import load

            made.__init__(load(path, target=target, threads=threads, trust_code=trust_code), context=context)  # type: ignore[misc]
        return made

    def _use(self, model: Model) -> None:
        self.model = model
        self.speed = Speed()
        self.cache_bytes = 0
        self.tokenizer: Any = read_tokenizer(model.tokenizer) if model.tokenizer else None
        self.vocabulary = model.vocabulary

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens.

        Raises:
            Refused: it is empty, a text without a tokenizer, or holds a token that the model does not have.
        """
        if isinstance(prompt, str) and self.tokenizer is None:
            raise Refused("the artifact holds no tokenizer", way_out="give token numbers, or compile from a folder with tokenizer.json")
        tokens = list(self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else map(operator.index, prompt))
        if not tokens:
            raise Refused("the prompt is empty", way_out="give at least one token")
        if wrong := [token for token in tokens if not 0 <= token < self.vocabulary]:
            raise Refused(f"the prompt holds token {wrong[0]}, the model has {self.vocabulary} tokens")
        return tokens

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
    ) -> Iterator[Piece]:
        """Yield new tokens as they come; with several prompts one for each of them in turn, until all have ended.

        Args:
            prompts: a text, token numbers, or a list of either, which may have different lengths.
            max_tokens: the most new tokens of each text, by default as many as the context has room for.
            sampling: by default greedy.
            stop: texts that end the generation; they are yielded too.
            ignore_end: do not end at the model's end tokens.

        Raises:
            Refused: a prompt is not possible, or prompt and ``max_tokens`` do not fit in the context. Nothing has been yielded then.
        """
        chosen = _as_list(prompts)
        given = [self.tokens_of(prompt) for prompt in chosen]
        self._check_room(given, max_tokens)
        ends = frozenset() if ignore_end else frozenset(self.model.end_tokens)
        rows = [_Row(tokens, TextStream(self.tokenizer, tokens), stop, ends, self._room(tokens, max_tokens)) for tokens in given]
        return self._run(rows, Sampler(sampling or Sampling(), len(rows)))

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Continuation]:
        """Return what ``stream`` yields, joined for each prompt."""
        pieces = self.stream(prompts, **options)
        found = [Continuation(self.tokens_of(prompt)) for prompt in _as_list(prompts)]
        for piece in pieces:
            made = found[piece.row]
            made.tokens.append(piece.token)
            made.text += piece.text
            made.end = piece.end
        return found

    def _room(self, tokens: Sequence[int], max_tokens: int | None) -> tuple[int, str]:
        left = self.model.context - len(tokens) + 1  # the last token is chosen and never read
        return (left, "context") if max_tokens is None else (max_tokens, "length")

    def _check_room(self, given: Sequence[Sequence[int]], max_tokens: int | None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise Refused(f"max_tokens is 1 or more, not {max_tokens}")
        for row, tokens in enumerate(given):
            if len(tokens) + (max_tokens or 1) - 1 > self.model.context:
                asked = f" and {max_tokens} new ones" if max_tokens else ""
                raise Refused(
                    f"{len(tokens)} tokens{asked} do not fit in the context of {self.model.context}", node=f"prompt {row}",
                    way_out="shorten the prompt, or ask for fewer tokens",
                )  # fmt: skip

    def _run(self, rows: list[_Row], sampler: Sampler) -> Iterator[Piece]:
        session = Session(self.model, len(rows))
        self.model.build()  # before the clock starts
        self.speed = Speed()
        start = time.perf_counter()
        logits = session.extend([row.prompt for row in rows])
        self.speed.prefill_seconds = time.perf_counter() - start
        self.speed.prefill_tokens = sum(len(row.prompt) for row in rows)
        while True:
            start = time.perf_counter()
            active = [number for number, row in enumerate(rows) if not row.ended]
            pieces = [rows[number].take(number, sampler.choose(number, logits[number])) for number in active]
            self.cache_bytes = session.cache_bytes
            self.speed.decode_seconds += time.perf_counter() - start
            yield from pieces
            if all(row.ended for row in rows):
                return
            start = time.perf_counter()
            logits = session.extend([[] if row.ended else [row.last] for row in rows])
            self.speed.decode_seconds += time.perf_counter() - start
            self.speed.decode_tokens += len([row for row in rows if not row.ended])


@dataclass
class _Row:
    """One text on its way: when it ends, and the text so far."""

    prompt: list[int]
    stream: TextStream
    stop: Sequence[str]
    ends: frozenset[int]
    room: tuple[int, str]
    text: str = ""
    count: int = 0
    last: int = -1
    ended: bool = False

    def take(self, row: int, token: int) -> Piece:
        """Append a token and say what it adds."""
        self.last, self.count = token, self.count + 1
        left, reason = self.room
        end = "end" if token in self.ends else reason if self.count >= left else ""
        added = self.stream.add(token, last=bool(end))
        before = len(self.text)
        self.text += added
        # A stop text may begin in an earlier piece.
        if any(word in self.text[max(0, before - len(word)) :] for word in self.stop if word):
            end = "stop"
        self.ended = bool(end)
        return Piece(row, token, added, end)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    found: list[Any] = list(prompts)
    if not found:
        raise Refused("there is no prompt")
    return found if isinstance(found[0], str | Sequence) else [found]  # token numbers: integers, or what an array of them gives

"""Perplexity of a language model on a text, by windows, beside its float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import Refused

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

_LOGITS = 1 << 24  # numbers of one batch of logits: in float64 twice and of two models, half a gigabyte


@dataclass(frozen=True)
class Windows:
    """A text as windows of tokens.

    Window n begins at token n * stride and has ``context`` tokens; those that an earlier window has judged are context only. A stride as
    long as a window leaves no overlap, and a token sees only what stands before it in its window; a smaller one shows every token at least
    ``context - stride`` tokens before it. A token with nothing before it in its window is not judged, nor is what is left at the end of
    the text and fills no window.

    Attributes:
        tokens: of the text.
        context: tokens of a window, the opening included.
        stride: tokens from one window's begin to the next one's.
        opening: tokens that the tokenizer puts before every text, such as a begin token.
        limit: the most windows.
    """

    tokens: Sequence[int]
    context: int
    stride: int
    opening: Sequence[int] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if not len(self.opening) + 2 <= self.context:
            raise Refused(f"a window of {self.context} tokens has none to judge", way_out="give a larger context")
        if not 1 <= self.stride <= self.context - len(self.opening):
            raise Refused(f"a stride is 1 to {self.context - len(self.opening)} tokens, not {self.stride}")

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        """Yield the tokens of each window and the place of the first that is judged."""
        body = self.context - len(self.opening)
        starts = range(0, len(self.tokens) - body + 1, self.stride)
        for number, start in enumerate(starts[: self.limit]):
            overlap = body - self.stride if number else 0
            yield [*self.opening, *self.tokens[start : start + body]], max(len(self.opening) + overlap, 1)


@dataclass
class Likelihood:
    """What a model says of a text, in nats."""

    tokens: int = 0
    nats: float = 0.0
    float_nats: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log likelihood of a token."""
        return math.exp(self.nats / self.tokens)

    @property
    def float_perplexity(self) -> float:
        return math.exp(self.float_nats / self.tokens)


def read_windows(path: Path, tokenizer: Any, context: int, stride: int | None, limit: int | None) -> Windows:
    """Read a UTF-8 text and code it by a tokenizer of the package ``tokenizers``; without a stride windows do not overlap.

    Raises:
        Refused: no such file or no UTF-8, or the text fills no window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("the file cannot be read as UTF-8 text", node=str(path)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    probe = tokenizer.encode("a")
    opening = probe.ids[:1] if probe.special_tokens_mask[0] else []
    stride = context - len(opening) if stride is None else stride
    if limit is not None:
        text = text[: 64 * (context + stride * limit)]  # no tokenizer makes tokens of 64 letters on average
    windows = Windows(tokenizer.encode(text, add_special_tokens=False).ids, context, stride, opening, limit)
    if next(iter(windows), None) is None:
        raise Refused("the text fills no window", node=str(path), way_out="give a longer text or a smaller context")
    return windows


def measure(run: Run, float_run: Run | None, windows: Windows, vocabulary: int) -> Likelihood:
    """Return the likelihood of every judged token under a model, and what the float model says at the same places.

    Args:
        run: the model: tokens [batch, context] to logits [batch, context, vocabulary].
        float_run: the float model, where it is known.
        windows: what to judge.
        vocabulary: how many tokens the model knows.

    Raises:
        Refused: the model gives no logits of this shape, or the text has a token that it does not know.
    """
    found = Likelihood()
    for tokens, first in _batches(windows, max(1, _LOGITS // (windows.context * vocabulary))):
        judged = tokens[:, first:].unsqueeze(-1)
        likely = _log_probabilities(run([tokens])[0], tokens)[:, first - 1 :]
        found.nats -= float(likely.gather(-1, judged).sum())
        found.tokens += judged.numel()
        if float_run:
            true = _log_probabilities(float_run([tokens])[0], tokens)[:, first - 1 :]
            found.float_nats -= float(true.gather(-1, judged).sum())
            found.divergence += float((true.exp() * (true - likely)).sum())
            found.agreed += int((true.argmax(-1) == likely.argmax(-1)).sum())
    return found


def _batches(windows: Windows, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield tokens i64[batch, context] of windows that are judged from the same place on."""
    group: list[list[int]] = []
    place = -1
    for tokens, first in windows:
        if group and (first != place or len(group) == size):
            yield torch.tensor(group), place
            group = []
        group.append(tokens)
        place = first
    if group:
        yield torch.tensor(group), place


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log softmax [batch, tokens - 1, vocabulary] in float64: what is said of the next token at every place but the last."""
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        shape = list(logits.shape)
        raise Refused(f"perplexity needs logits [batch, tokens, vocabulary] for tokens {list(tokens.shape)}; the model's output is {shape}")
    if int(tokens.max()) >= logits.shape[-1]:
        raise Refused(
            f"the model gives {logits.shape[-1]} values for each token, and the text has token {int(tokens.max())}: no language model"
        )
    return logits[:, :-1].double().log_softmax(-1)

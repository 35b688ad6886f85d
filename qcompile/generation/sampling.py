"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.errors import Refused


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: choose among the k most likely tokens; 0 among all.
        top_p: choose among the most likely tokens that together have at least this probability (nucleus sampling, Holtzman et al. 2019),
            after ``top_k``; 1 among all.
        seed: equal seeds give equal texts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise Refused(f"a temperature is 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise Refused(f"top-k is a number of tokens, or 0 for all, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise Refused(f"top-p is a probability above 0 and at most 1, not {self.top_p}")


class Sampler:
    """Chooses tokens for the rows of a batch, each with random numbers of its own: a row's text does not depend on the others."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        self._random = [np.random.default_rng([sampling.seed, row]) for row in range(rows)]

    def choose(self, row: int, logits: np.ndarray[Any, Any]) -> int:
        """Return a token for logits f32[vocabulary].

        Raises:
            Refused: the logits hold NaN, or no token is possible.
        """
        logits = np.asarray(logits)
        highest = logits.max()  # NaN if there is one
        if not np.isfinite(highest):
            raise Refused("the model's logits hold NaN or infinity", way_out="check the weights, or compile with more bits")
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = self._probabilities(logits)
        cumulative = np.cumsum(probabilities)
        return int(np.searchsorted(cumulative, self._random[row].random() * cumulative[-1], side="right").clip(0, len(cumulative) - 1))

    def _probabilities(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return what is left of the distribution after temperature, top-k and top-p, in float64, not normalized."""
        chosen = self._sampling
        scores = logits.astype(np.float64) / chosen.temperature
        probabilities = np.exp(scores - scores.max())
        order = np.argsort(-probabilities, kind="stable")
        kept = order[: chosen.top_k] if chosen.top_k else order
        if chosen.top_p < 1:
            shares = probabilities[kept] / probabilities[kept].sum()
            kept = kept[: int((shares.cumsum() - shares < chosen.top_p).sum())]
        result = np.zeros_like(probabilities)
        result[kept] = probabilities[kept]
        return result

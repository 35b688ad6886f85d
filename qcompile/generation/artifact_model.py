"""A decoder built from an artifact's graph, on any target."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from qcompile.artifact import Artifact
from qcompile.errors import Refused
from qcompile.generation.entries import Decoder, decoder_entries, longest_text
from qcompile.generation.session import Array, CacheRow, check_model
from qcompile.registry import find_target
from qcompile.target import Executable, Target


class ArtifactModel:
    """A decoder; see ``session.Model``.

    Args:
        artifact: a compiled decoder.
        context: the most tokens of a text, by default what the model was made for.

    Raises:
        Refused: the artifact is no decoder, or the context is longer than the model's.
    """

    def __init__(self, artifact: Artifact, context: int | None = None) -> None:
        self.artifact, self.tokenizer, self.end_tokens = artifact, artifact.tokenizer, artifact.end_tokens
        longest = longest_text(artifact.graph)
        if context is not None and not 0 < context <= longest:
            raise Refused(f"a context of {context} tokens is not possible: the model takes texts of 1 to {longest} tokens")
        self.context = context or longest

    @cached_property
    def decoder(self) -> Decoder:
        return decoder_entries(self.artifact.graph, self.context)

    @property
    def past_only(self) -> bool:
        return self.decoder.past_only

    @property
    def vocabulary(self) -> int:
        return int(self.decoder.prefill.outputs[0].meta["val"].shape[-1])

    @cached_property
    def caches(self) -> Sequence[CacheRow]:
        return [CacheRow(str(c.type.dtype).removeprefix("torch."), tuple(map(int, c.type.shape[2:]))) for c in self.decoder.caches]

    @property
    def target(self) -> Target:
        return find_target(self.artifact.target).with_tiles(self.artifact.tiles)

    @cached_property
    def executable(self) -> Executable:
        """The entry ``prefill``, built."""
        return self.target.build(self.decoder.prefill, threads=self.artifact.threads)

    @cached_property
    def _checked(self) -> bool:
        check_model(self, self.artifact.golden_inputs[0][:1].numpy(), self.artifact.golden_outputs[0][0].numpy())
        return True

    def build(self) -> None:
        _ = self.executable
        _ = self._checked

    def step(self, tokens: Array, past: Array, counts: Array, caches: Sequence[Array]) -> tuple[Array, list[Array]]:
        given = [torch.from_numpy(array).contiguous() for array in (tokens, past, counts, *caches)]
        logits, *new = self.executable(given)
        return logits.numpy(), [cache.numpy() for cache in new]

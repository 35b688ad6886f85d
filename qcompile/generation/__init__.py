"""Generation: a decoder's graph over whole texts becomes entries that continue a text from a cache, and a loop that samples from them.

Names are loaded when they are first used: continuing texts with code that is built needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.generation.entries import Cache, Decoder, decoder_entries
    from qcompile.generation.generator import Continuation, Generator, Piece
    from qcompile.generation.sampling import Sampling

_HOME = {
    "Cache": "entries", "Decoder": "entries", "decoder_entries": "entries", "Continuation": "generator", "Generator": "generator",
    "Piece": "generator", "Sampling": "sampling",
}  # fmt: skip

__all__ = ["Cache", "Continuation", "Decoder", "Generator", "Piece", "Sampling", "decoder_entries"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qcompile.generation.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")

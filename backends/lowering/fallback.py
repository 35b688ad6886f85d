"""What a target could not run with a kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fallback:
    """A node that a target has no kernel for and that runs as a composition of generic operators."""

    node: str
    operator: str
    reason: str

"""The nearest known name, for messages about unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X?``, or the known names where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known) or 'none'}"


def nearest_names(pattern: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names that are nearest to a name or pattern, however far, as ``'a', 'b', 'c'``; best first."""
    literal = "".join(c for c in pattern if c not in "*?[]")
    return ", ".join(f"'{name}'" for name in difflib.get_close_matches(literal, sorted(set(known)), count, 0.0))

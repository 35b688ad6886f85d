"""Ahead-of-time C for Linux boards and microcontrollers: no heap, no runtime library, one arena whose size is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.backends.edge.target import TARGET

__all__ = ["TARGET"]


def __getattr__(name: str) -> Any:
    # TVM takes a second to import: only when something is built.
    if name == "TARGET":
        from qcompile.backends.edge.target import TARGET

        return TARGET
    raise AttributeError(f"module {__name__} has no attribute {name}")

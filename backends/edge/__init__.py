"""The edge target: C for boards and microcontrollers, and the proof of it under QEMU."""

from qcompile.backends.edge.target import TARGET

__all__ = ["TARGET"]

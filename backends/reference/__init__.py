"""The reference target: the FX interpreter over the operators' meanings. Slow; it defines what is correct."""

from qcompile.backends.reference.target import TARGET, ReferenceTarget

__all__ = ["TARGET", "ReferenceTarget"]

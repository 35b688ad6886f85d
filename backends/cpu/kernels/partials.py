"""Reductions along a row that keep four vectors in flight, so that no step waits for the one before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.backends.cpu.kernels.registers import LANES, Expression, fold, ramp, splat, store
from qcompile.backends.cpu.kernels.vector import register
from tvm.tirx.script.builder import ir as T

SLOTS = 4  # independent partial results: the latency of an addition

_COMBINE: dict[str, Callable[[Any, Any], Any]] = {"fadd": lambda a, b: a + b, "fmax": T.max, "fmin": T.min}


class Partials:
    """Sixteen lanes of a partial result in each of ``SLOTS`` registers; allocated where it is constructed, float32."""

    def __init__(self) -> None:
        self.kind = ""
        self.registers = [register("float32", LANES) for _ in range(SLOTS)]

    def begin(self, kind: str, value: float) -> None:
        """Start a reduction from ``value`` in every lane: a sum (``fadd``), a maximum (``fmax``) or a minimum (``fmin``)."""
        self.kind = kind
        for kept in self.registers:
            store(kept, splat(value), ramp(0))

    def take(self, value: Expression, slot: int) -> None:
        """Reduce sixteen lanes into the register of the slot that ``each_vector`` names."""
        kept = self.registers[slot]
        store(kept, _COMBINE[self.kind](kept[ramp(0)], value), ramp(0))

    def result(self) -> Expression:
        """Return the reduction of all lanes of all slots as a scalar."""
        combine, parts = _COMBINE[self.kind], [kept[ramp(0)] for kept in self.registers]
        return fold(combine(combine(parts[0], parts[1]), combine(parts[2], parts[3])), combine)

"""Reductions along a row that keep four vectors in flight, so that no step waits for the one before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.backends.cpu.kernels.registers import LANES, Expression, local, ramp, reduce, splat, store
from tvm.tirx.script.builder import ir as T

SLOTS = 4  # independent partial results: the latency of an addition

_COMBINE: dict[str, Callable[[Any, Any], Any]] = {"fadd": lambda a, b: a + b, "fmax": T.max, "fmin": T.min}


class Partials:
    """Sixteen lanes of a partial result in each of ``SLOTS`` registers; allocated where it is constructed, float32."""

    def __init__(self) -> None:
        self.kind = ""
        self.registers = local(SLOTS * LANES)

    def begin(self, kind: str, value: float) -> None:
        """Start a reduction from ``value`` in every lane; kind is a float one of ``registers.reduce``."""
        self.kind = kind
        for slot in range(SLOTS):
            store(self.registers, splat(value), ramp(slot * LANES))

    def take(self, value: Expression, slot: int) -> None:
        """Reduce sixteen lanes into the register of the slot that ``each_vector`` names."""
        lanes = ramp(slot * LANES)
        store(self.registers, _COMBINE[self.kind](self.registers[lanes], value), lanes)

    def result(self) -> Expression:
        """Return the reduction of all lanes of all slots as a scalar."""
        combine, parts = _COMBINE[self.kind], [self.registers[ramp(slot * LANES)] for slot in range(SLOTS)]
        return reduce(self.kind, combine(combine(parts[0], parts[1]), combine(parts[2], parts[3])))

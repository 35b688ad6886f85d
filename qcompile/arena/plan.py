"""A plan of an arena: which bytes each value has, what lives at each step, and which step needs most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qcompile.arena.work import Work
from qcompile.errors import Refused


@dataclass(frozen=True)
class Span:
    """A value (or the scratch of a step) in the arena: its bytes ``start`` to ``stop`` are its own from step ``first`` to ``last``."""

    name: str
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Where everything lies.

    Attributes:
        work: what was planned.
        offsets: of each value that is used, in bytes.
        scratch: offset of each step's scratch, by the number of the step.
        bytes: of the arena.
        needed: the most that lives at one step, less what may overlap: no plan of this order is smaller.
        proven: no plan of this order of steps is smaller.
    """

    work: Work
    offsets: dict[int, int]
    scratch: dict[int, int]
    bytes: int
    needed: int
    proven: bool

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """All values and scratch, by their first step and offset."""
        lifetimes = self.work.lifetimes()
        found = [Span(self.work.names[v], at, at + self.work.sizes[v], *lifetimes[v]) for v, at in self.offsets.items()]
        for number, at in self.scratch.items():
            step = self.work.steps[number]
            found.append(Span(f"scratch of {step.name}", at, at + step.scratch, number, number))
        return tuple(sorted(found, key=lambda span: (span.first, span.start, span.name)))

    def living(self, number: int) -> tuple[Span, ...]:
        """Return what lives while a step runs, lowest first."""
        return tuple(sorted((s for s in self.spans if s.first <= number <= s.last), key=lambda s: (s.start, s.stop)))

    def reached(self, number: int) -> int:
        """Return the highest byte that belongs to anything while a step runs."""
        return max((span.stop for span in self.living(number)), default=0)

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Bytes that belong to something while each step runs; what overlaps counts once."""
        return tuple(_covered(self.living(number)) for number in range(len(self.work.steps)))

    @property
    def peak(self) -> int:
        """The number of the step that needs most bytes, the first of them."""
        return max(range(len(self.used)), key=lambda number: (self.used[number], -number), default=0)


def plan_work(work: Work, *, alignment: int = 1, exact: bool = False) -> Plan:
    """Return places for the values and the scratch of a work whose steps run in their order.

    Args:
        work: what is to be done.
        alignment: every offset is a multiple of so many bytes, and so is the arena.
        exact: search for the smallest arena where it is not proven at once, see ``place``.
    """
    blocks = work.blocks(alignment)
    placement, owners = blocks.place(exact=exact), blocks.owners
    offsets = {number: at * alignment for (kind, number), at in zip(owners, placement.offsets, strict=True) if kind == "value"}
    scratch = {number: at * alignment for (kind, number), at in zip(owners, placement.offsets, strict=True) if kind == "scratch"}
    return Plan(work, offsets, scratch, placement.size * alignment, placement.needed * alignment, placement.proven)


def require_fit(plan: Plan, limit: int, *, way_out: str = "") -> None:
    """Raise Refused where a plan takes more than ``limit`` bytes; it names the step that needs most, what lives then and what would fit."""
    if plan.bytes <= limit:
        return
    living = ", ".join(f"{span.name} {span.stop - span.start}" for span in sorted(plan.living(plan.peak), key=lambda s: s.start - s.stop))
    raise Refused(
        f"the arena takes {plan.bytes} bytes, the limit is {limit}: at this operator {plan.used[plan.peak]} bytes live ({living})",
        node=plan.work.steps[plan.peak].name,
        way_out=way_out or f"{plan.bytes} bytes would fit",
    )


def _covered(spans: tuple[Span, ...]) -> int:
    """Return how many bytes lie in at least one of the spans, which stand lowest first."""
    total = end = 0
    for span in spans:
        total += max(0, span.stop - max(span.start, end))
        end = max(end, span.stop)
    return total

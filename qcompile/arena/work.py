"""What a model does, as its memory sees it: steps that read and write values of so many bytes.

    Work(names=("a", "b"), sizes=(100, 50), steps=(Step("first", (), (0,)), Step("second", (0,), (1,))), kept=frozenset({1}))

It says nothing of operators, so that it serves graphs (``from_graph``) and sequences of kernels alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from qcompile.arena.offsets import Block, Placement, needed, place


@dataclass(frozen=True)
class Overlap:
    """A step may write a value over one that it reads, as long as the value written starts ``lead`` bytes before the value read.

    The step reads ``read`` for the last time and works from its front to its back: when it writes byte w of ``written`` it needs no byte of
    ``read`` before w - lead. ``overlap`` derives leads of kernels. A lead of 0 lets equal sizes share one place; a negative one lets the
    result start behind the start of what is read. None is for a kernel that works in another order and may write over what it reads in
    place: there the result starts where that starts, and takes its place wherever it is.
    """

    read: int
    written: int
    lead: int | None


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        name: of the operator, for messages.
        reads: values, each as often as it is read.
        writes: values; one value may be written by several steps, each a part of it.
        scratch: bytes that are its own while it runs.
        overlaps: which results may overlap what is read.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    scratch: int = 0
    overlaps: tuple[Overlap, ...] = ()


@dataclass(frozen=True)
class Work:
    """Steps in order, and the values between them.

    Attributes:
        names: of each value.
        sizes: of each value, in bytes.
        steps: in order.
        given: values that hold something before the first step.
        kept: values that are read after the last step.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    given: frozenset[int] = field(default_factory=frozenset)
    kept: frozenset[int] = field(default_factory=frozenset)

    def ordered(self, order: Iterable[int]) -> Work:
        """Return the same work with its steps in another order."""
        return replace(self, steps=tuple(self.steps[i] for i in order))

    def without_overlaps(self) -> Work:
        """Return the same work where nothing may overlap."""
        return replace(self, steps=tuple(replace(step, overlaps=()) for step in self.steps))

    def only(self, values: Collection[int]) -> Work:
        """Return the same steps as if there were no other values than these; numbers stay."""
        steps = (
            replace(
                step,
                reads=tuple(v for v in step.reads if v in values),
                writes=tuple(v for v in step.writes if v in values),
                overlaps=tuple(o for o in step.overlaps if o.read in values and o.written in values),
            )
            for step in self.steps
        )
        return replace(self, steps=tuple(steps))

    def lifetimes(self) -> dict[int, tuple[int, int]]:
        """Return the first and the last step of every value that is used; what is given lives from the first step on."""
        found: dict[int, tuple[int, int]] = {}
        for number, step in enumerate(self.steps):
            for value in (*step.reads, *step.writes):
                found[value] = (found.get(value, (number, number))[0], number)
        for value in self.given & (self.kept | found.keys()):
            found[value] = (0, found.get(value, (0, 0))[1])
        for value in self.kept & found.keys():
            found[value] = (found[value][0], len(self.steps) - 1)
        return found

    def overlaps(self) -> list[Overlap]:
        """Return the overlaps that hold in this order of steps: what is read is not needed later, what is written is new."""
        lifetimes = self.lifetimes()
        return [
            overlap
            for number, step in enumerate(self.steps)
            for overlap in step.overlaps
            if lifetimes[overlap.read][1] == number
            and overlap.read not in self.kept
            and lifetimes[overlap.written][0] == number
            and overlap.written not in self.given
            and (*step.reads, *step.writes).count(overlap.read) == 1
            and (*step.reads, *step.writes).count(overlap.written) == 1
        ]

    def blocks(self, alignment: int) -> Blocks:
        """Return the blocks to place, in units of ``alignment`` bytes."""
        lifetimes = self.lifetimes()
        owners = [("value", value) for value in sorted(lifetimes)]
        blocks = [Block(units(self.sizes[value], alignment), *lifetimes[value]) for _, value in owners]
        number = {value: i for i, (_, value) in enumerate(owners)}
        leads: dict[tuple[int, int], int] = {}
        same: dict[int, int] = {}
        for overlap in self.overlaps():
            read, written = number[overlap.read], number[overlap.written]
            if overlap.lead is not None:
                leads[read, written] = units(overlap.lead, alignment)
            elif written not in same and read not in same.values():
                same[written] = read
        leads = {pair: lead for pair, lead in leads.items() if pair[1] not in same}
        for i, step in enumerate(self.steps):
            if step.scratch:
                owners.append(("scratch", i))
                blocks.append(Block(units(step.scratch, alignment), i, i))
        return Blocks(blocks, leads, same, owners)


@dataclass(frozen=True)
class Blocks:
    """What ``place`` is given, and what each block is: a value or the scratch of a step, by number."""

    blocks: list[Block]
    leads: dict[tuple[int, int], int]
    same: dict[int, int]
    owners: list[tuple[str, int]]

    def place(self, *, exact: bool = False) -> Placement:
        """Return where they lie."""
        return place(self.blocks, self.leads, same=self.same, exact=exact)

    def needed(self) -> int:
        """Return the most that lives at one step."""
        return needed(self.blocks, self.leads, self.same)


def units(size: int, alignment: int) -> int:
    """Return how many units of ``alignment`` bytes hold so many bytes; leads are rounded up too."""
    return -(-size // alignment)

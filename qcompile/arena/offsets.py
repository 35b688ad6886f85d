"""Offsets of blocks in one arena: blocks that live at the same time lie apart, and the arena is as small as can be.

A block lives from its ``first`` step to its ``last``. Two that live together must lie apart, but for a lead: ``leads[read, written] = l``
says that ``written`` is made while ``read`` is read for the last time, front to back, so that it may overlap it where it starts
at least l before it:

    at(written) + l <= at(read)     or     at(read) + size(read) <= at(written)

``same[written] = read`` says that it lies where ``read`` begins, and nowhere else: a kernel that goes over its input in another order may
still write over it in place.

``place`` takes the best of several greedy orders, and on request proves it or finds a better one by an integer program. The proof needs no
search where the arena is as large as what lives at one time (``needed``).

Sources: the greedy orders are those of Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference (2020), section 5; the
program is that of dynamic storage allocation with one binary for each pair of blocks that live together (Maas et al., TelaMalloc, 2022,
section 2.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REPAIRS = 32  # tries of an order, the block that reaches highest first in the next
LARGEST_PROGRAM = 600  # pairs of blocks that live together: beyond, the integer program is not tried
LARGEST_SEARCH = 20_000  # nodes of its tree; a number of nodes, not of seconds, so that every machine finds the same


@dataclass(frozen=True)
class Block:
    """So many units of memory, needed from step ``first`` to step ``last``, both included."""

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Placement:
    """Where blocks lie.

    Attributes:
        offsets: of each block, in units.
        size: of the arena: the highest end of a block.
        needed: the most that lives at one step, less what may overlap; no arena is smaller.
        proven: no placement is smaller.
    """

    offsets: tuple[int, ...]
    size: int
    needed: int
    proven: bool


def place(
    blocks: Sequence[Block],
    leads: Mapping[tuple[int, int], int] | None = None,
    *,
    same: Mapping[int, int] | None = None,
    exact: bool = False,
) -> Placement:
    """Return offsets of blocks.

    Args:
        blocks: sizes and lifetimes.
        leads: of pairs (read, written) of blocks where ``written`` begins to live at the step at which ``read`` is last used.
        same: for a block that is written, the one that is read for the last time at that step and whose place it takes.
        exact: search for the smallest arena, where the best greedy one is not proven to be it.

    Raises:
        ValueError: a lead of two blocks that meet at more than one step.
    """
    problem = _Problem(blocks, leads or {}, same or {})
    if not blocks:
        return Placement((), 0, 0, True)
    least = needed(blocks, problem.leads, problem.same)
    best: list[int] = []
    reached = 0
    for key in _ORDERS:
        offsets = problem.repaired(sorted(problem.roots, key=lambda i, key=key: (*key(problem.hulls[i]), i)), least)  # type: ignore[misc]
        size = problem.size(offsets)
        if not best or size < reached:
            best, reached = offsets, size
        if reached == least:
            break
    proven = reached == least
    if exact and not proven and len(problem.pairs) <= LARGEST_PROGRAM:
        found, proven = problem.solve(reached, least)
        if found is not None and problem.size(found) < reached:
            best, reached = found, problem.size(found)
    return Placement(tuple(best[problem.root[i]] for i in range(len(blocks))), reached, least, proven)


# The first is the one that mostly is best; the others are tried where it wastes memory.
_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.first),
    lambda b: (-b.size * (b.last - b.first + 1), b.first),
    lambda b: (b.first - b.last, -b.size),
    lambda b: (b.first, -b.size),
    lambda b: (-b.last, -b.size),
)


def needed(blocks: Sequence[Block], leads: Mapping[tuple[int, int], int], same: Mapping[int, int]) -> int:
    """Return the most that lives at one step: sizes, less the most that results can share with what is read. No arena is smaller."""
    shared: dict[int, int] = {}
    for (read, written), lead in [*leads.items(), *(((read, written), 0) for written, read in same.items())]:
        a, b = blocks[read].size, blocks[written].size
        shared[written] = shared.get(written, 0) + max(0, a + b - max(b, max(lead, 0) + a))
    change = [0] * (2 + max((block.last for block in blocks), default=0))
    saved = [0] * len(change)
    for number, block in enumerate(blocks):
        change[block.first] += block.size
        change[block.last + 1] -= block.size
        saved[block.first] += min(block.size, shared.get(number, 0))
    return max(living - less for living, less in zip(itertools.accumulate(change), saved, strict=True))


class _Problem:
    """Blocks, and for each pair that lives together how far apart they must lie."""

    def __init__(self, blocks: Sequence[Block], leads: Mapping[tuple[int, int], int], same: Mapping[int, int]) -> None:
        self.blocks, self.leads, self.same = blocks, leads, same
        for read, written in (*leads, *((read, written) for written, read in same.items())):
            if blocks[read].last != blocks[written].first:
                raise ValueError(f"blocks {read} and {written} meet at more than one step: they cannot overlap")
        self.root = [self._root(i) for i in range(len(blocks))]
        self.roots = sorted(set(self.root))
        # Of all blocks that share a place: the largest size, the first and the last step.
        self.hulls: dict[int, Block] = {}
        for root, block in zip(self.root, blocks, strict=True):
            hull = self.hulls.get(root, block)
            self.hulls[root] = Block(max(hull.size, block.size), min(hull.first, block.first), max(hull.last, block.last))
        # beside[i][j] = (d, e): either at(i) + d <= at(j) or at(j) + e <= at(i)
        self.beside: list[dict[int, tuple[int, int]]] = [{} for _ in blocks]
        for j, b in enumerate(blocks):
            for i, a in enumerate(blocks[:j]):
                if a.size and b.size and a.first <= b.last and b.first <= a.last and self.root[i] != self.root[j]:
                    self._keep_apart(self.root[i], self.root[j], self._distance(i, j), self._distance(j, i))
        self.pairs = [(i, j) for i, others in enumerate(self.beside) for j in others if i < j]

    def _root(self, number: int) -> int:
        while number in self.same:
            number = self.same[number]
        return number

    def _keep_apart(self, i: int, j: int, ahead: int, behind: int) -> None:
        before, after = self.beside[i].get(j, (ahead, behind))
        ahead, behind = max(ahead, before), max(behind, after)
        self.beside[i][j], self.beside[j][i] = (ahead, behind), (behind, ahead)

    def _distance(self, before: int, after: int) -> int:
        """Return how far ``before`` must start before ``after`` to lie before it."""
        size = self.blocks[before].size
        return min(size, self.leads.get((after, before), size))

    def size(self, offsets: Sequence[int]) -> int:
        return max(offsets[i] + hull.size for i, hull in self.hulls.items())

    # ---- greedy -----------------------------------------------------------------------------------------------------------

    def repaired(self, order: list[int], least: int) -> list[int]:
        """Return offsets of an order: each block at the lowest free place; the block that reaches highest goes first, and again."""
        best: list[int] = []
        for _ in range(min(REPAIRS, len(order))):
            offsets = self._lowest(order)
            if not best or self.size(offsets) < self.size(best):
                best = offsets
            if self.size(best) == least:
                break
            highest = max(order, key=lambda i: offsets[i] + self.hulls[i].size)
            order = [highest, *(i for i in order if i != highest)]
        return best

    def _lowest(self, order: Sequence[int]) -> list[int]:
        offsets = [-1] * len(self.blocks)
        for i in order:
            taken = [(offsets[j] - ahead, offsets[j] + behind) for j, (ahead, behind) in self.beside[i].items() if offsets[j] >= 0]
            at = 0
            for low, high in sorted(taken):
                if low < at < high:
                    at = high
            offsets[i] = at
        return offsets

    # ---- exact ------------------------------------------------------------------------------------------------------------

    def solve(self, most: int, least: int) -> tuple[list[int] | None, bool]:
        """Return offsets of an arena smaller than ``most``, None where none was found, and whether it is proven that none is smaller.

        Minimise H over offsets x and binaries y, one for each pair: ``x_i + d <= x_j + M (1 - y)``, ``x_j + e <= x_i + M y``,
        ``x_i + size_i <= H``, ``least <= H <= most - 1``. What the solver is asked for are the binaries: offsets follow from them in whole
        numbers.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        n, height, top = len(self.blocks), len(self.blocks), most - 1
        sizes = [self.hulls[i].size if i in self.hulls else 0 for i in range(n)]
        if max(sizes) > top:
            return None, True
        rows: list[tuple[int, int, float]] = []
        limits: list[float] = []

        def at_most(terms: Sequence[tuple[int, float]], limit: float) -> None:
            rows.extend((len(limits), column, factor) for column, factor in terms)
            limits.append(limit)

        for i, size in enumerate(sizes):
            at_most([(i, 1), (height, -1)], -size)
        for k, (i, j) in enumerate(self.pairs):
            ahead, behind = self.beside[i][j]
            most_ahead = top - sizes[i] + ahead  # the largest x_i + d - x_j
            most_behind = top - sizes[j] + behind
            at_most([(i, 1), (j, -1), (n + 1 + k, most_ahead)], most_ahead - ahead)
            at_most([(j, 1), (i, -1), (n + 1 + k, -most_behind)], -behind)
        columns = n + 1 + len(self.pairs)
        row, column, factor = zip(*rows, strict=True)
        matrix = csr_array((factor, (row, column)), shape=(len(limits), columns))
        lowest, highest = np.zeros(columns), np.ones(columns)
        highest[:n] = [top - size for size in sizes]
        lowest[height], highest[height] = least, top
        result = milp(
            np.eye(1, columns, height)[0],
            integrality=np.r_[np.zeros(n + 1), np.ones(len(self.pairs))],
            bounds=Bounds(lowest, highest),
            constraints=LinearConstraint(matrix, -np.inf, np.array(limits)),
            options={"node_limit": LARGEST_SEARCH, "mip_rel_gap": 0.0},
        )
        if result.status == 2:  # infeasible: the greedy arena is the smallest
            return None, True
        if result.x is None:
            return None, False
        return self._lowest_in(np.asarray(result.x[n + 1 :]) > 0.5), result.status == 0

    def _lowest_in(self, ahead: np.ndarray) -> list[int] | None:
        """Return the lowest offsets where ``ahead`` says of each pair which lies before the other (longest paths)."""
        apart = [
            (i, j, self.beside[i][j][0]) if first else (j, i, self.beside[i][j][1]) for (i, j), first in zip(self.pairs, ahead, strict=True)
        ]
        offsets = [0] * len(self.blocks)
        for _ in range(len(self.blocks) + 1):
            moved = False
            for before, after, distance in apart:
                if offsets[before] + distance > offsets[after]:
                    offsets[after], moved = offsets[before] + distance, True
            if not moved:
                return offsets
        return None

"""An order of steps in which little lives at one time.

What lives after some steps depends only on which steps these are, not on their order. So orders are paths through sets of finished
steps, and the best path is the one whose worst step needs least: a shortest-path search where a path costs its most expensive step. A chain
has as many sets as steps; a net with branches has more, and where they are too many the best of a few greedy orders is taken.

Sources: the search over sets is that of Ahn et al., Ordering Chaos: Memory-Aware Scheduling of Irregularly Wired Neural Networks for Edge
Devices (2020), section 3.1; their adaptive budget is the bound of ``_search``: no set is entered that costs more than the best order known.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from qcompile.arena.work import Work

LARGEST_SEARCH = 20_000  # sets of finished steps that are looked at


@dataclass(frozen=True)
class Order:
    """An order of steps.

    Attributes:
        steps: their numbers, in order.
        peak: the most bytes that live at one step, less what may overlap.
        proven: no order has a smaller peak.
    """

    steps: tuple[int, ...]
    peak: int
    proven: bool


def order_steps(work: Work, *, largest_search: int = LARGEST_SEARCH) -> Order:
    """Return the order of steps with the smallest peak that was found; the order as it is where none is better.

    A step stays behind the steps that write what it reads and stand before it now.
    """
    problem = _Problem(work)
    best = tuple(range(len(work.steps)))
    peak = problem.peak(best)
    for choice in (problem.after, problem.during):
        order = problem.greedy(choice)
        if problem.peak(order) < peak:
            best, peak = order, problem.peak(order)
    found, proven = problem.search(peak, largest_search)
    return Order(found, problem.peak(found), proven) if found else Order(best, peak, proven)


class _Problem:
    """Sets of steps and of values as whole numbers: bit i is step or value i."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.all = (1 << len(work.steps)) - 1
        self.users = [0] * len(work.sizes)  # steps that read or write a value
        self.writers = [0] * len(work.sizes)
        self.before = [0] * len(work.steps)  # steps that must be finished
        for number, step in enumerate(work.steps):
            for value in step.reads:
                self.before[number] |= self.writers[value]
            for value in (*step.reads, *step.writes):
                self.users[value] |= 1 << number
            for value in step.writes:
                self.writers[value] |= 1 << number

    def _lives(self, value: int, done: int) -> bool:
        """Say whether a value holds something that is needed after the finished steps."""
        begun = value in self.work.given or bool(self.users[value] & done)
        return begun and (value in self.work.kept or bool(self.users[value] & ~done))

    def after(self, done: int) -> int:
        """Return how many bytes live between steps."""
        return sum(size for value, size in enumerate(self.work.sizes) if self._lives(value, done))

    def during(self, done: int, number: int) -> int:
        """Return how many bytes live while a step runs: what lives before it, what it writes, its scratch, less what may overlap."""
        step = self.work.steps[number]
        new = {value for value in step.writes if not self._lives(value, done)}
        total = self.after(done) + sum(self.work.sizes[value] for value in new) + step.scratch
        shared: dict[int, int] = {}
        for overlap in step.overlaps:
            dies = overlap.read not in self.work.kept and not self.users[overlap.read] & ~done & ~(1 << number)
            once = (*step.reads, *step.writes).count(overlap.read) == 1
            if dies and once and overlap.written in new and self._lives(overlap.read, done):
                a, b = self.work.sizes[overlap.read], self.work.sizes[overlap.written]
                shared[overlap.written] = shared.get(overlap.written, 0) + max(0, a + b - max(b, max(overlap.lead or 0, 0) + a))
        return total - sum(min(self.work.sizes[value], most) for value, most in shared.items())

    def peak(self, order: tuple[int, ...]) -> int:
        done, most = 0, 0
        for number in order:
            most = max(most, self.during(done, number))
            done |= 1 << number
        return most

    def ready(self, done: int) -> list[int]:
        return [i for i in range(len(self.work.steps)) if not done >> i & 1 and not self.before[i] & ~done]

    def greedy(self, cost: Callable[..., int]) -> tuple[int, ...]:
        """Return the order that takes, of the steps that may run, the one after which (or during which) least lives."""
        order: list[int] = []
        done = 0
        while done != self.all:
            number = min(self.ready(done), key=lambda i: (cost(done | 1 << i) if cost == self.after else cost(done, i), i))
            order.append(number)
            done |= 1 << number
        return tuple(order)

    def search(self, best: int, largest: int) -> tuple[tuple[int, ...] | None, bool]:
        """Return an order with the smallest peak below ``best``, None where there is none, and whether that is proven."""
        start = self.after(0)
        # By peak, then most steps finished, then the order in which sets were found: the first complete set has the smallest peak.
        queue: list[tuple[int, int, int, int]] = [(start, 0, 0, 0)]
        came: dict[int, tuple[int, int]] = {}
        cost = {0: start}
        finished: set[int] = set()
        while queue:
            peak, _, _, done = heapq.heappop(queue)
            if done in finished:
                continue
            if done == self.all:
                return self._path(came), True
            if len(finished) == largest:
                return None, False
            finished.add(done)
            for number in self.ready(done):
                reached, needs = done | 1 << number, max(peak, self.during(done, number))
                if needs < best and needs < cost.get(reached, best):
                    cost[reached], came[reached] = needs, (done, number)
                    heapq.heappush(queue, (needs, -reached.bit_count(), number, reached))
        return None, True

    def _path(self, came: dict[int, tuple[int, int]]) -> tuple[int, ...]:
        order: list[int] = []
        done = self.all
        while done:
            done, number = came[done]
            order.append(number)
        return tuple(reversed(order))

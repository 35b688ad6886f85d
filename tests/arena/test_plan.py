"""Orders keep what steps depend on and need no more; a plan in one arena of bytes computes what memory apart computes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.arena.order import Order, order_steps
from qcompile.arena.plan import Plan, plan_work, require_fit
from qcompile.arena.work import Overlap, Step, Work
from qcompile.errors import Refused


@st.composite
def works(draw: Any, largest: int = 7) -> Work:
    """Steps that read some of the values made before and make one or two of their own; a few read what was given."""
    sizes: list[int] = [draw(st.integers(1, 9))]
    steps: list[Step] = []
    for number in range(draw(st.integers(1, largest))):
        reads = tuple(draw(st.lists(st.integers(0, len(sizes) - 1), max_size=3, unique=True)))
        writes = []
        for _ in range(draw(st.integers(1, 2))):
            writes.append(len(sizes))
            sizes.append(draw(st.integers(1, 9)))
        overlaps = ()
        if reads and draw(st.booleans()):
            overlaps = (Overlap(reads[0], writes[0], draw(st.integers(-3, 6))),)
        steps.append(Step(f"step{number}", reads, tuple(writes), draw(st.integers(0, 3)), overlaps))
    kept = frozenset(draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1, max_size=2)))
    return Work(tuple(f"v{i}" for i in range(len(sizes))), tuple(sizes), tuple(steps), frozenset({0}), kept)


def legal(work: Work, order: tuple[int, ...]) -> bool:
    place = {number: i for i, number in enumerate(order)}
    writers = {value: number for number, step in enumerate(work.steps) for value in step.writes}
    return all(place[writers[value]] < place[i] for i, step in enumerate(work.steps) for value in step.reads if value in writers)


@given(works())
def test_the_order_is_legal_and_needs_no_more(work: Work) -> None:
    found = order_steps(work)
    assert sorted(found.steps) == list(range(len(work.steps)))
    assert legal(work, found.steps)
    assert found.peak <= plan_work(work).needed
    assert found.peak == plan_work(work.ordered(found.steps)).needed, "the peak is that of the plan"
    assert order_steps(work) == found


@given(works(largest=5))
def test_the_order_needs_least_of_all(work: Work) -> None:
    orders = [order for order in itertools.permutations(range(len(work.steps))) if legal(work, order)]
    found = order_steps(work)
    assert found.proven
    assert found.peak == min(plan_work(work.ordered(order)).needed for order in orders)


@given(works())
def test_without_a_search_the_order_is_still_no_worse(work: Work) -> None:
    found = order_steps(work, largest_search=0)
    assert legal(work, found.steps)
    assert order_steps(work).peak <= found.peak <= plan_work(work).needed


def branches(count: int) -> Work:
    """Branches of two steps, each first one making 10 bytes and the second 1 of them, written breadth first, then joined."""
    names = [f"{kind}{i}" for kind in ("wide", "narrow") for i in range(count)]
    steps = [Step(f"expand{i}", (), (i,)) for i in range(count)] + [Step(f"shrink{i}", (i,), (count + i,)) for i in range(count)]
    steps.append(Step("join", tuple(range(count, 2 * count)), (2 * count,)))
    return Work((*names, "joined"), (*[10] * count, *[1] * count, 1), tuple(steps), kept=frozenset({2 * count}))


def test_branches_are_finished_one_after_another() -> None:
    work = branches(4)
    assert plan_work(work).needed == 41
    assert order_steps(work) == Order((0, 4, 1, 5, 2, 6, 3, 7, 8), 14, True)


def test_many_branches_are_ordered_without_a_search() -> None:
    found = order_steps(branches(40), largest_search=50)
    assert found.peak == 10 + 1 + 39
    assert order_steps(branches(40)).peak == 10 + 1 + 39


def test_a_chain_stays_as_it_is() -> None:
    work = Work(("a", "b", "c"), (1, 2, 3), tuple(Step(str(i), (i - 1,) if i else (), (i,)) for i in range(3)), kept=frozenset({2}))
    assert order_steps(work) == Order((0, 1, 2), 5, True)


def test_parts_of_a_value_may_come_in_any_order_but_before_what_reads_it() -> None:
    """Steps 1 and 3 each write a half of value 2, from a value of their own."""
    steps = (Step("a", (), (0,)), Step("b", (), (1,)), Step("left", (0,), (2,)), Step("right", (1,), (2,)), Step("use", (2,), (3,)))
    work = Work(("a", "b", "whole", "end"), (10, 10, 4, 1), steps, kept=frozenset({3}))
    found = order_steps(work)
    assert found.peak == 14
    assert found.steps in ((0, 2, 1, 3, 4), (1, 3, 0, 2, 4))


def run(plan: Plan, filler: int) -> dict[int, bytes]:
    """Run the steps in one arena; each writes bytes that depend on every byte it reads, as late as an overlap with a lead allows."""
    work = plan.work
    arena = np.full(plan.bytes, filler, np.uint8)

    def view(value: int) -> np.ndarray:
        return arena[plan.offsets[value] : plan.offsets[value] + work.sizes[value]]

    for value in work.given:
        view(value)[:] = np.arange(work.sizes[value]) + 1
    for number, step in enumerate(work.steps):
        if number in plan.scratch:
            arena[plan.scratch[number] : plan.scratch[number] + step.scratch] = 99
        leads = {(o.read, o.written): o.lead for o in step.overlaps}
        results = [(value, at) for value in step.writes for at in range(work.sizes[value])]
        seen: dict[tuple[int, int], int] = {}

        def byte(value: int, at: int) -> int:
            return int(view(value)[at])

        for value, at in results:
            total = 17 * number + 31 * value + at
            for read in step.reads:
                # What a lead says: before byte w is written everything before w + 1 - lead has been read, into registers.
                lead = leads.get((read, value), 0)
                for i in range(work.sizes[read]):
                    if (read, i) not in seen and ((read, value) not in leads or i < at + 1 - lead):
                        seen[read, i] = byte(read, i)
                total += sum((i + 3) * (seen[read, i] if (read, i) in seen else byte(read, i)) for i in range(work.sizes[read]))
            view(value)[at] = total % 256
    return {value: view(value).tobytes() for value in work.kept if value in plan.offsets}


def apart(work: Work) -> Plan:
    """Return a plan in which nothing shares a byte with anything."""
    offsets, end = {}, 0
    for value in work.lifetimes():
        offsets[value], end = end, end + work.sizes[value]
    return Plan(work, offsets, {}, end, end, False)


@given(works(), st.sampled_from([1, 4]), st.booleans())
def test_a_plan_computes_what_memory_apart_computes(work: Work, alignment: int, exact: bool) -> None:
    plan = plan_work(work, alignment=alignment, exact=exact)
    assert run(plan, 0) == run(plan, 255) == run(apart(work), 7)
    assert all(at % alignment == 0 for at in (*plan.offsets.values(), *plan.scratch.values()))
    assert all(span.stop <= plan.bytes for span in plan.spans)
    assert plan.bytes >= plan.needed >= max(plan.used, default=0) - alignment * len(plan.spans)


@given(works())
def test_an_ordered_plan_computes_the_same(work: Work) -> None:
    ordered = work.ordered(order_steps(work).steps)
    names = [step.name for step in work.steps]
    # The bytes depend on a step's number: give steps the numbers that they had.
    assert sorted(step.name for step in ordered.steps) == sorted(names)
    assert plan_work(ordered, exact=True).bytes <= plan_work(work, exact=True).bytes or not plan_work(ordered, exact=True).proven


def chain(overlaps: bool = False) -> Work:
    leads = [(Overlap(i - 1, i, 0),) if overlaps and i else () for i in range(3)]
    steps = tuple(Step(f"conv{i}", (i - 1,) if i else (), (i,), 10 if i == 1 else 0, leads[i]) for i in range(3))
    return Work(("a", "b", "c"), (100, 100, 50), steps, kept=frozenset({2}))


def test_timeline_of_a_chain() -> None:
    plan = plan_work(chain())
    assert (plan.bytes, plan.needed, plan.proven, plan.peak, plan.used) == (210, 210, True, 1, (100, 210, 150))
    assert [(span.name, span.first, span.last) for span in plan.spans] == [
        ("a", 0, 1), ("b", 1, 2), ("scratch of conv1", 1, 1), ("c", 2, 2),
    ]  # fmt: skip
    assert {span.name for span in plan.living(1)} == {"a", "b", "scratch of conv1"}


def test_overlaps_make_it_smaller() -> None:
    plan = plan_work(chain(overlaps=True))
    assert (plan.bytes, plan.used) == (110, (100, 110, 100))
    assert plan_work(chain(overlaps=True).without_overlaps()).bytes == 210


def test_what_is_read_again_or_kept_is_not_written_over() -> None:
    once = (Step("a", (), (0,)), Step("b", (0,), (1,), overlaps=(Overlap(0, 1, 0),)))
    names, sizes = ("x", "y", "z"), (10, 10, 10)
    assert plan_work(Work(names, sizes, once, kept=frozenset({1}))).bytes == 10
    assert plan_work(Work(names, sizes, once, kept=frozenset({0, 1}))).bytes == 20
    assert plan_work(Work(names, sizes, (*once, Step("c", (0, 1), (2,))), kept=frozenset({2}))).bytes == 30
    assert plan_work(Work(names, sizes, (once[0], Step("b", (0, 0), (1,), overlaps=once[1].overlaps)), kept=frozenset({1}))).bytes == 20


def test_a_limit_that_is_too_small_names_the_operator() -> None:
    plan = plan_work(chain())
    require_fit(plan, 210)
    with pytest.raises(Refused) as refusal:
        require_fit(plan, 209)
    assert str(refusal.value) == (
        "conv1: the arena takes 210 bytes, the limit is 209: at this operator 210 bytes live (a 100, b 100, scratch of conv1 10); "
        "210 bytes would fit"
    )

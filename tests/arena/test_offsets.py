"""Blocks that live together lie apart (but for a lead), no arena is smaller than what lives at one time, and exact is exact."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.arena.offsets import Block, Placement, place


@st.composite
def problems(draw: Any, largest: int = 12) -> tuple[list[Block], dict[tuple[int, int], int]]:
    """Blocks of up to six steps, some of which begin where others end, with a lead."""
    blocks = []
    for _ in range(draw(st.integers(1, largest))):
        first = draw(st.integers(0, 6))
        blocks.append(Block(draw(st.integers(0, 9)), first, first + draw(st.integers(0, 3))))
    leads = {}
    for read, written in itertools.permutations(range(len(blocks)), 2):
        if blocks[read].last == blocks[written].first and draw(st.booleans()):
            leads[read, written] = draw(st.integers(-8, 12))
    return blocks, leads


def check(blocks: list[Block], leads: dict[tuple[int, int], int], placed: Placement) -> None:
    for (i, a), (j, b) in itertools.permutations(enumerate(blocks), 2):
        if not (a.first <= b.last and b.first <= a.last and a.size and b.size):
            continue
        x, y = placed.offsets[i], placed.offsets[j]
        apart = x + a.size <= y or y + b.size <= x
        follows = (i, j) in leads and y + leads[i, j] <= x
        precedes = (j, i) in leads and x + leads[j, i] <= y
        assert apart or follows or precedes, f"{i} and {j} share bytes"
    assert min(placed.offsets) >= 0
    assert placed.size == max(x + block.size for x, block in zip(placed.offsets, blocks, strict=True))
    assert placed.needed <= placed.size


@given(problems())
def test_greedy_is_sound(problem: tuple[list[Block], dict[tuple[int, int], int]]) -> None:
    placed = place(*problem)
    check(*problem, placed)
    assert placed.proven == (placed.size == placed.needed)
    assert place(*problem) == placed, "the same blocks get the same places"


@given(problems())
@settings(max_examples=60)
def test_exact_is_sound_and_no_larger(problem: tuple[list[Block], dict[tuple[int, int], int]]) -> None:
    exact = place(*problem, exact=True)
    check(*problem, exact)
    assert exact.proven
    assert exact.size <= place(*problem).size


def smallest(blocks: list[Block], leads: dict[tuple[int, int], int]) -> int:
    """Return the smallest arena, by trying every offset of every block."""
    order = range(len(blocks))

    def fits(offsets: list[int], i: int, at: int) -> bool:
        for j, other in enumerate(offsets):
            a, b = blocks[i], blocks[j]
            if a.first <= b.last and b.first <= a.last and a.size and b.size:
                ahead = at + min(a.size, leads.get((j, i), a.size)) <= other
                behind = other + min(b.size, leads.get((i, j), b.size)) <= at
                if not (ahead or behind):
                    return False
        return True

    def possible(offsets: list[int], top: int) -> bool:
        i = len(offsets)
        return i == len(order) or any(
            fits(offsets, i, at) and possible([*offsets, at], top) for at in range(top - blocks[i].size + 1)
        )  # fmt: skip

    return next(top for top in itertools.count(max(b.size for b in blocks)) if possible([], top))


@given(problems(largest=5))
@settings(max_examples=60)
def test_exact_is_the_smallest(problem: tuple[list[Block], dict[tuple[int, int], int]]) -> None:
    assert place(*problem, exact=True).size == smallest(*problem)


def test_the_program_finds_what_no_greedy_order_finds() -> None:
    """Eight blocks, found among random ones."""
    blocks = [Block(*b) for b in ((2, 2, 5), (5, 5, 5), (4, 1, 4), (5, 4, 7), (2, 2, 4), (4, 2, 5), (1, 4, 7), (4, 0, 0))]
    assert (place(blocks).size, place(blocks).proven) == (19, False)
    exact = place(blocks, exact=True)
    check(blocks, {}, exact)
    assert (exact.size, exact.proven) == (18, True)


def test_equal_sizes_share_a_place_with_a_lead_of_nothing() -> None:
    chain = [Block(5, i, i + 1) for i in range(4)]
    leads = {(i, i + 1): 0 for i in range(3)}
    assert place(chain, leads) == Placement((0, 0, 0, 0), 5, 5, True)
    assert place(chain).size == 10


def test_a_lead_is_kept() -> None:
    placed = place([Block(10, 0, 1), Block(10, 1, 2)], {(0, 1): 3})
    assert placed.size == placed.needed == 13
    assert placed.offsets == (3, 0)


def test_nothing_to_place() -> None:
    assert place([]) == Placement((), 0, 0, True)


def test_a_lead_of_blocks_that_live_on_is_refused() -> None:
    with pytest.raises(ValueError, match="meet at more than one step"):
        place([Block(4, 0, 3), Block(4, 1, 3)], {(0, 1): 0})

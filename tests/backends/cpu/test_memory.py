"""Constants in one piece of memory: equal to what they were, on addresses that kernels may load from, in large pages."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from qcompile.backends.cpu import memory

_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randint(-128, 128, (3, 5), dtype=torch.int8),
        torch.randn(3 << 19),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.randn(6, 4).t(),
        torch.empty(0, 3),
        torch.tensor([True, False, True]),
        torch.randn(2, 7, requires_grad=True),
    ]


def test_placed_tensors_lie_behind_one_another_and_keep_their_values() -> None:
    given = _tensors()
    placed = memory.place(given)
    for before, after in zip(given, placed, strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert torch.equal(after, before)
        assert after.is_contiguous()
        assert after.data_ptr() % memory.ALIGNMENT == 0
    filled = [tensor for tensor in placed if tensor.numel()]
    for one, other in itertools.pairwise(filled):
        size = one.numel() * one.element_size()
        assert other.data_ptr() == one.data_ptr() + -(-size // memory.ALIGNMENT) * memory.ALIGNMENT


def test_few_bytes_stay_where_they_are() -> None:
    given = [memory.aligned(torch.randn(8, 8)), memory.aligned(torch.randn(5))]
    assert [tensor.data_ptr() for tensor in memory.place(given)] == [tensor.data_ptr() for tensor in given]
    assert memory.place([]) == []


@pytest.mark.skipif(not _PAGES.exists() or "[never]" in _PAGES.read_text(), reason="this system gives no large pages")
def test_placed_tensors_lie_in_large_pages() -> None:
    placed = memory.place([torch.ones(16 << 20, dtype=torch.uint8)])
    assert _large_bytes(placed[0].data_ptr() + (8 << 20)) >= 8 << 20


def _large_bytes(address: int) -> int:
    """Return the bytes in large pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0

"""Memory in large pages where the system has them.

A kernel that reads weights from memory spends a part of its time on finding pages of 4 KiB, and the processor's own reading ahead ends
with each of them. On one machine two threads read 38 GB/s from pages of 2 MiB, 32 from small ones. NumPy asks Linux for large pages
(``madvise``) for arrays from 4 MiB on; where the system refuses, or another system runs, they are ordinary memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes; kernels load whole 512-bit vectors, and TVM refuses less
LARGE = 4 << 20  # bytes: less than this has no large pages

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def allocate(size: int) -> Bytes:
    """Return ``size`` new bytes on an address that is a multiple of 64."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size]


def pieces(sizes: Sequence[int]) -> Iterator[Bytes]:
    """Yield new memory of each of these sizes in bytes, all in one piece, each on an address that is a multiple of 64."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    memory = allocate(starts[-1])
    for start, size in zip(starts, sizes, strict=False):
        yield memory[start : start + size]

"""How far results may overlap what is read: leads of kernels that work from front to back.

A kernel that runs in order needs less and less of its input while it writes more and more of its result. Let W(t) be the bytes of the result
that are written once step t is done, and R(t) the first byte of the input that a step after t, or a later write of step t, still reads. No
needed byte is written over where

    at(result) + W(t) <= at(input) + R(t)  for all t,      that is      at(result) + lead <= at(input)      with lead = max (W(t) - R(t))

W(t) and R(t) are counted for blocks of work within which any order is allowed: an element, a pixel with all its channels, or a row. A block
that reads all it needs before it writes (into registers, or scratch) has R(t) where the *next* block begins to read; one that writes while it
still reads has R(t) where it began itself.

Sources: MCUNet's in-place depthwise convolution (Lin et al. 2020, section 3.2) keeps a copy of what is still needed in scratch; vMCU (Zheng
et al. 2024, section 4) lets the two segments follow each other without one, as here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal


def elementwise_lead() -> int:
    """Return the lead of a kernel that reads element i before it writes element i of the same number of bytes, and none after: 0."""
    return 0


@dataclass(frozen=True)
class Windows:
    """A convolution or pooling over NHWC as its addresses see it; all in rows, columns and bytes of one picture.

    Attributes:
        size: rows and columns of the input.
        result: rows and columns of the result.
        pixel: bytes of an input pixel, all channels.
        result_pixel: bytes of a result's pixel.
        kernel: rows and columns of the window, dilation included.
        stride: down and across.
        padding: rows above and columns left of the input.
    """

    size: tuple[int, int]
    result: tuple[int, int]
    pixel: int
    result_pixel: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def bytes(self) -> int:
        return self.size[0] * self.size[1] * self.pixel

    def first_read(self, row: int, column: int) -> int:
        """Return the first byte of the input that the result's pixel (row, column), or one after it in its row, reads."""
        top = min(max(row * self.stride[0] - self.padding[0], 0), self.size[0])
        left = min(max(column * self.stride[1] - self.padding[1], 0), self.size[1])
        return min((top * self.size[1] + left) * self.pixel, self.bytes)


def windows_lead(windows: Windows, *, by: Literal["row", "pixel"] = "pixel", copied: bool = False) -> int:
    """Return the lead of a kernel that makes the pixels of a convolution or pooling in order, all channels of a pixel together.

    Args:
        windows: its geometry.
        by: what is made before anything is written over: ``pixel`` for a kernel whose loops are rows, columns, channels; ``row`` for one that
            goes over the channels of a whole row (or over blocks of its columns), which writes a row in any order.
        copied: each block has read all it needs before it writes: a pixel whose sums are all held, a 1x1 kernel with a scratch of one
            pixel. A row has where a ring of rows in scratch is filled up to the last row that it reads (``row_ring_bytes``); rows in the
            ring are needed no more.
    """
    rows, columns = windows.result
    if by == "row" and copied:
        return _ring_lead(windows)
    lead = -windows.bytes
    width = columns if by == "row" else 1
    for row, begun in itertools.product(range(rows), range(0, columns, width)):
        written = begun + width
        reads = [windows.first_read(row, begun)] if not copied else []  # the block still reads when its last byte is written
        reads += [windows.first_read(row, written)] if written < columns else []
        reads += [windows.first_read(row + 1, 0)] if row + 1 < rows else []
        if reads:
            lead = max(lead, (row * columns + written) * windows.result_pixel - min(reads))
    return lead


def row_ring_bytes(windows: Windows) -> int:
    """Return the scratch of a ring that holds as many input rows as the kernel is high."""
    return windows.kernel[0] * windows.size[1] * windows.pixel


def _ring_lead(windows: Windows) -> int:
    """Return the lead where row r is made from a ring that was filled before it with all rows up to the last that it reads."""
    rows, columns = windows.result
    lead = -windows.bytes
    for row in range(rows - 1):  # nothing is read after the ring was filled for the last
        copied = min(max(row * windows.stride[0] - windows.padding[0] + windows.kernel[0], 0), windows.size[0])
        lead = max(lead, (row + 1) * columns * windows.result_pixel - copied * windows.size[1] * windows.pixel)
    return lead

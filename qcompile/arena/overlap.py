"""How far results may overlap what is read: leads of kernels that work from front to back.

A kernel that runs in order needs less and less of its input while it writes more and more of its result. Let W(t) be the bytes of the
result that are written once step t is done, and R(t) the first byte of the input that a step after t, or a later write of step t, still
reads. No byte that is needed is written over where

    at(result) + W(t) <= at(input) + R(t)  for all t,      that is      at(result) + lead <= at(input)      with lead = max (W(t) - R(t))

W(t) and R(t) are counted for blocks of work within which any order is allowed: an element, some pixels with all their channels, a row. A
block that reads all it needs before it writes (into registers, or scratch) has R(t) where the *next* block begins to read; one that
writes while it still reads has R(t) where it began itself.

Sources: MCUNet's in-place depthwise convolution (Lin et al. 2020, section 3.2) keeps a copy of what is still needed in scratch; vMCU (Zheng
et al. 2024, section 4) lets the two segments follow each other without one, as here.
"""

from __future__ import annotations

from dataclasses import dataclass


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


def windows_lead(windows: Windows, *, block: int = 1, copied: bool = False) -> int:
    """Return the lead of a kernel that makes the pixels of a convolution or pooling in order, some at a time.

    Args:
        windows: its geometry.
        block: the most pixels that are made together, channels and pixels of a block in any order; a block may reach into the next row.
            1 for loops over rows, columns, channels; the columns of the result for one that goes over a whole row per channel.
        copied: each block has read all it needs before it writes: its window lies in scratch, or all its sums are held.
    """
    rows, columns = windows.result

    def needed(pixel: int) -> int | None:
        """Return the first byte that this pixel or a later one reads; None where there is none."""
        row, column = divmod(pixel, columns)
        reads = [windows.first_read(row, column)] if row < rows else []
        return min([*reads, windows.first_read(row + 1, 0)] if row + 1 < rows else reads, default=None)

    lead = -windows.bytes
    for begun in range(rows * columns):
        written = begun + 1 if copied else min(begun + block, rows * columns)
        first = needed(written if copied else begun)
        if first is not None:
            lead = max(lead, written * windows.result_pixel - first)
    return lead


def ring_lead(windows: Windows) -> int:
    """Return the lead of a kernel that makes row after row from a ring of input rows in scratch.

    Before a row is made the ring is filled up to the last row that it reads; rows in the ring are needed no more.
    """
    rows, columns = windows.result
    lead = -windows.bytes
    for row in range(rows - 1):  # nothing is read after the ring was filled for the last
        copied = min(max(row * windows.stride[0] - windows.padding[0] + windows.kernel[0], 0), windows.size[0])
        lead = max(lead, (row + 1) * columns * windows.result_pixel - copied * windows.size[1] * windows.pixel)
    return lead


def ring_bytes(windows: Windows) -> int:
    """Return the scratch of a ring that holds as many input rows as the kernel is high."""
    return windows.kernel[0] * windows.size[1] * windows.pixel

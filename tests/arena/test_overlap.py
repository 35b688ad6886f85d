"""Kernels run over their own input with the lead that is derived for them, byte by byte in one arena, and give what they give apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.arena.overlap import Windows, ring_bytes, ring_lead, windows_lead


@st.composite
def geometries(draw: Any) -> Windows:
    """Pictures of up to 7 x 7 pixels of 1 to 4 bytes, windows of up to 5 x 5, strides 1 to 3."""
    size, kernel = (tuple(draw(st.integers(low, high)) for _ in range(2)) for low, high in ((1, 7), (1, 5)))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    end = tuple(draw(st.integers(0, k - 1)) for k in kernel)  # below and right, which need not be the same
    result = tuple(max((n + p + e - k) // s + 1, 1) for n, p, e, k, s in zip(size, padding, end, kernel, stride, strict=True))
    return Windows(size, result, draw(st.integers(1, 4)), draw(st.integers(1, 6)), kernel, stride, padding)


def pixels_of(windows: Windows, row: int, column: int) -> list[tuple[int, int]]:
    """Return the pixels of the input that a window covers."""
    (down, across), (top, left) = windows.stride, windows.padding
    rows = range(row * down - top, row * down - top + windows.kernel[0])
    columns = range(column * across - left, column * across - left + windows.kernel[1])
    return [(r, c) for r in rows for c in columns if 0 <= r < windows.size[0] and 0 <= c < windows.size[1]]


def value(windows: Windows, picture: Callable[[int], int], row: int, column: int, channel: int) -> int:
    """Return a byte of the result: a sum over the window, with factors that tell its bytes apart."""
    total = channel
    for r, c in pixels_of(windows, row, column):
        for i in range(windows.pixel):
            total += (7 * r + 3 * c + i + channel + 1) * picture((r * windows.size[1] + c) * windows.pixel + i)
    return total % 256


def plain(windows: Windows, data: np.ndarray) -> list[int]:
    places = itertools.product(range(windows.result[0]), range(windows.result[1]), range(windows.result_pixel))
    return [value(windows, lambda at: int(data[at]), *place) for place in places]


def in_one_arena(windows: Windows, data: np.ndarray, lead: int, kernel: Callable[..., None]) -> list[int]:
    """Return what a kernel writes that is given its result ``lead`` bytes before its input."""
    length = windows.result[0] * windows.result[1] * windows.result_pixel
    start, result = max(lead, 0), max(-lead, 0)
    arena = np.zeros(max(start + windows.bytes, result + length), np.uint8)
    arena[start : start + windows.bytes] = data
    kernel(windows, arena, start, result)
    return arena[result : result + length].tolist()


def by_pixels(windows: Windows, arena: np.ndarray, start: int, result: int) -> None:
    """Rows, columns, channels; reads the window again for each channel."""
    for n, (row, column) in enumerate(itertools.product(*map(range, windows.result))):
        for channel in range(windows.result_pixel):
            arena[result + n * windows.result_pixel + channel] = value(windows, lambda at: int(arena[start + at]), row, column, channel)


def by_held_pixels(windows: Windows, arena: np.ndarray, start: int, result: int) -> None:
    """Rows, columns; holds all channels of a pixel before it writes them."""
    for n, (row, column) in enumerate(itertools.product(*map(range, windows.result))):
        held = [value(windows, lambda at: int(arena[start + at]), row, column, channel) for channel in range(windows.result_pixel)]
        arena[result + n * windows.result_pixel :][: len(held)] = held


def by_rows(windows: Windows, arena: np.ndarray, start: int, result: int) -> None:
    """Rows; within a row channels backwards, each over columns from the right."""
    for row in range(windows.result[0]):
        for channel, column in itertools.product(reversed(range(windows.result_pixel)), reversed(range(windows.result[1]))):
            n = row * windows.result[1] + column
            arena[result + n * windows.result_pixel + channel] = value(windows, lambda at: int(arena[start + at]), row, column, channel)


def by_ring(windows: Windows, arena: np.ndarray, start: int, result: int) -> None:
    """Rows, from a ring of input rows that is filled before each of them."""
    high, pitch = windows.kernel[0], windows.size[1] * windows.pixel
    ring = np.zeros(ring_bytes(windows), np.uint8)
    filled = 0
    for row in range(windows.result[0]):
        first = row * windows.stride[0] - windows.padding[0]
        while filled < min(first + high, windows.size[0]):
            ring[filled % high * pitch :][:pitch] = arena[start + filled * pitch :][:pitch]
            filled += 1
        for channel, column in itertools.product(reversed(range(windows.result_pixel)), reversed(range(windows.result[1]))):
            n = row * windows.result[1] + column
            made = value(windows, lambda at: int(ring[at // pitch % high * pitch + at % pitch]), row, column, channel)
            arena[result + n * windows.result_pixel + channel] = made


KERNELS = {
    "pixels": (by_pixels, windows_lead),
    "held pixels": (by_held_pixels, lambda windows: windows_lead(windows, copied=True)),
    "rows": (by_rows, lambda windows: windows_lead(windows, block=windows.result[1])),
    "ring": (by_ring, ring_lead),
}


@pytest.mark.parametrize("name", KERNELS)
@given(windows=geometries(), seed=st.integers(0, 99))
def test_a_kernel_runs_over_its_input(name: str, windows: Windows, seed: int) -> None:
    kernel, rule = KERNELS[name]
    data = np.random.default_rng(seed).integers(0, 256, windows.bytes, dtype=np.uint8)
    assert in_one_arena(windows, data, rule(windows), kernel) == plain(windows, data)
    assert in_one_arena(windows, data, rule(windows) + 3, kernel) == plain(windows, data), "a longer lead does no harm"


@given(windows=geometries(), block=st.integers(2, 4), seed=st.integers(0, 99))
def test_pairs_of_pixels_run_over_their_input(windows: Windows, block: int, seed: int) -> None:
    def by_blocks(windows: Windows, arena: np.ndarray, start: int, result: int) -> None:
        pixels = windows.result[0] * windows.result[1]
        for begun in range(0, pixels, block):
            for channel, n in itertools.product(range(windows.result_pixel), reversed(range(begun, min(begun + block, pixels)))):
                row, column = divmod(n, windows.result[1])
                arena[result + n * windows.result_pixel + channel] = value(windows, lambda at: int(arena[start + at]), row, column, channel)

    data = np.random.default_rng(seed).integers(0, 256, windows.bytes, dtype=np.uint8)
    assert in_one_arena(windows, data, windows_lead(windows, block=block), by_blocks) == plain(windows, data)


@pytest.mark.parametrize(("name", "lead"), [("pixels", 40), ("held pixels", 36), ("ring", -32)])
def test_a_lead_is_no_longer_than_it_must_be(name: str, lead: int) -> None:
    """A 3 x 3 window over 6 x 8 pixels of 4 bytes: one pixel less, and something is read that was written over."""
    kernel, rule = KERNELS[name]
    windows = Windows((6, 8), (6, 8), 4, 4, (3, 3), (1, 1), (1, 1))
    assert rule(windows) == lead
    data = np.random.default_rng(0).integers(1, 256, windows.bytes, dtype=np.uint8)
    assert in_one_arena(windows, data, lead - 4, kernel) != plain(windows, data)


@pytest.mark.parametrize(("pixel", "result_pixel", "lead"), [(8, 3, -5), (4, 4, 0), (4, 24, 20 * 47)])
def test_a_product_of_pixels(pixel: int, result_pixel: int, lead: int) -> None:
    """A 1 x 1 convolution that copies its pixel: narrower, as wide, and wider, where the last pixel is read before it is reached."""
    assert windows_lead(Windows((6, 8), (6, 8), pixel, result_pixel), copied=True) == lead

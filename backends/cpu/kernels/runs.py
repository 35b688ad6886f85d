"""Runs of elements that lie one behind another: copied and filled by the widest vectors that fit."""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.registers import Index, ramp, store
from qcompile.backends.cpu.kernels.vector import spread
from tvm.tirx.script.builder import ir as T

_VECTOR_BYTES = 64
_UNROLLED = 8  # vectors; more of them become a loop


def copy_run(to: Any, place: Index, source: Any, start: Index, count: int, flip: int = 0) -> None:
    """Copy ``count`` elements between flat buffers; bytes may flip the bits of ``flip``."""
    pieces, start, place = _pieces(count, source), T.Bind(start), T.Bind(place)

    def copy(offset: Index, lanes: int) -> None:
        value = source[_elements(start + offset, lanes)]
        if flip:
            value = T.bitwise_xor(T.reinterpret("uint8" if lanes == 1 else f"uint8x{lanes}", value), spread(T.uint8(flip), lanes))
        store(to, value, _elements(place + offset, lanes))

    if len(pieces) > _UNROLLED:
        lanes = pieces[0][1]
        whole = count // lanes
        with T.serial(whole) as i:
            copy(i * lanes, lanes)
        pieces = pieces[whole:]
    for offset, lanes in pieces:
        copy(offset, lanes)


def fill_run(to: Any, place: Index, value: Any, count: int) -> None:
    """Store a value ``count`` times."""
    place = T.Bind(place)
    for offset, lanes in _pieces(count, to):
        store(to, spread(value, lanes), _elements(place + offset, lanes))


def _pieces(count: int, buffer: Any) -> list[tuple[int, int]]:
    """Cut a run into (offset, lanes) of powers of two; the last piece overlaps the one before instead of reaching past the end."""
    largest = _VECTOR_BYTES * 8 // buffer.dtype.bits
    lanes = min(largest, 1 << (count.bit_length() - 1))
    pieces = [(offset, lanes) for offset in range(0, count - lanes + 1, lanes)]
    return pieces if count % lanes == 0 else [*pieces, (count - lanes, lanes)]


def _elements(start: Index, lanes: int) -> Index:
    return start if lanes == 1 else ramp(start, lanes)

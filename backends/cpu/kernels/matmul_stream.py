"""Reading an array once from memory, at the rate that memory gives: which lines to ask for before their turn."""

from __future__ import annotations

from qcompile.backends.cpu.kernels.vector import Expr, hold
from tvm.script.ir_builder import tirx as T

_RUN_LINES = 64  # of 64 bytes that are asked for together, into the second-level cache: a page of 4 KiB
_NEAR_LINES = 24  # that lie there and are asked for into the first level
_SECOND_LEVEL, _FIRST_LEVEL = 2, 3


def prefetch_turn(array: Expr, turn: Expr, end: Expr, lines: int, line: int = 16) -> None:
    """Ask for as many lines of 64 bytes, ``line`` elements, as turn number ``turn`` reads of an array that is read in order up to ``end``.

    One core has the most requests under way when they go to several places at once: a run of some turns to come is cut into as many
    parts as a turn has lines, and each turn asks for one line of each part (measured on one core: 18 GB/s, without requests 15). Short
    runs suit arrays in large pages (``backends.cpu.memory``): 3 to 11 % faster there than runs of 128 KiB, which were up to 7 % faster
    in pages of 4 KiB. No run is asked for that starts at the end or after it: another task reads there.
    """
    run = 1 << max((_RUN_LINES // lines).bit_length() - 1, 0)
    here = T.bitwise_and(turn, run - 1)
    start = hold(turn - here + run)
    with T.If(start < end), T.Then():
        first = hold(start * lines + here)
        for part in range(lines):
            _prefetch(array, (first + part * run) * line, _SECOND_LEVEL)
    for part in range(lines):
        _prefetch(array, (turn * lines + (_NEAR_LINES + part)) * line, _FIRST_LEVEL)


def _prefetch(array: Expr, element: Expr, level: int) -> None:
    place = (*[0] * (len(array.shape) - 1), element)
    prefetch = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    T.evaluate(T.call_llvm_intrin("void", prefetch, T.address_of(array[place]), T.int32(0), T.int32(level), T.int32(1)))

"""Products of bytes in tile registers (AMX): a tile of x, 16 rows of 64 codes, times a tile of weights, 16 words of 16 columns.

A tile of weights is 16 words of the panels that ``vpdpbusd`` reads: rows of 16 columns, four codes of k for each. One product adds 16384
products of bytes to 16 x 16 int32 sums in 16 cycles, eight times the rate of ``vpdpbusd``; a load of a tile takes 8 cycles, so the
block of two tiles of rows by two of columns keeps the multiplier busy. x may have a sign or not (``tdpbssd``, ``tdpbusd``). Rows of x
lie anywhere, a stride apart: an image or a matrix of codes is read where it is, without a copy.

The eight registers have numbers, not names: ``Block`` gives sums 0 to 3, x 4 and 5, weights 6 and 7. Their shapes are state of the
thread: a task starts with ``configure`` and ends with ``release``.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.vector import register
from tvm.script.ir_builder import tirx as T

Expr = Any

ROWS = 16  # of a tile of x, and of sums
COLUMNS = 16  # of a tile of weights, and of sums
DEPTH = 64  # codes of k in a tile
WORDS = DEPTH // 4


def configure(rows: Expr | int = ROWS, depth: int = DEPTH) -> None:
    """Emit the shapes of all tiles: ``rows`` (1 to 16, int32) of sums and of x, ``depth`` (a multiple of 4) codes of k in x and weights."""
    # Palette 1; bytes 16 to 31 are the tiles' row lengths as int16, bytes 48 to 55 their numbers of rows.
    whole, x, weights = DEPTH << 16 | DEPTH, depth << 16 | depth, (depth // 4) << 24 | (depth // 4) << 16
    words = [1, 0, 0, 0, whole, whole, x, whole, 0, 0, 0, 0, rows * 0x01010101, rows * 0x0101 + weights, 0, 0]
    shapes = register("int32", len(words))
    for i, word in enumerate(words):
        T.buffer_store(shapes, T.int32(word) if isinstance(word, int) else word, [i])
    _call("ldtilecfg", T.address_of(shapes[0]))


def release() -> None:
    """Emit the end of the use of tiles: their contents no longer need saving when the thread is switched."""
    _call("tilerelease")


class Block:
    """The sums of one or two tiles of rows by one or two tiles of columns, in tile registers.

    Args:
        row_tiles, column_tiles: 1 or 2.
        x: dtype of x: ``int8``, ``uint8``, or ``bfloat16``, whose weights are bfloat16 and whose sums are float32.
        first: number of the first register of sums.
    """

    def __init__(self, row_tiles: int, column_tiles: int, x: str, *, first: int = 0) -> None:
        self.row_tiles, self.column_tiles, self.first = row_tiles, column_tiles, first
        self.product = {"int8": "tdpbssd", "uint8": "tdpbusd", "bfloat16": "tdpbf16ps"}[x]

    def zero(self) -> None:
        """Emit sums of zero."""
        for i in range(self.row_tiles):
            for j in range(self.column_tiles):
                _call("tilezero", self._sum(i, j))

    def start(self, sums: list[Expr]) -> None:
        """Emit sums that are the same in all rows: addresses [column tile] of 16 int32. A stride of 0 reads one row again and again."""
        self.load([sums] * self.row_tiles, 0)

    def load(self, sums: list[list[Expr]], stride: int) -> None:
        """Emit loads of the sums: addresses [row tile][column tile] of their first, ``stride`` bytes from one row to the next."""
        for i in range(self.row_tiles):
            for j in range(self.column_tiles):
                _call("tileloadd64", self._sum(i, j), sums[i][j], T.int64(stride))

    def store(self, sums: list[list[Expr]], stride: int) -> None:
        """Emit stores of the sums, addressed as by ``load``."""
        for i in range(self.row_tiles):
            for j in range(self.column_tiles):
                _call("tilestored64", self._sum(i, j), sums[i][j], T.int64(stride))

    def multiply_add(self, x: list[Expr], x_stride: Expr | int, weight: list[Expr], weight_stride: int) -> None:
        """Emit the products of a tile's depth of k: addresses of the tiles' first bytes, strides in bytes from row to row."""
        for j in range(self.column_tiles):
            _call("tileloadd64", T.int8(6 + j), weight[j], T.int64(weight_stride))
        for i in range(self.row_tiles):
            _call("tileloadd64", T.int8(4 + i), x[i], T.int64(x_stride) if isinstance(x_stride, int) else x_stride)
            self.multiply(i)

    def multiply(self, i: int) -> None:
        """Emit the products of tile i of x by the tiles of weights, as they lie in the registers."""
        for j in range(self.column_tiles):
            _call(self.product, self._sum(i, j), T.int8(4 + i), T.int8(6 + j))

    def _sum(self, i: int, j: int) -> Expr:
        return T.int8(self.first + i * 2 + j)


def prefetch(address: Expr) -> None:
    """Emit a hint that the cache line of an address will be read; one that is no memory does nothing."""
    T.evaluate(T.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id("llvm.prefetch"), address, T.int32(0), T.int32(2), T.int32(1)))


def _call(name: str, *arguments: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *arguments))

"""The description of one linear kernel: everything its code depends on, and the sizes of its panels."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue

LANES = 16  # columns of one vector: 512 bits hold 16 int32 sums or 16 floats
CHUNK = 16  # words of x that are packed side by side for each row: one 64-byte vector


@dataclass(frozen=True)
class Tile:
    """Sizes of the blocks a product is cut into.

    Attributes:
        rows: rows of the register block.
        vectors: vectors of 16 columns of the register block; rows * vectors + vectors + 1 registers are in use.
        words: 4-byte words of k for which one panel of weights stays in the first-level cache.
        packed_bytes: bytes of x that one task copies side by side, to stay in the second-level cache.
        threads: parallel tasks that the work is cut for; any number of threads runs them.
    """

    rows: int
    vectors: int
    words: int
    packed_bytes: int = 768 << 10
    threads: int = field(default_factory=instruction_sets.thread_count)


TILES = {instruction_sets.AVX512_VNNI: Tile(12, 2, 256), instruction_sets.PORTABLE: Tile(4, 1, 256)}


@dataclass(frozen=True)
class Linear:
    """One linear layer ``y = epilogue(x @ weight.T)``, x [m, in_features] with any m.

    Attributes:
        in_features, out_features: k and n.
        x: dtype of the input: ``float32``, or ``int8`` or ``uint8`` codes.
        x_per_token: scale and zero point of the codes are [m], not [1].
        x_affine: the codes have a zero point (an argument); without, it is 0.
        bits: of one weight code, 1 to 8, or 32 for a float32 weight.
        group: inputs that share a weight scale, a multiple of 16 (of 32 at 3, 5, 6 and 7 bits... see ``pack``); 0: the whole row.
        weight_affine: weight codes have zero points.
        epilogue: what follows the sum.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``.
        tile: block sizes; None: those measured best for the instruction set.
    """

    in_features: int
    out_features: int
    x: str = "uint8"
    x_per_token: bool = False
    x_affine: bool = True
    bits: int = 8
    group: int = 0
    weight_affine: bool = False
    epilogue: Epilogue = Epilogue()
    isa: str = field(default_factory=instruction_sets.detect)
    tile: Tile | None = None

    def __post_init__(self) -> None:
        instruction_sets.check(self.isa)
        if self.tile is None:
            object.__setattr__(self, "tile", TILES[self.isa])
        if self.x not in ("float32", "int8", "uint8"):
            raise ValueError(f"x is '{self.x}'; known are float32, int8, uint8")
        if self.bits == 32 and self.x != "float32":
            raise ValueError("a float32 weight needs a float32 input")
        if self.epilogue.bias == "int32" and (self.x == "float32" or self.group):
            raise ValueError("an int32 bias needs an integer sum over the whole row")

    @property
    def integer(self) -> bool:
        """Whether products are of integers."""
        return self.x != "float32"

    @property
    def columns(self) -> int:
        """Columns of a register block and of a panel."""
        return LANES * self.tile.vectors

    @property
    def column_blocks(self) -> int:
        return -(-self.out_features // self.columns)

    @property
    def padded_columns(self) -> int:
        return self.column_blocks * self.columns

    @functools.cached_property
    def words(self) -> int:
        """4-byte words of one row of x: four codes, or one float."""
        return -(-self.in_features // 4) if self.integer else self.in_features

    @property
    def chunks(self) -> int:
        return -(-self.words // CHUNK)

    @property
    def task_rows(self) -> int:
        """The most rows that one task takes: their packed copy, and their sums, have a fixed size."""
        rows = min(self.tile.packed_bytes // (self.chunks * CHUNK * 4), 240)
        return max(1, rows // self.tile.rows) * self.tile.rows

    @property
    def row_variants(self) -> tuple[int, ...]:
        """Row counts that the register block exists for, ascending; a remainder takes the smallest that holds it."""
        return (*(count for count in (1, 2, 4, 8) if count < self.tile.rows), self.tile.rows)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight: [column blocks, words, bytes or floats of one word of every column]."""
        return (self.column_blocks, self.words, self.columns * (4 if self.integer else 1))

    @property
    def has_sums(self) -> bool:
        """Whether the kernel reads the sum of each column of weights: it takes back what was added to make x unsigned."""
        return self.integer and (self.x_affine or self.x == "int8")

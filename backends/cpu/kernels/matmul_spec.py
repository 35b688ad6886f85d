"""The description of one linear kernel: everything its code depends on, and the sizes of its panels."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels import tiles
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue

LANES = 16  # columns of one vector: 512 bits hold 16 int32 sums or 16 floats
_FEW_ROWS_SHARE = 3  # x and its tables are read in order, once for each block of columns: they may pass what a task packs by this
_TASK_ROWS = 256
_TILED_TASK_ROWS = 1024
_TILED_GROUP = 32  # least weights of a group
TERNARY_INPUTS = 1 << 15
TRITS = 5  # ternary codes in a byte
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


def _tile(isa: str, integer: bool) -> Tile:
    """Return the block of an instruction set's vectors: three where a vector is one register, else one, and up to eight rows."""
    found = instruction_sets.SETS[isa]
    vectors = 3 if found.parts == 1 else 1
    return Tile(min(found.block_rows(vectors, integer), 8), vectors, 128)


TILES = {isa: _tile(isa, integer=True) for isa in instruction_sets.KNOWN}
TILED = Tile(2 * tiles.ROWS, 2, 128, packed_bytes=1 << 20)  # block of tile registers
FLOAT_TILES = {isa: _tile(isa, integer=False) for isa in instruction_sets.KNOWN}


@dataclass(frozen=True)
class Part:
    """One of the layers that a product computes together: how many columns of the result are its own, and its activation."""

    columns: int
    activation: str = "none"


@dataclass(frozen=True)
class Linear:
    """One linear layer ``y = epilogue(x @ weight.T)``, x [m, in_features] with any m.

    Attributes:
        in_features, out_features: k and n.
        x: dtype of the input: ``float32``, or ``int8`` or ``uint8`` codes, or ``bfloat16`` as the bits of int16.
        x_per_token: scale and zero point of the codes are [m], not [1].
        x_affine: the codes have a zero point (an argument); without, it is 0.
        bits: of one weight code, 1 to 8, or 16 for a bfloat16 and 32 for a float32 weight.
        group: inputs that share a weight scale: 16 (4-, 2- and 6-bit codes), 32, or a multiple of 64; 0: the whole row.
        weight_signed: codes are two's complement; else unsigned.
        weight_affine: weight codes have zero points, one for each scale (below 8 bits, where code - zero fits a byte).
        codebook: 4-bit codes are places in a table of sixteen values, an argument: int8, or float32 where x is.
        ternary: codes are -1, 0 and 1 and stored with five in a byte; for integer x and weights without groups.
        epilogue: what follows the sum.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``.
        tile: block sizes; None: those measured best for the instruction set.
        parts: layers of the same x that are computed as one, each with a float32 result of its own; empty: there is one result. Each
            part begins a block of columns, and has the epilogue's bias.
    """

    in_features: int
    out_features: int
    x: str = "uint8"
    x_per_token: bool = False
    x_affine: bool = True
    bits: int = 8
    group: int = 0
    weight_signed: bool = True
    weight_affine: bool = False
    epilogue: Epilogue = Epilogue()
    isa: str = field(default_factory=instruction_sets.detect)
    tile: Tile | None = None
    codebook: bool = False
    ternary: bool = False
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        instruction_sets.check(self.isa)
        if self.tile is None:
            object.__setattr__(self, "tile", TILED if self.tiled else (TILES if self.integer else FLOAT_TILES)[self.isa])
        if self.tiled and (
            self.tile.rows % tiles.ROWS or self.tile.rows > 2 * tiles.ROWS or self.tile.vectors > 2 or self.tile.words % CHUNK
        ):
            raise ValueError(f"tile registers hold blocks of 16 or 32 rows by 1 or 2 vectors, in stretches of whole tiles, not {self.tile}")
        if self.x not in ("float32", "int8", "uint8", "bfloat16"):
            raise ValueError(f"x is '{self.x}'; known are float32, int8, uint8, bfloat16")
        if (self.bits == 16 and (self.integer or self.group or self.weight_affine)) or (self.x == "bfloat16" and self.bits != 16):
            raise ValueError("bfloat16 meets bfloat16: a weight without groups and zero points, x in bfloat16 or float32")
        if self.bits == 32 and self.x != "float32":
            raise ValueError("a float32 weight needs a float32 input")
        if self.bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32):
            raise ValueError(f"a weight code has 1 to 8 bits, or 16 for bfloat16, or 32 for float32, not {self.bits}")
        if self.group and ((self.group % 64 and 64 % self.group) or self.group % (4 * self.step)):
            raise ValueError(f"no kernel for groups of {self.group} at {self.bits} bits")
        if self.bits == 8 and (self.weight_affine or not self.weight_signed):
            raise ValueError("8-bit weights must be signed and symmetric: code minus zero point must fit a byte")
        if self.codebook and (self.bits != 4 or self.weight_affine):
            raise ValueError("codes that are places in a table have 4 bits and no zero points")
        if self.codebook and self.group and self.shifted and self.in_features % self.group:
            raise ValueError("groups padded by codes that mean zero: a table may hold no zero")
        if self.ternary and (self.bits != 2 or not self.weight_signed or self.weight_affine or self.group or not self.integer):
            raise ValueError("five codes in a byte are signed, of two bits, without zero points and groups, for integer x")
        if self.ternary and self.in_features >= TERNARY_INPUTS:
            raise ValueError(f"sums of ternary codes are 256 times as large on their way: fewer than {TERNARY_INPUTS} inputs")
        if self.epilogue.bias == "int32" and (self.x == "float32" or self.group):
            raise ValueError("an int32 bias needs an integer sum over the whole row")
        if self.parts and sum(part.columns for part in self.parts) != self.out_features:
            raise ValueError(f"parts of {[part.columns for part in self.parts]} columns are not {self.out_features}")
        if self.parts and (self.epilogue.residual or self.epilogue.codes):
            raise ValueError("layers are computed together only where they give floats and add no residual")

    @property
    def integer(self) -> bool:
        """Whether products are of integers."""
        return self.x in ("int8", "uint8")

    @property
    def scaled(self) -> bool:
        """Whether weights are codes times scales."""
        return self.bits <= 8

    @property
    def pairs(self) -> bool:
        """Whether vectors multiply words of two bfloat16; else such words become two float32 each."""
        return self.x == "bfloat16" and instruction_sets.SETS[self.isa].pairs

    @property
    def tiled(self) -> bool:
        """Whether many rows are multiplied in tile registers. Groups of 16 are not: their sums would leave the tiles too often."""
        return instruction_sets.SETS[self.isa].tiles and self.x != "float32" and (not self.group or self.group >= _TILED_GROUP)

    @property
    def tile_depth(self) -> int:
        """Bytes of k in a tile: codes of 8 bits, or twice as many as bfloat16."""
        return min(self.group, tiles.DEPTH) if self.group else tiles.DEPTH

    @property
    def reads_x(self) -> bool:
        """Whether tiles are loaded from x itself: where its rows are whole tiles."""
        return self.tiled and self.in_features == self.words * self.word_codes

    @property
    def signed_x(self) -> bool:
        """Whether, in vectors, 8-bit weights, and panels of any, meet x as signed bytes; else as unsigned ones. Tiles take both."""
        return instruction_sets.SETS[self.isa].signed_x

    @property
    def x_shift(self) -> int:
        """What is added to the codes of x for them to be bytes of that kind: 0, or 128 either way, which flips the top bit."""
        if not self.integer or self.signed_x == (self.x == "int8"):
            return 0
        return -128 if self.signed_x else 128

    @property
    def columns(self) -> int:
        """Columns of a register block and of a panel."""
        return LANES * self.tile.vectors

    @property
    def column_blocks(self) -> int:
        return sum(-(-part.columns // self.columns) for part in self.results)

    @property
    def results(self) -> tuple[Part, ...]:
        """The parts; of a layer by itself, the one that is all of it."""
        return self.parts or (Part(self.out_features, self.epilogue.activation),)

    @property
    def padded_columns(self) -> int:
        return self.column_blocks * self.columns

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of a code as they are stored, a power of two in each byte plane: 5 bits are a plane of 4 and one of 1."""
        return tuple(width for width in (8, 4, 2, 1) if self.bits & width)

    @property
    def word_codes(self) -> int:
        """Weights of one column in a 4-byte word, after unpacking: four codes, two bfloat16, or one float."""
        return {16: 2, 32: 1}.get(self.bits, 4)

    @property
    def step(self) -> int:
        """Words of four codes that are stored and unpacked together: as many as one vector of the thinnest plane holds."""
        if self.ternary:
            return TRITS
        return 8 // min(self.planes) if self.bits <= 8 else 1

    @property
    def steps(self) -> int:
        """Steps of words of a packed row; of five ternary words the last may have fewer."""
        return -(-self.code_words // self.step)

    @property
    def unpacks(self) -> bool:
        """Whether weights become a local panel before they meet x; else the product reads the packed array itself."""
        if self.bits == 16:
            return not (self.tiled or self.pairs)
        return self.bits < 8 or (self.bits == 8 and (self.group > 0 or not self.integer))

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group) if self.group else 1

    @property
    def code_words(self) -> int:
        """Words of weights in a packed row, padded to whole steps (not of five words), whole groups and whole tiles."""
        whole = self.group // 4 if self.group else tiles.WORDS if self.tiled or self.ternary else self.step
        return -(-self.in_features // (self.word_codes * whole)) * whole

    @property
    def words(self) -> int:
        """4-byte words of one packed row of x: four codes, two bfloat16, or one float."""
        return self.code_words if self.integer or self.pairs or self.tiled else self.code_words * self.word_codes

    @property
    def few_words(self) -> int:
        """The same for few rows, which meet no tiles."""
        return self.code_words if self.integer or self.pairs else self.code_words * self.word_codes

    @property
    def group_words(self) -> int:
        """Words of x in one group; 0 without groups."""
        return self.group // 4 if self.integer else self.group

    @property
    def stretch(self) -> int:
        """Words of k of one panel: whole groups, whole steps."""
        if self.ternary:
            return max(self.tile.words // (TRITS * CHUNK), 1) * TRITS * CHUNK
        return max(self.tile.words // self.group_words, 1) * self.group_words if self.group else self.tile.words

    @property
    def chunks(self) -> int:
        return -(-self.words // CHUNK)

    @property
    def task_rows(self) -> int:
        """The most rows that one task takes: their packed copy, and their sums, have a fixed size."""
        most = _TILED_TASK_ROWS if self.tiled else _TASK_ROWS
        rows = min(self.tile.packed_bytes // (self.chunks * CHUNK * 4), most)
        return max(1, rows // self.tile.rows) * self.tile.rows

    @property
    def looks_up(self) -> bool:
        """Whether, for few rows, four bits of codes at a time choose one of sixteen floats: with narrow codes and float x."""
        return self.bits < 8 and not self.integer

    @property
    def table_floats(self) -> int:
        """Floats of the tables that one row of x gives: sixteen for each two (1-bit plane: four) of its elements."""
        return sum(self.words // (4 // width) * 16 for width in self.planes if width < 4) if self.looks_up else 0

    @property
    def few_rows(self) -> tuple[int, ...]:
        """Row counts, ascending, for which weights are read once, straight into registers; none where x does not fit beside them."""
        if self.looks_up and instruction_sets.SETS[self.isa].parts > 1:  # the lookup is an instruction of 512-bit registers
            return ()
        size = 4 * (-(-self.few_words // CHUNK) * CHUNK + self.table_floats)
        most = instruction_sets.SETS[self.isa].block_rows(self.tile.vectors, self.integer)
        return tuple(count for count in (1, 2, 4, 8) if count <= most and count * size <= _FEW_ROWS_SHARE * self.tile.packed_bytes)

    @property
    def row_variants(self) -> tuple[int, ...]:
        """Row counts that the register block exists for, ascending; a remainder takes the smallest that holds it."""
        if self.tiled:
            return tuple(range(tiles.ROWS, self.tile.rows + 1, tiles.ROWS))
        return (*(count for count in (1, 2, 4, 8) if count < self.tile.rows), self.tile.rows)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight: [column blocks, steps, elements of one step of every column]."""
        if self.bits == 32:
            return (self.column_blocks, self.words, self.columns)
        return (self.column_blocks, self.steps, self.step_bytes)

    @property
    def step_bytes(self) -> int:
        """Bytes of one step of every column."""
        return self.step * min(self.bits, 8) // 8 * self.columns * 4

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of weight scales and zero points: [columns], or [column blocks, groups, columns of a block]."""
        return (self.column_blocks, self.groups, self.columns) if self.group else (self.padded_columns,)

    @property
    def has_sums(self) -> bool:
        """Whether the kernel reads the sum of each column of weights: it takes back what was added to the codes of x.

        That is 128 where they become unsigned, or less 128 where few rows make them signed beside narrow weights.
        """
        return self.integer and not self.group and (self.shifted or self.bits < 8)

    @property
    def shifted(self) -> bool:
        """Whether the codes of x, as bytes without sign, have a zero point."""
        return self.integer and (self.x_affine or self.x_shift != 0)

    @property
    def corrects_panels(self) -> bool:
        """Whether unpacking sums the codes of each group, to take back the zero point of x; tiles take x as it is."""
        return self.x_affine if self.tiled else self.shifted

    @property
    def code_zero(self) -> int:
        """What is subtracted from a stored code where the scheme is symmetric: signed codes below 8 bits are stored shifted.

        Few rows look bytes of a table up raised, for the operand without sign, where products have such a one.
        """
        if self.ternary:
            return 1
        if self.codebook:
            return 128 if self.integer and not self.signed_x else 0
        return 1 << (self.bits - 1) if self.weight_signed and self.bits < 8 else 0

    @property
    def sum_dtype(self) -> str:
        """Dtype of the running sums in memory."""
        return "int32" if self.integer and not self.group else "float32"

"""The description of one 2-d convolution kernel: everything its code depends on, and the sizes of its tiles."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.code_sums import CodeSum
from qcompile.backends.cpu.kernels.convolution_plan import TilePlan
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue

LANES = 16
_PACKED_BYTES = 192 << 10  # im2col rows of one task: they stay in the second-level cache beside a panel of weights
_SHARED_BYTES = 1 << 20  # larger weights would be read again from memory by every task of rows: then tasks split columns


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks a convolution is cut into.

    Attributes:
        rows, vectors: of the register block; of two tiles of rows where tile registers are used and rows are more than one tile has.
        packed_bytes: of the im2col rows of one task: they stay in the second-level cache beside a panel of weights.
    """

    rows: int
    vectors: int
    packed_bytes: int = _PACKED_BYTES


@dataclass(frozen=True)
class Convolution:
    """One convolution over NHWC images, ``y = epilogue(conv(x, weight))``, any batch.

    Attributes:
        channels, out_channels: of the whole convolution, all groups together.
        height, width: of the input image.
        kernel, stride, padding, dilation: pairs (rows, columns); padding inserts the real value zero.
        groups: input and output channels are cut into so many independent convolutions.
        x: dtype of the input: ``float32`` (weights too), or ``int8`` or ``uint8`` codes with one scale.
        x_affine: the codes have a zero point (an argument); without, it is 0.
        weight_affine: weight codes have zero points, one for each output channel.
        epilogue: what follows the sum of products.
        sum: what becomes of the codes of the epilogue, if they are not the result.
        isa: a name of ``qcompile.backends.cpu.kernels.isa.KNOWN``.
        blocks: sizes of blocks; None: those with the least padding.
    """

    channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    x: str = "uint8"
    x_affine: bool = True
    weight_affine: bool = False
    epilogue: Epilogue = Epilogue()
    sum: CodeSum | None = None
    isa: str = field(default_factory=instruction_sets.detect)
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        instruction_sets.check(self.isa)
        if self.x not in ("float32", "int8", "uint8"):
            raise ValueError(f"x is '{self.x}'; known are float32, int8, uint8")
        if self.channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"{self.channels} and {self.out_channels} channels do not divide into {self.groups} groups")
        if self.x == "float32" and (self.epilogue.bias == "int32" or self.weight_affine):
            raise ValueError("an int32 bias and weight zero points need an integer sum")
        if self.sum is not None and not self.epilogue.codes:
            raise ValueError("what is added to other codes is codes")
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(f"a kernel of {self.kernel} leaves nothing of an image of {self.height} x {self.width}")

    @property
    def results(self) -> tuple[str, ...]:
        """The dtypes of the results, in order: values before codes."""
        if self.sum is None:
            return (self.epilogue.output,)
        return ("float32",) * self.sum.values + ((self.sum.output,) if self.sum.output is not None else ())

    @property
    def bytewise(self) -> bool:
        """Whether results are made sixty-four codes at once where a register holds as many (``byte_codes``): there is nothing but codes."""
        return self.epilogue.codes and not self.epilogue.residual and self.results[0] != "float32"

    @property
    def integer(self) -> bool:
        """Whether products are of integers."""
        return self.x != "float32"

    @property
    def tiled(self) -> bool:
        """Whether products are made in tile registers: those of one group, by weights without zero points, where it is worth it."""
        able = instruction_sets.SETS[self.isa].tiles and self.integer and self.groups == 1 and not self.weight_affine
        return able and self.plan.worthwhile

    @functools.cached_property
    def plan(self) -> TilePlan:
        """How it is cut into tiles."""
        return TilePlan(self)

    @property
    def signed_x(self) -> bool:
        """Whether x is multiplied as signed bytes; else as unsigned ones."""
        if self.tiled:
            return self.x == "int8"
        return instruction_sets.SETS[self.isa].signed_x

    @property
    def x_shift(self) -> int:
        """What is added to the codes of x for them to be bytes of that kind: 0, or 128 either way, which flips the top bit."""
        if not self.integer or self.signed_x == (self.x == "int8"):
            return 0
        return -128 if self.signed_x else 128

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding[0] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding[1] - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Output pixels of one image."""
        return self.out_height * self.out_width

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_outputs(self) -> int:
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether output pixels are input pixels, one by one."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def depth(self) -> int:
        """Elements of one im2col row: (kernel row, kernel column, channel)."""
        return self.taps * self.group_channels

    @property
    def word(self) -> int:
        """Elements of one 4-byte word."""
        return 4 if self.integer else 1

    @property
    def words(self) -> int:
        return self.plan.words if self.tiled else -(-self.depth // self.word)

    @property
    def pitch(self) -> int:
        """Words from one im2col row to the next: an odd number of cache lines, so that rows do not share cache sets."""
        return ((-(-self.words // 16)) | 1) * 16

    @functools.cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of the register block: what the registers hold, least padding over the image's pixels and channels."""
        if self.blocks is not None:
            return self.blocks.rows, self.blocks.vectors
        if self.tiled:
            return self.plan.block * self.plan.rows, self.plan.vectors
        choices = self.register_blocks()
        best = min(cost for cost, _, _ in choices)
        _, rows, vectors = next(choice for choice in choices if choice[0] <= best * 1.01)
        return rows, vectors

    def register_blocks(self) -> list[tuple[float, int, int]]:
        """Return predicted cycles, rows and vectors of every register block that the registers hold."""
        isa = instruction_sets.SETS[self.isa]
        vectors_in_all = -(-self.group_outputs // LANES)
        choices = []
        for vectors in (2, 1, 3) if isa.parts == 1 else (1,):
            for rows in range(min(isa.block_rows(vectors, self.integer), 28, self.pixels), 0, -1):
                # A step takes 2 products or 2 loads for each cycle; a product's latency of 5 needs 10 in flight.
                step = max(rows * vectors * isa.parts / 2, (rows + vectors * isa.parts) / 2, 5.0)
                blocks = math.ceil(self.pixels / rows) * math.ceil(vectors_in_all / vectors)
                choices.append((blocks * (step + 12 / self.words), rows, vectors))
        return choices

    @property
    def packed_bytes(self) -> int:
        """Bytes of im2col rows that one task may hold."""
        return self.blocks.packed_bytes if self.blocks is not None else _PACKED_BYTES

    @property
    def columns(self) -> int:
        """Output channels of a panel."""
        return self.tile[1] * LANES

    @property
    def column_blocks(self) -> int:
        """Panels of one group."""
        return -(-self.group_outputs // self.columns)

    @property
    def padded_columns(self) -> int:
        """Columns of all groups, each padded to whole panels."""
        return self.groups * self.column_blocks * self.columns

    @functools.cached_property
    def tasks(self) -> tuple[int, int]:
        """Row blocks of one task (tiled: lines, see ``TilePlan.tasks``), and tasks that the columns are cut into."""
        if self.tiled:
            return self.plan.tasks
        threads = instruction_sets.thread_count()
        blocks = -(-self.pixels // self.tile[0])
        most = max(1, self.packed_bytes // (self.tile[0] * self.pitch * 4))
        cuts = threads * math.ceil(blocks / (threads * most))
        by_rows = max(1, math.ceil(blocks / cuts))
        balance = blocks / (by_rows * math.ceil(math.ceil(blocks / by_rows) / threads) * threads)
        shared = self.words * 4 * self.padded_columns <= _SHARED_BYTES
        if self.groups > 1 or self.column_blocks < threads or (shared and balance > 0.85):
            return by_rows, 1
        return min(most, blocks), threads

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight: [groups * panels, words, one word of every column]."""
        return (self.groups * self.column_blocks, self.words, self.columns * self.word)

    @property
    def has_sums(self) -> bool:
        """Whether the kernel reads the sum of each channel's weights: it takes back what was added to make x unsigned."""
        return self.integer and (self.x_affine or self.x_shift != 0 or self.weight_affine)

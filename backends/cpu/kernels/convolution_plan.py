"""How a dense convolution of codes is cut into tiles: which bytes of the image a tile of x takes, tasks, and where tiles are worth it.

A tile's rows are neighbouring output pixels of one image row (or of all pixels, where output pixels are input pixels): in NHWC they lie
a stride of pixels apart, and the taps of a kernel row follow one another. So a tile is loaded from the image itself, at each kernel
row (or tap) and each ``depth`` bytes of it. An image with padding, or whose runs are no whole tiles, is copied once into a padded band;
bytes that a tile reads past its run meet weights of zero. Where image rows are short, the runs of all pixels are copied (im2col).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels import tiles

if TYPE_CHECKING:
    from qcompile.backends.cpu.kernels.convolution_spec import Convolution

_SHORT_LINE = 8  # pixels: products of tiles of fewer rows take longer for each than loads of weights


@dataclass(frozen=True)
class TilePlan:
    """The sizes of one convolution in tiles; bytes are elements of x."""

    spec: Convolution

    # ---- k: runs of bytes, cut into steps of one tile each ----

    @property
    def joined(self) -> bool:
        """Whether the taps of a kernel row follow one another in memory."""
        return self.spec.dilation[1] == 1 or self.spec.kernel[1] == 1

    @property
    def runs(self) -> int:
        """Runs of bytes under one output pixel: kernel rows, or taps."""
        return self.spec.kernel[0] if self.joined else self.spec.taps

    @property
    def run(self) -> int:
        """Bytes of a run."""
        return self.spec.channels * (self.spec.kernel[1] if self.joined else 1)

    @functools.cached_property
    def steps(self) -> int:
        """Tiles of k in a run: the fewest, or, to read x without a copy, as many as cut it into equal whole words."""
        fewest = -(-self.run // tiles.DEPTH)
        if any(self.spec.padding) or self.gathers:
            return fewest
        return next((steps for steps in range(fewest, fewest + fewest // 2 + 1) if self.run % (4 * steps) == 0), fewest)

    @property
    def depth(self) -> int:
        """Bytes of k in a tile."""
        return -(-self.run // (4 * self.steps)) * 4

    @property
    def copies(self) -> bool:
        """Whether tasks copy their part of the image."""
        return any(self.spec.padding) or self.depth * self.steps != self.run

    # ---- rows: output pixels ----

    @property
    def flat(self) -> bool:
        """Whether tiles take pixels as they come, from one image row or image to the next."""
        return self.spec.pointwise

    @property
    def gathers(self) -> bool:
        """Whether tasks copy the runs of every pixel of an image side by side, because its rows are too short for tiles."""
        return not self.flat and self.spec.out_width < _SHORT_LINE and self.spec.pixels > self.spec.out_width

    @property
    def line(self) -> int:
        """Output pixels that tiles are cut from: of an image, or of a row of it."""
        return self.spec.pixels if self.flat or self.gathers else self.spec.out_width

    @property
    def lines(self) -> int:
        """Lines of an image; flat: tiles."""
        return self.line_tiles if self.flat else 1 if self.gathers else self.spec.out_height

    @functools.cached_property
    def rows(self) -> int:
        """Output pixels of a tile."""
        return self._even_rows if self.spec.blocks is None else min(self.spec.blocks.rows // self.block, self.line)

    @property
    def _even_rows(self) -> int:
        return -(-self.line // -(-self.line // tiles.ROWS))

    @property
    def block(self) -> int:
        """Tiles of rows that are multiplied together."""
        return 2 if self.spec.blocks is None or self.spec.blocks.rows > tiles.ROWS else 1

    # ---- columns ----

    @property
    def vectors(self) -> int:
        """Tiles of columns that are multiplied together."""
        return min(2, -(-self.spec.out_channels // tiles.COLUMNS)) if self.spec.blocks is None else self.spec.blocks.vectors

    @property
    def words(self) -> int:
        """Words of four codes of a column of the packed weight."""
        return self.runs * self.steps * self.depth // 4

    @property
    def line_tiles(self) -> int:
        return -(-self.line // self.rows)

    @property
    def image_tiles(self) -> int:
        return self.line_tiles * (1 if self.flat else self.lines)

    # ---- tasks ----

    @property
    def padded_width(self) -> int:
        """Pixels of a row of the band."""
        return self.spec.width + 2 * self.spec.padding[1]

    def band_bytes(self, tiles_of_rows: int) -> int:
        """Return the bytes that a task of so many lines (flat: tiles) copies."""
        spec = self.spec
        if self.flat:
            return tiles_of_rows * self.rows * spec.channels
        rows = (tiles_of_rows - 1) * spec.stride[0] + spec.dilation[0] * (spec.kernel[0] - 1) + 1
        return rows * self.padded_width * spec.channels

    @functools.cached_property
    def tasks(self) -> tuple[int, int]:
        """Lines (flat: tiles) of one task, and tasks that the columns are cut into.

        Every task reads its part of the image and its columns of weights: whichever is more is read once.
        """
        spec, threads = self.spec, instruction_sets.thread_count()
        weights = spec.words * 4 * spec.padded_columns
        by_columns = spec.column_blocks >= threads and (weights > spec.channels * spec.height * spec.width or self.lines < threads)
        most = self.lines
        while not self.gathers and most > 1 and self.band_bytes(most) > spec.packed_bytes:
            most = -(-most // 2)
        if by_columns:
            return most, threads
        tasks = -(-self.lines // most)
        return -(-self.lines // (-(-tasks // threads) * threads)), 1

    @property
    def task_tiles(self) -> int:
        """Tiles of rows of a task."""
        return self.spec.tasks[0] * (1 if self.flat else self.line_tiles)

    @property
    def worthwhile(self) -> bool:
        """Whether tiles are faster than vectors.

        A product of tiles takes a cycle for each row, and not less than 8; by ``vpdpbusd`` a word of 16 columns takes half a cycle. So
        tiles lose where a pixel has a few bytes, or an image row a single pixel of few channels.
        """
        rows = self._even_rows
        return rows * self.depth // 4 >= 2 * max(rows, 8)

"""Element formats whose codes are places in a table of ascending levels: NormalFloat, and codebooks of bytes.

    value = scale * level[code]

``nf4`` is NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3): levels that a normally distributed weight, divided by
its largest magnitude, falls on about equally often. ``codebook4`` has levels of one byte, so that products with integer activations are
exact sums; they are those of nf4 in steps of 1/127, or the rows of a table that the weight brings along (a solver's, such as ``kmeans``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch

from qcompile.formats.format import Format, register_family

STEPS = 127  # of a byte from zero to its highest level

_NAME = re.compile(r"(nf|codebook)([1-4])")


@dataclass(frozen=True)
class Lookup(Format):
    """What both families share: the code of a value is the place of the nearest level; between two, the lower."""

    bits: int

    @property
    def levels(self) -> tuple[float, ...]:
        """The values of the codes 0, 1, .., ascending, in units of the scale."""
        raise NotImplementedError

    @property
    def lowest(self) -> float:
        return self.levels[0]

    @property
    def highest(self) -> float:
        return self.levels[-1]

    @property
    def storage(self) -> torch.dtype:
        return torch.uint8

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return torch.bucketize(values, ((levels[1:] + levels[:-1]) / 2).to(values.dtype)).to(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(self.levels, dtype=torch.float32).to(dtype)[codes.to(torch.int64)]


@dataclass(frozen=True)
class NormalFloat(Lookup):
    """``nf2`` to ``nf4``: quantiles of the normal distribution between -1 and 1, zero among them."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise ValueError(f"a NormalFloat has 2 to 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"nf{self.bits}"

    @property
    def levels(self) -> tuple[float, ...]:
        return normal_levels(self.bits)


@dataclass(frozen=True)
class Codebook(Lookup):
    """``codebook1`` to ``codebook4``: levels of one byte, -127 to 127, by default those of NormalFloat."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise ValueError(f"a codebook has 1 to 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"codebook{self.bits}"

    @property
    def levels(self) -> tuple[float, ...]:
        return (-STEPS, STEPS) if self.bits == 1 else tuple(float(round(STEPS * level)) for level in normal_levels(self.bits))


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """Return the levels of NormalFloat: equally spaced quantiles, one more above zero than below, and zero itself.

    The outermost quantile is the mean of those that 2**bits values and one value less would have, 1 - 1/2 (1/32 + 1/30) at 4 bits, as
    in the authors' code; the paper's equation 4 leaves it open. All are divided by the largest.
    """
    half, normal = 2 ** (bits - 1), NormalDist()
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2

    def quantiles(count: int) -> list[float]:
        return [normal.inv_cdf(outermost + (0.5 - outermost) * i / count) for i in range(count)]

    above, below = quantiles(half), quantiles(half - 1)
    return tuple(level / above[0] for level in (*(-q for q in below), 0.0, *reversed(above)))


@register_family
def parse_lookup(name: str) -> Lookup | None:
    """Parse ``nf4`` or ``codebook3``; any other name belongs to another family."""
    match = _NAME.fullmatch(name)
    if not match or (match[1] == "nf" and match[2] == "1"):
        return None
    return (NormalFloat if match[1] == "nf" else Codebook)(int(match[2]))


# ---- tables ---------------------------------------------------------------------------------------------------------------


def look_up(codes: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the levels of codes [rows, ..] in a table [tables, levels]: each table serves as many of the rows, in order."""
    owner = torch.arange(codes.shape[0]) // (codes.shape[0] // table.shape[0])
    return table.to(dtype)[owner.reshape(-1, *[1] * (codes.ndim - 1)), codes.to(torch.int64)]


def check_table(table: torch.Tensor, format: Format, rows: int) -> None:
    """Check a weight's own table: int8 [tables, 2**bits], ascending in each row, for a weight of so many rows.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(format, Codebook):
        raise ValueError(f"{format} has no table of its own")
    if table.dtype != torch.int8 or table.ndim != 2 or table.shape[1] != 2**format.bits:
        raise ValueError(f"a table of {format} is int8 [tables, {2**format.bits}], not {table.dtype} {list(table.shape)}")
    if not len(table) or rows % len(table):
        raise ValueError(f"{len(table)} tables cannot serve {rows} rows in equal parts")
    if bool((table[:, 1:] < table[:, :-1]).any()):
        raise ValueError("the levels of a table do not ascend")

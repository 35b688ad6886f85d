"""Integer element formats: 1 to 8 bits, signed or unsigned."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qcompile.formats.format import Format, register_family

_NAME = re.compile(r"(u?)int([1-8])$")


@dataclass(frozen=True)
class Integer(Format):
    """A two's-complement (``int4``) or unsigned (``uint4``) integer of 1 to 8 bits.

    ``int1`` holds -1 and 0, as two's complement says; binary weights of -1 and +1 are another format.
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"an integer format has 1 to 8 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def family(self) -> str:
        return "int"

    @property
    def lowest(self) -> float:
        return -(2.0 ** (self.bits - 1)) if self.signed else 0.0

    @property
    def highest(self) -> float:
        return 2.0 ** (self.bits - 1) - 1 if self.signed else 2.0**self.bits - 1

    @property
    def storage(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.round().clamp(self.lowest, self.highest).to(self.storage)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return codes.to(dtype)


@register_family
def parse_integer(name: str) -> Integer | None:
    """Parse ``int4`` or ``uint8``; any other name belongs to another family."""
    match = _NAME.fullmatch(name)
    return Integer(int(match[2]), not match[1]) if match else None

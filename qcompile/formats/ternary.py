"""The ternary format: weights of -1, 0 and 1, stored with five of them in a byte.

3**5 = 243 combinations fit a byte's 256, so a weight takes 1.6 bits where log2(3) = 1.585 would do: the packing of llama.cpp's TQ1_0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qcompile.formats.format import register_family
from qcompile.formats.integer import Integer

TRITS = 5  # in a byte
COMBINATIONS = 3**TRITS


@dataclass(frozen=True)
class Ternary(Integer):
    """``ternary``: codes -1, 0 and 1. Kernels see integers of two bits; what is stored is their digits to base 3."""

    bits: int = field(default=2, init=False)
    signed: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        return "ternary"

    @property
    def family(self) -> str:
        return "ternary"

    @property
    def dense(self) -> bool:
        return False

    @property
    def lowest(self) -> float:
        return -1.0

    def packed_size(self, size: int) -> int:
        return -(-size // TRITS)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack codes [.., n] into bytes [.., ceil(n / 5)]: code + 1 as a digit, the first code the lowest; digits past the end are 0."""
        digits = torch.nn.functional.pad(codes.to(torch.uint8) + 1, (0, -codes.shape[-1] % TRITS)).unflatten(-1, (-1, TRITS))
        return (digits * _powers()).sum(-1, dtype=torch.uint8)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        self.check_packed(packed)
        digits = packed.unsqueeze(-1) // _powers() % 3
        return (digits.flatten(-2)[..., :size].to(torch.int8) - 1).contiguous()

    def check_packed(self, packed: torch.Tensor) -> None:
        if packed.dtype != torch.uint8 or (packed.numel() and int(packed.max()) >= COMBINATIONS):
            raise ValueError(f"bytes of ternary weights lie below {COMBINATIONS}; these are damaged")


def _powers() -> torch.Tensor:
    return torch.tensor([3**i for i in range(TRITS)], dtype=torch.uint8)


@register_family
def parse_ternary(name: str) -> Ternary | None:
    """Parse ``ternary``; any other name belongs to another family."""
    return Ternary() if name == "ternary" else None

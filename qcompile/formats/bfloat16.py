"""bfloat16: the upper half of a float32, eight bits of significand. Its codes are its bits, so there is no scale.

    code = upper 16 bits of x, rounded to nearest even        value = the float32 with these upper bits

Denormal numbers count as zero, as for the instructions that multiply bfloat16 (``vdpbf16ps``, ``tdpbf16ps``) and round to it
(``vcvtneps2bf16``); a NaN becomes the quiet one without sign. Infinities stay, and what lies nearer to 2**128 than to the highest value
becomes one: nothing saturates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qcompile.formats.format import Format, register_family

NAN = 0x7FC0
_EXPONENT = 0x7F80
_SIGN = -0x8000


@dataclass(frozen=True)
class BFloat16(Format):
    """``bf16``: the range of float32, a relative error of rounding of at most 2**-9."""

    bits: int = field(default=16, init=False)

    @property
    def name(self) -> str:
        return "bf16"

    @property
    def family(self) -> str:
        return "bf16"

    @property
    def scaled(self) -> bool:
        return False

    @property
    def lowest(self) -> float:
        return -self.highest

    @property
    def highest(self) -> float:
        return (2 - 2.0**-7) * 2.0**127

    @property
    def storage(self) -> torch.dtype:
        return torch.int16

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the bits of each value; those of other dtypes than float32 are rounded to it first."""
        # By integers: PyTorch's own conversion gives other bits for a NaN from machine to machine. Only NaNs can overflow the sum.
        bits = values.to(torch.float32).view(torch.int32)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = torch.where(upper & _EXPONENT == 0, upper & _SIGN, upper)
        return torch.where(values.isnan(), NAN, upper).to(torch.int16)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        normal = torch.where(codes & _EXPONENT == 0, codes & _SIGN, codes)
        return (normal.to(torch.int32) << 16).view(torch.float32).to(dtype)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the codes as they are: int16 [.., n]."""
        return codes

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        self.check_packed(packed)
        return packed

    def check_packed(self, packed: torch.Tensor) -> None:
        if packed.dtype != torch.int16:
            raise ValueError(f"bf16 is stored as the bits of int16, not as {packed.dtype}")


@register_family
def parse_bfloat16(name: str) -> BFloat16 | None:
    """Parse ``bf16``; any other name belongs to another family."""
    return BFloat16() if name == "bf16" else None

"""Dense storage of codes of a whole number of bits, and the exact cost of a weight.

Codes of b bits are laid end to end along the last axis, least significant bit first, each row padded to a whole byte.
Signed codes are stored as two's complement in b bits. 8-bit codes are stored as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qcompile.formats.scheme import Scheme


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [.., n] (int8 or uint8) into uint8 [.., ceil(n * bits / 8)]; 8-bit codes are returned unchanged."""
    if bits == 8:
        return codes
    unsigned = codes.to(torch.uint8) & ((1 << bits) - 1)
    spread = (unsigned.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)) & 1  # [.., n, bits]
    flat = spread.flatten(-2)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, signed: bool, size: int) -> torch.Tensor:
    """Undo ``pack``: uint8 [.., ceil(size * bits / 8)] to codes [.., size], int8 if signed else uint8."""
    if bits == 8:
        return packed
    if 8 % bits == 0:  # whole codes in each byte
        codes = (
            ((packed.unsqueeze(-1) >> torch.arange(0, 8, bits, dtype=torch.uint8)) & ((1 << bits) - 1)).flatten(-2)[..., :size].contiguous()
        )
    else:
        spread = ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)[..., : size * bits]
        codes = (spread.unflatten(-1, (size, bits)) << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    if not signed:
        return codes
    return (codes.to(torch.int8) ^ (1 << (bits - 1))) - (1 << (bits - 1))


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Return the exact bytes of codes, scales and zero points of a tensor of this shape; a table of its own comes on top."""
    rows = math.prod(shape[:-1])
    scales = math.prod(scheme.granularity.scale_shape(shape))
    zero_points = 0 if scheme.symmetric else scales
    return rows * scheme.format.packed_size(shape[-1]) + scales * scheme.scale_dtype.itemsize + zero_points


def bits_per_weight(scheme: Scheme, shape: tuple[int, ...]) -> float:
    """Return stored bits for each element, scales and zero points included."""
    return 8 * stored_bytes(scheme, shape) / math.prod(shape)

"""Codes laid end to end in 32-bit words, as GPTQ, AWQ and compressed-tensors store them: least significant bit first, little endian."""

from __future__ import annotations

import torch

from qcompile.formats import packing


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return unsigned codes u8[.., n] as words i32[.., ceil(n * bits / 32)]; bits past the end are zero."""
    data = packing.pack(codes, bits)
    return torch.nn.functional.pad(data, (0, -data.shape[-1] % 4)).contiguous().view(torch.int32)


def codes_of(words: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Undo ``words_of``: return unsigned codes u8[.., size].

    Raises:
        ValueError: the words are not of 32 bits, or not as many as so many codes take.
    """
    expected = -(-size * bits // 32)
    if words.dtype != torch.int32 or words.shape[-1] != expected:
        raise ValueError(f"{size} codes of {bits} bits take {expected} words of int32, not {words.shape[-1]} of {words.dtype}")
    data = words.contiguous().view(torch.uint8)[..., : -(-size * bits // 8)]
    return packing.unpack(data.contiguous(), bits, False, size)

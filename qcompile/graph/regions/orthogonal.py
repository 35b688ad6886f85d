"""Orthogonal matrices for rotations, in float64 and the same for the same seed."""

from __future__ import annotations

import torch

from qcompile.errors import Refused
from qcompile.graph.hadamard import hadamard_block, hadamard_matrix


def orthogonal_matrix(size: int, kind: str, seed: int) -> torch.Tensor:
    """Return an orthogonal matrix f64 [size, size].

    ``hadamard``: random signs times the Hadamard matrix; where none has this size, the Kronecker product of a random orthogonal matrix and
    the largest Hadamard matrix whose size divides it. ``random``: the Q of a QR decomposition of normal numbers, signs such that R has a
    positive diagonal (Haar distribution).

    Raises:
        Refused: the kind is neither.
    """
    if kind not in ("hadamard", "random"):
        raise Refused(f"unknown rotation '{kind}'", way_out="known are hadamard and random")
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return _haar(size, generator)
    block = hadamard_block(size)
    matrix = hadamard_matrix(block, torch.float64)
    if size > block:
        matrix = torch.kron(_haar(size // block, generator), matrix)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
    return signs.to(torch.float64) * matrix


def _haar(size: int, generator: torch.Generator) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * torch.sign(torch.diagonal(r))).contiguous()

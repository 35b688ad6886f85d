"""Hadamard matrices of size m * 2^k: entries of -1 and 1, symmetric, so that a normalised one is its own inverse.

A size is an odd number o times a power of two. With o = 1 it is Sylvester's matrix (1867). Otherwise the Kronecker product of a matrix of
order m = 4 o and Sylvester's: Paley's second construction (1933) gives the first where q = 2 o - 1 is a prime or the square of one:
m = 12, 20, 28, 36, 52, 60. An odd part of 11 has none, and those above 15 are left out.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from qcompile.errors import Refused

LARGEST_ORDER = 60  # of m: a kernel joins m vectors by m^2 additions, all in its code; LLVM takes seconds for 60, minutes for 124


def hadamard_order(size: int) -> int | None:
    """Return the order m of the matrix that is joined with Sylvester's: 1 for a power of two, None where no matrix of the size is known."""
    if size < 1:
        return None
    odd = size // (size & -size)
    order = 4 * odd if odd > 1 else 1
    known = order == 1 or (order <= LARGEST_ORDER and _field(2 * odd - 1) is not None)
    return order if known and size % order == 0 else None


def hadamard_block(size: int) -> int:
    """Return the largest divisor of a size, or 1, that ``hadamard_matrix`` takes."""
    return next((block for block in range(size, 0, -1) if size % block == 0 and hadamard_order(block)), 1)


def require_hadamard(size: int) -> int:
    """Return ``hadamard_order``.

    Raises:
        Refused: no matrix of this size is known.
    """
    order = hadamard_order(size)
    if order is None:
        raise Refused(f"no Hadamard matrix of size {size} is known", way_out=f"the largest that divides it is {hadamard_block(size)}")
    return order


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the normalised Hadamard matrix [size, size]: symmetric, and its own inverse.

    Raises:
        Refused: none of this size is known.
    """
    matrix = paley_matrix(require_hadamard(size)).to(torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return (matrix / math.sqrt(size)).to(dtype)


@cache
def paley_matrix(order: int) -> torch.Tensor:
    """Return the symmetric matrix of -1 and 1, int8 [order, order], whose square is order times the identity; [[1]] for order 1.

    With C the conference matrix of order q + 1 it is C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]] (Paley 1933, lemma 4).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    q = order // 2 - 1
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _differences(q)
    double, corner = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, double) + torch.kron(torch.eye(q + 1, dtype=torch.int8), corner)


def _field(q: int) -> tuple[int, int] | None:
    """Return (p, n) where q is p^n for an odd prime p and n of 1 or 2, and leaves 1 when divided by 4."""
    root = math.isqrt(q)
    p, n = (root, 2) if root * root == q else (q, 1)
    prime = p > 2 and all(p % divisor for divisor in range(2, math.isqrt(p) + 1))
    return (p, n) if prime and q % 4 == 1 else None


def _differences(q: int) -> torch.Tensor:
    """Return, for all pairs of elements of the field of q, whether their difference is a square (1), none (-1) or zero (0), int8 [q, q].

    The field of p^2 is a + b sqrt(r) with r no square modulo p; an element of it is a square where its norm a^2 - r b^2 is one modulo p.
    """
    field = _field(q)
    assert field is not None
    p, n = field
    squares = {i * i % p for i in range(1, p)}
    character = torch.tensor([0, *(1 if i in squares else -1 for i in range(1, p))], dtype=torch.int8)
    a, b = torch.arange(q) % p, torch.arange(q) // p  # b is 0 where n is 1
    a, b = a - a[:, None], b - b[:, None]
    if n == 1:
        return character[a % p]
    r = next(i for i in range(2, p) if i not in squares)
    return character[(a * a - r * b * b) % p]

"""Hadamard matrices of every size that is known: entries, symmetry, inverse."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import Refused
from qcompile.graph.hadamard import LARGEST_ORDER, hadamard_block, hadamard_matrix, hadamard_order, paley_matrix

ORDERS = [12, 20, 28, 36, 52, 60]  # 4 o where 2 o - 1 is a prime or the square of one
SIZES = [size for size in range(1, 1025) if hadamard_order(size)]


def test_the_orders_are_those_of_paley() -> None:
    assert sorted({hadamard_order(size) for size in SIZES}) == [1, *ORDERS]
    assert ORDERS[-1] == LARGEST_ORDER
    assert {hadamard_order(order * 2**k) for order in ORDERS for k in range(8)} == set(ORDERS)


@pytest.mark.parametrize("order", [1, *ORDERS])
def test_paley_matrices_are_symmetric_and_orthogonal(order: int) -> None:
    matrix = paley_matrix(order).to(torch.int64)
    assert set(matrix.flatten().tolist()) <= {-1, 1}
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("size", SIZES)
def test_matrices_of_all_sizes_are_their_own_inverse(size: int) -> None:
    matrix = (hadamard_matrix(size, torch.float64) * size**0.5).round()
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix, size * torch.eye(size, dtype=torch.float64))  # whole numbers below 2^53: exact


@pytest.mark.parametrize("size", [0, -4, 3, 6, 22, 44, 76, 172, 4 * 17, 4 * 33])
def test_other_sizes_are_refused(size: int) -> None:
    assert hadamard_order(size) is None
    with pytest.raises(Refused, match=f"no Hadamard matrix of size {size} is known"):
        hadamard_matrix(size)
    with pytest.raises(Refused, match="is known"):
        torch.ops.qc.hadamard(torch.zeros(1, max(size, 1), device="meta"), size)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (7, 1), (24, 24), (1536, 1536), (11008, 256), (33 * 64, 192), (14336, 14336), (14, 2)])
def test_the_largest_block_of_a_size(size: int, block: int) -> None:
    assert hadamard_block(size) == block

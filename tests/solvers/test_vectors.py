"""Tables of vectors: what k-means promises."""

from __future__ import annotations

import itertools

import torch

from qcompile.solvers._vectors import learn_vectors

qc = torch.ops.qc


def rows(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width // 2).repeat_interleave(2, 1) + 0.3 * torch.randn(tokens, width)


def error(x: torch.Tensor, table: torch.Tensor, weights: torch.Tensor) -> float:
    runs = (qc.vectors(qc.vector_codes(x, table), table) - x).square().unflatten(-1, (len(table), -1)).sum(-1)
    return float((weights * runs).sum())


def test_rounds_never_raise_the_error_and_weights_are_what_it_counts() -> None:
    x, weights = rows(1500, 16), torch.rand(1500, 4).pow(6) * 10
    for counted in (None, weights):
        errors = [
            error(x, learn_vectors(x, 4, counted, rounds=n), torch.ones(1500, 4) if counted is None else weights) for n in (0, 1, 3, 20)
        ]
        assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert error(x, learn_vectors(x, 4, weights), weights) < 0.8 * error(x, learn_vectors(x, 4), weights)


def test_as_many_values_as_vectors_are_kept() -> None:
    x = torch.randn(40, 12)[torch.randint(0, 40, (500,))]
    assert torch.equal(qc.vectors(qc.vector_codes(x, table := learn_vectors(x, 4)), table).round(decimals=5), x.round(decimals=5))


def test_coupled_channels_hold_more_than_channels_alone() -> None:
    """Neighbours that vary together: four channels in a byte lose less than two bits for each channel, each with its own best range."""
    x = rows(4000, 16)
    steps = (x.amax(0) - x.amin(0)) / 3
    alone = ((x - x.amin(0)) / steps).round() * steps + x.amin(0)
    assert error(x, learn_vectors(x, 4), torch.ones(4000, 4)) < 0.6 * float((alone - x).square().sum())

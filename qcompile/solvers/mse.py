"""Least squared error: each granule's range is shrunk by the factor that loses least, then weights go to the nearest code.

Clipping a few large weights pays where it makes the step of all others smaller. With a Gram matrix of the layer's input the error of
input i counts ``gram[i, i]`` times: the diagonal of the layer's own objective tr(E H E^T).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Block, Channel, Granularity, Group, Tensor
from qcompile.formats.quantize import choose_scale, dequantize, quantize

USES = ("gram",)  # statistics that the solver takes where there is data
BY_ROWS = True


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    weighted: bool = True,
    steps: int = 80,
    smallest: float = 0.2,
) -> Quantized:
    """Return the weight on the grids of least squared error.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in] or [groups, in, in] of the layer's input, or nothing.
        scheme: of the weight.
        weighted: weigh the error by the diagonal of ``gram``, where there is one.
        steps: how many shrink factors are tried, evenly spaced from ``smallest`` to 1.
        smallest: the least shrink factor.
    """
    importance = input_importance(weight, statistics) if weighted else None
    scale, zero_point = search_scale(weight, scheme, importance, steps=steps, smallest=smallest)
    return Quantized(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)


def input_importance(weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what the squared error of each weight counts, float64 broadcastable to [out, in], or None."""
    gram = statistics.get("gram")
    if gram is None:
        return None
    diagonal = torch.diagonal(gram.to(torch.float64), dim1=-2, dim2=-1).reshape(-1, weight.shape[1])  # [groups, in]
    # A dead input would make every grid of its granule equally good; a trace of weight keeps such rows near nearest rounding.
    diagonal = diagonal + 1e-6 * diagonal.mean().clamp(min=1e-30)
    return diagonal.repeat_interleave(weight.shape[0] // len(diagonal), 0)


def search_scale(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, *, steps: int = 80, smallest: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scale and zero point of each granule with the least (weighted) squared error; ties keep the wider range."""
    low, high = scheme.granularity.reduce_range(weight)
    best_scale, best_zero_point = choose_scale(low, high, scheme)
    best = _granule_error(weight, best_scale, best_zero_point, scheme, importance)
    for factor in torch.linspace(1, smallest, steps)[1:].tolist():
        scale, zero_point = choose_scale(low * factor, high * factor, scheme)
        error = _granule_error(weight, scale, zero_point, scheme, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero_point is not None and best_zero_point is not None:
            best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _granule_error(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme, importance: torch.Tensor | None
) -> torch.Tensor:
    """Return the sum of squared errors of each granule, float64, in the scale's shape."""
    rounded = dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    error = (weight - rounded).to(torch.float64).square()
    return granule_sum(error if importance is None else error * importance, scheme.granularity)


def granule_sum(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Return the sum of x over the elements that share a scale, in the scale's shape."""
    match granularity:
        case Tensor():
            return x.sum()
        case Channel(axis):
            others = [d for d in range(x.ndim) if d != axis % x.ndim]
            return x.sum(others) if others else x
        case Group(size, axis):
            return _run_sum(x, size, axis)
        case Block(rows, columns):
            return _run_sum(_run_sum(x, columns, -1), rows, -2)
    return x.sum(-1, keepdim=True)  # Token


def _run_sum(x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    moved = x.movedim(axis, -1)
    padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % size))
    return padded.unflatten(-1, (-1, size)).sum(-1).movedim(-1, axis)

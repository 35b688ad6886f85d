"""Static ranges of activations from statistics: minimum and maximum, percentile, least squared error, least divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from qcompile.errors import Refused
from qcompile.formats import Scheme
from qcompile.formats.granularity import Channel
from qcompile.formats.quantize import choose_scale, dequantize, quantize
from qcompile.statistics.collectors import range_request

__all__ = ["find_range", "range_request"]

_ENTROPY_BINS = 2048  # of the histogram of magnitudes, as TensorRT has


def find_range(
    kind: str, result: Mapping[str, torch.Tensor], scheme: Scheme, percentile: float = 99.99
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the range (low, high), float32 scalars, to give to ``choose_scale``.

    Args:
        kind: ``minmax``, ``percentile``, ``mse`` or ``entropy``.
        result: what the request of ``range_request(kind, node)`` gathered.
        scheme: of the activation; its granularity is taken as one scale for the whole tensor.
        percentile: share of the elements inside the range, in percent, for ``percentile``.

    Raises:
        Refused: an unknown kind, a percentile outside (0, 100], or no data.
    """
    if not torch.isfinite(result["min"]) or not torch.isfinite(result["max"]):
        raise Refused("the calibration data gave no finite range")
    if kind == "minmax":
        return result["min"].float(), result["max"].float()
    if kind == "percentile":
        low, high = _percentile_range(result, scheme, percentile)
    elif kind == "mse":
        low, high = _least_error_range(result, scheme)
    elif kind == "entropy":
        low, high = _entropy_range(result, scheme)
    else:
        raise Refused(f"unknown range '{kind}'", way_out="known are minmax, percentile, mse, entropy")
    return torch.maximum(low.float(), result["min"].float()), torch.minimum(high.float(), result["max"].float())


def _edges(result: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the edges of the bins, float64 [bins + 1]."""
    low, high, bins = result["low"], result["high"], len(result["counts"])
    return low + (high - low) * torch.arange(bins + 1, dtype=torch.float64) / bins


def _magnitudes(result: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the counts of |x| in bins of equal width from zero, and the width."""
    counts, bins = result["counts"], len(result["counts"])
    width = float(result["high"] - result["low"]) / bins
    first = round(float(result["low"]) / width)  # number of the first bin counted from zero: zero is an edge of the collector's bins
    numbers = torch.arange(first, first + bins)
    numbers = torch.where(numbers < 0, -numbers - 1, numbers)
    return torch.zeros(int(numbers.max()) + 1, dtype=torch.int64).index_add_(0, numbers, counts), width


# ---- percentile -----------------------------------------------------------------------------------------------------------


def _percentile_range(result: Mapping[str, torch.Tensor], scheme: Scheme, percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the same share of elements: of |x| for a symmetric scheme, else half of the share at either end."""
    if not 0 < percentile <= 100:
        raise Refused(f"a percentile lies above 0 and up to 100, not {percentile:g}")
    share = percentile / 100
    if scheme.symmetric:
        counts, width = _magnitudes(result)
        edge = _quantile(counts, torch.arange(len(counts) + 1, dtype=torch.float64) * width, share)
        return -edge, edge
    edges, tail = _edges(result), (1 - share) / 2
    return _quantile(result["counts"], edges, tail), _quantile(result["counts"], edges, 1 - tail)


def _quantile(counts: torch.Tensor, edges: torch.Tensor, share: float) -> torch.Tensor:
    """Return the value below which this share of the elements lies, linear within a bin."""
    below = torch.cat([torch.zeros(1, dtype=torch.float64), counts.to(torch.float64).cumsum(0)])
    wanted = share * below[-1]
    bin = min(int(torch.searchsorted(below[1:], wanted)), len(counts) - 1)
    part = (wanted - below[bin]) / max(float(counts[bin]), 1.0)
    return edges[bin] + part.clamp(0, 1) * (edges[bin + 1] - edges[bin])


# ---- least squared error --------------------------------------------------------------------------------------------------


def _least_error_range(result: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Search shrink factors of the range for the least expected squared rounding error: both ends together, then each end alone."""
    edges, counts = _edges(result), result["counts"].to(torch.float64)
    kept = counts > 0
    values = ((edges[1:] + edges[:-1]) / 2).clamp(float(result["min"]), float(result["max"]))[kept]
    data = _Values(values, counts[kept])
    low, high = result["min"].to(torch.float64), result["max"].to(torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    factors = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    best = _best(low * factors, high * factors, data, scheme)
    if scheme.symmetric:
        return best
    for _ in range(2):
        near = torch.cat([torch.linspace(0.5, 1.5, 101, dtype=torch.float64), ones])  # 1 stands in it exactly: never worse
        best = _best((best[0] * near).clamp(min=low), best[1].expand(102), data, scheme)
        best = _best(best[0].expand(102), (best[1] * near).clamp(max=high), data, scheme)
    return best


class _Values:
    """Distinct values in ascending order, float64 [n], how often each occurs, and sums over all values below each, [n + 1]."""

    def __init__(self, values: torch.Tensor, counts: torch.Tensor) -> None:
        self.values, self.counts = values, counts
        powers = torch.stack([counts, counts * values, counts * values.square()])
        self.below = torch.nn.functional.pad(powers.cumsum(1), (1, 0))  # counts, sums and sums of squares
        self.magnitude = float((counts * values.abs()).sum())


def _best(low: torch.Tensor, high: torch.Tensor, data: _Values, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pair of the candidates low and high [n] with the least error; the widest of equals.

    Sums bound every candidate's error; only those whose bounds leave it open are compared by ``expected_error``, so the choice is that of
    comparing all.
    """
    error, rounding = _errors(low, high, data, scheme)
    least = (error + rounding).nan_to_num(nan=torch.inf).min()
    undecided = (~(error - rounding > least)).nonzero().flatten().tolist()  # NaN, of a scale that is not finite, is undecided too
    last = {(float(low[i]), float(high[i])): i for i in undecided}  # equal candidates are tried once
    exact = {i: expected_error(low[i], high[i], data.values, data.counts, scheme) for i in last.values()}
    index = min(exact, key=lambda i: (exact[i], -i))
    return low[index], high[index]


def _errors(low: torch.Tensor, high: torch.Tensor, data: _Values, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expected errors of candidates [n], and by how much rounding may have made them wrong.

    What rounds to a level lies between the middles of it and its neighbours: a run of the sorted values, which adds
    ``sum (x - level)^2 = sum x^2 - 2 level sum x + level^2 count``. Counts are exact. A sum of m terms in order is wrong by up to m 2^-53
    of the sum of magnitudes (Higham 2002, section 4.2), and as a run begins where another ends, what the sums at the borders are wrong by
    enters with the distance of two levels, in all with that of the outermost. Twice that covers the few operations after the sums.
    """
    scale, zero_point = choose_scale(low, high, dataclasses.replace(scheme, granularity=Channel(0)))
    codes = torch.arange(scheme.format.lowest, scheme.format.highest + 1, dtype=torch.float64)
    levels = (codes - (0 if zero_point is None else zero_point.reshape(-1, 1))) * scale.reshape(-1, 1)  # [n, levels]
    ends = torch.searchsorted(data.values, (levels[:, 1:] + levels[:, :-1]) / 2)
    ends = F.pad(F.pad(ends, (1, 0)), (0, 1), value=len(data.values))
    counts, sums = data.below[:2, ends].diff(dim=2)
    squares = data.below[2, -1]
    error = squares + (levels * (levels * counts - 2 * sums)).sum(1)
    span = levels.abs().amax(1) + levels[:, -1] - levels[:, 0]
    return error, 2 * (len(data.values) + len(codes)) * 2.0**-53 * (squares + 2 * span * data.magnitude)


def expected_error(low: torch.Tensor, high: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, scheme: Scheme) -> float:
    """Return the sum of squared rounding errors of values [n], each so often, on the grid that covers [low, high]."""
    row = dataclasses.replace(scheme, granularity=Channel(0))
    scale, zero_point = choose_scale(low.reshape(1), high.reshape(1), row)
    zero_point = None if zero_point is None else zero_point.reshape(1)
    x = values.reshape(1, -1)
    rounded = dequantize(quantize(x, scale, zero_point, row), scale, zero_point, row)
    return float(((x - rounded).square() * counts).sum().nan_to_num(nan=torch.inf))


# ---- least divergence -----------------------------------------------------------------------------------------------------


def _entropy_range(result: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the threshold of |x| whose clipped, coarsened histogram diverges least from the clipped one (Migacz 2017, TensorRT).

    For each threshold: P is the histogram up to it with the rest added to its last bin; Q is the histogram up to it merged into as many
    levels as the scheme has on the used side(s), each spread evenly over its non-empty bins; the least KL(P || Q) wins.
    """
    counts, width = _magnitudes(result)
    histogram, width = _rebin(counts, width)
    levels = int(scheme.format.highest - scheme.format.lowest + 1)
    two_sided = scheme.symmetric or (result["min"] < 0 and result["max"] > 0)
    levels = max(2, levels // 2 if two_sided else levels)
    if len(histogram) <= levels:
        limit = torch.maximum(result["min"].abs(), result["max"].abs()).to(torch.float64)
        return -limit, limit
    stops = range(levels, len(histogram) + 1, max(1, len(histogram) // 512))
    divergence = [_divergence(histogram, stop, levels) for stop in stops]
    best = min(range(len(divergence)), key=lambda i: (divergence[i], -i))
    limit = torch.tensor(stops[best] * width, dtype=torch.float64)
    return -limit, limit


def _rebin(counts: torch.Tensor, width: float) -> tuple[torch.Tensor, float]:
    """Merge whole numbers of bins so that at most about 2048 are left; return float64 counts and the new width."""
    merged = max(1, len(counts) // _ENTROPY_BINS)
    padded = F.pad(counts.to(torch.float64), (0, -len(counts) % merged))
    return padded.reshape(-1, merged).sum(1), width * merged


def _divergence(histogram: torch.Tensor, stop: int, levels: int) -> float:
    """Return KL(P || Q) for the threshold after ``stop`` bins."""
    inside = histogram[:stop]
    p = inside.clone()
    p[-1] += histogram[stop:].sum()
    level = torch.arange(stop) * levels // stop
    filled = (p > 0).to(torch.float64)  # the last bin counts as filled when only clipped elements are in it
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    share = total / torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled).clamp(min=1)
    q = share[level] * filled
    if q.sum() == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    return float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum())

"""Requests for statistics and the collectors that gather them, batch by batch.

A request is a frozen value that names a node and what to gather; ``start`` gives its collector. Collectors stream: none keeps the
data, and none depends on how the data was cut into batches beyond float64 rounding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from qcompile.errors import Refused

Result = dict[str, torch.Tensor]


class Collector(Protocol):
    """Gathers one statistic over values that arrive one batch at a time."""

    def update(self, value: torch.Tensor) -> None:
        """Take the value of the node on one batch; for a request ``beside_float``, and the float model's as a second argument."""

    def result(self) -> Result:
        """Return the statistic as plain tensors."""


@dataclass(frozen=True)
class Request:
    """A statistic of one node's value; ``str(request)`` is its stable text form, used in cache keys."""

    node: str

    @property
    def beside_float(self) -> bool:
        """Whether the collector is given the float model's value too."""
        return False

    def start(self) -> Collector:
        """Return a new collector."""
        raise NotImplementedError

    def __str__(self) -> str:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "node")
        return f"{type(self).__name__}({', '.join([f'%{self.node}', *(f'{name}={value}' for name, value in fields)])})"


def _rows(value: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the value as float64 [elements of the other axes, channels of ``axis``]."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis]).to(torch.float64)


# ---- ranges ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinMax(Request):
    """The smallest and the largest element: ``min`` and ``max``, float32 scalars."""

    def start(self) -> Collector:
        return _MinMax()


class _MinMax:
    def __init__(self) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def update(self, value: torch.Tensor) -> None:
        if value.numel():
            low, high = value.aminmax()
            self.low, self.high = torch.minimum(self.low, low.float()), torch.maximum(self.high, high.float())

    def result(self) -> Result:
        return {"min": self.low, "max": self.high}


@dataclass(frozen=True)
class Histogram(Request):
    """Counts of elements in bins of equal width that cover the data, with at least ``bins`` bins from zero to the largest magnitude.

    Result: ``counts`` int64 [n], ``low`` and ``high`` (edges of the first and the last bin, float64), ``min`` and ``max`` of the data.
    """

    bins: int = 2048

    def start(self) -> Collector:
        return _Histogram(self.bins)


class _Histogram:
    """Bins over [-2^e, 2^e): when the range doubles, pairs of bins merge, so the counts are those of the final range, exactly."""

    def __init__(self, bins: int) -> None:
        self.half = 2 * bins  # bins on either side of zero; a power-of-two range may be twice the data's, so half of them are surely used
        self.exponent = -100
        self.counts = torch.zeros(2 * self.half, dtype=torch.int64)
        self.range = _MinMax()

    def update(self, value: torch.Tensor) -> None:
        if not value.numel():
            return
        value = value.detach().reshape(-1).float()
        self.range.update(value)
        exponent = int(torch.frexp(torch.maximum(self.range.low.abs(), self.range.high.abs())).exponent)
        if exponent > self.exponent:
            self._widen(exponent)
        index = (value.to(torch.float64) * (self.half * 2.0**-self.exponent)).floor().to(torch.int64) + self.half
        self.counts += torch.bincount(index, minlength=2 * self.half)

    def _widen(self, exponent: int) -> None:
        centered = torch.arange(-self.half, self.half)
        merged = (centered >> min(exponent - self.exponent, 62)) + self.half
        self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts)
        self.exponent = exponent

    def result(self) -> Result:
        used = self.counts.nonzero().flatten()
        first, last = (int(used[0]), int(used[-1])) if len(used) else (self.half, self.half)
        width = 2.0**self.exponent / self.half
        edges = {"low": (first - self.half) * width, "high": (last + 1 - self.half) * width}
        return {
            "counts": self.counts[first : last + 1].clone(),
            **{name: torch.tensor(edge, dtype=torch.float64) for name, edge in edges.items()},
            **self.range.result(),
        }


def range_request(kind: str, node: str) -> Request:
    """Return what the range of this kind needs: ``minmax``, ``percentile``, ``mse`` or ``entropy``.

    Raises:
        Refused: the kind is none of these.
    """
    if kind not in ("minmax", "percentile", "mse", "entropy"):
        raise Refused(f"unknown range '{kind}'", way_out="known are minmax, percentile, mse, entropy")
    return MinMax(node) if kind == "minmax" else Histogram(node)


# ---- channels -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AbsMax(Request):
    """The largest magnitude of each channel of an axis: ``abs_max`` float32 [channels]."""

    axis: int = -1

    def start(self) -> Collector:
        return _AbsMax(self.axis)


class _AbsMax:
    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.largest: torch.Tensor | None = None

    def update(self, value: torch.Tensor) -> None:
        if value.numel():
            others = [d for d in range(value.ndim) if d != self.axis % value.ndim]
            found = value.abs().amax(others) if others else value.abs()
            self.largest = found.float() if self.largest is None else torch.maximum(self.largest, found.float())

    def result(self) -> Result:
        return {"abs_max": _present(self.largest)}


@dataclass(frozen=True)
class AbsMean(Request):
    """The mean magnitude of each channel of an axis: ``abs_mean`` float32 [channels], ``count`` of values behind each mean."""

    axis: int = -1

    def start(self) -> Collector:
        return _AbsMean(self.axis)


class _AbsMean:
    def __init__(self, axis: int) -> None:
        self.axis, self.count = axis, 0
        self.total: torch.Tensor | None = None

    def update(self, value: torch.Tensor) -> None:
        rows = _rows(value, self.axis).abs()
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.count += len(rows)

    def result(self) -> Result:
        return {"abs_mean": (_present(self.total) / max(self.count, 1)).float(), "count": torch.tensor(self.count)}


@dataclass(frozen=True)
class Moments(Request):
    """``mean`` and ``variance`` (of the population) of each channel of an axis, float64 [channels], and ``count`` of values behind each."""

    axis: int = -1

    def start(self) -> Collector:
        return _Moments(self.axis)


class _Moments:
    """Merges batches as Chan, Golub and LeVeque (1979) do, so that a large mean does not cancel the variance."""

    def __init__(self, axis: int) -> None:
        self.axis, self.count = axis, 0
        self.mean: torch.Tensor | None = None
        self.squares = torch.zeros(())

    def update(self, value: torch.Tensor) -> None:
        rows = _rows(value, self.axis)
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.mean is None:
            self.mean, self.squares, self.count = mean, squares, len(rows)
            return
        total, step = self.count + len(rows), mean - self.mean
        self.squares = self.squares + squares + step.square() * (self.count * len(rows) / total)
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def result(self) -> Result:
        return {"mean": _present(self.mean), "variance": self.squares / max(self.count, 1), "count": torch.tensor(self.count)}


def _present(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise Refused("the calibration data gave no value here")
    return value


# ---- products and samples -------------------------------------------------------------------------------------------------

Unfold = tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int], int]


@dataclass(frozen=True)
class RowWeights:
    """What each row of a value counts in a Gram matrix.

    Attributes:
        name: stable text that tells these weights from others on the same graph and data.
        batches: float32 [rows, groups] for each batch of the data, in order.
    """

    name: str
    batches: tuple[torch.Tensor, ...] = dataclasses.field(compare=False, default=())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Gram(Request):
    """x^T diag(s) x / rows over the rows of the last axis: ``gram`` float64 [k, k] and ``rows``; s is 1 without ``weights``.

    With ``unfold`` = (kh, kw, stride, padding, dilation, groups) the value is the input [batch, channels, height, width] of a
    convolution and its rows are the patches that the kernel sees: k = channels / groups * kh * kw, in the order of the
    weight; with more than one group ``gram`` is [groups, k, k]. So it is with ``weights`` of more than one group.

    With ``cross`` the result has ``cross`` beside it, x^T diag(s) z / rows, where z is the same value in the float model.
    """

    unfold: Unfold | None = None
    weights: RowWeights | None = None
    cross: bool = False

    @property
    def beside_float(self) -> bool:
        return self.cross

    def start(self) -> Collector:
        return _Gram(self)


class _Gram:
    def __init__(self, request: Gram) -> None:
        self.unfold, self.cross, self.rows = request.unfold, request.cross, 0
        self.weights = iter(request.weights.batches) if request.weights else None
        self.totals: dict[str, torch.Tensor] = {}

    def update(self, value: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        if self.unfold is None:
            weights = None if self.weights is None else next(self.weights).T.unsqueeze(2)  # [groups, rows, 1]
            rows, beside = (None if x is None else x.reshape(1, -1, value.shape[-1]) for x in (value, exact))
            self._add(rows, beside, weights)
            return
        for image in range(len(value)):  # one at a time: patches of a whole batch take kh * kw times its memory
            self._add(self._patches(value[image]), None if exact is None else self._patches(exact[image]), None)

    def _patches(self, image: torch.Tensor) -> torch.Tensor:
        """Return what the kernel sees, [groups, places, k]."""
        assert self.unfold is not None
        kh, kw, stride, padding, dilation, groups = self.unfold
        patches = F.unfold(image.unsqueeze(0).float(), (kh, kw), dilation, padding, stride)  # [1, channels * kh * kw, places]
        return patches.reshape(groups, -1, patches.shape[-1]).transpose(1, 2)

    def _add(self, rows: torch.Tensor | None, exact: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        assert rows is not None
        rows = rows.to(torch.float64)  # [groups, rows, k]
        weighted = rows if weights is None else rows * weights
        self._sum("gram", weighted.transpose(1, 2) @ rows)
        if exact is not None:
            self._sum("cross", weighted.transpose(1, 2) @ exact.to(torch.float64))
        self.rows += rows.shape[1]

    def _sum(self, name: str, product: torch.Tensor) -> None:
        self.totals[name] = self.totals[name].add_(product) if name in self.totals else product

    def result(self) -> Result:
        _present(self.totals.get("gram"))
        means = {name: total / max(self.rows, 1) for name, total in self.totals.items()}
        return {**{name: m[0] if len(m) == 1 else m for name, m in means.items()}, "rows": torch.tensor(self.rows)}


@dataclass(frozen=True)
class Samples(Request):
    """Up to ``rows`` rows of the last axis, drawn over the whole data by a seed: ``rows`` [up to rows, k] in the data's order."""

    rows: int = 512
    seed: int = 0

    def start(self) -> Collector:
        return _Samples(self.rows, self.seed)


class _Samples:
    """Keeps the rows whose numbers hash lowest: the choice depends on the seed and the row's place in the data, not on the batches."""

    def __init__(self, rows: int, seed: int) -> None:
        self.wanted, self.seed, self.seen = rows, seed, 0
        self.numbers = np.zeros(0, np.uint64)
        self.values: torch.Tensor | None = None

    def update(self, value: torch.Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1])
        numbers = np.concatenate([self.numbers, np.arange(self.seen, self.seen + len(rows), dtype=np.uint64)])
        self.seen += len(rows)
        kept = _lowest(numbers, self.wanted, self.seed)
        old = len(self.numbers)
        new = rows[torch.from_numpy(kept[kept >= old] - old)]
        self.values = new if self.values is None else torch.cat([self.values[torch.from_numpy(kept[kept < old])], new])
        self.numbers = numbers[kept]

    def result(self) -> Result:
        return {"rows": _present(self.values).contiguous()}


def sampled_places(request: Samples, count: int) -> torch.Tensor:
    """Return which of so many rows in all a request keeps, in order."""
    return torch.from_numpy(_lowest(np.arange(count, dtype=np.uint64), request.rows, request.seed))


def _lowest(numbers: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    return np.sort(np.argsort(_hash(numbers, seed), kind="stable")[:wanted])


def _hash(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return 64 mixed bits for each number (splitmix64, Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(seed * 1_000_003 % 2**64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

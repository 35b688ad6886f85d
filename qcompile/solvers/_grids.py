"""The grid that each weight of a matrix is rounded to, for solvers that walk along its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Channel, Group, Tensor
from qcompile.formats.quantize import SMALLEST_SCALE, choose_scale, dequantize, quantize
from qcompile.solvers._coordinates import errors, fit
from qcompile.solvers.mse import input_importance, search_scale


@dataclass(frozen=True)
class Grids:
    """Scales and zero points of a weight [out, in]; values stand as [groups, rows, in], float64.

    Attributes:
        scheme: by tensor, by output channel, or by runs along the input.
        scale: float32 of the granularity's shape.
        zero_point: int32 of the same shape, or None.
        shape: of the weight as [groups, rows, in].
    """

    scheme: Scheme
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    shape: tuple[int, int, int]

    @classmethod
    def choose(
        cls, name: str, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], scheme: Scheme, grid: str, groups: int
    ) -> Grids:
        """Return the grids that ``nearest`` (minimum and maximum) or ``mse`` (least squared error, weighted by H's diagonal) chooses.

        Raises:
            Refused: another word, or a granularity that is not along the input.
        """
        if grid not in ("nearest", "mse"):
            raise Refused(f"grid of {name} is nearest or mse, not '{grid}'")
        by = scheme.granularity
        if not isinstance(by, (Tensor, Channel, Group)) or getattr(by, "axis", 0) not in ((-1, 1) if isinstance(by, Group) else (0, -2)):
            raise Refused(f"{name} takes scales by tensor, output channel or group along the input, not {by}")
        if grid == "nearest":
            chosen = choose_scale(*by.reduce_range(weight), scheme)
        else:
            chosen = search_scale(weight, scheme, input_importance(weight, statistics))
        return cls(scheme, *chosen, (groups, weight.shape[0] // groups, weight.shape[1]))

    def _full(self, part: torch.Tensor) -> torch.Tensor:
        groups, rows, inputs = self.shape
        return self.scheme.granularity.expand(part, (groups * rows, inputs)).expand(groups * rows, inputs).reshape(self.shape)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest values that can be had, all columns at once."""
        return self._values(self._codes(values, self._full(self.scale), self._zero()))

    def round(self, values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Return the nearest values that can be had for columns ``place`` [groups, rows], as ``descend`` asks."""
        at = place.unsqueeze(2)
        scale, zero_point = self._column(self.scale, at), None if self.zero_point is None else self._column(self.zero_point, at)
        single = replace(self.scheme, granularity=Tensor())  # scale and column have one shape: nothing to expand
        codes = quantize(values.to(torch.float32), scale, zero_point, single)
        return dequantize(codes, scale, zero_point, single).to(torch.float64)

    def run_scale(self, run: slice) -> torch.Tensor:
        """Return the scale of each weight of a run of neighbouring columns, float64 [groups, rows, columns]."""
        return self._full(self.scale)[:, :, run].to(torch.float64)

    def round_run(self, values: torch.Tensor, run: slice) -> torch.Tensor:
        """Return what the format gives for values [groups, rows, columns] of a run of neighbouring columns."""
        scale = self._full(self.scale)[:, :, run]
        assert self.zero_point is None
        single = replace(self.scheme, granularity=Tensor())
        return dequantize(quantize(values.to(torch.float32), scale, None, single), scale, None, single).to(torch.float64)

    def _column(self, part: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return what a part of the granularity's shape has for places [groups, rows, 1], as [groups, rows]."""
        groups, rows, _ = self.shape
        if part.ndim == 0:
            return part.expand(groups, rows)
        if not isinstance(self.scheme.granularity, Group):
            return part.reshape(groups, rows)
        return part.reshape(groups, rows, -1).gather(2, at // self.scheme.granularity.size).squeeze(2)

    def _zero(self) -> torch.Tensor | None:
        return None if self.zero_point is None else self._full(self.zero_point)

    def _codes(self, values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        return quantize(values.to(torch.float32), scale, zero_point, replace(self.scheme, granularity=Tensor()))

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        single = replace(self.scheme, granularity=Tensor())
        return dequantize(codes, self._full(self.scale), self._zero(), single).to(torch.float64)

    def quantized(self, q: torch.Tensor) -> Quantized:
        """Return values that can be had as codes [out, in]."""
        codes = self._codes(q, self._full(self.scale), self._zero())
        return Quantized(codes.reshape(-1, self.shape[2]), self.scale, self.zero_point, self.scheme)

    def refit(self, W: torch.Tensor, H: torch.Tensor, q: torch.Tensor) -> tuple[Grids, torch.Tensor]:
        """Return the grids whose scales fit the codes of q best on f (see ``_coordinates``), and the values of the codes on them.

        A row whose fitted scales are not all positive, or that gains nothing, keeps its own.
        """
        steps = q / self._full(self.scale).to(torch.float64)  # [groups, rows, in], whole numbers or levels
        by, total = self.scheme.granularity, self.shape[0] * self.shape[1]
        count = -(-self.shape[2] // by.size) if isinstance(by, Group) else 1
        owner = torch.arange(self.shape[2]) // (by.size if isinstance(by, Group) else self.shape[2])
        basis = steps.unsqueeze(3) * torch.nn.functional.one_hot(owner, count).to(torch.float64)
        fitted = fit(W, H, basis, total if isinstance(by, Tensor) else 1).reshape(self.scale.shape).to(self.scheme.scale_dtype)
        fitted = fitted.to(torch.float32)
        usable = torch.isfinite(fitted) & (fitted >= max(SMALLEST_SCALE, torch.finfo(self.scheme.scale_dtype).smallest_normal))
        moved = replace(self, scale=torch.where(usable, fitted, self.scale))
        values = (steps * moved._full(moved.scale).to(torch.float64)).to(torch.float32).to(torch.float64)
        gained = _by_row(errors(W, values, H), by) < _by_row(errors(W, q, H), by)  # [groups, rows]
        rows = gained.reshape(-1, *[1] * (self.scale.ndim - 1)) if self.scale.ndim else gained.all()
        kept = replace(self, scale=torch.where(rows, moved.scale, self.scale))
        return kept, torch.where(gained.unsqueeze(2), values, q)

    def best_rows(self, W: torch.Tensor, H: torch.Tensor, start: torch.Tensor, found: Sequence[tuple[Grids, torch.Tensor]]) -> Quantized:
        """Return, of ``start`` on these grids and each of ``found`` on its own, every row where it has the smallest f.

        With one scale for the tensor, rows cannot differ in theirs: then it is the one that is best as a whole.
        """
        best, values = self.quantized(start), start
        for grids, q in found:
            better = _by_row(errors(W, q, H), self.scheme.granularity) < _by_row(errors(W, values, H), self.scheme.granularity)
            values = torch.where(better.unsqueeze(2), q, values)
            best = _choose(better.reshape(-1), grids.quantized(q), best)
        return best


def _by_row(error: torch.Tensor, granularity: object) -> torch.Tensor:
    """Return the error of what shares scales: each row, or all rows together."""
    return error.sum().expand_as(error) if isinstance(granularity, Tensor) else error


def _choose(rows: torch.Tensor, one: Quantized, other: Quantized) -> Quantized:
    def pick(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(rows.reshape(-1, *[1] * (a.ndim - 1)) if a.ndim else rows.all(), a, b)

    assert one.scale is not None
    assert other.scale is not None
    zero_point = None if one.zero_point is None or other.zero_point is None else pick(one.zero_point, other.zero_point)
    return Quantized(pick(one.codes, other.codes), pick(one.scale, other.scale), zero_point, one.scheme)

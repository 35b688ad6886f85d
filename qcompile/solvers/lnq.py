"""LNQ: a table of levels for each output channel, learned for the layer's output (GuidedQuant, Kim et al. 2025, arXiv 2505.07004).

Minimises sum over rows of (w - q) H (w - q)^T, q = s T[codes], over the table T and the codes in turn, from the start of k-means:

    T = (P^T S H S P)^-1 P^T S H w, P one-hot of the codes, S the scales        codes: coordinate descent, ``cycles`` times over all inputs

Neither step raises the error. Where kmeans weighs weights one by one (H's diagonal), this one counts how their errors meet in the output.
With ``rows=gradient`` of ``quantize-weights`` H is the paper's guided Hessian. At the end the levels become bytes, the scales take
up the largest of each table, and the codes are descended once more on what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.errors import Refused
from qcompile.formats import Codebook, Quantized, Scheme
from qcompile.formats.lookup import STEPS
from qcompile.formats.quantize import SMALLEST_SCALE
from qcompile.solvers import kmeans
from qcompile.solvers._coordinates import descend, errors, fit, prepare

NEEDS = ("gram",)
FORMATS = (Codebook,)  # weights of another format are left to least squared error


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    table_rows: int = 1,
    rounds: int = 3,
    cycles: int = 4,
    damping: float = 0.01,
) -> Quantized:
    """Return the weight with codes, scales and tables of its own.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in] or [groups, in, in].
        scheme: of the weight; its format is a codebook.
        table_rows: rows of the weight that share a table; 0: all.
        rounds: of tables and codes in turn.
        cycles: of coordinate descent in a round.
        damping: added to H's diagonal, as a share of its mean (the paper: 1e-5, where H is known from more data).

    Raises:
        Refused: another format, rows that do not divide, or a Gram matrix that does not fit.
    """
    if not isinstance(scheme.format, Codebook):
        raise Refused(f"lnq learns the tables of a codebook; {scheme.format} has none")
    W, H = prepare("lnq", weight, statistics.get("gram"), damping)
    start = kmeans.solve(weight, statistics, scheme, table_rows=table_rows)
    assert start.table is not None
    solver = _Rows(W, H, start, weight.shape[0] // len(start.table))
    best = solver.stored()
    for _ in range(rounds):
        solver.choose_levels()
        for _ in range(cycles):
            solver.choose_codes()
        best = solver.better(best, solver.stored())
    return best


class _Rows:
    """Codes, scales and levels on the way: q = scale * levels[codes]."""

    def __init__(self, W: torch.Tensor, H: torch.Tensor, start: Quantized, shared: int) -> None:
        assert start.table is not None
        assert start.scale is not None
        self.W, self.H, self.start, self.shared = W, H, start, shared
        shape = tuple(start.codes.shape)
        self.scale = start.scheme.granularity.expand(start.scale.to(torch.float64), shape).expand(shape).reshape(W.shape)
        self.codes = start.codes.to(torch.int64).reshape(W.shape)
        self.levels = start.table.to(torch.float64)  # [tables, levels]

    def _of_rows(self, levels: torch.Tensor) -> torch.Tensor:
        """Return levels [groups, rows, levels]."""
        return levels.repeat_interleave(self.shared, 0).reshape(*self.W.shape[:2], -1)

    def choose_levels(self) -> None:
        P = torch.nn.functional.one_hot(self.codes, self.levels.shape[1]).to(torch.float64)
        found = fit(self.W, self.H, P * self.scale.unsqueeze(3), self.shared)
        used = P.sum(2).reshape(-1, self.shared, P.shape[3]).sum(1) > 0
        found = torch.where(used, found, self.levels)
        order = found.argsort(1)
        self.levels = found.gather(1, order)
        self.codes = self._of_rows(order.argsort(1)).gather(2, self.codes)

    def choose_codes(self) -> None:
        self.codes = self._descended(self.levels, self.scale)

    def _descended(self, levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows = self._of_rows(levels)
        middles = ((rows[:, :, 1:] + rows[:, :, :-1]) / 2).contiguous()

        def nearest(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            s = scale.gather(2, place.unsqueeze(2))
            code = torch.searchsorted(middles, values.unsqueeze(2) / s)
            codes.scatter_(2, place.unsqueeze(2), code)
            return (rows.gather(2, code) * s).squeeze(2)

        codes = self.codes.clone()
        descend(self.W, rows.gather(2, codes) * scale, self.H, nearest, torch.arange(self.W.shape[2]))
        return codes

    def better(self, one: Quantized, other: Quantized) -> Quantized:
        """Return, for each run of rows that share a table, the one of two with the smaller error; all together where they share a scale."""
        error, new = (errors(self.W, q.dequantize().to(torch.float64).reshape(self.W.shape), self.H).reshape(-1) for q in (one, other))
        assert one.table is not None
        assert other.table is not None
        assert one.scale is not None
        assert other.scale is not None
        tables = (new - error).reshape(-1, self.shared).sum(1) < 0
        if not one.scale.ndim:
            tables = (new - error).sum().expand(len(tables)) < 0
        rows = tables.repeat_interleave(self.shared).unsqueeze(1)
        scale = torch.where(rows.reshape(-1, *[1] * (one.scale.ndim - 1)) if one.scale.ndim else tables[0], other.scale, one.scale)
        codes, table = torch.where(rows, other.codes, one.codes), torch.where(tables.unsqueeze(1), other.table, one.table)
        return Quantized(codes, scale, None, one.scheme, table)

    def stored(self) -> Quantized:
        """Return what is stored: levels of a byte, scales in their format, codes descended on these."""
        scheme, shape = self.start.scheme, tuple(self.start.codes.shape)
        stretch = STEPS / self.levels.abs().amax(1, keepdim=True).clamp(min=SMALLEST_SCALE)
        table = (self.levels * stretch).round().clamp(-STEPS, STEPS).to(torch.int8)
        assert self.start.scale is not None
        scale = self.start.scale.to(torch.float64)
        if scale.ndim:
            scale = scale / stretch.repeat_interleave(self.shared, 0).reshape(-1, *[1] * (scale.ndim - 1))
        else:  # one scale for all tables: the largest level of all is the highest byte
            table = (self.levels * stretch.min()).round().clamp(-STEPS, STEPS).to(torch.int8)
            scale = scale / stretch.min()
        smallest = max(SMALLEST_SCALE, torch.finfo(scheme.scale_dtype).smallest_normal)
        scale = scale.to(scheme.scale_dtype).to(torch.float32).clamp(min=smallest)
        full = scheme.granularity.expand(scale.to(torch.float64), shape).expand(shape).reshape(self.W.shape)
        codes = self._descended(table.to(torch.float64), full)
        return Quantized(codes.reshape(shape).to(torch.uint8), scale, None, scheme, table)

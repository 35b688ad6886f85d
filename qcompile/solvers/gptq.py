"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input column at a time and let the columns not yet rounded make up for its error.

Minimises tr(E H E^T), E = W - W_q, H = X^T X / rows. In the paper's letters: W is the weight [out, in], H the Hessian [in, in], U the
upper Cholesky factor of H^-1 (H^-1 = U^T U), and for each column j in order

    q = round(W[:, j])        e = (W[:, j] - q) / U[j, j]        W[:, j:] -= e U[j, j:]

which is OBQ's exact step for a fixed order of columns. Columns are treated in blocks; the rest of W is updated once for each block.
Inside, weights stand as [groups, rows, in] for the groups of a convolution, one group for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Channel, Group, Tensor
from qcompile.formats.quantize import choose_scale, dequantize, quantize
from qcompile.solvers.mse import input_importance, search_scale

NEEDS = ("gram",)  # statistics that the solver does not work without
BY_ROWS = True

Grid = tuple[torch.Tensor, torch.Tensor | None]  # scale and zero point


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
    grid: str = "mse",
    block: int = 128,
    keep_better: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Quantized:
    """Return the weight with GPTQ's codes.

    Args:
        weight: [out, in], float32; a convolution's as [out, in / groups * kh * kw].
        statistics: ``gram`` [in, in], or [groups, in, in] for a convolution whose outputs fall into groups.
        scheme: of the weight: one scale for the tensor, for each row, or for each run along the input.
        damping: added to H's diagonal, as a share of its mean; grows tenfold while H is not positive definite.
        act_order: round the columns with the largest H[j, j] first (``desc_act``).
        static_groups: take the scales of groups from the original weight; False: from what the weight has become when its group's
            turn comes. With ``act_order`` they are always static, so that the codes need no reordering at run time.
        grid: ``nearest`` (minimum and maximum) or ``mse`` (least squared error, weighted by H's diagonal) chooses the scales.
        block: columns between two updates of the whole rest; changes speed, not results beyond float64 rounding.
        keep_better: rows whose error tr(E H E^T) is smaller with nearest rounding keep that (the greedy steps promise nothing for one row).
        say: called with one line when more damping was needed.

    Raises:
        Refused: no Gram matrix, one of another size or not finite, a granularity that is not along the input, or H that damping
            does not save.
    """
    if grid not in ("nearest", "mse"):
        raise Refused(f"grid of gptq is nearest or mse, not '{grid}'")
    if getattr(scheme.granularity, "axis", 0) not in ((-1, 1) if isinstance(scheme.granularity, Group) else (0, -2)) or not isinstance(
        scheme.granularity, (Tensor, Channel, Group)
    ):
        raise Refused(f"gptq takes scales by tensor, output channel or group along the input, not {scheme.granularity}")
    H = check_gram(weight, statistics)  # [groups, in, in]
    start = first_grid(weight, statistics, scheme, grid)
    dynamic = isinstance(scheme.granularity, Group) and not static_groups and not act_order
    columns = _Columns(scheme, weight.shape[0] // len(H), start, grid if dynamic else None)
    codes = _round_columns(weight, H, columns, damping, act_order, block, say)
    found = Quantized(codes, *columns.grid, scheme)
    return _better_rows(weight, H, found, start) if keep_better else found


def check_gram(weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return H [groups, in, in], float64; raise Refused where there is none, or it does not fit, or something is not finite."""
    if "gram" not in statistics:
        raise Refused(
            "gptq needs the Gram matrix of the layer's input", way_out="give calibration data, or choose the solver mse or nearest"
        )
    H = statistics["gram"].to(torch.float64)
    H = H.unsqueeze(0) if H.ndim == 2 else H
    if H.ndim != 3 or H.shape[1:] != (weight.shape[1], weight.shape[1]) or weight.shape[0] % len(H):
        raise Refused(f"the Gram matrix {list(H.shape)} does not fit the weight {list(weight.shape)}")
    if not torch.isfinite(H).all() or not torch.isfinite(weight).all():
        raise Refused("the Gram matrix or the weight is not finite")
    return H


def first_grid(weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], scheme: Scheme, grid: str) -> Grid:
    """Return scale and zero point that ``nearest`` (minimum and maximum) or ``mse`` (weighted by H's diagonal) chooses."""
    if grid == "nearest":
        return choose_scale(*scheme.granularity.reduce_range(weight), scheme)
    return search_scale(weight, scheme, input_importance(weight, statistics))


@dataclass
class _Columns:
    """The grid of each column: fixed from the start, or chosen when the turn of its group comes (``dynamic`` names how)."""

    scheme: Scheme
    rows: int
    grid: Grid
    dynamic: str | None

    def __post_init__(self) -> None:
        scale, zero_point = self.grid
        self.grid = scale.clone(), None if zero_point is None else zero_point.clone()
        self.size = self.scheme.granularity.size if isinstance(self.scheme.granularity, Group) else 0
        # One column's scale has the column's own shape: as "tensor" granularity it broadcasts as it is.
        self.column_scheme = replace(self.scheme, granularity=Tensor())

    def round(self, w: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and values of a column w [groups, rows], which stands at ``place`` [groups] in the weight."""
        scale, zero_point = (None if part is None else self._at(part, place) for part in self.grid)
        assert scale is not None
        codes = quantize(w.to(torch.float32), scale, zero_point, self.column_scheme)
        return codes, dequantize(codes, scale, zero_point, self.column_scheme).to(torch.float64)

    def _at(self, part: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        if part.ndim == 0:
            return part
        if not self.size:
            return part.reshape(-1, self.rows)
        part = part.reshape(-1, self.rows, part.shape[1])
        return part.gather(2, (place // self.size).view(-1, 1, 1).expand(-1, self.rows, 1)).squeeze(2)

    def choose(self, number: int, group: torch.Tensor, H: torch.Tensor) -> None:
        """Choose the scales of one group from its columns as they are now, [groups, rows, size], and their H[j, j]."""
        rows = group.reshape(-1, group.shape[2]).to(torch.float32)
        scheme = replace(self.scheme, granularity=Channel(0))
        if self.dynamic == "nearest":
            scale, zero_point = choose_scale(*scheme.granularity.reduce_range(rows), scheme)
        else:
            scale, zero_point = search_scale(rows, scheme, input_importance(rows, {"gram": H}))
        self.grid[0][:, number] = scale
        if self.grid[1] is not None and zero_point is not None:
            self.grid[1][:, number] = zero_point


def round_columns(
    weight: torch.Tensor,
    H: torch.Tensor,
    grid: Grid,
    scheme: Scheme,
    *,
    damping: float,
    act_order: bool,
    say: Callable[[str], None] = lambda text: None,
) -> torch.Tensor:
    """Return GPTQ's codes [out, in] on scales and zero points that are fixed; ``H`` is [groups, in, in]."""
    return _round_columns(weight, H, _Columns(scheme, weight.shape[0] // len(H), grid, None), damping, act_order, 128, say)


def _round_columns(
    weight: torch.Tensor, H: torch.Tensor, columns: _Columns, damping: float, act_order: bool, block: int, say: Callable[[str], None]
) -> torch.Tensor:
    """Return the codes [out, in]."""
    groups, inputs = len(H), weight.shape[1]
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True) if act_order else torch.arange(inputs).expand(groups, inputs)
    U = torch.stack([inverse_factor(h[o][:, o], damping, say) for h, o in zip(H, order, strict=True)])
    W = weight.to(torch.float64).reshape(groups, -1, inputs)
    W = W.gather(2, order.unsqueeze(1).expand_as(W)).clone()
    codes = torch.empty(W.shape, dtype=columns.scheme.format.storage)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        e = torch.zeros(groups, W.shape[1], stop - start, dtype=torch.float64)
        for j in range(start, stop):
            if columns.dynamic and j % columns.size == 0:
                group = W[:, :, j : j + columns.size].clone()
                late = stop - j  # columns of the group past this block have not had this block's errors yet
                group[:, :, late:] -= e[:, :, : j - start] @ U[:, start:j, stop : j + columns.size]
                columns.choose(j // columns.size, group, H[:, j : j + columns.size, j : j + columns.size])
            code, q = columns.round(W[:, :, j], order[:, j])
            codes.scatter_(2, order[:, j].view(-1, 1, 1).expand(-1, W.shape[1], 1), code.unsqueeze(2))
            e[:, :, j - start] = (W[:, :, j] - q) / U[:, j, j].unsqueeze(1)
            W[:, :, j + 1 : stop] -= e[:, :, j - start].unsqueeze(2) * U[:, j, j + 1 : stop].unsqueeze(1)
        W[:, :, stop:] -= e @ U[:, start:stop, stop:]
    return codes.reshape(weight.shape)


def inverse_factor(H: torch.Tensor, damping: float, say: Callable[[str], None] = lambda text: None) -> torch.Tensor:
    """Return the upper Cholesky factor of (H + damping * mean diagonal)^-1, float64 [in, in].

    Inputs that are always zero get a one on the diagonal: their weights have no part in the error and take none up.

    Raises:
        Refused: H is not positive semidefinite, up to a damping of its whole mean diagonal.
    """
    H, wanted = H.clone(), damping
    diagonal = torch.diagonal(H)
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = 1.0
    while True:
        lower, failed = torch.linalg.cholesky_ex(H + damping * mean * torch.eye(len(H), dtype=torch.float64))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                break
        if damping >= 1:
            raise Refused("the Gram matrix is not positive semidefinite, even with its mean diagonal added")
        damping = min(max(10 * damping, 1e-6), 1.0)
    if damping != wanted:
        say(f"the Hessian needed a damping of {damping:g} instead of {wanted:g} to be positive definite")
    return upper


def row_errors(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return e H e^T of each row, float64 [out]; their sum is the layer's objective. ``gram`` is [in, in] or [groups, in, in]."""
    H = (gram if gram.ndim == 3 else gram.unsqueeze(0)).to(torch.float64)
    E = (weight.to(torch.float64) - rounded.to(torch.float64)).reshape(len(H), -1, weight.shape[1])
    return ((E @ H) * E).sum(2).reshape(-1)


def _better_rows(weight: torch.Tensor, H: torch.Tensor, found: Quantized, start: Grid) -> Quantized:
    """Return ``found`` with nearest rounding on the first grid in every row where that has the smaller error."""
    nearest = Quantized(quantize(weight, *start, found.scheme), *start, found.scheme)
    worse = row_errors(weight, found.dequantize(), H) > row_errors(weight, nearest.dequantize(), H)

    def choose(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(worse.view(-1, *[1] * (mine.ndim - 1)), other, mine) if mine.ndim else mine

    assert found.scale is not None
    zero_point = None if found.zero_point is None or start[1] is None else choose(found.zero_point, start[1])
    return Quantized(choose(found.codes, nearest.codes), choose(found.scale, start[0]), zero_point, found.scheme)

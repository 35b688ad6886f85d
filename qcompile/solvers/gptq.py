"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input column at a time and let the columns not yet rounded make up for its error.

Minimises tr(E H E^T), E = W - W_q, H = X^T X / rows + damping. In the paper's letters: W is the weight [out, in], H the Hessian [in, in], U the upper
Cholesky factor of H^-1 (H^-1 = U^T U), and for each column j in order

    q = round(W[:, j])        e = (W[:, j] - q) / U[j, j]        W[:, j:] -= e U[j, j:]

which is OBQ's exact greedy step for a fixed order of columns. Columns are treated in blocks; the rest of W is updated once for each block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Channel, Group, Tensor
from qcompile.formats.quantize import choose_scale, dequantize, quantize
from qcompile.solvers.mse import search_scale


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = True,
    grid: str = "nearest",
    block: int = 128,
) -> Quantized:
    """Return the weight with GPTQ's codes.

    Args:
        weight: [out, in], float32; a convolution's as [out, in / groups * kh * kw].
        statistics: ``gram`` [in, in], or [groups, in, in] for a convolution whose outputs fall into groups.
        scheme: of the weight: one scale for the tensor, for each row, or for each run along the input.
        damping: added to H's diagonal, as a share of its mean; grows tenfold while H is not positive definite.
        act_order: round the columns with the largest H[j, j] first (``desc_act``).
        static_groups: take the scales of groups from the original weight; False: from what the weight has become when its group's turn
            comes. Groups of columns that ``act_order`` scatters always have static scales, so that the codes stay in place.
        grid: ``nearest`` (minimum and maximum) or ``mse`` (least squared error, weighted by H's diagonal) chooses the scales.
        block: columns between two updates of the whole rest; changes speed, not results beyond float64 rounding.

    Raises:
        Refused: no Gram matrix, one of another size or not finite, a granularity that is not along the input, or H that damping does not save.
    """
    if grid not in ("nearest", "mse"):
        raise Refused(f"grid of gptq is nearest or mse, not '{grid}'")
    if not isinstance(scheme.granularity, (Tensor, Channel, Group)) or getattr(scheme.granularity, "axis", 0) not in _axes(scheme):
        raise Refused(f"gptq rounds weights with scales by tensor, output channel or group along the input, not {scheme.granularity}")
    H = _hessian(weight, statistics)  # [groups, in, in]
    options = _Options(scheme, damping, act_order, static_groups or act_order or not isinstance(scheme.granularity, Group), grid, block)
    scale, zero_point = _scales(weight, H, scheme, grid)
    outputs = weight.shape[0] // len(H)
    parts = [
        _solve_rows(weight[i * outputs : (i + 1) * outputs], H[i], *_take_rows(scale, zero_point, i * outputs, outputs, scheme), options)
        for i in range(len(H))
    ]
    codes = torch.cat([part[0] for part in parts])
    if not options.static_groups:
        scale = torch.cat([part[1] for part in parts])
        zero_point = None if zero_point is None else torch.cat([part[2] for part in parts])  # type: ignore[misc]
    return Quantized(codes, scale, zero_point, scheme)


def _axes(scheme: Scheme) -> tuple[int, ...]:
    return (-1, 1) if isinstance(scheme.granularity, Group) else (0, -2)


@dataclass(frozen=True)
class _Options:
    scheme: Scheme
    damping: float
    act_order: bool
    static_groups: bool
    grid: str
    block: int


def _hessian(weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "gram" not in statistics:
        raise Refused("gptq needs the Gram matrix of the layer's input", way_out="give calibration data, or choose the solver mse or nearest")
    H = statistics["gram"].to(torch.float64)
    H = H.unsqueeze(0) if H.ndim == 2 else H
    if H.shape[1:] != (weight.shape[1], weight.shape[1]) or weight.shape[0] % len(H):
        raise Refused(f"the Gram matrix {list(H.shape)} does not fit the weight {list(weight.shape)}")
    if not torch.isfinite(H).all() or not torch.isfinite(weight).all():
        raise Refused("the Gram matrix or the weight is not finite")
    return H


def _scales(weight: torch.Tensor, H: torch.Tensor, scheme: Scheme, grid: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if grid == "nearest":
        return choose_scale(*scheme.granularity.reduce_range(weight), scheme)
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    diagonal = diagonal + 1e-6 * diagonal.mean().clamp(min=1e-30)
    return search_scale(weight, scheme, diagonal.repeat_interleave(weight.shape[0] // len(H), 0))


def _take_rows(
    scale: torch.Tensor, zero_point: torch.Tensor | None, first: int, count: int, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the part of scale and zero point that some rows have."""
    if isinstance(scheme.granularity, Tensor):
        return scale, zero_point
    return scale[first : first + count], None if zero_point is None else zero_point[first : first + count]


def _solve_rows(
    weight: torch.Tensor, H: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, options: _Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, scale and zero point of rows that share a Hessian."""
    scheme = options.scheme
    W = weight.to(torch.float64).clone()
    dead = torch.diagonal(H) <= 0
    order = torch.argsort(torch.diagonal(H), descending=True, stable=True) if options.act_order else torch.arange(len(H))
    U = inverse_factor(H, options.damping, dead)[0] if not options.act_order else inverse_factor(H[order][:, order], options.damping, dead[order])[0]
    W = W[:, order]
    codes = torch.empty(weight.shape, dtype=scheme.format.storage)
    column = replace(scheme, granularity=Channel(0) if not isinstance(scheme.granularity, Tensor) else Tensor())
    size = scheme.granularity.size if isinstance(scheme.granularity, Group) else 0
    for start in range(0, W.shape[1], options.block):
        stop = min(start + options.block, W.shape[1])
        errors = torch.zeros(W.shape[0], stop - start, dtype=torch.float64)
        for j in range(start, stop):
            if size and not options.static_groups and j % size == 0:
                # Columns of the group that lie past this block have not had this block's errors yet: give them to the choice of scale.
                group = W[:, j : j + size].clone()
                late = max(stop, j)
                if late < j + size:
                    group[:, late - j :] -= errors[:, : j - start] @ U[start:j, late : j + size]
                _set_group(scale, zero_point, group, H, j // size, options)
            place = int(order[j])
            s, z = _column_grid(scale, zero_point, place // size if size else None)
            w = W[:, j].to(torch.float32)
            code = quantize(w, s, z, column)
            q = dequantize(code, s, z, column).to(torch.float64)
            codes[:, place] = code
            errors[:, j - start] = (W[:, j] - q) / U[j, j]
            W[:, j + 1 : stop] -= torch.outer(errors[:, j - start], U[j, j + 1 : stop])
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return codes, scale, zero_point


def _column_grid(
    scale: torch.Tensor, zero_point: torch.Tensor | None, group: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale and zero point, [out] or scalar, that one column has."""
    if group is None:
        return scale, zero_point
    return scale[:, group], None if zero_point is None else zero_point[:, group]


def _set_group(
    scale: torch.Tensor, zero_point: torch.Tensor | None, group: torch.Tensor, H: torch.Tensor, number: int, options: _Options
) -> None:
    """Write the scales of one group from what its columns have become."""
    row = replace(options.scheme, granularity=Channel(0))
    first = number * group.shape[1] if group.shape[1] else 0
    diagonal = torch.diagonal(H)[first : first + group.shape[1]].expand(1, 1, -1)
    del diagonal
    s, z = choose_scale(*row.granularity.reduce_range(group.to(torch.float32)), row) if options.grid == "nearest" else search_scale(group.float(), row)
    scale[:, number] = s
    if zero_point is not None and z is not None:
        zero_point[:, number] = z


def inverse_factor(H: torch.Tensor, damping: float, dead: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the upper Cholesky factor of (H + damping * mean diagonal)^-1, float64, and the damping that was needed.

    Inputs that are always zero (``dead``) get a one on the diagonal: their weights have no part in the error and take none up.

    Raises:
        Refused: H is not positive semidefinite up to a damping of its whole mean diagonal.
    """
    H = H.clone()
    index = torch.arange(len(H))
    H[index[dead], index[dead]] = 1.0
    mean = float(torch.diagonal(H)[~dead].mean()) if not dead.all() else 1.0
    while damping <= 1.0 or math.isclose(damping, 1.0):
        damped = H.clone()
        damped[index, index] += damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper, damping
        damping = max(10 * damping, 1e-6)
    raise Refused("the Gram matrix is not positive semidefinite, even with its mean diagonal added")

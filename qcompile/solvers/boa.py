"""BoA: GPTQ that also lets the rows of an attention head make up for one another (Kim et al. 2024, arXiv 2406.13474).

What counts of a query or key projection is the scores of its head, so the error's weight is a Kronecker product, tr(H_out E H_in E^T) for
each head: H_in = x^T x as in GPTQ, and H_out [d, d] from what the head's queries meet, the keys, or the other way round
(``statistics/head_grams.py``). With U = the upper Cholesky factor of H_out^-1, for each row j of a head in order

    q_j = GPTQ of row j with H_in        W[k] -= (U[j, k] / U[j, j]) (w_j - q_j)  for the rows k > j

Heads run side by side. With H_out = 1 this is GPTQ, bit for bit; layers without ``heads`` are GPTQ's. The paper's treatment of values,
which its successor's code leaves out, is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.quantize import quantize
from qcompile.solvers import gptq
from qcompile.solvers.gptq import Grid, inverse_factor

NEEDS = ("gram",)
USES = ("heads",)


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    grid: str = "mse",
    keep_better: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Quantized:
    """Return the weight with BoA's codes.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in], and ``heads`` [heads, d, d] where the output goes into attention scores; out = heads * d.
        scheme: of the weight: one scale for the tensor, for each row, or for each run along the input.
        damping: added to the diagonals of H_in and H_out, as a share of their means.
        act_order: inputs with the largest H_in[j, j] first.
        grid: ``nearest`` (minimum and maximum) or ``mse`` (least squared error, weighted by H_in's diagonal) chooses the scales.
        keep_better: heads whose error is smaller with nearest rounding keep that.
        say: called with one line when more damping was needed.

    Raises:
        Refused: as gptq, and for ``heads`` that do not fit the weight.
    """
    options = {"damping": damping, "act_order": act_order, "grid": grid, "say": say}
    if "heads" not in statistics or (statistics["gram"].ndim == 3 and len(statistics["gram"]) > 1):
        return gptq.solve(weight, statistics, scheme, keep_better=keep_better, **options)  # type: ignore[arg-type]
    H_out = statistics["heads"].to(torch.float64)
    if H_out.ndim != 3 or H_out.shape[0] * H_out.shape[1] != weight.shape[0] or H_out.shape[1] != H_out.shape[2]:
        raise Refused(f"the matrices of the heads {list(H_out.shape)} do not fit the weight {list(weight.shape)}")
    H_in = gptq.check_gram(weight, statistics)
    start = gptq.first_grid(weight, statistics, scheme, grid)
    U = torch.stack([inverse_factor(h, damping, say) for h in H_out])  # [heads, d, d]
    heads, d = H_out.shape[:2]
    W = weight.to(torch.float64).reshape(heads, d, -1).clone()
    codes = torch.empty(W.shape, dtype=scheme.format.storage)
    for j in range(d):
        rows = torch.arange(heads) * d + j
        mine = _grid_of(start, rows)
        codes[:, j] = gptq.round_columns(W[:, j], H_in, mine, scheme, damping=damping, act_order=act_order, say=say)
        found = Quantized(codes[:, j], *mine, scheme).dequantize().to(torch.float64)
        W[:, j + 1 :] -= (U[:, j, j + 1 :] / U[:, j, j, None]).unsqueeze(2) * (W[:, j] - found).unsqueeze(1)
    found_all = Quantized(codes.reshape(weight.shape), *start, scheme)
    return _better_heads(weight, H_in[0], H_out, found_all) if keep_better else found_all


def head_errors(weight: torch.Tensor, rounded: torch.Tensor, H_in: torch.Tensor, H_out: torch.Tensor) -> torch.Tensor:
    """Return tr(H_out E H_in E^T) of each head, float64 [heads]."""
    E = (weight.to(torch.float64) - rounded.to(torch.float64)).reshape(len(H_out), H_out.shape[1], -1)
    return ((H_out @ E) * (E @ H_in)).sum((1, 2))


def _grid_of(grid: Grid, rows: torch.Tensor) -> Grid:
    scale, zero_point = (part if part is None or part.ndim == 0 else part[rows] for part in grid)
    assert scale is not None
    return scale, zero_point


def _better_heads(weight: torch.Tensor, H_in: torch.Tensor, H_out: torch.Tensor, found: Quantized) -> Quantized:
    plain = quantize(weight, found.scale, found.zero_point, found.scheme)
    errors = [head_errors(weight, replace(found, codes=codes).dequantize(), H_in, H_out) for codes in (found.codes, plain)]
    worse = (errors[0] > errors[1]).repeat_interleave(H_out.shape[1]).unsqueeze(1)
    return replace(found, codes=torch.where(worse, plain, found.codes))

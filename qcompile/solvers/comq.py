"""COMQ: coordinate descent on codes in a greedy order, with the scale solved for after each sweep (Zhang et al. 2024, arXiv 2403.07134).

Minimises ||X w - d X q||^2 over whole numbers q and the step d of each channel, in Gram form: with r = (w - d q) H,

    q_i <- clip(round((d q_i + r_i / H_ii) / d))        d <- (w H q) / (q H q) after each sweep

The first sweep starts from the weight itself, so that it rounds each weight with what the ones before it have left over; later ones
refine. Every row goes through its columns from the largest ``||x_i|| |w_i|`` to the smallest. With zero points q is code - zero
point; with groups their steps are solved for together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.formats import Quantized, Scheme
from qcompile.solvers._coordinates import descend, prepare
from qcompile.solvers._grids import Grids

NEEDS = ("gram",)


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    sweeps: int = 4,
    greedy: bool = True,
    refit: bool = True,
    grid: str = "mse",
    damping: float = 0.01,
) -> Quantized:
    """Return the weight with COMQ's codes.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in] or [groups, in, in].
        scheme: of the weight: one scale for the tensor, for each row, or for each run along the input.
        sweeps: over all columns.
        greedy: the order above; False: from first to last.
        refit: solve for the scales after each sweep; the authors' code keeps them.
        grid: ``nearest`` (minimum and maximum, the paper's) or ``mse`` (least squared error, weighted by H's diagonal) first.
        damping: added to H's diagonal, as a share of its mean; not in the paper, it keeps what few rows of data leave open near the weight.

    Raises:
        Refused: no Gram matrix, one that does not fit, or a granularity that is not along the input.
    """
    W, H = prepare("comq", weight, statistics.get("gram"), damping)
    grids = Grids.choose("comq", weight, statistics, scheme, grid, len(H))
    start = grids.nearest(W)
    power = torch.diagonal(H, dim1=1, dim2=2).sqrt().unsqueeze(1) * W.abs()
    order = power.argsort(dim=2, descending=True, stable=True) if greedy else torch.arange(W.shape[2])
    first, q = grids, W
    candidates = []
    for _ in range(sweeps):
        q = descend(W, q, H, grids.round, order)
        candidates.append((grids, q))
        if refit:
            grids, q = grids.refit(W, H, q)
            candidates.append((grids, q))
    return first.best_rows(W, H, start, candidates)

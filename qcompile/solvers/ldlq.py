"""LDLQ: round columns from last to first with the feedback of H's LDL decomposition (QuIP, Chee et al. 2023, arXiv 2307.13304).

Minimises tr(E H E^T), E = W - W_q. In the paper's letters (section 3), H = (L + I) D (L + I)^T with L strictly lower triangular, and

    W_q[:, k] = Q(W[:, k] + (W - W_q)[:, k+1:] L[k+1:, k])        k = in - 1, .., 0

which is the best of all linear feedbacks; GPTQ is the same on the columns in reverse. ``passes`` are the greedy steps of the paper's RG
(section 5): coordinate descent over all columns, which GPTQ's one pass leaves room for where codes clamp;
``refit`` fits the scales to the codes by least squares on H before each. The paper's incoherence (section 4) is a change of basis before
the solver: the pass ``rotate`` makes it, in what kernels can run.
The damping of 1 % is the paper's; its grid by the Frobenius norm is not here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.solvers._coordinates import Round, descend, prepare
from qcompile.solvers._grids import Grids

NEEDS = ("gram",)


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    damping: float = 0.01,
    order: bool = True,
    grid: str = "mse",
    passes: int = 3,
    refit: bool = True,
) -> Quantized:
    """Return the weight with LDLQ's codes.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in] or [groups, in, in].
        scheme: of the weight: one scale for the tensor, for each row, or for each run along the input.
        damping: added to H's diagonal, as a share of its mean.
        order: round the columns with the largest H[j, j] first; False: from last to first, as the paper has it.
        grid: ``nearest`` (minimum and maximum) or ``mse`` (least squared error, weighted by H's diagonal) chooses the scales.
        passes: turns of coordinate descent over all columns after the first rounding.
        refit: fit the scales to the codes by least squares before each of these turns.

    Raises:
        Refused: no Gram matrix, one that does not fit, or a granularity that is not along the input.
    """
    W, H = prepare("ldlq", weight, statistics.get("gram"), damping)
    grids = Grids.choose("ldlq", weight, statistics, scheme, grid, len(H))
    start = grids.nearest(W)
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    columns = torch.argsort(diagonal.sum(0), stable=True) if order else torch.arange(W.shape[2])  # the last is rounded first
    q = _feedback(W, H, columns, grids.round)
    candidates = [(grids, q)]
    for _ in range(passes):
        if refit:
            grids, q = grids.refit(W, H, q)
        q = descend(W, q, H, grids.round, columns.flip(0))
        candidates.append((grids, q))
    return candidates[0][0].best_rows(W, H, start, candidates)


def _feedback(W: torch.Tensor, H: torch.Tensor, columns: torch.Tensor, round: Round) -> torch.Tensor:
    """Return q after one rounding of all columns, the last of ``columns`` first; H is positive definite."""
    lower, failed = torch.linalg.cholesky_ex(H[:, columns][:, :, columns])
    if failed.any():
        raise Refused("the Gram matrix is not positive definite", way_out="give more damping")
    L = lower / torch.diagonal(lower, dim1=1, dim2=2).unsqueeze(1)  # unit diagonal: L + I
    E = torch.zeros_like(W)  # W - W_q of the columns that are done, in their new order
    q = torch.empty_like(W)
    for k in reversed(range(W.shape[2])):
        column = int(columns[k])
        wished = W[:, :, column] + torch.einsum("gri,gi->gr", E[:, :, k + 1 :], L[:, k + 1 :, k])
        q[:, :, column] = round(wished, torch.tensor(column).expand(W.shape[:2]))
        E[:, :, k] = W[:, :, column] - q[:, :, column]
    return q

"""GPFQ: greedy path following, each code against the error so far of the quantized network (Zhang, Zhou, Saab 2022, arXiv 2201.11113).

With X the layer's input in the float model and Y in the quantized one, columns in order,

    u_0 = 0        q_t = Q(<Y_t, u_{t-1} + w_t X_t> / ||Y_t||^2)        u_t = u_{t-1} + w_t X_t - q_t Y_t

so that the layer makes up for what the layers before it have lost. Only products of columns are needed: with G = Y^T Y and C = Y^T X

    q_t = Q((C[t, :t+1] w[:t+1] - G[t, :t] q[:t]) / G[t, t])
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.quantize import choose_scale
from qcompile.solvers._coordinates import prepare
from qcompile.solvers._grids import Grids

NEEDS = ("gram", "cross")


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    radius: float = 0.0,
    grid: str = "mse",
    order: bool = True,
    damping: float = 0.0,
) -> Quantized:
    """Return the weight with GPFQ's codes.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` G [in, in] or [groups, in, in], and ``cross`` C of the same shape.
        scheme: of the weight: one scale for the tensor, for each row, or for each run along the input.
        radius: the paper's alphabet: one step for the layer, which reaches ``radius`` times the mean over rows of max |w|; 0: by ``grid``.
        grid: ``nearest`` (minimum and maximum) or ``mse`` (least squared error, weighted by G's diagonal) chooses the scales.
        order: columns with the largest G[t, t] first; False: as they stand, which is the paper's.
        damping: pulls q_t towards w_t as a column of its own with that share of the mean power would.

    Raises:
        Refused: matrices that are missing or do not fit, or a granularity that is not along the input.
    """
    W, G = prepare("gpfq", weight, statistics.get("gram"), damping)
    if "cross" not in statistics or statistics["cross"].shape != statistics["gram"].shape:
        raise Refused("gpfq needs the cross products with the float model's input, of the Gram matrix's shape")
    C = statistics["cross"].to(torch.float64).reshape(G.shape)
    C = C + torch.diag_embed(torch.diagonal(G - statistics["gram"].to(torch.float64).reshape(G.shape), dim1=1, dim2=2))
    grids = Grids.choose("gpfq", weight, statistics, scheme, grid, len(G))
    if radius:
        reach = radius * weight.abs().amax(1).mean()
        scale, zero_point = choose_scale(-reach, reach, scheme)
        zero_points = None if zero_point is None else zero_point.expand_as(grids.scale).clone()
        grids = Grids(scheme, scale.expand_as(grids.scale).clone(), zero_points, grids.shape)
    columns = torch.argsort(torch.diagonal(G, dim1=1, dim2=2).sum(0), descending=True, stable=True) if order else torch.arange(W.shape[2])
    q = torch.zeros_like(W)
    for t, column in enumerate(columns.tolist()):
        seen = columns[: t + 1]
        wished = torch.einsum("gri,gi->gr", W[:, :, seen], C[:, column, seen]) - torch.einsum(
            "gri,gi->gr", q[:, :, seen], G[:, column, seen]
        )
        q[:, :, column] = grids.round(wished / G[:, column, column].unsqueeze(1), torch.tensor(column).expand(W.shape[:2]))
    return grids.quantized(q)

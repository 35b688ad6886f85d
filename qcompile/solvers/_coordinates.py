"""Coordinate steps on a Gram matrix: what LDLQ, COMQ and LNQ share.

All minimise f(q) = sum over rows of (w - q) H (w - q)^T, each row of the weight by itself. Weights stand as [groups, rows, in], H as
[groups, in, in], float64: one group, or one for each run of output channels that has a Gram matrix of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qcompile.errors import Refused

Round = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From wished values [groups, rows] of the columns [groups, rows] in which they stand to the nearest that can be had."""


def prepare(name: str, weight: torch.Tensor, gram: torch.Tensor | None, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W [groups, rows, in] and H [groups, in, in] with ``damping`` times its mean diagonal added; dead inputs get a one.

    Args:
        name: of the solver, for messages.
        weight: [out, in], float32.
        gram: [in, in] or [groups, in, in].
        damping: share of the mean of the diagonal.

    Raises:
        Refused: there is no Gram matrix, or it does not fit, or something is not finite.
    """
    if gram is None:
        raise Refused(
            f"{name} needs the Gram matrix of the layer's input", way_out="give calibration data, or choose the solver mse or nearest"
        )
    H = gram.to(torch.float64)
    H = H.unsqueeze(0) if H.ndim == 2 else H
    if H.ndim != 3 or H.shape[1:] != (weight.shape[1], weight.shape[1]) or weight.shape[0] % len(H):
        raise Refused(f"the Gram matrix {list(H.shape)} does not fit the weight {list(weight.shape)}")
    if not torch.isfinite(H).all() or not torch.isfinite(weight).all():
        raise Refused("the Gram matrix or the weight is not finite")
    H = H.clone()
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    dead = diagonal <= 0
    mean = (diagonal * ~dead).sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
    diagonal += torch.where(dead, torch.ones_like(diagonal), damping * mean)
    return weight.to(torch.float64).reshape(len(H), -1, weight.shape[1]), H


def errors(W: torch.Tensor, q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return f of each row, [groups, rows]."""
    E = W - q
    return ((E @ H) * E).sum(2)


def descend(W: torch.Tensor, q: torch.Tensor, H: torch.Tensor, round: Round, order: torch.Tensor) -> torch.Tensor:
    """Return q after one turn of coordinate descent.

    Each weight in its turn goes to the value that can be had nearest to the one that minimises f with the others where they are, q_i +
    ((w - q) H)_i / H_ii. Where every q can be had from the start, f never rises.

    Args:
        W: see the module.
        q: float64 [groups, rows, in].
        H: see the module.
        round: to what can be had.
        order: int64 [in], one order of columns for all rows, or [groups, rows, in].
    """
    q = q.clone()
    R = (W - q) @ H
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    if order.ndim == 1:
        for column in order.tolist():
            place = torch.tensor(column).expand(q.shape[:2])
            new = round(q[:, :, column] + R[:, :, column] / diagonal[:, column, None], place)
            R -= (new - q[:, :, column]).unsqueeze(2) * H[:, column].unsqueeze(1)
            q[:, :, column] = new
        return q
    group = torch.arange(len(H)).unsqueeze(1).expand(q.shape[:2])
    for place in order.unbind(2):  # [groups, rows]
        at = place.unsqueeze(2)
        old = q.gather(2, at).squeeze(2)
        new = round(old + R.gather(2, at).squeeze(2) / diagonal.gather(1, place), place)
        R -= (new - old).unsqueeze(2) * H[group, place]
        q.scatter_(2, at, new.unsqueeze(2))
    return q


def fit(W: torch.Tensor, H: torch.Tensor, basis: torch.Tensor, shared: int = 1, ridge: float = 1e-7) -> torch.Tensor:
    """Return the coefficients c [runs, k] that minimise f for q = basis c; runs of ``shared`` rows, in order, have the same.

    c = (B^T H B)^-1 B^T H w, sums over a run's rows inside; ``ridge`` times the mean diagonal keeps the inverse where a column of the basis
    is empty, and gives such a column the coefficient 0.

    Args:
        W: see the module.
        H: see the module.
        basis: [groups, rows, in, k].
        shared: rows that share coefficients; divides their number in all groups together.
        ridge: share of the mean diagonal.
    """
    k = basis.shape[3]
    HB = torch.einsum("gij,grjk->grik", H, basis)
    A = torch.einsum("grik,gril->grkl", basis, HB).reshape(-1, shared, k, k).sum(1)
    b = torch.einsum("grik,gri->grk", HB, W).reshape(-1, shared, k).sum(1)
    mean = torch.diagonal(A, dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    A = A + (ridge * mean)[:, None, None] * torch.eye(k, dtype=A.dtype)
    return torch.linalg.solve(A, b)

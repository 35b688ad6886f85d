"""PVQ: runs of weights become points of a pyramid, with feedback of errors (van der Ouderaa et al. 2024, arXiv 2410.16926).

Minimises tr(E H E^T), E = W - W_q, where H is the Gram matrix of the input (the identity without data). With blocks as long as the format's
runs, H = (L + I) D (L + I)^T, L strictly lower block triangular, and from the last run b to the first

    W_q[:, b] = Q(W[:, b] + (W - W_q)[:, later] L[later, b])

as LDLQ does by columns; Q is the format's own rounding and then pulses moved within the run, by the error that counts, D[b, b]. Then
``passes`` turns over all runs, in which a run goes to Q of the values that are best with the others where they are, or moves pulses of
the point that it has, if that lowers the error; scales are fitted to the codes before each. Scales start where the
gains lose least: points do not depend on them. The paper's rotation of weights is the pass ``rotate``; it codes activations too, here they
stay as their scheme says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Channel, Group, Tensor
from qcompile.formats.pyramid import Pyramid, nearest_points
from qcompile.formats.quantize import SMALLEST_SCALE
from qcompile.solvers._coordinates import prepare
from qcompile.solvers._grids import Grids
from qcompile.solvers.mse import granule_sum

USES = ("gram",)  # statistics that the solver takes where there is data
FORMATS = (Pyramid,)  # weights of another format are left to least squared error


def solve(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    scheme: Scheme,
    *,
    damping: float = 0.01,
    passes: int = 3,
    refit: bool = True,
    steps: int = 40,
) -> Quantized:
    """Return the weight with points, gains and scales of its own.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in] or [groups, in, in], or nothing.
        scheme: of the weight: a pyramid, with one scale for the tensor, for each row, or for each run along the input.
        damping: added to H's diagonal, as a share of its mean.
        passes: turns over all runs after the first rounding.
        refit: fit the scales to the codes by least squares before each of these turns.
        steps: scales that are tried for each granule.

    Raises:
        Refused: another format, a granularity that is not along the input, or a Gram matrix that does not fit.
    """
    if not isinstance(scheme.format, Pyramid):
        raise Refused(f"pvq chooses points of a pyramid; {scheme.format} is none", way_out="give a format such as pvq8k6g3")
    by = scheme.granularity
    if not isinstance(by, (Tensor, Channel, Group)) or getattr(by, "axis", 0) not in ((-1, 1) if isinstance(by, Group) else (0, -2)):
        raise Refused(f"pvq takes scales by tensor, output channel or group along the input, not {by}")
    gram = statistics.get("gram", torch.eye(weight.shape[1], dtype=torch.float64))
    W, H = prepare("pvq", weight, gram, damping)
    importance = torch.diagonal(H, dim1=1, dim2=2).unsqueeze(1).expand(W.shape).reshape(weight.shape)
    scale = choose_scale(weight.to(torch.float64), importance, scheme, steps)
    grids = Grids(scheme, scale, None, (len(H), weight.shape[0] // len(H), weight.shape[1]))
    start = grids.nearest(W)
    q = _feedback(W, H, grids)
    candidates = [(grids, q)]
    for _ in range(passes):
        if refit:
            grids, q = grids.refit(W, H, q)
        q = _descend(W, H, q, grids)
        candidates.append((grids, q))
    return candidates[0][0].best_rows(W, H, start, candidates)


def choose_scale(W: torch.Tensor, importance: torch.Tensor, scheme: Scheme, steps: int) -> torch.Tensor:
    """Return scales, float32 of the granularity's shape, with the least sum of importance (w - w_q)^2 of each granule.

    A run x has the point p whatever the scale s is, and its gain is <x, p> / (<p, p> s) rounded: tried are scales for which the
    largest gain of a granule is 1 to 3 times the largest code.
    """
    format = scheme.format
    assert isinstance(format, Pyramid)
    runs, real = format.runs(W)
    points = nearest_points(runs, format.pulses, real)
    ideal = ((runs * points).sum(-1, keepdim=True) / points.square().sum(-1, keepdim=True)).expand(runs.shape)
    points, ideal = (x.flatten(-2)[:, : W.shape[1]] for x in (points, ideal))
    highest = scheme.granularity.reduce_range(ideal)[1] / format.largest_gain
    smallest = max(SMALLEST_SCALE, torch.finfo(scheme.scale_dtype).smallest_normal)
    best, least = highest, torch.full_like(highest, torch.inf)
    for step in range(steps):
        scale = (highest * (1 - step / steps * 2 / 3)).to(scheme.scale_dtype).to(torch.float64).clamp(min=smallest)
        full = scheme.granularity.expand(scale, tuple(W.shape))
        values = (ideal / full).round().clamp(0, format.largest_gain) * points * full
        error = granule_sum(importance * (W - values).square(), scheme.granularity)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.to(torch.float32)


def _runs(grids: Grids) -> list[slice]:
    """Return the columns of each run, in order."""
    length, inputs = grids.scheme.format.length, grids.shape[2]  # type: ignore[attr-defined]
    return [slice(start, min(start + length, inputs)) for start in range(0, inputs, length)]


def _feedback(W: torch.Tensor, H: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Return q after one rounding of all runs, the last first; H is positive definite."""
    lower, failed = torch.linalg.cholesky_ex(H)
    if failed.any():
        raise Refused("the Gram matrix is not positive definite", way_out="give more damping")
    E, q = torch.zeros_like(W), torch.empty_like(W)
    for run in reversed(_runs(grids)):
        C = lower[:, run, run]
        # (W - W_q) L with L = C[later, b] C[b, b]^-1, C the Cholesky factor; D[b, b] = C[b, b] C[b, b]^T
        fed = torch.linalg.solve_triangular(C, E[:, :, run.stop :] @ lower[:, run.stop :, run], upper=False, left=False)
        wished = W[:, :, run] + fed
        q[:, :, run] = move_pulses(wished, grids.round_run(wished, run), C @ C.transpose(1, 2), grids.run_scale(run), grids.scheme)
        E[:, :, run] = W[:, :, run] - q[:, :, run]
    return q


def _descend(W: torch.Tensor, H: torch.Tensor, q: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Return q after one turn over all runs; where every q can be had from the start, the error never rises."""
    q = q.clone()
    R = (W - q) @ H
    for run in _runs(grids):
        inside, scale = H[:, run, run], grids.run_scale(run)
        best, rest = q[:, :, run], torch.linalg.solve(inside, R[:, :, run].transpose(1, 2)).transpose(1, 2)
        wished = best + rest  # the best values of this run with the others where they are
        least = ((rest @ inside) * rest).sum(2)
        for start in (grids.round_run(wished, run), best):
            found = move_pulses(wished, start, inside, scale, grids.scheme)
            rest = wished - found
            error = ((rest @ inside) * rest).sum(2)
            best = torch.where((error < least).unsqueeze(2), found, best)
            least = torch.minimum(error, least)
        R -= (best - q[:, :, run]) @ H[:, run]
        q[:, :, run] = best
    return q


def move_pulses(
    wished: torch.Tensor, q: torch.Tensor, H: torch.Tensor, scale: torch.Tensor, scheme: Scheme, moves: int = 4
) -> torch.Tensor:
    """Return values after moving pulses, one at a time, to where they lower (x - q) H (x - q)^T most, and then choosing the best gains.

    One pulse leaves place i and one comes to place j: with the step s m and the signs u = -sign(p_i), v = sign(p_j) (that of the gradient
    where p_j = 0), the error changes by (s m)^2 (H_ii + H_jj + 2 u v H_ij) - 2 s m (u g_i + v g_j), g = (x - q) H.

    Args:
        wished: x, float64 [groups, rows, D].
        q: points times gains times the scale, of the same shape.
        H: [groups, D, D].
        scale: of each weight, [groups, rows, D].
        scheme: whose format is a pyramid.
        moves: at most so many pulses of each run.
    """
    format = scheme.format
    assert isinstance(format, Pyramid)
    codes = (q / scale).round()
    gain = (codes.abs().sum(2, keepdim=True) / format.pulses).round()
    p, step = codes / gain.clamp(min=1), scale * gain
    diagonal, places = torch.diagonal(H, dim1=1, dim2=2).unsqueeze(1), torch.arange(q.shape[2])
    for _ in range(moves):
        g = (wished - step * p) @ H
        u, v = -p.sign(), torch.where(p != 0, p.sign(), torch.where(g < 0, -1.0, 1.0))
        less = torch.where(p != 0, step.square() * diagonal - 2 * step * u * g, torch.inf)
        more = step.square() * diagonal - 2 * step * v * g
        both = 2 * (step * u).unsqueeze(3) * (step * v).unsqueeze(2) * H.unsqueeze(1)
        change = less.unsqueeze(3) + more.unsqueeze(2) + both  # [groups, rows, i, j]
        change[:, :, places, places] = torch.inf
        most, place = change.flatten(2).min(2)
        moved = (most < 0).unsqueeze(2).to(p.dtype)
        if not moved.any():
            break
        i, j = (place // q.shape[2]).unsqueeze(2), (place % q.shape[2]).unsqueeze(2)
        p = p.scatter_add(2, i, u.gather(2, i) * moved).scatter_add(2, j, v.gather(2, j) * moved)
    unit = scale * p
    weighed = unit @ H
    gain = (weighed * wished).sum(2, keepdim=True) / (weighed * unit).sum(2, keepdim=True).clamp(min=torch.finfo(unit.dtype).tiny)
    return (unit * gain.round().clamp(0, format.largest_gain)).to(torch.float32).to(torch.float64)

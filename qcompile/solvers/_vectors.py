"""Tables of vectors by k-means: what the channels of a cache that are coded together are coded by.

For each run of c channels, 256 centroids minimise sum_t w_t |x_t - T[code_t]|^2 over tokens t, where w is 1 or what an error of the run
costs (coupled quantization, Zhang et al. 2024, arXiv 2405.03917, sections 3.2 and 3.3: the squared gradient of the loss, summed over the
run). First centroids are drawn as k-means++ does (Arthur and Vassilvitskii 2007), each with probability w times its squared distance from
those before it; then Lloyd's steps in turn. A centroid that no token falls to stays.
"""

from __future__ import annotations

import torch

from qcompile.graph.dialect import VECTORS

_ROWS_AT_ONCE = 512  # whose distances stay in the cache of the processor
_TINY = 1e-30  # of a probability: data may hold fewer different vectors than there are centroids


def learn_vectors(
    rows: torch.Tensor, coupled: int, weights: torch.Tensor | None = None, *, rounds: int = 20, seed: int = 0
) -> torch.Tensor:
    """Return a table float32 [runs, 256, coupled] of the channels of rows float32 [tokens, runs * coupled].

    ``weights`` float32 [tokens, runs] says what an error of each run counts. Equal arguments give equal tables. Errors never grow from
    round to round.
    """
    x = rows.unflatten(-1, (-1, coupled)).transpose(0, 1).contiguous()  # [runs, tokens, c]
    w = torch.ones(x.shape[:2]) if weights is None else weights.T.contiguous()
    w = w / w.mean(1, keepdim=True).clamp(min=_TINY)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_lloyd(x[i], w[i], _first(x[i], w[i], generator), rounds) for i in range(len(x))])


def _first(x: torch.Tensor, w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the first centroids of one run [256, c]."""
    chosen = torch.empty(VECTORS, x.shape[1])
    nearest = torch.full(w.shape, torch.inf)
    draws = torch.rand(VECTORS, generator=generator, dtype=torch.float64)
    for i in range(VECTORS):
        chances = (w * (nearest if i else 1.0)).to(torch.float64) + _TINY
        sums = chances.cumsum(0)
        chosen[i] = x[int(torch.searchsorted(sums, draws[i] * sums[-1]).clamp(max=len(x) - 1))]
        nearest = torch.minimum(nearest, (x - chosen[i]).square().sum(1))
    return chosen


def _lloyd(x: torch.Tensor, w: torch.Tensor, table: torch.Tensor, rounds: int) -> torch.Tensor:
    weighted = torch.cat([x * w.unsqueeze(1), w.unsqueeze(1)], 1).to(torch.float64)
    before: torch.Tensor | None = None
    for _ in range(rounds):
        sizes = table.square().sum(1)
        codes = torch.cat([torch.addmm(sizes, part, table.T, alpha=-2).min(1).indices for part in x.split(_ROWS_AT_ONCE)])
        if before is not None and torch.equal(codes, before):
            break
        sums = torch.zeros(VECTORS, weighted.shape[1], dtype=torch.float64).index_add_(0, codes, weighted)
        means = (sums[:, :-1] / sums[:, -1:].clamp(min=_TINY)).to(torch.float32)
        table, before = torch.where(sums[:, -1:] > 0, means, table), codes
    return table

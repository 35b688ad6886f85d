"""k-means: learn the table that a weight's codes are places in, as SqueezeLLM does (Kim et al. 2023, arXiv 2306.07629, section 4.1).

Minimises sum h (w - s T[c])^2 over the table T (levels of one byte), the codes c and the scales s, where h is the mean square of the input
that meets the weight (the diagonal of the Gram matrix; the paper takes the Fisher information), or 1 without data. Lloyd's steps in turn,
each the least-squares solution given the others:

    c = nearest level of w / s        T[j] = sum h s w / sum h s^2 over codes j        s = sum h w T[c] / sum h T[c]^2 over a granule

There are two starts: nearest rounding on the format's own levels, and levels that equally many weights fall to, which leaves none idle
where weights lie on one side of zero. The best of all rounds is kept, so the error is never larger than that of nearest rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.errors import Refused
from qcompile.formats import Codebook, Quantized, Scheme, decode, quantize_tensor
from qcompile.formats.lookup import STEPS
from qcompile.formats.quantize import SMALLEST_SCALE
from qcompile.solvers.mse import granule_sum, input_importance

USES = ("gram",)  # statistics that the solver takes where there is data
FORMATS = (Codebook,)  # weights of another format are left to least squared error


def solve(
    weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], scheme: Scheme, *, table_rows: int = 0, rounds: int = 20
) -> Quantized:
    """Return the weight with codes, scales and tables of its own.

    Args:
        weight: [out, in], float32.
        statistics: ``gram`` [in, in] or [groups, in, in] of the layer's input, or nothing.
        scheme: of the weight; its format is a codebook.
        table_rows: rows of the weight that share a table; 0: all.
        rounds: of Lloyd's steps.

    Raises:
        Refused: another format, or rows that do not divide.
    """
    if not isinstance(scheme.format, Codebook):
        raise Refused(f"kmeans learns the table of a codebook; {scheme.format} has none")
    rows = table_rows or weight.shape[0]
    if rows < 0 or weight.shape[0] % rows:
        raise Refused(f"{weight.shape[0]} rows do not divide into runs of {rows} that share a table")
    found = quantize_tensor(weight, scheme)
    W = weight.to(torch.float64)
    h = input_importance(weight, statistics)
    h = torch.ones_like(W) if h is None else h.expand_as(W)
    first = _with_table(found, weight.shape[0] // rows)
    starts = [first, _replace_levels(W, h, first, _quantiles(W, first))]
    return min((_descend(W, h, start, rounds) for start in starts), key=lambda result: result[0])[1]


def _descend(W: torch.Tensor, h: torch.Tensor, current: Quantized, rounds: int) -> tuple[float, Quantized]:
    """Return the least error of the rounds from a start, and the weight that has it."""
    best, least = current, float((h * (W - current.dequantize()).square()).sum())
    for _ in range(rounds):
        current = _step(W, h, current)
        error = float((h * (W - current.dequantize()).square()).sum())
        if not error < least:
            break
        best, least = current, error
    return least, best


def _with_table(found: Quantized, tables: int) -> Quantized:
    levels = torch.tensor(found.scheme.format.levels, dtype=torch.int8)  # type: ignore[attr-defined]
    return Quantized(found.codes, found.scale, None, found.scheme, levels.expand(tables, -1).contiguous())


def _full_scale(W: torch.Tensor, found: Quantized) -> torch.Tensor:
    shape = tuple(W.shape)
    assert found.scale is not None
    return found.scheme.granularity.expand(found.scale.to(torch.float64), shape).expand(shape)


def _quantiles(W: torch.Tensor, found: Quantized) -> torch.Tensor:
    """Return levels [tables, levels] in units of the scale, each the middle one of as many weights as the others."""
    assert found.table is not None
    tables, levels = found.table.shape
    values = (W / _full_scale(W, found)).reshape(tables, -1).sort(1).values
    return values[:, ((torch.arange(levels) + 0.5) / levels * values.shape[1]).to(torch.int64)]


def _step(W: torch.Tensor, h: torch.Tensor, found: Quantized) -> Quantized:
    """Return the weight after one turn of table, codes and scales."""
    table, scale = found.table, _full_scale(W, found)
    assert table is not None
    tables = len(table)
    codes = found.codes.reshape(tables, -1).to(torch.int64)

    def by_level(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(table.shape, dtype=torch.float64).scatter_add_(1, codes, x.reshape(tables, -1))

    counts = by_level(h * scale.square())
    return _replace_levels(W, h, found, torch.where(counts > 0, by_level(h * scale * W) / counts, table.to(torch.float64)))


def _replace_levels(W: torch.Tensor, h: torch.Tensor, found: Quantized, levels: torch.Tensor) -> Quantized:
    """Return the weight with these levels, in units of its scale, as bytes; then with the best codes and scales for them."""
    scheme, shape, scale = found.scheme, tuple(W.shape), _full_scale(W, found)
    assert found.scale is not None
    # The largest level is the highest byte: the scales take up what that changes, and rounding to bytes loses least.
    stretch = STEPS / levels.abs().amax().clamp(min=SMALLEST_SCALE)
    levels = (levels * stretch).round().clamp(-STEPS, STEPS).sort(1).values
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    places = torch.searchsorted(middles, (W / scale * stretch).reshape(len(levels), -1).contiguous())
    moved = Quantized(places.reshape(shape).to(torch.uint8), found.scale, None, scheme, levels.to(torch.int8))
    values = decode(moved.codes, scheme, moved.table, torch.float64)
    power = granule_sum(h * values.square(), scheme.granularity)
    fitted = granule_sum(h * values * W, scheme.granularity) / power
    fitted = torch.where((power > 0) & (fitted > 0), fitted, found.scale.to(torch.float64) / stretch)
    smallest = max(SMALLEST_SCALE, torch.finfo(scheme.scale_dtype).smallest_normal)
    return Quantized(moved.codes, fitted.to(scheme.scale_dtype).to(torch.float32).clamp(min=smallest), None, scheme, moved.table)

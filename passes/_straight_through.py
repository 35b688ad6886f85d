"""Rounding that gradients pass through, for passes that learn: the value is the rounded one, the derivative that of the step and of x."""

from __future__ import annotations

import torch

from qcompile.formats import Scheme
from qcompile.formats.quantize import choose_scale, dequantize, quantize
from qcompile.graph import Quantizer


def round_dynamic(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return x rounded with ranges of its own: x + step * r, where r, the distance to the code in steps, counts as constant.

    So the derivative sees what x does to the step by its extremes (Shao et al., OmniQuant 2023), and takes rounding for the identity.
    """
    scale, zero_point = choose_scale(*scheme.granularity.reduce_range(x), scheme)
    fixed = scale.detach()
    steps = scheme.granularity.expand(scale, tuple(x.shape))
    with torch.no_grad():
        distance = (dequantize(quantize(x, fixed, zero_point, scheme), fixed, zero_point, scheme) - x) / steps
    return x + steps * distance


def round_through(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Return what a quantizer of an activation gives; on a static grid the derivative is 1 inside its range and 0 outside."""
    if quantizer.scale is None:
        return round_dynamic(x, quantizer.scheme)
    with torch.no_grad():
        rounded = quantizer(x)
        steps = quantizer.scheme.granularity.expand(quantizer.scale, tuple(x.shape))
        inside = (rounded - x).abs() <= steps
    return rounded + torch.where(inside, x - x.detach(), 0)

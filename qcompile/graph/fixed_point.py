"""Requantization in integers: a real factor as a 32-bit multiplier and a shift.

    requantize(acc, multiplier, shift) = (acc * multiplier + 2**(shift - 1)) >> shift

The product has 64 bits, the shift is arithmetic, and there is one rounding: to nearest, halves up. Source: TensorFlow Lite's
``MultiplyByQuantizedMultiplier`` with ``TFLITE_SINGLE_ROUNDING``, CMSIS-NN's ``arm_nn_requantize`` with
``CMSIS_NN_USE_SINGLE_ROUNDING``; the multiplier and shift of a factor as gemmlowp chooses them (Jacob et al. 2018, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LONGEST_SHIFT = 62
LONGEST_SUM_SHIFT = 20  # of sums: three bits remain above 8-bit differences of factors up to one
_LARGEST_DIFFERENCE = 255  # of two 8-bit codes


def fixed_point(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return multiplier i32 in [2**30, 2**31) and shift i8 in [1, 62], ``factor = multiplier * 2**-shift`` within a relative 2**-31.

    A factor below 2**-32 takes every int32 to zero, and so does what is returned for it.

    Args:
        factor: f64, of any shape; positive and below 2**30.

    Raises:
        ValueError: a factor is not.
    """
    factor = factor.to(torch.float64)
    if not bool(((factor > 0) & (factor < 2.0**30)).all()):
        raise ValueError("a factor is not between 0 and 2**30")
    mantissa, exponent = torch.frexp(factor)
    multiplier = (mantissa * 2.0**31).round().to(torch.int64)
    carried = multiplier == 2**31
    multiplier, exponent = torch.where(carried, 2**30, multiplier), exponent + carried
    shift = 31 - exponent
    faint = shift > LONGEST_SHIFT
    multiplier, shift = torch.where(faint, 2**30, multiplier), torch.where(faint, LONGEST_SHIFT, shift)
    if bool((shift < 1).any()):
        raise ValueError("a factor is not between 0 and 2**30")
    return multiplier.to(torch.int32), shift.to(torch.int8)


def requantize(acc: torch.Tensor, multiplier: torch.Tensor | int, shift: torch.Tensor | int) -> torch.Tensor:
    """Return int32 values ``acc`` times multiplier * 2**-shift, rounded to nearest, halves up: i64."""
    shift = torch.as_tensor(shift, dtype=torch.int64)
    product = acc.to(torch.int64) * torch.as_tensor(multiplier, dtype=torch.int64)
    return (product + (torch.ones_like(shift) << (shift - 1))) >> shift


def sum_fixed_point(factors: Sequence[float]) -> tuple[list[int], int]:
    """Return a multiplier for each term of a sum of differences of 8-bit codes, and their shift, so that all of it fits in int32.

    ``factors[i] = multipliers[i] * 2**-shift`` within 2**-(shift + 1), with the largest shift up to 20.

    Raises:
        ValueError: a factor is not positive, or none fits.
    """
    if not all(factor > 0 for factor in factors):
        raise ValueError("a factor is not positive")
    for shift in range(LONGEST_SUM_SHIFT, 0, -1):
        multipliers = [round(factor * 2**shift) for factor in factors]
        if sum_fits(multipliers, shift):
            return multipliers, shift
    raise ValueError("no shift keeps the sum in int32")


def sum_fits(multipliers: Sequence[int], shift: int) -> bool:
    """Say whether sums of differences of 8-bit codes times these multipliers, and half of 2**shift, fit in int32."""
    return _LARGEST_DIFFERENCE * sum(multipliers) + 2 ** (shift - 1) < 2**31

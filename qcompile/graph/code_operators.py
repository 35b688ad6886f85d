"""The ``qc`` operators that take codes to codes in integers alone: what networks hold between their products.

They serve processors without floating point. Codes have 8 bits. Zero points, multipliers and shifts are numbers, known when a
graph is made; ``requantize`` is that of ``qcompile.graph.fixed_point``. Operators that only move codes or compare them (max pooling,
concatenation on one grid, padding with the zero point, reshaping) are ATen's own, on codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qcompile.formats import parse_scheme
from qcompile.graph.dialect import clamp_codes, define
from qcompile.graph.fixed_point import LONGEST_SHIFT, requantize

TABLE = 256  # one entry for each byte


def is_fixed_point(arguments: Mapping[str, Any]) -> bool:
    """Say whether an operator's arguments by name hold multipliers, so that its result has no float part."""
    return arguments.get("multiplier") is not None or bool(arguments.get("multipliers"))


def _require_multiplier(multiplier: int, shift: int) -> None:
    if not (2**30 <= multiplier < 2**31 and 1 <= shift <= LONGEST_SHIFT):
        raise ValueError(f"a multiplier lies in [2**30, 2**31) and a shift in 1..{LONGEST_SHIFT}, not {multiplier} and {shift}")


def _storage(scheme: str) -> torch.dtype:
    return parse_scheme(scheme).format.storage


# ---- lookup ---------------------------------------------------------------------------------------------------------------


def _lookup(codes, table):
    """Return ``table[byte]`` for the byte that each 8-bit code is: any function of one value, or a change of its grid.

    table [256] holds codes of the result; entry 0 is that of code 0, and of signed codes entry 255 is that of -1.
    """
    return table[codes.view(torch.uint8).to(torch.int64)]


def _lookup_shape(codes, table):
    torch._check(tuple(table.shape) == (TABLE,), lambda: f"qc.lookup reads a table of {TABLE} codes, this one has {tuple(table.shape)}")
    torch._check(codes.element_size() == 1, lambda: "qc.lookup reads codes of 8 bits")
    return codes.new_empty(codes.shape, dtype=table.dtype)


define("lookup(Tensor codes, Tensor table) -> Tensor", _lookup, _lookup_shape)


# ---- means ----------------------------------------------------------------------------------------------------------------


def _mean(codes, dims, x_zero_point, multiplier, shift, out_zero_point, keepdim, out_scheme):
    """Mean over ``dims``: ``clamp(requantize(sum of (code - x_zero_point)) + out_zero_point)``, the sum int32.

    The factor of multiplier and shift is ``x_scale / (count * out_scale)``.
    """
    _require_multiplier(multiplier, shift)
    acc = (codes.to(torch.int64) - x_zero_point).sum(dims, keepdim)
    return clamp_codes(requantize(acc, multiplier, shift), "none", None, out_zero_point, out_scheme)


def _mean_shape(codes, dims, x_zero_point, multiplier, shift, out_zero_point, keepdim, out_scheme):
    _require_multiplier(multiplier, shift)
    return codes.to(torch.int64).sum(dims, keepdim).to(_storage(out_scheme))


define(
    "mean(Tensor codes, int[] dims, int x_zero_point, int multiplier, int shift, int out_zero_point, bool keepdim, str out_scheme) "
    "-> Tensor",
    _mean,
    _mean_shape,
)


def _avg_pool2d(codes, kernel_size, stride, padding, x_zero_point, multiplier, shift, out_zero_point, out_scheme):
    """Mean over windows of NCHW codes, as ``mean``; padding adds the real value zero and counts, so all windows have one size."""
    _require_multiplier(multiplier, shift)
    # Sums of a window: its float64 mean times its size is within 1e-9 of an integer.
    centered = codes.to(torch.float64) - x_zero_point
    means = F.avg_pool2d(centered, kernel_size, stride, padding, count_include_pad=True)
    acc = (means * (kernel_size[0] * kernel_size[1])).round()
    return clamp_codes(requantize(acc, multiplier, shift), "none", None, out_zero_point, out_scheme)


def _avg_pool2d_shape(codes, kernel_size, stride, padding, x_zero_point, multiplier, shift, out_zero_point, out_scheme):
    _require_multiplier(multiplier, shift)
    size = [(codes.shape[2 + d] + 2 * padding[d] - kernel_size[d]) // stride[d] + 1 for d in range(2)]
    return codes.new_empty((*codes.shape[:2], *size), dtype=_storage(out_scheme))


define(
    "avg_pool2d(Tensor codes, int[] kernel_size, int[] stride, int[] padding, int x_zero_point, int multiplier, int shift, "
    "int out_zero_point, str out_scheme) -> Tensor",
    _avg_pool2d,
    _avg_pool2d_shape,
)


# ---- resize, softmax ------------------------------------------------------------------------------------------------------


def _resize_nearest(codes, size):
    """Resize NCHW codes to ``size`` (height, width): row i reads row ``i * in // out``, columns likewise."""
    rows, columns = (torch.arange(out) * codes.shape[2 + d] // out for d, out in enumerate(size))
    return codes[:, :, rows.unsqueeze(1), columns].contiguous()


define(
    "resize_nearest(Tensor codes, int[] size) -> Tensor",
    _resize_nearest,
    lambda codes, size: codes.new_empty((*codes.shape[:2], *size)),
)


def _softmax(codes, table, out_scheme):
    """Softmax over the last axis; the result has the scale 1/256 and its lowest code for the zero point.

        e = table[greatest code of the row - code]                  int32, table [256] descending from 2**k to 0 or more
        codes = min((256 * e + sum // 2) // sum + lowest, highest)  sum is that of e, int32

    ``softmax_table`` makes the table: 2**k * exp(-difference * x_scale), so large that neither sum nor ``256 * e + sum // 2`` leaves int32.
    """
    x, format = codes.to(torch.int64), parse_scheme(out_scheme).format
    e = table.to(torch.int64)[x.amax(-1, keepdim=True) - x]
    total = e.sum(-1, keepdim=True)
    return ((256 * e + total // 2) // total + int(format.lowest)).clamp(max=int(format.highest)).to(format.storage)


def _softmax_shape(codes, table, out_scheme):
    torch._check(
        tuple(table.shape) == (TABLE,) and table.dtype == torch.int32, lambda: f"qc.softmax reads a table of {TABLE} int32 numbers"
    )
    return codes.new_empty(codes.shape, dtype=_storage(out_scheme))


define("softmax(Tensor codes, Tensor table, str out_scheme) -> Tensor", _softmax, _softmax_shape)


def softmax_table(x_scale: float, columns: int) -> torch.Tensor:
    """Return the table i32[256] of ``qc.softmax`` for codes of this scale in rows of so many columns (at most 2**14).

    Raises:
        ValueError: rows so long leave too few bits.
    """
    bits = min(22, 30 - (columns - 1).bit_length())
    if bits < 16:
        raise ValueError(f"rows of {columns} are too long to sum in int32")
    return (2.0**bits * torch.exp(-torch.arange(TABLE, dtype=torch.float64) * x_scale)).round().to(torch.int32)

"""Constant arrays in the layout that the linear kernels read."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompile.backends.cpu.kernels.matmul_spec import LANES, Linear

Array = np.ndarray[Any, Any]


def pack_linear(spec: Linear, weight: Array, scale: Array | None = None, bias: Array | None = None) -> list[Array]:
    """Return the constants of ``matmul.linear(spec)`` in its argument order.

    weight [n, k]: codes, int8 or uint8, or float32 where ``spec.bits`` is 32. scale float32 [n] or one for all.
    bias [n] of the epilogue's bias dtype. Columns are padded with zeros to whole register blocks.

    Raises:
        ValueError: the shape does not agree with ``spec``.
    """
    n, k = spec.out_features, spec.in_features
    if weight.shape != (n, k):
        raise ValueError(f"a weight of shape {weight.shape} is not [{n}, {k}]")
    arrays = [_panels(spec, weight)]
    if spec.has_sums:
        arrays.append(_columns(spec, weight.astype(np.int32).sum(1), np.int32))
    if scale is not None:
        arrays.append(_columns(spec, np.broadcast_to(scale, (n,)), np.float32))
    if spec.epilogue.bias != "none":
        if bias is None:
            raise ValueError("this layer has a bias")
        arrays.append(_columns(spec, bias, np.dtype(spec.epilogue.bias)))
    return arrays


def _columns(spec: Linear, values: Array, dtype: Any) -> Array:
    padded = np.zeros(spec.padded_columns, dtype)
    padded[: spec.out_features] = values
    return padded


def _panels(spec: Linear, weight: Array) -> Array:
    """Return [column blocks, words, columns * elements of a word]: of each word of k, all columns of the block."""
    size = 4 if spec.integer else 1
    padded = np.zeros((spec.padded_columns, spec.words * size), np.int8 if spec.integer else np.float32)
    padded[: spec.out_features, : spec.in_features] = weight
    split = padded.reshape(spec.column_blocks, spec.columns, spec.words, size)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3).reshape(spec.weight_shape))


__all__ = ["LANES", "pack_linear"]

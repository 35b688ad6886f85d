"""Constant arrays in the layout that the linear kernels read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from qcompile.backends.cpu.kernels.matmul_spec import Linear

Array = np.ndarray[Any, Any]


_AT_ONCE = 1 << 22  # codes of a layer that are packed at a time


def pack_linear(
    spec: Linear,
    weight: Array,
    scale: Array | None = None,
    zero_point: Array | None = None,
    bias: Array | None = None,
    table: Array | None = None,
) -> list[Array]:
    """Return the constants of ``matmul.linear(spec)`` in its argument order: weight, sums, scale, zero point, bias, table, as it has them.

    weight [n, k]: one code per element, int8 or uint8, or float32 where ``spec.bits`` is 32, or int16 where it is 16. scale float32 and
    zero_point integer: [n], or one for all, or [n, groups]. bias [n] of the epilogue's bias dtype. table [16], the values of a codebook.
    Columns are padded to whole register blocks, rows to whole groups, with codes that mean zero (in a codebook: that meet zeros of x).

    Raises:
        ValueError: an array is missing, or its shape does not agree with ``spec``.
    """
    n, k = spec.out_features, spec.in_features
    if weight.shape != (n, k):
        raise ValueError(f"a weight of shape {weight.shape} is not [{n}, {k}]")
    missing = {"scale": scale is None and spec.scaled, "zero_point": zero_point is None and spec.weight_affine}
    missing["table"] = table is None and spec.codebook
    missing["bias"] = bias is None and spec.epilogue.bias != "none"
    if any(missing.values()):
        raise ValueError(f"this layer needs: {', '.join(name for name, lacks in missing.items() if lacks)}")
    if spec.bits == 32:
        arrays = [_panels(spec, weight)]
    elif spec.bits == 16:
        arrays = [_pair_panels(spec, weight)]
    else:
        raised = 0 if spec.codebook else spec.code_zero
        # Bytes throughout, whatever the weight's dtype: what is stored is the code modulo 256, and a head of 32000 x 2048 in wider
        # integers took gigabytes.
        codes = weight.astype(np.uint8) + np.uint8(raised)  # unsigned below 8 bits
        zeros = np.full((n, spec.groups), raised, np.int32)
        if spec.weight_affine:
            zeros[:] = np.asarray(zero_point, np.int32).reshape(-1, 1 if not spec.group else spec.groups) + spec.code_zero
        arrays = [_code_panels(spec, codes, zeros.astype(np.uint8))]
        if spec.has_sums:
            lengths = np.diff([*range(0, k, spec.group or k), k])  # of the groups, the last may be shorter
            if table is None:
                sums = weight.sum(1, dtype=np.int32) + raised * k - zeros[:, : len(lengths)] @ lengths
            else:
                sums = table.astype(np.int16)[codes].sum(1, dtype=np.int32)
            arrays.append(_columns(spec, sums, np.int32))
        arrays.append(_scales(spec, np.asarray(scale), np.float32))
        if spec.weight_affine:
            arrays.append(_scales(spec, zeros, np.uint8))
    if spec.epilogue.bias != "none":
        arrays.append(_columns(spec, np.asarray(bias), np.dtype(spec.epilogue.bias)))
    if spec.codebook:
        arrays.append(np.asarray(table, np.int8 if spec.integer else np.float32).reshape(1, 1, -1))
    return arrays


def pack_layers(spec: Linear, layers: list[tuple[Any, ...]]) -> list[Array]:
    """Return the constants of a product of one layer, or of all of ``spec.parts``; of each, the arrays that ``pack_linear`` takes.

    Whole blocks of columns lie one behind another, so the layers' own constants do, too.
    """
    if not spec.parts and (spec.codebook or spec.out_features * spec.in_features <= _AT_ONCE):
        return pack_linear(spec, *layers[0])
    if not spec.parts:  # a large layer too, a run of whole blocks at a time: packing takes many times the memory of the codes
        run = max(_AT_ONCE // (spec.in_features * spec.columns), 1) * spec.columns
        if run >= spec.out_features:
            return pack_linear(spec, *layers[0])
        starts = range(0, spec.out_features, run)
        each = [replace(spec, out_features=min(run, spec.out_features - start)) for start in starts]
        layers = [tuple(_run(array, spec.out_features, slice(start, start + run)) for array in layers[0]) for start in starts]
    else:
        each = [replace(spec, out_features=part.columns, parts=()) for part in spec.parts]
    packed = [pack_layers(alone, [arrays]) for alone, arrays in zip(each, layers, strict=True)]
    return [np.concatenate(arrays) for arrays in zip(*packed, strict=True)]


def _run(array: Array | None, columns: int, run: slice) -> Array | None:
    """Return a run of an array that has a row for each column; one value for all stays."""
    return array if array is None or not np.ndim(array) or len(array) != columns else array[run]


def _scales(spec: Linear, values: Array, dtype: Any) -> Array:
    """Return one value for each column, or [column blocks, groups, columns of a block]."""
    if not spec.group:
        return _columns(spec, np.broadcast_to(values.reshape(-1), (spec.out_features,)), dtype)
    padded = np.zeros((spec.padded_columns, spec.groups), dtype)
    padded[: spec.out_features] = values
    return np.ascontiguousarray(padded.reshape(spec.column_blocks, spec.columns, spec.groups).transpose(0, 2, 1))


def _code_panels(spec: Linear, codes: Array, zeros: Array) -> Array:
    """Return codes [n, k] as bytes of ``spec.weight_shape``: for each step of words, plane after plane, vectors of all columns.

    In a plane of width b, byte i of vector v holds element i of the words ``v * 8 / b + 0, 1, ..``, lowest bits first. Of ternary codes,
    byte i holds element i of five words as digits to base 3, the first word's the highest, times 256 / 243 rounded up: a product with 3
    then carries the next digit over 256.
    """
    n, k = codes.shape
    words, step, columns = spec.steps * spec.step, spec.step, spec.columns
    padded = np.zeros((spec.padded_columns, words * 4), np.uint8)
    padded[:n] = zeros.repeat(spec.group or words * 4, 1)[:, : words * 4]
    padded[:n, :k] = codes
    bytes_ = np.ascontiguousarray(padded.reshape(spec.column_blocks, columns, words // step, step, 4).transpose(0, 2, 3, 1, 4))
    if spec.ternary:
        numbers = np.tensordot(bytes_, 3 ** np.arange(step)[::-1], (2, 0))
        return np.ascontiguousarray(-(numbers * -256 // 3**step)).astype(np.uint8).view(np.int8).reshape(spec.weight_shape)
    parts, low = [], 0
    for width in spec.planes:
        each = 8 // width  # words in one vector
        plane = (bytes_ >> low) & ((1 << width) - 1)
        plane = plane.reshape(*bytes_.shape[:2], step // each, each, columns * 4)
        shifts = (np.arange(each, dtype=np.uint8) * width).reshape(each, 1)
        parts.append((plane << shifts).sum(3, dtype=np.uint8).reshape(*bytes_.shape[:2], -1))
        low += width
    return np.ascontiguousarray(np.concatenate(parts, 2).view(np.int8).reshape(spec.weight_shape))


def _columns(spec: Linear, values: Array, dtype: Any) -> Array:
    padded = np.zeros(spec.padded_columns, dtype)
    padded[: spec.out_features] = values
    return padded


def _pair_panels(spec: Linear, weight: Array) -> Array:
    """Return the bits of bfloat16 weights as [column blocks, words of two, bytes of the block's columns]."""
    padded = np.zeros((spec.padded_columns, spec.code_words * 2), np.int16)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    words = padded.view(np.int32).reshape(spec.column_blocks, spec.columns, spec.code_words)
    return np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.int8).reshape(spec.weight_shape)


def _panels(spec: Linear, weight: Array) -> Array:
    """Return float weights as [column blocks, k, columns of a block]."""
    padded = np.zeros((spec.padded_columns, spec.words), np.float32)
    padded[: spec.out_features] = weight
    return np.ascontiguousarray(padded.reshape(spec.column_blocks, spec.columns, spec.words).transpose(0, 2, 1))

"""Resize and Upsample: torch's own interpolation where it is the same, else one weight matrix for each axis."""

from __future__ import annotations

import math
from typing import Any

import torch

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.operators import Call, Result, bounded, normal_axis, operator
from qcompile.errors import Refused

aten = torch.ops.aten


@operator("Upsample")
def upsample(call: Call) -> Result:
    scales = call.constant(1).tolist() if call.version >= 9 else [float(s) for s in call.node.attributes["scales"].value]
    return _resize(call, call[0], list(range(len(scales))), scales, None, "asymmetric", "floor")


@operator("Resize", since=10)
def resize_by_scales(call: Call) -> Result:
    scales = call.constant(1).tolist()
    return _resize(call, call[0], list(range(len(scales))), scales, None, "asymmetric", "floor")


@operator("Resize", since=11)
def resize(call: Call) -> Result:
    x, rank = call[0], call.build.rank(call[0])
    axes = [normal_axis(axis, rank) for axis in call.integer_list("axes")] or list(range(rank))
    given_scales, given_sizes = call.get(2), call.get(3)
    scales = call.constant(2).tolist() if given_scales is not None and call.build.shape(given_scales) != (0,) else None
    sizes = call.integers(3) if given_sizes is not None and call.build.shape(given_sizes) != (0,) else None
    if (scales is None) == (sizes is None):
        raise Refused("Resize needs either scales or sizes")
    if call.string("keep_aspect_ratio_policy", "stretch") != "stretch" or call.integer("antialias"):
        raise Refused("Resize with antialias or a kept aspect ratio is not supported")
    coordinates = call.string("coordinate_transformation_mode", "half_pixel")
    if coordinates not in _COORDINATES:
        raise Refused(f"Resize with coordinates '{coordinates}' is not supported")
    return _resize(call, x, axes, scales, sizes, coordinates, call.string("nearest_mode", "round_prefer_floor"))


def _resize(
    call: Call, x: Value, axes: list[int], scales: list[float] | None, sizes: list[int] | None, coordinates: str, nearest: str
) -> Value:
    mode = call.string("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise Refused(f"Resize mode '{mode}' is not supported")
    shape = call.build.shape(x)
    if sizes is not None:
        scales = [size / own for size, own in zip(sizes, call.build.static_shape(x, axes), strict=True)]
    assert scales is not None
    factors = [1.0] * len(shape)
    for axis, factor in zip(axes, scales, strict=True):
        factors[axis] = factor
    if mode == "nearest" and _is_torch_nearest(factors, coordinates, nearest):
        return call.call(aten.upsample_nearest2d.vec, x, None, factors[2:])
    if (
        mode == "linear"
        and coordinates in ("half_pixel", "pytorch_half_pixel")
        and len(shape) == 4
        and factors[:2] == [1, 1]
        and sizes is not None
    ):
        by_axis = dict(zip(axes, sizes, strict=True))
        wanted = [by_axis.get(axis, shape[axis]) for axis in (2, 3)]
        if coordinates == "half_pixel" or min(wanted) > 1:
            return call.call(aten.upsample_bilinear2d.vec, x, wanted, False, None)
    for position, axis in enumerate(axes):
        if scales[position] != 1:
            x = _resize_axis(call, x, axis, scales[position], sizes[position] if sizes is not None else None, (mode, coordinates, nearest))
    return x


def _is_torch_nearest(factors: list[float], coordinates: str, nearest: str) -> bool:
    """Say whether this is a whole-number enlargement of images that picks the elements torch picks.

    Output o of factor s reads at (o + 0.5) / s - 0.5, which lies less than half an element from floor(o / s), never on a tie.
    """
    whole = len(factors) == 4 and factors[:2] == [1, 1] and all(factor == int(factor) and factor >= 1 for factor in factors[2:])
    rounded = coordinates in ("half_pixel", "half_pixel_symmetric") and nearest.startswith("round")
    return whole and (rounded or (coordinates == "asymmetric" and nearest == "floor"))


_COORDINATES = {
    "half_pixel": lambda out, scale, size, count: (out + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda out, scale, size, count: size / 2 * (1 - count / (scale * size)) + (out + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda out, scale, size, count: (out + 0.5) / scale - 0.5 if count > 1 else 0.0,
    "asymmetric": lambda out, scale, size, count: out / scale,
    "align_corners": lambda out, scale, size, count: out * (size - 1) / (scale * size - 1) if count > 1 else 0.0,
}

_NEAREST = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda at: math.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: math.floor(at + 0.5),
}


def _resize_axis(call: Call, x: Value, axis: int, scale: float, count: int | None, how: tuple[str, str, str]) -> Any:
    """Resize one axis, whose size must be known: nearest by selecting, linear and cubic by a matrix [out, in]."""
    mode, coordinates, nearest = how
    size = call.build.static_shape(x, [axis])[0]
    count = math.floor(size * scale) if count is None else count
    bounded(count * (1 if mode == "nearest" else size))
    places = [_COORDINATES[coordinates](out, scale, size, count) for out in range(count)]
    if mode == "nearest":
        if nearest not in _NEAREST:
            raise Refused(f"Resize with nearest_mode '{nearest}' is not supported")
        picked = [min(max(int(_NEAREST[nearest](place)), 0), size - 1) for place in places]
        return call.call(aten.index_select.default, x, axis, torch.tensor(picked))
    matrix = torch.zeros(count, size, dtype=torch.float64)
    for out, place in enumerate(places):
        for source, weight in _taps(call, mode, place, size):
            matrix[out, min(max(source, 0), size - 1)] += weight
    turned = call.call(aten.transpose.int, x, axis, -1)
    product = call.call(aten.linear.default, turned, matrix.to(call.build.dtype(x)))
    return call.call(aten.transpose.int, product, axis, -1)


def _taps(call: Call, mode: str, place: float, size: int) -> list[tuple[int, float]]:
    """Return the elements that one output reads, with their weights."""
    base = math.floor(place)
    part = place - base
    if mode == "linear":
        return [(base, 1 - part), (base + 1, part)]
    a = call.real("cubic_coeff_a", -0.75)
    distances = [part + 1, part, 1 - part, 2 - part]
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in distances]
    taps = list(zip(range(base - 1, base + 3), near, strict=True))
    if not call.integer("exclude_outside"):
        return taps
    inside = [(source, weight) for source, weight in taps if 0 <= source < size]
    total = sum(weight for _, weight in inside)
    return [(source, weight / total) for source, weight in inside]

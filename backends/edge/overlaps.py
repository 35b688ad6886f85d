"""How far results of the edge's kernels may overlap what they read, by the order of their loops; ``qcompile.arena.overlap`` derives leads.

- Functions of single codes read a code right before they write its place.
- Convolutions copy the codes under a few pixels to scratch before they write these; pointwise ones read a few pixels where they lie.
- Poolings and plain depthwise convolutions go over rows, columns, channels.
- Depthwise convolutions by planes copy a channel whole where it is one band, and then write that channel's codes alone: in place.
"""

from __future__ import annotations

import re

from qcompile.backends.edge.kernels.convolution import SIZES
from qcompile.backends.edge.kernels.planes import SIZES as PLANE_SIZES
from qcompile.backends.edge.kernels.pooling import WINDOWS
from qcompile.backends.lowering.sequence import Call, View

from qcompile.arena.overlap import Windows, windows_lead

Overlaps = list[tuple[int, int, int | None]]


def overlaps(call: Call) -> Overlaps:
    """Return for a call which result may overlap which argument: their positions among its buffers, and the lead in bytes."""
    name, numbers = call.kernel, [size for size in call.sizes if isinstance(size, int)]
    if name.startswith(("add_", "lookup_")):
        result, operands = len(call.arguments) - 1, (0, 1) if name.startswith("add_") else (0,)
        return [(n, result, 0) for n in operands if _bytes(call.arguments[n]) == _bytes(call.arguments[result])]
    if name.startswith(("mean_pool_", "max_pool_")):
        s = dict(zip(WINDOWS.split(), numbers, strict=False))
        return [(0, len(call.arguments) - 1, windows_lead(_windows(s, s["channels"])))]
    result = 5  # x, weight, bias, multiplier, shift come before it, scratch behind it
    if len(call.arguments) <= result or call.arguments[result].dtype not in ("int8", "uint8"):
        return []
    if name.startswith("pointwise_"):
        pixels, channels, out_channels = numbers[:3]
        return [(0, result, windows_lead(Windows((1, pixels), (1, pixels), channels, out_channels), block=_together(name)))]
    if name.startswith("convolution_"):
        s = dict(zip(SIZES.split(), numbers, strict=False))
        return [(0, result, windows_lead(_windows(s, s["out_channels"]), copied=True))]
    if re.match(r"depthwise_[su]8_", name):
        s = dict(zip(SIZES.split(), numbers, strict=False))
        return [(0, result, windows_lead(_windows(s, s["out_channels"])))]
    if name.startswith("depthwise_w"):
        s = dict(zip(PLANE_SIZES.split(), numbers, strict=False))
        return [(0, result, None)] if s["band"] == s["out_height"] and _bytes(call.arguments[result]) <= _bytes(call.arguments[0]) else []
    return []


def _windows(s: dict[str, int], result_pixel: int) -> Windows:
    size, result = (s["height"], s["width"]), (s["out_height"], s["out_width"])
    return Windows(size, result, s["channels"], result_pixel, stride=(s["stride_y"], s["stride_x"]), padding=(s["pad_y"], s["pad_x"]))


def _together(name: str) -> int:
    """Return the pixels that a product makes together, as its name says: ``.._2x4``."""
    found = re.search(r"_(\d+)x\d+(_pairs)?$", name)
    return int(found[1]) if found else 2


def _bytes(view: View) -> int:
    total = 1 if view.dtype in ("int8", "uint8") else 4
    for size in view.shape:
        assert isinstance(size, int)
        total *= size
    return total

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
from qcompile.backends.edge.kernels.planes import Planes, plane_sizes
from qcompile.backends.edge.kernels.pooling import WINDOWS
from qcompile.backends.lowering.sequence import Call, View
from torch import fx

from qcompile.arena.from_graph import Kernels, plain_leads, windows_of
from qcompile.arena.overlap import Windows, windows_lead
from qcompile.graph.text import bound_arguments, operator_name

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


# ---- of nodes -------------------------------------------------------------------------------------------------------------


def kernels_of_nodes(*, dsp: bool) -> Kernels:
    """Return what the kernels that nodes become need and allow, near enough to choose patches and orders by; ``dsp`` as in ``lower``."""

    def leads(node: fx.Node) -> dict[fx.Node, int | None]:
        if not _is_convolution(node) or (windows := windows_of(node)) is None:
            return dict(plain_leads(node))
        x = bound_arguments(node)["x"]
        if _is_depthwise(node):
            return {x: None} if _plane(node, windows, dsp)[1] else {}
        return {x: windows_lead(windows, block=2, copied=windows.kernel != (1, 1))}

    def scratch(node: fx.Node) -> int:
        if not _is_convolution(node) or (windows := windows_of(node)) is None:
            return 0
        if _is_depthwise(node):
            return _plane(node, windows, dsp)[0]
        row = windows.kernel[0] * windows.kernel[1] * windows.pixel
        rows = 0 if windows.kernel == (1, 1) else 2 * row
        return rows + (4 * row if dsp else 0)  # two pixels, as codes and as pairs of 16 bits

    return Kernels(leads, scratch)


def _is_convolution(node: fx.Node) -> bool:
    return operator_name(node.target) == "qc.conv2d" and bool(bound_arguments(node)["out_scheme"])


def _is_depthwise(node: fx.Node) -> bool:
    arguments = bound_arguments(node)
    return bool(arguments["groups"] == arguments["x"].meta["val"].shape[1] > 1)


def _plane(node: fx.Node, windows: Windows, dsp: bool) -> tuple[int, bool]:
    """Return the bytes of a depthwise convolution's plane, and whether the result may take the place of its input."""
    (height, width), channels = windows.result, windows.result_pixel
    spec = Planes(8, True, dsp, *windows.kernel, windows.stride[1], 1)
    _, band, elements = plane_sizes(spec, height, width, windows.size[1], channels, windows.stride[0], windows.padding[1])
    smaller = height * width * channels <= windows.bytes
    return elements * (2 if dsp else 1), band == height and smaller

"""Rules of ``use-fixed-point`` for what stands between a dequantize and a quantize: on codes instead of values.

Operators that move or compare elements are the same on codes; a function of one value is a table of its 256 results, bit for bit; means
and pools are int32 sums; softmax reads a table of exponentials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from qcompile.passes import _places
from qcompile.passes.fuse_epilogue import differ

from qcompile.formats import Integer, Scheme, Tensor, parse_scheme
from qcompile.graph import Graph
from qcompile.graph.code_operators import TABLE, softmax_table
from qcompile.graph.fixed_point import fixed_point
from qcompile.graph.rewrite import Any_, Match, Op, Rule
from qcompile.graph.text import bound_arguments, operator_name

_qc = torch.ops.qc
_RESIZE = "aten.upsample_nearest2d.vec"
_PADS = ("aten.constant_pad_nd", "aten.pad")
NOT_CODES = "it is not between codes of 8 bits on static grids"

# ---- grids ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A static grid of 8-bit codes: scale (f32 as a float64 number), zero point, scheme."""

    scale: float
    zero_point: int
    scheme: Scheme


def static_grid(graph: Graph, scale: Any, zero_point: Any, scheme: str) -> Grid | None:
    """Return the grid of constants, or None where it is not static, not one for the tensor or not of 8-bit integers."""
    parsed, value, zero = parse_scheme(scheme) if scheme else None, graph.constant(scale), graph.constant(zero_point)
    if parsed is None or value is None or value.ndim or (zero is None) != (zero_point is None):
        return None
    if parsed.granularity != Tensor() or not isinstance(parsed.format, Integer) or parsed.bits != 8:
        return None
    return Grid(float(value), 0 if zero is None else int(zero), parsed)


def _grid_of(graph: Graph, node: object) -> Grid | None:
    """Return the grid of a quantize or dequantize node."""
    if not isinstance(node, fx.Node) or node.target not in (_qc.quantize.default, _qc.dequantize.default):
        return None
    a = bound_arguments(node)
    return None if a.get("size") is not None else static_grid(graph, a["scale"], a["zero_point"], a["scheme"])


def _guard_grids(graph: Graph, m: Match) -> str | None:
    return None if _grid_of(graph, m["x"]) and _grid_of(graph, m.root) else NOT_CODES


def _known_grids(graph: Graph, m: Match) -> tuple[Grid, Grid]:
    x, out = _grid_of(graph, m["x"]), _grid_of(graph, m.root)
    assert x is not None
    assert out is not None
    return x, out


def _codes(m: Match) -> fx.Node:
    return bound_arguments(m["x"])["codes"]


# ---- moves ----------------------------------------------------------------------------------------------------------------


def _guard_move(graph: Graph, m: Match) -> str | None:
    if reason := _guard_grids(graph, m) or differ(graph, m.arguments("quantize"), m.arguments("x")):
        return reason
    name, a = operator_name(m["op"].target), m.arguments("op")
    if name in _PADS and (a["value"] or a.get("mode", "constant") != "constant"):
        return "it pads with other values than zero"
    if name == _RESIZE:
        return _guard_resize(m)
    return None


def _guard_resize(m: Match) -> str | None:
    """Return None where the rows and columns that ATen reads, by a float scale, are those of whole numbers."""
    before, after = m["x"].meta["val"].shape[-2:], m["op"].meta["val"].shape[-2:]
    scales = m.arguments("op")["scale_factors"] or [out / size for size, out in zip(before, after, strict=True)]
    for size, out, scale in zip(before, after, scales, strict=True):
        if not isinstance(size, int) or not isinstance(out, int):
            return "its size is not known"
        places = (torch.arange(out, dtype=torch.float64) / scale).floor().clamp(max=size - 1)
        if not torch.equal(places.to(torch.int64), torch.arange(out) * size // out):
            return "it reads other places than whole numbers give"
    return None


def _move(graph: Graph, m: Match) -> fx.Node:
    node, grid, codes = m["op"], _known_grids(graph, m)[0], _codes(m)
    if operator_name(node.target) == _RESIZE:
        return graph.call(_qc.resize_nearest.default, codes, [int(size) for size in node.meta["val"].shape[-2:]], before=m.root, like=node)
    if operator_name(node.target) in _PADS:
        return graph.call(
            torch.ops.aten.constant_pad_nd.default, codes, m.arguments("op")["pad"], grid.zero_point, before=m.root, like=node
        )
    others = {name: value for name, value in m.arguments("op").items() if value is not m["x"]}
    return graph.call(node.target, codes, before=m.root, like=node, **others)


# ---- tables ---------------------------------------------------------------------------------------------------------------


def _chain(node: Any) -> list[fx.Node]:
    """Return the functions of one value that lead to a node, first to last, and before them the node that they start from."""
    found = [node]
    while _places.is_pointwise(found[0]) and (found[0] is node or len(found[0].users) == 1):
        found.insert(0, found[0].all_input_nodes[0])
    return found


def _guard_lookup(graph: Graph, m: Match) -> str | None:
    start = _chain(m["value"])[0]
    return None if _grid_of(graph, start) and start.target is _qc.dequantize.default and _grid_of(graph, m.root) else NOT_CODES


def _lookup(graph: Graph, m: Match) -> fx.Node:
    start, *functions = _chain(m["value"])
    d, q = bound_arguments(start), m.arguments("quantize")
    every = torch.arange(TABLE, dtype=torch.int64).to(torch.uint8).view(parse_scheme(d["scheme"]).format.storage)
    values = {start: _qc.dequantize(every, graph.constant(d["scale"]), graph.constant(d["zero_point"]), d["scheme"])}
    for function in functions:
        arguments, keywords = fx.map_arg((function.args, dict(function.kwargs)), lambda node: values[node])
        values[function] = function.target(*arguments, **keywords)
    table = _qc.quantize(values[m["value"]], graph.constant(q["scale"]), graph.constant(q["zero_point"]), q["scheme"])
    if torch.equal(table, every):
        return d["codes"]
    last = functions[-1] if functions else m.root
    return graph.call(
        _qc.lookup.default, d["codes"], graph.add_constant(f"{last.name}_table", table, like=m.root), before=m.root, like=last
    )


# ---- means and softmax ----------------------------------------------------------------------------------------------------


def _mean_dims(m: Match) -> list[int]:
    """Return the axes that a mean, or an adaptive pool to one place, takes."""
    node, a = m["op"], m.arguments("op")
    if operator_name(node.target) == "aten.adaptive_avg_pool2d":
        return [-2, -1]
    rank = m["x"].meta["val"].ndim
    return [int(d) - rank if d >= 0 else int(d) for d in a["dim"] or range(rank)]


def _guard_mean(graph: Graph, m: Match) -> str | None:
    if reason := _guard_grids(graph, m):
        return reason
    node, shape = m["op"], m["x"].meta["val"].shape
    if operator_name(node.target) == "aten.adaptive_avg_pool2d" and list(node.meta["val"].shape[-2:]) != [1, 1]:
        return "it pools to more than one place"
    return None if all(isinstance(shape[d], int) for d in _mean_dims(m)) else "how many it counts is not known"


def _mean(graph: Graph, m: Match) -> fx.Node:
    node, shape, (x, out) = m["op"], m["x"].meta["val"].shape, _known_grids(graph, m)
    dims = _mean_dims(m)
    multiplier, shift = _number(x.scale / (math.prod(int(shape[d]) for d in dims) * out.scale))
    keep = bool(m.arguments("op").get("keepdim", True))
    rest = (x.zero_point, multiplier, shift, out.zero_point, keep, str(out.scheme))
    return graph.call(_qc.mean.default, _codes(m), dims, *rest, before=m.root, like=node)


def _number(factor: float) -> tuple[int, int]:
    multiplier, shift = fixed_point(torch.tensor(factor, dtype=torch.float64))
    return int(multiplier), int(shift)


def _guard_pool(graph: Graph, m: Match) -> str | None:
    if reason := _guard_grids(graph, m):
        return reason
    a, padding = m.arguments("op"), _pair(m.arguments("op")["padding"])
    if a["divisor_override"] is not None:
        return "it divides by a number of its own"
    if padding != [0, 0] and not a["count_include_pad"]:
        return "its windows at the edge count fewer elements"
    kernel, stride = _pair(a["kernel_size"]), _pair(a["stride"] or a["kernel_size"])
    size = [(m["x"].meta["val"].shape[-2 + d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in range(2)]
    return None if list(m["op"].meta["val"].shape[-2:]) == size else "its last windows reach beyond the edge"


def _pool(graph: Graph, m: Match) -> fx.Node:
    a, (x, out) = m.arguments("op"), _known_grids(graph, m)
    kernel = _pair(a["kernel_size"])
    geometry = (kernel, _pair(a["stride"] or a["kernel_size"]), _pair(a["padding"]))
    numbers = _number(x.scale / (math.prod(kernel) * out.scale))
    return graph.call(
        _qc.avg_pool2d.default, _codes(m), *geometry, x.zero_point, *numbers, out.zero_point, str(out.scheme), before=m.root, like=m["op"]
    )


def _pair(value: Any) -> list[int]:
    return list(value) * (2 // len(value))


def _guard_softmax(graph: Graph, m: Match) -> str | None:
    if reason := _guard_grids(graph, m):
        return reason
    _, out = _known_grids(graph, m)
    if not _places.is_softmax(m["op"]):
        return "it is not over the last axis"
    if out.scale != 1 / _places.SOFTMAX_STEPS or out.zero_point != int(out.scheme.format.lowest):
        return "its result is not on the grid of qc.softmax"
    columns = m["x"].meta["val"].shape[-1]
    return None if isinstance(columns, int) and columns <= 2**14 else "its rows are too long, or not of known length"


def _softmax(graph: Graph, m: Match) -> fx.Node:
    x, out = _known_grids(graph, m)
    table = softmax_table(x.scale, int(m["x"].meta["val"].shape[-1]))
    constant = graph.add_constant(f"{m['op'].name}_table", table, like=m["op"])
    return graph.call(_qc.softmax.default, _codes(m), constant, str(out.scheme), before=m.root, like=m["op"])


# ---- the rules ------------------------------------------------------------------------------------------------------------


def _sandwich(name: str, operators: str, replace: Any, guard: Any) -> Rule:
    x = Op("qc.dequantize", name="x", shared=True)
    inner = Op(operators, name="op", input=x) if operators == _RESIZE else Op(operators, name="op", self=x)
    return Rule(name, Op("qc.quantize", name="quantize", x=inner), replace, guard)


CODE_RULES: tuple[Rule, ...] = (
    *(_sandwich("codes-moved", name, _move, _guard_move) for name in sorted(_places.MOVES)),
    _sandwich("codes-mean", "aten.mean.dim|aten.adaptive_avg_pool2d", _mean, _guard_mean),
    _sandwich("codes-avg-pool", "aten.avg_pool2d", _pool, _guard_pool),
    _sandwich("codes-softmax", "aten.softmax.int", _softmax, _guard_softmax),
    Rule("codes-lookup", Op("qc.quantize", name="quantize", x=Any_("value")), _lookup, _guard_lookup),
)

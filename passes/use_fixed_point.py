"""Leave integers alone: every requantization becomes a 32-bit multiplier and a shift, every function of a value a table.

    %conv = qc.conv2d(%x, .., %bias, .., %s, %z) {.., out_scheme="int8 tensor affine"}
    %pool = aten.mean.dim(%dequantize, [2, 3])         %q = qc.quantize(%pool, ..)
    %act = aten.hardswish(%dequantize_1)               %q_1 = qc.quantize(%act, ..)

    %conv = qc.conv2d(%x, .., %bias, .., %s, %z) {.., multiplier=%conv_multiplier, shift=%conv_shift}
    %q = qc.mean(%codes) {dims=[2, 3], multiplier=.., shift=.., ..}
    %q_1 = qc.lookup(%codes_1, %act_table)

What stands between a dequantize and a quantize goes over to codes: operators that move or compare elements as they are, functions of one
value as a table of their 256 results (bit for bit), means and pools as int32 sums, softmax by a table of exponentials. Requantization by a
multiplier rounds the exact product once, where float32 rounds three times: codes differ where the value lies within 2**-22 of a half.

Float biases of linear layers become int32 at scale ``x_scale * weight_scale`` (Jacob et al. 2018, section 2.4). What stays float has
the reason in its note ``reason``; processors without floating point refuse it. The rule: ``qcompile.graph.fixed_point``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from qcompile.passes import _places
from qcompile.passes.fuse_epilogue import differ

from qcompile.formats import Group, Integer, Scheme, Tensor, parse_scheme
from qcompile.graph import Graph, Stage, dialect
from qcompile.graph.code_operators import TABLE, is_fixed_point, softmax_table
from qcompile.graph.fixed_point import fixed_point, sum_fixed_point
from qcompile.graph.rewrite import Any_, Match, Op, Rule, apply_rules, match_pattern
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately

_qc = torch.ops.qc
_RESIZE = "aten.upsample_nearest2d.vec"
_PADS = ("aten.constant_pad_nd", "aten.pad")
_BETWEEN = "it is not between codes of 8 bits on static grids"

# ---- grids ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """A static grid of 8-bit codes: scale (f32 as a float64 number), zero point, scheme."""

    scale: float
    zero_point: int
    scheme: Scheme


def _grid(graph: Graph, scale: Any, zero_point: Any, scheme: str) -> _Grid | None:
    """Return the grid of constants, or None where it is not static, not one for the tensor or not of 8-bit integers."""
    parsed, value, zero = parse_scheme(scheme) if scheme else None, graph.constant(scale), graph.constant(zero_point)
    if parsed is None or value is None or value.ndim or (zero is None) != (zero_point is None):
        return None
    if parsed.granularity != Tensor() or not isinstance(parsed.format, Integer) or parsed.bits != 8:
        return None
    return _Grid(float(value), 0 if zero is None else int(zero), parsed)


def _grid_of(graph: Graph, node: object) -> _Grid | None:
    """Return the grid of a quantize or dequantize node."""
    if not isinstance(node, fx.Node) or node.target not in (_qc.quantize.default, _qc.dequantize.default):
        return None
    a = bound_arguments(node)
    return None if a.get("size") is not None else _grid(graph, a["scale"], a["zero_point"], a["scheme"])


def _guard_grids(graph: Graph, m: Match) -> str | None:
    return None if _grid_of(graph, m["x"]) and _grid_of(graph, m.root) else _BETWEEN


def _known_grids(graph: Graph, m: Match) -> tuple[_Grid, _Grid]:
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
    return None if _grid_of(graph, start) and start.target is _qc.dequantize.default and _grid_of(graph, m.root) else _BETWEEN


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


# ---- products and sums ----------------------------------------------------------------------------------------------------


def _guard_product(graph: Graph, m: Match) -> str | None:
    a = m.arguments("layer")
    if is_fixed_point(a):
        return "it has a multiplier"
    if not _grid(graph, a["x_scale"], a["x_zero_point"], a["x_scheme"]) or not _grid(
        graph, a["out_scale"], a["out_zero_point"], a["out_scheme"]
    ):
        return _BETWEEN
    if a["residual"] is not None or a["activation"] not in dialect.FIXED_POINT_ACTIVATIONS:
        return f"its epilogue holds {'a residual' if a['residual'] is not None else a['activation']}"
    weight, bias = (graph.constant(a[key]) for key in ("weight", "bias"))
    scheme = parse_scheme(a["weight_scheme"])
    if weight is None or (bias is None) != (a["bias"] is None) or isinstance(scheme.granularity, Group) or not scheme.format.scaled:
        return "its weight has groups along the input, or weight or bias are not constant"
    try:
        bias, multiplier, shift = _requantization(graph, a)
    except ValueError as error:
        return str(error)
    largest = _largest_accumulators(graph, a, bias)
    steps = largest * multiplier.to(torch.float64) * torch.exp2(-shift.to(torch.float64))
    if bool((largest >= 2.0**31).any()):
        return "its accumulators do not fit in int32"
    return None if bool((steps < 2.0**31 - 2**9).all()) else "its results in steps of the out scale do not fit in int32"


def _largest_accumulators(graph: Graph, a: dict[str, Any], bias: torch.Tensor | None) -> torch.Tensor:
    """Return the largest magnitude that each output's accumulator can have, f64 [out]."""
    scheme, x = parse_scheme(a["weight_scheme"]), _grid(graph, a["x_scale"], a["x_zero_point"], a["x_scheme"])
    packed, size = graph.constant(a["weight"]), a.get("in_features") or a["kernel_width"]
    assert x is not None
    assert packed is not None
    zero_point, table = graph.constant(a["weight_zero_point"]), graph.constant(a.get("weight_table"))
    weight = dialect._centered(scheme.format.unpack(packed, size), zero_point, scheme, table)
    reach = max(int(x.scheme.format.highest) - x.zero_point, x.zero_point - int(x.scheme.format.lowest))
    return weight.abs().flatten(1).sum(1) * reach + (0 if bias is None else bias.abs())


def _requantization(graph: Graph, a: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the bias as int32 (or None), multiplier and shift of a layer.

    Raises:
        ValueError: the scales give a bias or a factor that has no such form.
    """
    x_scale, weight_scale, out_scale = (graph.constant(a[key]).to(torch.float64) for key in ("x_scale", "weight_scale", "out_scale"))  # type: ignore[union-attr]
    step = x_scale * weight_scale
    bias = graph.constant(a["bias"])
    if bias is not None and bias.dtype.is_floating_point:
        codes = (bias.to(torch.float64) / step).round()
        if not bool((codes.abs() < 2.0**30).all()):
            raise ValueError("its bias does not fit in half of an accumulator")
        bias = codes.to(torch.int32)
    return bias, *fixed_point(step / out_scale)


def _use_multiplier(graph: Graph, m: Match) -> fx.Node:
    node, a = m["layer"], m.arguments("layer")
    bias, multiplier, shift = _requantization(graph, a)
    if bias is not None and bias is not graph.constant(a["bias"]):
        a["bias"] = graph.add_constant(f"{a['bias'].target}_codes", bias, like=node)
    a["multiplier"] = graph.add_constant(f"{node.name}.multiplier", multiplier, like=node)
    a["shift"] = graph.add_constant(f"{node.name}.shift", shift, like=node)
    return graph.call(node.target, **a, before=node, like=node)


def _guard_sum(graph: Graph, m: Match) -> str | None:
    a = m.arguments("add")
    if is_fixed_point(a):
        return "it has multipliers"
    if not all(_grid(graph, a[f"{side}_scale"], a[f"{side}_zero_point"], a[f"{side}_scheme"]) for side in ("a", "b", "out")):
        return _BETWEEN
    if a["activation"] not in dialect.FIXED_POINT_ACTIVATIONS:
        return f"its epilogue holds {a['activation']}"
    try:
        sum_fixed_point(_sum_factors(graph, a))
    except ValueError as error:
        return str(error)
    return None


def _sum_factors(graph: Graph, a: dict[str, Any]) -> list[float]:
    first, second, out = (float(graph.constant(a[f"{side}_scale"])) for side in ("a", "b", "out"))  # type: ignore[arg-type]
    return [first / out, second / out]


def _use_multipliers(graph: Graph, m: Match) -> fx.Node:
    a = m.arguments("add")
    multipliers, shift = sum_fixed_point(_sum_factors(graph, a))
    return graph.call(m["add"].target, **a | {"multipliers": multipliers, "shift": shift}, before=m["add"], like=m["add"])


# ---- the pass -------------------------------------------------------------------------------------------------------------


def _sandwich(name: str, operators: str, replace: Any, guard: Any) -> Rule:
    x = Op("qc.dequantize", name="x", shared=True)
    inner = Op(operators, name="op", input=x) if operators == _RESIZE else Op(operators, name="op", self=x)
    return Rule(name, Op("qc.quantize", name="quantize", x=inner), replace, guard)


@dataclass(frozen=True)
class UseFixedPoint(Pass):
    """Requantize by multipliers and shifts, and compute what stands between codes on codes."""

    stage: ClassVar[Stage] = Stage.INTEGER
    keeps: ClassVar[Keeps] = approximately(20.0)  # codes differ by one where a value lies near a half; softmax is rounded to 1/256
    needs: ClassVar[tuple[str, ...]] = ("materialize", "fuse-epilogue")
    rules: ClassVar[tuple[Rule, ...]] = (
        *(_sandwich("codes-moved", name, _move, _guard_move) for name in sorted(_places.MOVES)),
        _sandwich("codes-mean", "aten.mean.dim|aten.adaptive_avg_pool2d", _mean, _guard_mean),
        _sandwich("codes-avg-pool", "aten.avg_pool2d", _pool, _guard_pool),
        _sandwich("codes-softmax", "aten.softmax.int", _softmax, _guard_softmax),
        Rule("codes-lookup", Op("qc.quantize", name="quantize", x=Any_("value")), _lookup, _guard_lookup),
        Rule("fixed-point-product", Op("qc.linear|qc.conv2d", name="layer"), _use_multiplier, _guard_product),
        Rule("fixed-point-sum", Op("qc.add", name="add"), _use_multipliers, _guard_sum),
    )

    def run(self, graph: Graph, context: Context) -> int:
        changes = apply_rules(graph, self.rules, context.log)
        for node in left_in_float(graph):
            node.meta["notes"].setdefault("reason", _why(graph, node))
        return changes


def left_in_float(graph: Graph) -> list[fx.Node]:
    """Return the nodes that compute floats, or read them: all but the quantizers of inputs and the dequantizers of outputs."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        reads = any(_is_float(x) for x in node.all_input_nodes if x.op != "get_attr")
        at_input = node.target is _qc.quantize.default and node.args[0].op == "placeholder"
        at_output = node.target is _qc.dequantize.default and all(user.op == "output" for user in node.users)
        product = node.target in (_qc.linear.default, _qc.conv2d.default, _qc.add.default) and not is_fixed_point(bound_arguments(node))
        if product or ((_is_float(node) or reads) and not at_input and not at_output):
            found.append(node)
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _why(graph: Graph, node: fx.Node) -> str:
    """Return why a node is not of integers alone."""
    for user in node.users:
        for rule in UseFixedPoint.rules if user.target is _qc.quantize.default else ():
            found = match_pattern(graph, rule.pattern, user)
            if isinstance(found, Match) and found.values.get("op") is node and (reason := rule.guard(graph, found)):
                return reason
    for guard, names in ((_guard_product, ("qc.linear", "qc.conv2d")), (_guard_sum, ("qc.add",))):
        if operator_name(node.target) in names:
            return guard(graph, Match(node, {"layer": node, "add": node})) or _BETWEEN
    if operator_name(node.target).startswith("qc."):
        return "it reads or gives floats"
    return "no form on codes"

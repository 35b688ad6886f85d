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

Float biases become int32 at scale ``x_scale * weight_scale`` (Jacob et al. 2018, section 2.4). Of a channel whose weights are so small
beside its bias that this would leave 30 bits, the weights are coded again on a coarser scale, of which the bias has 2**29 steps: each
product is then within half of a step, |bias| * 2**-30, of what it was. What stays float has the reason in its note ``reason``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from qcompile.passes._code_rules import CODE_RULES, NOT_CODES, static_grid

from qcompile.formats import Group, parse_scheme
from qcompile.graph import Graph, Stage, dialect
from qcompile.graph.code_operators import is_fixed_point
from qcompile.graph.fixed_point import fixed_point, sum_fixed_point
from qcompile.graph.rewrite import Match, Op, Rule, apply_rules, match_pattern
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately

_qc = torch.ops.qc
BIAS_STEPS = 2.0**29  # a quarter of an accumulator, of which products take the rest

# ---- products and sums ----------------------------------------------------------------------------------------------------


def _guard_product(graph: Graph, m: Match) -> str | None:
    a = m.arguments("layer")
    if is_fixed_point(a):
        return "it has a multiplier"
    if not static_grid(graph, a["x_scale"], a["x_zero_point"], a["x_scheme"]) or not static_grid(
        graph, a["out_scale"], a["out_zero_point"], a["out_scheme"]
    ):
        return NOT_CODES
    if a["residual"] is not None or a["activation"] not in dialect.FIXED_POINT_ACTIVATIONS:
        return f"its epilogue holds {'a residual' if a['residual'] is not None else a['activation']}"
    weight, bias = (graph.constant(a[key]) for key in ("weight", "bias"))
    scheme = parse_scheme(a["weight_scheme"])
    if weight is None or (bias is None) != (a["bias"] is None) or isinstance(scheme.granularity, Group) or not scheme.format.scaled:
        return "its weight has groups along the input, or weight or bias are not constant"
    try:
        constants = _requantized(graph, a)
    except ValueError as error:
        return str(error)
    largest = _largest_accumulators(graph, a, constants)
    if bool((largest >= 2.0**31).any()):
        return "its accumulators do not fit in int32"
    steps = largest * constants.multiplier.to(torch.float64) * torch.exp2(-constants.shift.to(torch.float64))
    return None if bool((steps < 2.0**31 - 2**9).all()) else "its results in steps of the out scale do not fit in int32"


@dataclass(frozen=True)
class _Requantized:
    """What a layer reads: codes (not packed), weight scale f32, bias i32 or None, multiplier i32 and shift i8 of the scale's shape."""

    codes: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    multiplier: torch.Tensor
    shift: torch.Tensor


def _requantized(graph: Graph, a: dict[str, Any]) -> _Requantized:
    """Return the constants of a layer in integers.

    Raises:
        ValueError: the scales give a bias or a factor that has no such form.
    """
    packed, x_scale, weight_scale, out_scale = (graph.constant(a[key]) for key in ("weight", "x_scale", "weight_scale", "out_scale"))
    assert packed is not None
    assert x_scale is not None
    assert weight_scale is not None
    assert out_scale is not None
    scheme, bias = parse_scheme(a["weight_scheme"]), graph.constant(a["bias"])
    codes = scheme.format.unpack(packed, a.get("in_features") or a["kernel_width"])
    if bias is not None and bias.dtype.is_floating_point:
        needed = (bias.to(torch.float64).abs() / (x_scale.to(torch.float64) * BIAS_STEPS)).to(torch.float32)
        if weight_scale.ndim == 1 and scheme.symmetric and scheme.format.family == "int":
            wider = torch.maximum(weight_scale, needed)
            ratio = (weight_scale.to(torch.float64) / wider.to(torch.float64)).reshape(-1, *[1] * (codes.ndim - 1))
            codes, weight_scale = (codes * ratio).round().to(codes.dtype), wider
        elif bool((needed > weight_scale).any()):
            raise ValueError("its bias does not fit in half of an accumulator")
        bias = (bias.to(torch.float64) / (x_scale.to(torch.float64) * weight_scale.to(torch.float64))).round().to(torch.int32)
    factor = x_scale.to(torch.float64) * weight_scale.to(torch.float64) / out_scale.to(torch.float64)
    return _Requantized(codes, weight_scale, bias, *fixed_point(factor))


def _largest_accumulators(graph: Graph, a: dict[str, Any], constants: _Requantized) -> torch.Tensor:
    """Return the largest magnitude that each output's accumulator can have, f64 [out]."""
    scheme, x = parse_scheme(a["weight_scheme"]), static_grid(graph, a["x_scale"], a["x_zero_point"], a["x_scheme"])
    assert x is not None
    weight = dialect._centered(constants.codes, graph.constant(a["weight_zero_point"]), scheme, graph.constant(a.get("weight_table")))
    reach = max(int(x.scheme.format.highest) - x.zero_point, x.zero_point - int(x.scheme.format.lowest))
    return weight.abs().flatten(1).sum(1) * reach + (0 if constants.bias is None else constants.bias.abs())


def _use_multiplier(graph: Graph, m: Match) -> fx.Node:
    node, a = m["layer"], m.arguments("layer")
    constants = _requantized(graph, a)
    known = graph.constant(a["weight_scale"])
    if known is not None and not torch.equal(constants.weight_scale, known):
        packed = parse_scheme(a["weight_scheme"]).format.pack(constants.codes)
        a["weight"] = graph.add_constant(str(a["weight"].target), packed, like=node)
        a["weight_scale"] = graph.add_constant(str(a["weight_scale"].target), constants.weight_scale, like=node)
    if constants.bias is not None and constants.bias is not graph.constant(a["bias"]):
        a["bias"] = graph.add_constant(f"{a['bias'].target}_codes", constants.bias, like=node)
    a["multiplier"] = graph.add_constant(f"{node.name}.multiplier", constants.multiplier, like=node)
    a["shift"] = graph.add_constant(f"{node.name}.shift", constants.shift, like=node)
    return graph.call(node.target, **a, before=node, like=node)


def _guard_sum(graph: Graph, m: Match) -> str | None:
    a = m.arguments("add")
    if is_fixed_point(a):
        return "it has multipliers"
    if not all(static_grid(graph, a[f"{side}_scale"], a[f"{side}_zero_point"], a[f"{side}_scheme"]) for side in ("a", "b", "out")):
        return NOT_CODES
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


@dataclass(frozen=True)
class UseFixedPoint(Pass):
    """Requantize by multipliers and shifts, and compute what stands between codes on codes."""

    stage: ClassVar[Stage] = Stage.INTEGER
    keeps: ClassVar[Keeps] = approximately(20.0)  # codes differ by one where a value lies near a half; softmax is rounded to 1/256
    needs: ClassVar[tuple[str, ...]] = ("materialize", "fuse-epilogue")
    rules: ClassVar[tuple[Rule, ...]] = (
        *CODE_RULES,
        Rule("fixed-point-product", Op("qc.linear|qc.conv2d", name="layer"), _use_multiplier, _guard_product),
        Rule("fixed-point-sum", Op("qc.add", name="add"), _use_multipliers, _guard_sum),
    )

    def run(self, graph: Graph, context: Context) -> int:
        changes = apply_rules(graph, self.rules, context.log)
        for node in left_in_float(graph):
            note = (node.name, f"not of integers alone: {node.meta['notes'].setdefault('reason', _why(graph, node))}")
            context.notes += [note] if note not in context.notes else []
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
        for rule in CODE_RULES if user.target is _qc.quantize.default else ():
            found = match_pattern(graph, rule.pattern, user)
            if isinstance(found, Match) and found.values.get("op") is node and (reason := rule.guard(graph, found)):
                return reason
    for guard, names in ((_guard_product, ("qc.linear", "qc.conv2d")), (_guard_sum, ("qc.add",))):
        if operator_name(node.target) in names:
            return guard(graph, Match(node, {"layer": node, "add": node})) or NOT_CODES
    if operator_name(node.target).startswith("qc."):
        return "it reads or gives floats"
    return "no form on codes"

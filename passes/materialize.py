"""Turn quantizers into stored codes and integer operators: the codes of the simulation are the codes stored.

    %x.q = quantizer(%x, scale=@s, zero_point=@z) {scheme="uint8 tensor affine"}
    %w.q = quantizer(%w) {scheme="int8 channel=0 sym"}
    %linear = aten.linear(%x.q, %w.q, %b)

    %x_codes = qc.quantize(%x, %x.q.scale, %x.q.zero_point) {scheme="uint8 tensor affine"}
    %linear = qc.linear(%x_codes, %x.q.scale, %x.q.zero_point, %w.q.codes, %w.q.scale, none, %b) {..}

First every quantizer becomes ``qc.quantize`` and ``qc.dequantize`` (a weight: packed codes and ``qc.dequantize``); that is exact. Then
rules turn operators
over dequantized values into integer operators where the target has the kernel. What no rule takes stays a float operator between the
two and is correct so.

Attention over dequantized int8 queries, keys and values becomes ``qc.attention_codes``. Its weights are rounded to eight bits there and
nowhere before: they are no value of the graph, so the simulation has them in float.

A convolution's bias becomes int32 at scale ``x_scale * weight_scale`` (Krishnamoorthi 2018, section 3.1): at most half of one
accumulator step from the float bias.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from qcompile.formats import LayerScheme, Scheme, parse_scheme
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.rewrite import Any_, Match, Op, Rule, apply_rules
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately

_qc = torch.ops.qc


@dataclass(frozen=True)
class Materialize(Pass):
    """Make the graph integer."""

    stage: ClassVar[Stage] = Stage.SIMULATED
    gives: ClassVar[Stage | None] = Stage.INTEGER
    keeps: ClassVar[Keeps] = approximately(20.0)  # only int32 biases and the order of float operations differ from the simulation

    def run(self, graph: Graph, context: Context) -> int:
        changed = 0
        for node in graph.nodes:
            if quantizer := graph.quantizer(node):
                is_weight = graph.constant(node.args[0]) is not None
                graph.replace(node, (_store_weight if is_weight else _quantize_activation)(graph, node, quantizer))
                changed += 1
        graph.clean()
        return changed + apply_rules(graph, _rules(context), context.log)


def _quantize_activation(graph: Graph, node: fx.Node, quantizer: Quantizer) -> fx.Node:
    x, scheme, name = node.args[0], str(quantizer.scheme), str(node.target)
    scale: fx.Node | None
    zero_point: fx.Node | None
    if quantizer.scheme.dynamic:
        parts = graph.call(_qc.quantize_dynamic.default, x, scheme, before=node)
        # Names of their own: "getitem" may be taken by nodes already erased, which a resumed compile does not know of.
        names = (f"{parts.name}_{part}" for part in ("codes", "scale", "zero_point"))
        codes, scale, zero_point = (graph.call(operator.getitem, parts, i, before=node, name=part) for i, part in enumerate(names))
        zero_point = None if quantizer.scheme.symmetric else zero_point
    else:
        scale = None if quantizer.scale is None else graph.add_constant(f"{name}_scale", quantizer.scale, like=node)
        zero_point = None if quantizer.zero_point is None else graph.add_constant(f"{name}_zero_point", quantizer.zero_point, like=node)
        codes = graph.call(_qc.quantize.default, x, scale, zero_point, scheme, before=node)
    return graph.call(_qc.dequantize.default, codes, scale, zero_point, scheme, before=node)


def _store_weight(graph: Graph, node: fx.Node, quantizer: Quantizer) -> fx.Node:
    source = node.args[0]
    weight, name = graph.constant(source), str(source.target)
    assert weight is not None
    stored = quantizer.quantized(weight)
    codes = graph.add_constant(f"{name}_codes", stored.packed(), like=node)
    scale = None if stored.scale is None else graph.add_constant(f"{name}_scale", stored.scale, like=node)
    zero_point = None if stored.zero_point is None else graph.add_constant(f"{name}_zero_point", stored.zero_point, like=node)
    table = None if stored.table is None else graph.add_constant(f"{name}_table", stored.table, like=node)
    format = stored.scheme.format
    size = None if format.bits == 8 and format.dense else weight.shape[-1]
    return graph.call(_qc.dequantize.default, codes, scale, zero_point, str(stored.scheme), size, table, before=node)


# ---- rules: float operators over dequantized values -> integer operators --------------------------------------------------


def _rules(context: Context) -> tuple[Rule, ...]:
    def supported(operator: str, x: fx.Node | None, weight: fx.Node) -> str | None:
        if operator != "qc.linear" and bound_arguments(weight)["table"] is not None:
            return f"{operator} takes no weight with a table of its own"
        scheme = LayerScheme(_scheme(weight), _scheme(x) if x is not None else None)
        return context.target.supports(operator, scheme)

    def guard_product(operator: str) -> Any:
        def guard(graph: Graph, m: Match) -> str | None:
            if graph.constant(bound_arguments(m["weight"])["codes"]) is None:
                return "the weight is not stored codes"
            return _wrong_activation(m.values.get("x")) or _one_without_scale(m) or supported(operator, m.values.get("x"), m["weight"])

        return guard

    def guard_computed(operator: str) -> Any:
        def guard(graph: Graph, m: Match) -> str | None:
            if "q" in m.values and m.arguments("layer")["own_k"] is not None:
                return "queries meet their own tokens in float"
            for side in [m[side] for side in ("q", "k", "v", "a", "b") if side in m.values]:
                scheme = _scheme(side)
                if scheme.dynamic or str(scheme.granularity) != "tensor" or bound_arguments(side)["size"] is not None:
                    return f"{side.name} is not on a static grid"
                if "q" in m.values and (not scheme.symmetric or side.args[0].meta["val"].dtype != torch.int8):
                    return f"{side.name} has a zero point"
                if reason := context.target.supports(operator, LayerScheme(None, scheme)):
                    return reason
            return None

        return guard

    rules = []
    weight = Op("qc.dequantize", name="weight", shared=True)
    for source, target, replace in (("aten.linear", "qc.linear", _linear), ("aten.conv2d", "qc.conv2d", _conv2d)):
        quantized = Op(source, name="layer", input=Op("qc.dequantize", name="x", shared=True), weight=weight)
        weight_only = Op(source, name="layer", input=Any_("float_x"), weight=weight)
        rules.append(Rule(f"{target}-quantized", quantized, replace, guard_product(target)))
        rules.append(Rule(f"{target}-weight-only", weight_only, replace, guard_product(target)))
    rules.append(Rule("qc.embedding", Op("aten.embedding", name="layer", weight=weight), _embedding,
                      lambda graph, m: supported("qc.embedding", None, m["weight"])))  # fmt: skip
    q, k, v, a, b = (Op("qc.dequantize", name=side, shared=True) for side in "qkvab")
    attention = Op("qc.attention", name="layer", q=q, k=k, v=v)
    rules.append(Rule("qc.attention_codes", attention, _attention, guard_computed("qc.attention_codes")))
    products = (Op("aten.matmul", name="layer", self=a, other=b), Op("aten.bmm", name="layer", self=a, mat2=b))
    rules += [Rule("qc.matmul", product, _matmul, guard_computed("qc.matmul")) for product in products]
    add = Op(
        "aten.add.Tensor", name="add", self=Op("qc.dequantize", name="a", shared=True), other=Op("qc.dequantize", name="b", shared=True)
    )
    for name, x in (("qc.add", add), ("qc.add-activation", Op("aten.relu|aten.relu6|aten.hardtanh", name="act", self=add))):
        rules.append(Rule(name, Op("qc.quantize", name="out", x=x), _add, _guard_add))
    return tuple(rules)


def _scheme(dequantize: fx.Node) -> Scheme:
    return parse_scheme(bound_arguments(dequantize)["scheme"])


def _wrong_activation(dequantize: fx.Node | None) -> str | None:
    if dequantize is None:
        return None
    text = str(_scheme(dequantize).granularity)
    return None if text in ("tensor", "token") else f"activations by {text} have no integer product"


def _one_without_scale(m: Match) -> str | None:
    if "x" not in m.values or _scheme(m["x"]).format.scaled == _scheme(m["weight"]).format.scaled:
        return None
    return f"'{_scheme(m['x'])}' and '{_scheme(m['weight'])}' have no product: one has a scale, the other has none"


def _operands(m: Match) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Return the leading operands of a product (x and weight), and the arguments of both dequantizes."""
    w = bound_arguments(m["weight"])
    x = bound_arguments(m["x"]) if "x" in m.values else {"codes": m["float_x"], "scale": None, "zero_point": None, "scheme": ""}
    return [x["codes"], x["scale"], x["zero_point"], w["codes"], w["scale"], w["zero_point"]], x, w


def _linear(graph: Graph, m: Match) -> fx.Node:
    operands, x, w = _operands(m)
    bias = m.arguments("layer")["bias"]
    size = m["weight"].meta["val"].shape[-1]
    more = {} if w["table"] is None else {"weight_table": w["table"]}
    return graph.call(_qc.linear.default, *operands, bias, None, None, None, x["scheme"], w["scheme"], size, before=m.root, **more)


def _conv2d(graph: Graph, m: Match) -> fx.Node:
    operands, x, w = _operands(m)
    a = m.arguments("layer")
    bias = _integer_bias(graph, m, a["bias"], x, w)
    pair = {key: list(a[key]) * (2 // len(a[key])) for key in ("stride", "padding", "dilation")}
    width = m["weight"].meta["val"].shape[-1]
    return graph.call(
        _qc.conv2d.default, *operands, bias, None, None, None, x["scheme"], w["scheme"], width,
        pair["stride"], pair["padding"], pair["dilation"], a["groups"], before=m.root,
    )  # fmt: skip


def _integer_bias(graph: Graph, m: Match, bias: fx.Node | None, x: dict[str, Any], w: dict[str, Any]) -> fx.Node | None:
    """Return the bias as int32 at the accumulator's scale, or the float bias where the scale is not known or too fine for 32 bits."""
    value, x_scale, w_scale = graph.constant(bias), graph.constant(x["scale"]), graph.constant(w["scale"])
    if value is None or x_scale is None or w_scale is None or w_scale.ndim > 1:
        return bias
    codes = (value.to(torch.float64) / (x_scale.to(torch.float64) * w_scale.to(torch.float64))).round()
    if codes.abs().max() >= 2**30:  # half of the accumulator's range is left for the products
        return bias
    return graph.add_constant(f"{bias.target}_codes", codes.to(torch.int32), like=m.root)  # type: ignore[union-attr]


def _embedding(graph: Graph, m: Match) -> fx.Node:
    w = bound_arguments(m["weight"])
    indices, size = m.arguments("layer")["indices"], m["weight"].meta["val"].shape[-1]
    return graph.call(_qc.embedding.default, indices, w["codes"], w["scale"], w["zero_point"], w["scheme"], size, before=m.root)


def _attention(graph: Graph, m: Match) -> fx.Node:
    operands = [part for side in "qkv" for part in (bound_arguments(m[side])["codes"], bound_arguments(m[side])["scale"])]
    rest = [value for name, value in m.arguments("layer").items() if name not in ("q", "k", "v", "own_k", "own_v")]
    return graph.call(_qc.attention_codes.default, *operands, *rest, before=m.root)


def _matmul(graph: Graph, m: Match) -> fx.Node:
    a, b = bound_arguments(m["a"]), bound_arguments(m["b"])
    operands = [side[key] for side in (a, b) for key in ("codes", "scale", "zero_point")]
    return graph.call(_qc.matmul.default, *operands, None, None, a["scheme"], b["scheme"], before=m.root)


def _guard_add(graph: Graph, m: Match) -> str | None:
    arguments = m.arguments("out")
    for side in ("a", "b"):
        if _wrong_activation(m[side]) or graph.constant(bound_arguments(m[side])["scale"]) is None:
            return f"operand {side} is not on a static grid"
    if m.arguments("add")["alpha"] != 1:
        return "the sum is weighted"
    if "act" in m.values and activation_name(m["act"]) is None:
        return "the activation has no name in the dialect"
    return None if str(parse_scheme(arguments["scheme"]).granularity) == "tensor" else "the result is not on one grid"


def activation_name(node: fx.Node) -> str | None:
    """Return the dialect's name of an activation node, or None."""
    name, arguments = operator_name(node.target), bound_arguments(node)
    if name == "aten.hardtanh":
        return "relu6" if (arguments["min_val"], arguments["max_val"]) == (0, 6) else None
    if name == "aten.gelu":
        return "gelu" if arguments["approximate"] == "none" else "gelu_tanh"
    short = name.removeprefix("aten.")
    return short if short in ("relu", "relu6", "silu", "tanh", "sigmoid", "hardswish") else None


def _add(graph: Graph, m: Match) -> fx.Node:
    a, b, out = bound_arguments(m["a"]), bound_arguments(m["b"]), m.arguments("out")
    activation = activation_name(m["act"]) if "act" in m.values else "none"
    return graph.call(
        _qc.add.default, a["codes"], a["scale"], a["zero_point"], b["codes"], b["scale"], b["zero_point"], out["scale"], out["zero_point"],
        a["scheme"], b["scheme"], out["scheme"], activation, before=m.root,
    )  # fmt: skip

"""Rules that see one whole operator where a graph writes it out, up to float rounding.

Exporters write LayerNorm, RMSNorm, softmax and products with constant matrices as several small operators. Kernels and quantizers want
the whole one. Unary functions such as GELU have too many spellings for patterns; ``recognize_activations`` knows them by their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from qcompile.passes._layout_rules import rank, static_size

from qcompile.graph import Graph
from qcompile.graph.graph import node_name
from qcompile.graph.rewrite import Any_, Const, Match, Op, Rule
from qcompile.graph.text import bound_arguments, operator_name

aten = torch.ops.aten


def scalar(graph: Graph, value: Any) -> float | None:
    """Return the number that an argument stands for: a Python number or a constant of one element; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = graph.constant(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 and not tensor.is_complex() else None


# ---- clamps ---------------------------------------------------------------------------------------------------------------


def _bounds(graph: Graph, m: Match) -> tuple[Any, Any]:
    a = bound_arguments(m.root)
    return a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))


def _is_relu(graph: Graph, m: Match) -> str | None:
    low, high = _bounds(graph, m)
    fits = scalar(graph, low) == 0 and (high is None or scalar(graph, high) == 6)
    return None if fits else "its bounds are not 0 and 6"


def _make_relu(graph: Graph, m: Match) -> fx.Node:
    target = aten.relu.default if _bounds(graph, m)[1] is None else aten.relu6.default
    return graph.call(target, m["x"], before=m.root)


CLAMP_RULES = (Rule("relu6", Op("aten.hardtanh|aten.clamp|aten.clamp.Tensor|aten.clamp_min", self=Any_("x")), _make_relu, _is_relu),)


# ---- operators under their native names -----------------------------------------------------------------------------------


def _is_first_result(graph: Graph, m: Match) -> str | None:
    if m["index"] != 0:
        return "it is not the first result"
    return "it is in training mode" if bound_arguments(m["native"]).get("training") else None


def _batch_norm(graph: Graph, m: Match) -> fx.Node:
    a = m.arguments("native")
    state = (a["weight"], a["bias"], a["running_mean"], a["running_var"])
    return graph.call(aten.batch_norm.default, a["input"], *state, False, a["momentum"], a["eps"], False, before=m.root)


def _layer_norm(graph: Graph, m: Match) -> fx.Node:
    a = m.arguments("native")
    return graph.call(aten.layer_norm.default, a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"], before=m.root)


def _first(operators: str) -> Op:
    return Op("py.getitem", self=Op(operators, name="native"), other=Any_("index"))


def _is_conv2d(graph: Graph, m: Match) -> str | None:
    a = bound_arguments(m.root)
    if a["transposed"] or any(a["output_padding"]):
        return "it is transposed"
    return None if rank(m.root) == 4 else f"it has {rank(m.root) - 2} spatial axes"


def _make_conv2d(graph: Graph, m: Match) -> fx.Node:
    a = bound_arguments(m.root)
    both = [list(a[key]) * (2 if len(a[key]) == 1 else 1) for key in ("stride", "padding", "dilation")]
    return graph.call(aten.conv2d.default, a["input"], a["weight"], a["bias"], *both, a["groups"], before=m.root)


def _same_padding(graph: Graph, m: Match) -> list[int] | None:
    a = bound_arguments(m.root)
    if a["padding"] == "valid":
        return [0, 0]
    kernel = a["weight"].meta["val"].shape[2:]
    dilation = list(a["dilation"]) * (2 if len(a["dilation"]) == 1 else 1)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def _conv2d_padded(graph: Graph, m: Match) -> fx.Node:
    a = bound_arguments(m.root)
    spatial = (a["stride"], _same_padding(graph, m), a["dilation"])
    return graph.call(aten.conv2d.default, a["input"], a["weight"], a["bias"], *spatial, a["groups"], before=m.root)


def _make_softmax(graph: Graph, m: Match) -> fx.Node:
    target = aten.log_softmax.int if "log" in str(m.root.target) else aten.softmax.int
    return graph.call(target, m["x"], bound_arguments(m.root)["dim"], before=m.root)


NATIVE_RULES = (
    Rule("batch-norm", _first("aten._native_batch_norm_legit_no_training"), _batch_norm, _is_first_result),
    Rule("batch-norm", _first("aten.native_batch_norm|aten.cudnn_batch_norm"), _batch_norm, _is_first_result),
    Rule("layer-norm", _first("aten.native_layer_norm"), _layer_norm, _is_first_result),
    Rule("conv2d", Op("aten.convolution"), _make_conv2d, _is_conv2d),
    Rule(
        "conv2d-padding", Op("aten.conv2d.padding"), _conv2d_padded,
        lambda g, m: None if _same_padding(g, m) is not None else "its padding is not symmetric",
    ),
    Rule(
        "softmax", Op("aten._softmax|aten._log_softmax", self=Any_("x")), _make_softmax,
        lambda g, m: "it changes the dtype" if bound_arguments(m.root)["half_to_float"] else None,
    ),
)  # fmt: skip


# ---- products with constant matrices --------------------------------------------------------------------------------------


def _linear_weight(graph: Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """Return the constant [out, in] of a matrix [in, out]: the constant it is the transpose of, or its own transpose."""
    if graph.constant(node) is None:
        return bound_arguments(node)["self"]
    value = graph.constant(node)
    assert value is not None
    # Beside the original, so that the two have one place in the listing.
    return graph.add_constant(f"{node.target}_transposed", value.t(), before=node.next, like=node)


def _is_matrix(graph: Graph, m: Match) -> str | None:
    matrix = m["matrix"]
    if not m["x"].meta["val"].is_floating_point():
        return "it multiplies integers"
    if rank(matrix) != 2:
        return f"the constant has {rank(matrix)} axes"
    return None if rank(m["x"]) >= 2 else "its input is one vector"


def _to_linear(graph: Graph, m: Match) -> fx.Node:
    bias = m.values.get("bias")
    return graph.call(aten.linear.default, m["x"], _linear_weight(graph, m["matrix"], m.root), bias, before=m.root)


def _is_plain_addmm(graph: Graph, m: Match) -> str | None:
    a = bound_arguments(m.root)
    if a["beta"] != 1 or a["alpha"] != 1:
        return "it scales its operands"
    return _is_matrix(graph, m) or _is_bias(graph, m["bias"], static_size(m.root, -1))


def _is_bias(graph: Graph, bias: Any, size: int | None) -> str | None:
    value = graph.constant(bias)
    if value is None:
        return "what it adds is not a constant"
    return None if tuple(value.shape) == (size,) else "what it adds is not one number for each output"


_MATRIX = (Const("matrix"), Op("aten.transpose.int|aten.t", self=Const(), name="matrix", shared=True))


def _add_bias(graph: Graph, m: Match) -> fx.Node:
    a = m.arguments("linear")
    return graph.call(aten.linear.default, a["input"], a["weight"], m["bias"], before=m.root, like=m["linear"])


def _takes_bias(graph: Graph, m: Match) -> str | None:
    if m.arguments("linear")["bias"] is not None:
        return "the linear layer has a bias"
    if bound_arguments(m.root)["alpha"] != 1:
        return "the sum is scaled"
    return _is_bias(graph, m["bias"], static_size(m.root, -1))


def _is_zero_plus_product(graph: Graph, m: Match) -> str | None:
    return None if bound_arguments(m.root)["beta"] == 0 else "it adds its first operand"


def _scaled_product(graph: Graph, m: Match) -> fx.Node:
    a = bound_arguments(m.root)
    product = graph.call(aten.matmul.default, a["batch1"], a["batch2"], before=m.root)
    return product if a["alpha"] == 1 else graph.call(aten.mul.Tensor, product, a["alpha"], before=m.root)


LINEAR_RULES = (
    *(Rule("linear", Op("aten.matmul", self=Any_("x"), other=matrix), _to_linear, _is_matrix) for matrix in _MATRIX),
    *(Rule("linear", Op("aten.addmm", self=Any_("bias"), mat1=Any_("x"), mat2=matrix), _to_linear, _is_plain_addmm) for matrix in _MATRIX),
    Rule(
        "linear-bias",
        Op("aten.add.Tensor", self=Op("aten.linear", name="linear"), other=Const("bias"), commutative=True),
        _add_bias,
        _takes_bias,
    ),
    Rule("baddbmm", Op("aten.baddbmm"), _scaled_product, _is_zero_plus_product),
)


# ---- normalisations -------------------------------------------------------------------------------------------------------

_MEAN = "aten.mean.dim"


def _square(x: str) -> Op:
    return Op("aten.mul.Tensor", self=Any_(x), other=Any_(x))


def _plus_epsilon(inner: Op) -> Op:
    return Op("aten.add.Tensor|aten.add.Scalar", self=inner, other=Any_("epsilon"), commutative=True)


def _normalised(value: Any, variance: Op) -> tuple[Op, ...]:
    """Return the spellings of value / sqrt(variance + epsilon)."""
    root = _plus_epsilon(variance)
    return (
        Op("aten.div.Tensor", self=value, other=Op("aten.sqrt", self=root)),
        Op("aten.mul.Tensor", self=value, other=Op("aten.rsqrt", self=root), commutative=True),
        Op("aten.mul.Tensor", self=value, other=Op("aten.reciprocal", self=Op("aten.sqrt", self=root)), commutative=True),
        Op("aten.mul.Tensor", self=value, other=Op("aten.pow.Tensor_Scalar", self=root, exponent=Any_("minus_half")), commutative=True),
        Op("aten.div.Tensor", self=value, other=Op("aten.pow.Tensor_Scalar", self=root, exponent=Any_("half")), commutative=False),
    )


def _is_last_axis(node: fx.Node) -> str | None:
    a = bound_arguments(node)
    axes = [axis % rank(a["self"]) for axis in a["dim"] or range(rank(a["self"]))]
    if axes != [rank(a["self"]) - 1]:
        return "it averages over other axes than the last"
    if not a["keepdim"]:
        return "the mean drops its axis"
    return None if static_size(a["self"], -1) is not None else "the last size is symbolic"


def _is_normalisation(graph: Graph, m: Match) -> str | None:
    epsilon = scalar(graph, m["epsilon"])
    if epsilon is None or not 0 <= epsilon < 1:
        return "what it adds to the variance is no small constant"
    for name, expected in (("half", 0.5), ("minus_half", -0.5)):
        if name in m.values and m[name] != expected:
            return "the power is no square root"
    if "variance" in m.values and m.arguments("variance").get("correction") not in (0, False):
        return "the variance divides by n - 1"
    means = [m[name] for name in ("mean", "mean_square", "variance") if name in m.values]
    return next(filter(None, map(_is_last_axis, means)), None)


def _norm_replacement(target: Any, *nothing: None) -> Callable[[Graph, Match], fx.Node]:
    def replace(graph: Graph, m: Match) -> fx.Node:
        epsilon = scalar(graph, m["epsilon"])
        return graph.call(target, m["x"], [static_size(m["x"], -1)], *nothing, epsilon, before=m.root)

    return replace


def _norm_rules() -> tuple[Rule, ...]:
    mean = Op(_MEAN, self=Any_("x"), name="mean", shared=True)
    centered = Op("aten.sub.Tensor", self=Any_("x"), other=mean, name="centered", shared=True)
    # The variance may be written over the same difference or over a second copy of it.
    mean_again = Op(_MEAN, self=Any_("x"), shared=True)
    again = Op("aten.sub.Tensor", self=Any_("x"), other=mean_again, name="again", shared=True)
    squares = (
        Op(_MEAN, self=_square("centered"), name="mean_square"),
        Op(_MEAN, self=Op("aten.mul.Tensor", self=again, other=Any_("again")), name="mean_square"),
        Op("aten.var.correction", self=Any_("x"), name="variance"),
    )
    layer = _norm_replacement(aten.layer_norm.default, None, None)
    root = _norm_replacement(aten.rms_norm.default, None)
    mean_square = Op(_MEAN, self=_square("x"), name="mean_square")
    return (
        *(Rule("layer-norm", p, layer, _is_normalisation) for variance in squares for p in _normalised(centered, variance)),
        *(Rule("rms-norm", p, root, _is_normalisation) for p in _normalised(Any_("x"), mean_square)),
    )


def _affine_guard(slot: str, other: str) -> Callable[[Graph, Match], str | None]:
    def guard(graph: Graph, m: Match) -> str | None:
        a = m.arguments("norm")
        if a.get(slot) is not None or (slot == "weight" and a.get("bias") is not None):
            return f"the normalisation has a {slot} or a bias"
        if bound_arguments(m.root).get("alpha", 1) != 1:
            return "the sum is scaled"
        shape = tuple(m["gain"].meta["val"].shape)
        return None if shape == tuple(a["normalized_shape"]) else "the constant is not one number for each channel"

    return guard


def _with_affine(slot: str) -> Callable[[Graph, Match], fx.Node]:
    def replace(graph: Graph, m: Match) -> fx.Node:
        a = m.arguments("norm") | {slot: m["gain"]}
        target = m["norm"].target
        names = [argument.name for argument in target._schema.arguments if argument.name != "cudnn_enable"]
        return graph.call(target, *(a[name] for name in names), before=m.root, like=m["norm"])

    return replace


def _affine(operator_: str, norm: str) -> Op:
    return Op(operator_, self=Op(norm, name="norm"), other=Const("gain"), commutative=True)


_BELOW_MAXIMUM = Op("aten.sub.Tensor", self=Any_("x"), other=Op("aten.amax", self=Any_("x"), name="max"))

NORM_RULES = (
    Rule(
        "square", Op("aten.pow.Tensor_Scalar", self=Any_("x"), exponent=Any_("power")),
        lambda g, m: g.call(aten.mul.Tensor, m["x"], m["x"], before=m.root), lambda g, m: None if m["power"] == 2 else "it is no square",
    ),
    Rule(
        "square", Op("aten.pow.Tensor_Tensor", self=Any_("x"), exponent=Const("power")),
        lambda g, m: g.call(aten.mul.Tensor, m["x"], m["x"], before=m.root),
        lambda g, m: None if scalar(g, m["power"]) == 2 and rank(m["power"]) <= rank(m["x"]) else "it is no square",
    ),
    *_norm_rules(),
    Rule("norm-gain", _affine("aten.mul.Tensor", "aten.layer_norm|aten.rms_norm"), _with_affine("weight"), _affine_guard("weight", "bias")),
    Rule("norm-bias", _affine("aten.add.Tensor", "aten.layer_norm"), _with_affine("bias"), _affine_guard("bias", "")),
    Rule(
        "softmax",
        Op(
            "aten.div.Tensor",
            self=Op("aten.exp", self=_BELOW_MAXIMUM, name="e", shared=True),
            other=Op("aten.sum.dim_IntList", self=Any_("e"), name="sum"),
        ),
        lambda g, m: g.call(aten.softmax.int, m["x"], m.arguments("sum")["dim"][0], before=m.root),
        lambda g, m: _is_softmax(m),
    ),
)  # fmt: skip


def _is_softmax(m: Match) -> str | None:
    axes = [[axis % rank(m["x"]) for axis in m.arguments(name)["dim"] or ()] for name in ("max", "sum")]
    kept = all(m.arguments(name)["keepdim"] for name in ("max", "sum"))
    return None if axes[0] == axes[1] and len(axes[0]) == 1 and kept else "maximum and sum are not over one and the same axis"


# ---- unary functions by their values --------------------------------------------------------------------------------------

_POINTWISE = frozenset(
    {f"aten.{name}.{kind}" for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")}
    | {f"aten.{name}" for name in ("erf", "tanh", "sigmoid", "exp", "neg", "relu", "relu6", "hardtanh", "clamp", "hardsigmoid")}
    | {"aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.rsub.Scalar", "aten.clamp.Tensor", "aten.square", "aten.reciprocal"}
)

_ACTIVATIONS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (aten.gelu.default, {}),
    (aten.gelu.default, {"approximate": "tanh"}),
    (aten.silu.default, {}),
    (aten.hardswish.default, {}),
    (aten.hardsigmoid.default, {}),
    (aten.sigmoid.default, {}),
)
_WHOLE = frozenset(target for target, _ in _ACTIVATIONS)

# Exporters write sqrt(2) and 1/6 rounded to float32 or to a few digits; the two GELUs differ by 5e-4.
_TOLERANCE = 2e-6
_PROBES = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.tensor([-60.0, -30, 30, 60], dtype=torch.float64)])


def recognize_activations(graph: Graph) -> int:
    """Replace every chain of pointwise operators of one value that computes a known activation; return how many."""
    count = 0
    for root in reversed(graph.nodes):
        if root.users and _is_pointwise(root) and (found := _find_activation(graph, root)):
            target, options, x = found
            graph.replace(root, graph.call(target, x, before=root, **options))
            count += 1
    graph.clean()
    return count


def _is_pointwise(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node.target) in _POINTWISE


def _find_activation(graph: Graph, root: fx.Node) -> tuple[Any, dict[str, Any], fx.Node] | None:
    for x in _candidates(graph, root):
        values = None if x in root.all_input_nodes and root.target in _WHOLE else _evaluate(graph, root, x)
        if values is None:
            continue
        for target, options in _ACTIVATIONS:
            if torch.allclose(values, target(_PROBES, **options), rtol=_TOLERANCE, atol=_TOLERANCE):
                return target, options, x
    return None


def _candidates(graph: Graph, root: fx.Node, limit: int = 16) -> list[fx.Node]:
    """Return the values that the whole of a small pointwise cone above ``root`` depends on, the highest last."""
    cone, order = {root}, [root]
    for node in order:
        for parent in node.all_input_nodes:
            if _is_pointwise(parent) and parent not in cone and len(cone) < limit and graph.type_text(parent) == graph.type_text(root):
                cone.add(parent)
                order.append(parent)
    leaves = {p for node in cone for p in node.all_input_nodes if p not in cone and scalar(graph, p) is None}
    if len(cone) < 2:
        return []
    found = list(leaves) if len(leaves) == 1 else []
    # Other pointwise operators may stand above the activation: it may begin at any value of the cone.
    found += order[1:]
    return [x for x in found if isinstance(x.meta["val"], torch.Tensor) and graph.type_text(x) == graph.type_text(root)]


def _evaluate(graph: Graph, root: fx.Node, x: fx.Node) -> torch.Tensor | None:
    """Return the values of ``root`` where x takes the probe values, or None if it depends on more or is no chain."""
    known: dict[fx.Node, Any] = {x: _PROBES}

    def value(node: fx.Node) -> Any:
        if node not in known:
            number = scalar(graph, node)
            if number is not None:
                known[node] = torch.tensor(number, dtype=torch.float64)
            elif _is_pointwise(node):
                known[node] = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
            else:
                raise LookupError(node_name(node))
        return known[node]

    try:
        result = value(root)
    except (LookupError, RecursionError, RuntimeError):
        return None
    return result if isinstance(result, torch.Tensor) and result.shape == _PROBES.shape and bool(torch.isfinite(result).all()) else None

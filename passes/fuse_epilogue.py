"""Fuse what follows a product into it: activation, residual sum, requantization.

    %y = qc.linear(%x_codes, ..) : f32[4,8]
    %z = aten.gelu(%y)
    %q = qc.quantize(%z, %s, %zp) {scheme="uint8 tensor affine"}

    %q = qc.linear(%x_codes, .., out_scale=%s, out_zero_point=%zp) {activation="gelu", out_scheme="uint8 tensor affine"} : u8[4,8]

The operators' meaning states the epilogue's order (scale, bias, activation, residual, requantize), and it is the order of the nodes
that are fused, so every bit is kept on the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.fx as fx
from qcompile.passes.materialize import activation_name

from qcompile.formats import parse_scheme
from qcompile.graph import Graph, Stage
from qcompile.graph.rewrite import Any_, Match, Op, Rule
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import BITS, Keeps, Pass

_PRODUCTS = "qc.linear|qc.conv2d"
_ACTIVATIONS = "aten.relu|aten.relu6|aten.hardtanh|aten.gelu|aten.silu|aten.tanh|aten.sigmoid|aten.hardswish"


def _product(m: Match) -> dict[str, Any]:
    return m.arguments("product")


def _with(graph: Graph, m: Match, **changed: Any) -> fx.Node:
    """Insert the product again, at the root's place, with some arguments changed."""
    product = m["product"]
    arguments = _product(m) | changed
    node = graph.call(product.target, **arguments, before=m.root, like=product)
    node.meta["notes"] |= product.meta["notes"]
    return node


def _guard_activation(graph: Graph, m: Match) -> str | None:
    arguments = _product(m)
    if arguments["out_scheme"]:
        return "the product gives codes already"
    name = activation_name(m.root)
    if name is None:
        return "the activation has no name in the dialect"
    if arguments["activation"] != "none":
        return f"the product has the activation {arguments['activation']} already"
    return "only relu and relu6 may follow a residual" if arguments["residual"] is not None and name not in ("relu", "relu6") else None


def _fuse_activation(graph: Graph, m: Match) -> fx.Node:
    name = activation_name(m.root)
    return _with(graph, m, activation=f"add_{name}" if _product(m)["residual"] is not None else name)


def _guard_residual(graph: Graph, m: Match) -> str | None:
    arguments = _product(m)
    if arguments["out_scheme"] or arguments["residual"] is not None:
        return "the product has codes or a residual already"
    if m.arguments("add")["alpha"] != 1:
        return "the sum is weighted"
    other = m["residual"]
    if not isinstance(other, fx.Node) or graph.type_text(other) != graph.type_text(m["product"]):
        return "the other operand has another shape"
    return None


def _guard_requantize(graph: Graph, m: Match) -> str | None:
    arguments = m.arguments("quantize")
    if _product(m)["out_scheme"]:
        return "the product gives codes already"
    if str(parse_scheme(arguments["scheme"]).granularity) != "tensor":
        return "the grid is not one for the whole tensor"
    return None


def _fuse_requantize(graph: Graph, m: Match) -> fx.Node:
    q = m.arguments("quantize")
    return _with(graph, m, out_scale=q["scale"], out_zero_point=q["zero_point"], out_scheme=q["scheme"])


def _guard_same_grid(graph: Graph, m: Match) -> str | None:
    return differ(graph, m.arguments("quantize"), m.arguments("dequantize"))


def differ(graph: Graph, q: dict[str, Any], d: dict[str, Any]) -> str | None:
    """Return None where a quantize and a dequantize have one grid, so that codes pass through both unchanged."""
    same = all(q[key] is d[key] or _equal(graph, q[key], d[key]) for key in ("scale", "zero_point")) and q["scheme"] == d["scheme"]
    return None if same and d["size"] is None else "the two grids differ"


def _equal(graph: Graph, a: Any, b: Any) -> bool:
    left, right = graph.constant(a), graph.constant(b)
    return left is not None and right is not None and bool(left.equal(right))


def _guard_concat(graph: Graph, m: Match) -> str | None:
    q = m.arguments("quantize")
    for part in m.arguments("cat")["tensors"]:
        if part.op != "call_function" or operator_name(part.target) != "qc.dequantize":
            return f"{part.name} is not on a grid"
        if reason := differ(graph, q, bound_arguments(part)):
            return f"{part.name}: {reason}"
    return None


def _concat_codes(graph: Graph, m: Match) -> fx.Node:
    arguments = m.arguments("cat")
    codes = [bound_arguments(part)["codes"] for part in arguments["tensors"]]
    return graph.call(m["cat"].target, codes, arguments["dim"], before=m.root, like=m["cat"])


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Fuse activations, residual sums and requantization into qc.linear and qc.conv2d; on one grid, move codes instead of values."""

    stage: ClassVar[Stage] = Stage.INTEGER
    keeps: ClassVar[Keeps] = BITS
    needs: ClassVar[tuple[str, ...]] = ("materialize",)
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("activation", Op(_ACTIVATIONS, self=Op(_PRODUCTS, name="product")), _fuse_activation, _guard_activation),
        Rule(
            "residual",
            Op("aten.add.Tensor", name="add", commutative=True, self=Op(_PRODUCTS, name="product"), other=Any_("residual")),
            lambda graph, m: _with(graph, m, residual=m["residual"]),
            _guard_residual,
        ),
        Rule(
            "requantize",
            Op("qc.quantize", name="quantize", x=Op(f"{_PRODUCTS}|qc.matmul", name="product")),
            _fuse_requantize,
            _guard_requantize,
        ),
        Rule(
            "same-grid",
            Op("qc.quantize", name="quantize", x=Op("qc.dequantize", name="dequantize", shared=True)),
            lambda graph, m: bound_arguments(m["dequantize"])["codes"],
            _guard_same_grid,
        ),
        Rule("concat", Op("qc.quantize", name="quantize", x=Op("aten.cat", name="cat")), _concat_codes, _guard_concat),
    )

"""Cut codes instead of values: a channel's upper bound that stands before a quantizer moves behind it.

    %clamp = aten.clamp.Tensor(%y, none, %bound) : f32[n,2,4,4]
    %q = qc.quantize(%clamp, %s, %z) {scheme="uint8 tensor affine"} : u8[n,2,4,4]

    %codes = qc.quantize(%y, %s, %z) {scheme="uint8 tensor affine"} : u8[n,2,4,4]
    %q = aten.minimum(%codes, %bound_codes) : u8[n,2,4,4]

Rounding never changes an order, so quantize(min(y, b)) = min(quantize(y), quantize(b)), bit for bit. The quantizer then follows its
product directly and is fused into it; what is left is one pass over bytes. Where no bound lies below the largest code (the grid ends
there anyway), nothing is left. Such bounds come from ``equalize``, which turns a ReLU6 into a bound for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.formats import parse_scheme
from qcompile.formats.quantize import quantize
from qcompile.graph import Graph, Stage
from qcompile.graph.rewrite import Match, Op, Rule
from qcompile.pipeline import BITS, Keeps, Pass


def _guard(graph: Graph, m: Match) -> str | None:
    clamp, scheme = m.arguments("clamp"), parse_scheme(m.arguments("quantize")["scheme"])
    if clamp["min"] is not None or graph.constant(clamp["max"]) is None:
        return "it is no constant upper bound alone"
    return None if str(scheme.granularity) == "tensor" else "the grid is not one for the whole tensor"


def _cut_codes(graph: Graph, m: Match) -> fx.Node:
    clamp, q = m.arguments("clamp"), m.arguments("quantize")
    bound, scale, zero_point = (graph.constant(node) for node in (clamp["max"], q["scale"], q["zero_point"]))
    assert bound is not None
    assert scale is not None
    scheme = parse_scheme(q["scheme"])
    limits = quantize(bound, scale, zero_point, scheme)
    codes = graph.call(m.root.target, clamp["self"], q["scale"], q["zero_point"], q["scheme"], before=m.root, like=m.root)
    if bool((limits >= int(scheme.format.highest)).all()):
        return codes
    constant = graph.add_constant(f"{clamp['max'].target}_codes", limits, before=m.root)
    return graph.call(torch.ops.aten.minimum.default, codes, constant, before=m.root, like=m["clamp"])


@dataclass(frozen=True)
class ClampCodes(Pass):
    """Move upper bounds of channels behind the quantizers that read them."""

    stage: ClassVar[Stage] = Stage.INTEGER
    keeps: ClassVar[Keeps] = BITS
    needs: ClassVar[tuple[str, ...]] = ("materialize",)
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("clamp-codes", Op("qc.quantize", name="quantize", x=Op("aten.clamp.Tensor", name="clamp")), _cut_codes, _guard),
    )

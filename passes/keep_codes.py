"""Keep the codes that a checkpoint brought along: its weights are stored as they came, nothing is rounded.

    %w = const f32[8,64] @.. !{codes=@.., scale=@.., stored="int4 group=32 sym scale=f16"}
    %linear = aten.linear(%x, %w)

    %w.quantizer = quantizer(%w, scale=@.., codes=@..) {scheme="int4 group=32 sym scale=f16"} : f32[8,64]
    %linear = aten.linear(%x, %w.quantizer)

The quantizer gives the values of the codes, and they are compared with the constant bit for bit: where a pass before has changed the
weight, its codes say something else and the compile is refused. Weights without codes stay float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import LayerScheme, parse_scheme
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.pipeline import BITS, Context, Keeps, Pass


@dataclass(frozen=True)
class KeepCodes(Pass):
    """Put quantizers with the codes of the checkpoint on its weights."""

    gives: ClassVar[Stage | None] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = BITS

    def run(self, graph: Graph, context: Context) -> int:
        changed = 0
        for node in graph.nodes:
            notes = node.meta.get("notes", {})
            if "codes" not in notes or graph.constant(node) is None:
                continue
            for user in list(node.users):
                quantizer = _quantizer(graph, node)
                called = graph.call_quantizer(quantizer, node, before=user, name=f"{node.target}_quantizer")
                called.meta["notes"] = {}
                user.replace_input_with(node, called)
                user.meta["notes"] |= {
                    "scheme": str(LayerScheme(quantizer.scheme)),
                    "layer": str(node.target).removesuffix("_scaled").removesuffix(".weight"),
                    "float_node": user.name,
                }
                changed += 1
            for key in ("codes", "scale", "zero_point", "stored"):
                notes.pop(key, None)
        if not changed:
            raise Refused("no weight of the model has codes to keep", way_out="choose a recipe that quantizes, such as w4a16")
        return changed


def _quantizer(graph: Graph, node: fx.Node) -> Quantizer:
    """Return the quantizer of a weight's own codes.

    Raises:
        Refused: the weight is no longer what its codes say.
    """
    notes = node.meta["notes"]
    quantizer = Quantizer(parse_scheme(notes["stored"]), notes["scale"], notes.get("zero_point"), notes["codes"])
    value = graph.constant(node)
    assert value is not None
    if not torch.equal(quantizer(value), value):
        raise Refused(
            "a pass before has changed the weight, its codes no longer say it", node=str(node.target), way_out="use the recipe stored"
        )
    return quantizer

"""Bring a captured graph into the one form that later passes expect.

    %clone = aten.clone(%linear) : f32[batch,seq,384]                            %linear = ...
    %div = aten.div.Tensor(%clone, 1.4142135) : f32[batch,seq,384]        ->     %gelu = aten.gelu(%linear) : f32[batch,seq,384]
    %erf = aten.erf(%div) : f32[batch,seq,384] ...

Three groups of rewrites run in turn until none fires: names, layouts and no-ops (``_layout_rules.py``, bit for bit); whole operators for
written-out ones (``_composed_rules.py``, up to float rounding: the identity is the definition of each operator); and sizes, where all
``sym_size`` of one symbol become the one of the first input that has it. Canonical forms where there was a choice:

- ``aten.relu6`` for ``hardtanh(0, 6)`` and ``clamp(0, 6)``, ``aten.relu`` for ``clamp(min=0)``;
- ``aten.conv2d`` for ``convolution``, ``aten.linear`` for products with a constant matrix (stored [out, in]) and their bias;
- ``aten.batch_norm``, ``aten.layer_norm``, ``aten.rms_norm``, ``aten.softmax.int``, ``aten.matmul`` for their native and written-out forms;
- ``aten.view`` for views, ``aten.reshape`` where the data must be copied, ``aten.transpose.int`` for a swap of two axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from qcompile.passes._composed_rules import CLAMP_RULES, LINEAR_RULES, NATIVE_RULES, NORM_RULES, recognize_activations
from qcompile.passes._layout_rules import IDENTITY_RULES, LAYOUT_RULES, NAME_RULES, unify_sizes

from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.graph.rewrite import RewriteLog, apply_rules
from qcompile.pipeline import VALUES, Context, Keeps, Pass

aten = torch.ops.aten

# Names first: the rules after them then need to know one name only.
RULES = (*NAME_RULES, *IDENTITY_RULES, *LAYOUT_RULES, *NATIVE_RULES, *CLAMP_RULES, *LINEAR_RULES, *NORM_RULES)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """One form for each meaning: no-ops dropped, one name for each operator, whole operators for written-out ones."""

    keeps: ClassVar[Keeps] = VALUES
    rules = RULES

    def run(self, graph: Graph, context: Context) -> int:
        total = 0
        while changes := unify_sizes(graph) + apply_rules(graph, self.rules, context.log) + recognize_activations(graph):
            total += changes
        repair_views(graph)
        return total


def tidy_layout(graph: Graph, log: RewriteLog) -> int:
    """Apply only the rules about names, layouts, no-ops and sizes; for passes that insert transposes and views."""
    changes = unify_sizes(graph) + apply_rules(graph, (*NAME_RULES, *IDENTITY_RULES, *LAYOUT_RULES), log)
    repair_views(graph)
    return changes


def repair_views(graph: Graph) -> None:
    """Turn views that the strides of their input no longer allow into reshapes; all types, and with them strides, are inferred again."""
    for node in graph.nodes:
        try:
            graph.infer_type(node)
        except Refused:
            if node.target is not aten.view.default:
                raise
            node.target = aten.reshape.default
            graph.infer_type(node)

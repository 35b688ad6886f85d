"""Replace ReLU6 by ReLU, so that weight ranges can be equalized across it without a bound for each channel.

    %hardtanh = aten.hardtanh(%conv2d) {min_val=0.0, max_val=6.0}    ->    %relu = aten.relu(%conv2d)

This changes the function wherever a value lies above 6. Source: Nagel et al. (2019), section 5.1.1: the change is small in trained
networks, the gain for per-tensor weights is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from qcompile.graph import Graph
from qcompile.graph.rewrite import Any_, Match, Op, Rule
from qcompile.pipeline import Keeps, Pass, approximately


def _limits(graph: Graph, match: Match) -> str | None:
    arguments = match.arguments("clamp")
    low, high = (arguments.get(f"{side}_val", arguments.get(side)) for side in ("min", "max"))
    return None if (low, high) == (0, 6) else f"it cuts at {low} and {high}, which is no ReLU6"


def _relu(graph: Graph, match: Match) -> fx.Node:
    return graph.call(torch.ops.aten.relu.default, match["x"], before=match.root)


@dataclass(frozen=True)
class ReplaceRelu6(Pass):
    """Replace ReLU6 by ReLU."""

    keeps: ClassVar[Keeps] = approximately()
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("replace-relu6", Op("aten.relu6", self=Any_("x")), _relu),
        Rule("replace-clamp-0-6", Op("aten.hardtanh|aten.clamp", name="clamp", self=Any_("x")), _relu, _limits),
    )

"""The stages of a graph and what each may hold. Legality is data: a table of allowed node kinds and operators."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph.quantizer import Quantizer


class Stage(StrEnum):
    """FLOAT: ATen operators. SIMULATED: the same and quantizers. INTEGER: the same and ``qc`` operators, no quantizers."""

    FLOAT = "float"
    SIMULATED = "simulated"
    INTEGER = "integer"


# Rotations, attention recognition and the entries of decoders act on float graphs, so their operators are legal from the start.
_FLOAT_QC = frozenset({"qc.hadamard", "qc.rotary", "qc.attention", "qc.cache_append"})

LEGAL: dict[Stage, dict[str, Any]] = {
    Stage.FLOAT: {"quantizers": False, "qc": _FLOAT_QC},
    Stage.SIMULATED: {"quantizers": True, "qc": _FLOAT_QC | {"qc.vector_codes", "qc.vectors"}},  # a cache's codes have no scheme
    Stage.INTEGER: {"quantizers": False, "qc": None},  # None: every qc operator
}


def check_legal(module: fx.GraphModule, stage: Stage) -> None:
    """Raise Refused naming the first node that the stage does not allow."""
    allowed = LEGAL[stage]
    for node in module.graph.nodes:
        if reason := _illegal(module, node, allowed):
            raise Refused(f"{reason} in stage {stage.value}", node=node.name, operator=str(node.target))


def _illegal(module: fx.GraphModule, node: fx.Node, allowed: dict[str, Any]) -> str:
    if node.op == "call_module":
        if not isinstance(module.get_submodule(str(node.target)), Quantizer):
            return "only quantizers may be modules; a module is not allowed"
        return "" if allowed["quantizers"] else "a quantizer is not allowed"
    if node.op == "call_method":
        return "a method call is not allowed"
    if node.op == "call_function" and getattr(node.target, "namespace", "") == "qc":
        name = f"qc.{node.target._opname}"
        legal = allowed["qc"]
        return "" if legal is None or name in legal else f"{name} is not allowed"
    return ""

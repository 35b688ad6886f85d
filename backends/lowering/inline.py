"""Functions of blocks without their pointwise values in between: each is computed where it is read."""

from __future__ import annotations

from typing import Any

import tvm
from qcompile.backends.lowering.translate import SCHEDULED
from tvm import s_tir, tirx


def inline_pointwise(plan: s_tir.Schedule) -> None:
    """Inline every pointwise block that is not an output into its readers, first blocks first."""
    for block in plan.get_child_blocks(plan.get_sblock("root")):
        if _is_spatial(plan, block):
            try:
                plan.compute_inline(block)
            except s_tir.ScheduleError:
                continue  # an output, or read through an opaque access: it stays a block of its own


def is_of_blocks(function: Any) -> bool:
    """Say whether a function is of blocks, as ``LegalizeOps`` and ``FuseTIR`` leave it, and has no schedule yet."""
    return (
        isinstance(function, tirx.PrimFunc)
        and SCHEDULED not in (function.attrs or {})
        and isinstance(function.body, s_tir.SBlockRealize)
        and function.body.block.name_hint == "root"
    )


@tvm.transform.module_pass(opt_level=0, name="InlineRemaining")
class InlineRemaining:
    """Inline pointwise values of every function that has no schedule: what two of them hold between each other takes no memory."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        for variable, function in list(module.functions.items()):
            if is_of_blocks(function):
                plan = s_tir.Schedule(tvm.IRModule({"main": function}))
                inline_pointwise(plan)
                module[variable] = plan.mod["main"]
        return module


def _is_spatial(plan: s_tir.Schedule, block: Any) -> bool:
    return all(variable.iter_type == tirx.IterVar.DataPar for variable in plan.get(block).iter_vars)

"""CPU schedules for functions that no hand-written kernel covers: parallel rows, inner loops in vectors.

``schedule`` takes any PrimFunc of blocks, as ``LegalizeOps`` and ``FuseTIR`` leave it. Pointwise producers are inlined into
their readers; every block left runs its outer loops in parallel and its innermost spatial axis in vectors; a reduction
keeps its sums in registers.
"""

from __future__ import annotations

from typing import Any

import tvm
from qcompile.backends.lowering.inline import inline_pointwise, is_of_blocks
from qcompile.backends.lowering.translate import SCHEDULED
from tvm import s_tir, tirx

VECTOR = 16  # float32 elements of one 512-bit vector; narrower machines split it
SERIAL_WORK = 16 << 10  # elements below which starting a second thread costs more than it saves


def schedule(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the function with its loops scheduled; a function marked ``SCHEDULED`` or not made of blocks is returned as it is."""
    if not is_of_blocks(function):
        return function
    plan = s_tir.Schedule(tvm.IRModule({"main": function}))
    inline_pointwise(plan)
    for block in plan.get_child_blocks(plan.get_sblock("root")):
        attempt = plan.copy()
        try:
            _schedule_block(attempt, block)
        except s_tir.ScheduleError:
            continue  # an unusual block (a scan, a scatter) keeps its plain loops, which are right as they are
        plan = attempt
    return plan.mod["main"].with_attr(SCHEDULED, True)


def _schedule_block(plan: s_tir.Schedule, block: Any) -> None:
    loops = plan.get_loops(block)
    kinds = [variable.iter_type for variable in plan.get(block).iter_vars]
    if not loops or len(kinds) != len(loops) or any(k not in (tirx.IterVar.DataPar, tirx.IterVar.CommReduce) for k in kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != tirx.IterVar.DataPar]
    if not reduced:
        _schedule_pointwise(plan, spatial)
    else:
        _schedule_reduction(plan, block, spatial, reduced)


def _extent(plan: s_tir.Schedule, loop: Any) -> int | None:
    extent = plan.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _work(plan: s_tir.Schedule, loops: list[Any]) -> int | None:
    total = 1
    for loop in loops:
        extent = _extent(plan, loop)
        if extent is None:
            return None
        total *= extent
    return total


def _schedule_pointwise(plan: s_tir.Schedule, loops: list[Any]) -> None:
    work = _work(plan, loops)
    if work is not None:
        # Constant sizes: one loop over everything, cut into vectors.
        fused = plan.fuse(*loops) if len(loops) > 1 else loops[0]
        outer, inner = plan.split(fused, [None, VECTOR]) if work % VECTOR == 0 and work > VECTOR else (fused, None)
        if work >= SERIAL_WORK:
            plan.parallel(outer)
        if inner is not None:
            plan.vectorize(inner)
        return
    if len(loops) == 1:
        return  # one axis of unknown size: LLVM makes vectors of a plain loop
    last = _extent(plan, loops[-1])
    # A batch of images is most often one; waking another thread for a small one costs more than the work.
    small_image = len(loops) == 4 and (_work(plan, loops[1:]) or SERIAL_WORK) < SERIAL_WORK
    outer = plan.fuse(*loops[:-1]) if len(loops) > 2 else loops[0]
    if not small_image:
        plan.parallel(outer)
    if last is not None and last % VECTOR == 0:
        plan.vectorize(plan.split(loops[-1], [None, VECTOR])[1])


def _schedule_reduction(plan: s_tir.Schedule, block: Any, spatial: list[Any], reduced: list[Any]) -> None:
    """Rows in parallel; if the innermost spatial axis is long, its vectors stay in registers over the whole reduction."""
    if not spatial:
        return
    columns = _extent(plan, spatial[-1])
    work = _work(plan, [*spatial, *reduced])
    vectors = next((v for v in (4, 2, 1) if columns is not None and columns % (v * VECTOR) == 0), 0)
    parallel = work is None or work >= SERIAL_WORK
    plan.reorder(*spatial, *reduced)
    if vectors and len(spatial) > 0:
        head, inner = plan.split(spatial[-1], [None, vectors * VECTOR])
        strips, lanes = plan.split(inner, [None, VECTOR])
        plan.reorder(*spatial[:-1], head, *reduced, strips, lanes)
        outer = plan.fuse(*spatial[:-1], head) if len(spatial) > 1 else head
        register = plan.cache_write(block, 0, "local")
        plan.reverse_compute_at(register, outer)
        plan.vectorize(plan.split(plan.get_loops(register)[-1], [None, VECTOR])[1])
        if parallel:  # before the sums are split from their start: afterwards the loop is no plain reduction any more
            plan.parallel(outer)
        start = plan.decompose_reduction(block, reduced[0])
        plan.vectorize(plan.get_loops(start)[-1])
        plan.vectorize(lanes)
        plan.unroll(strips)
    else:
        outer = plan.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        if parallel:
            plan.parallel(outer)


@tvm.transform.module_pass(opt_level=0, name="ScheduleRemaining")
class ScheduleRemaining:
    """Schedules every function of a module that is not scheduled yet."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        for variable, function in list(module.functions.items()):
            if isinstance(function, tirx.PrimFunc):
                module[variable] = schedule(function)
        return module

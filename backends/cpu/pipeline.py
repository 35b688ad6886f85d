"""From a Relax module to machine code for the CPU: one flat list of passes."""

from __future__ import annotations

import threading
from typing import Any

import tvm
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.schedule import ScheduleRemaining
from qcompile.backends.lowering.share_shapes import OrderShapes, ShareShapes
from tvm import relax
from tvm.relax import transform

COMPILE_LOCK = threading.Lock()  # TVM's compiler is not thread-safe: one compile at a time in a process


def passes(extra: list[Any] | None = None) -> list[Any]:
    """Return the passes, in order."""
    return [
        # Index expressions of unread results and of constants go before anything is built for them.
        transform.EliminateCommonSubexpr(),
        transform.DeadCodeElimination(),
        relax.backend.DispatchSortScan(),
        # A reshape stays an operator: the virtual machine makes a view of it, where a TIR function would copy.
        transform.LegalizeOps(skip_ops=["relax.reshape"]),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
        # After fusion: a schedule is made for whole fused functions.
        ScheduleRemaining(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        # Needs the explicit allocations that CallTIRRewrite makes.
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        # Both read what VMShapeLower makes.
        ShareShapes(),
        OrderShapes(),
        transform.AttachGlobalSymbol(),
    ]


def compile_module(module: tvm.IRModule, threads: int | None = None) -> Any:
    """Return the Relax VM executable of a module for the machine this runs on."""
    target = tvm.target.Target(isa.target_description(threads=threads))
    with COMPILE_LOCK, target:
        lowered = tvm.transform.Sequential(passes())(module)
        return tvm.relax.build(lowered, target, relax_pipeline=None)

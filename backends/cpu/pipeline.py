"""From a Relax module to machine code for the CPU: flat lists of passes."""

from __future__ import annotations

import logging
from typing import Any

import tvm
from qcompile.backends.cpu.host import host_functions
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.schedule import ScheduleRemaining
from qcompile.backends.cpu.team import CONNECT, connect, connector, set_threads
from qcompile.backends.lowering.arena import plan_arena
from qcompile.backends.lowering.sequence import NoSequence, read_sequence
from qcompile.backends.lowering.share_shapes import OrderShapes, ShareShapes
from qcompile.backends.lowering.translate import COMPILE_LOCK
from tvm import relax, tirx
from tvm.relax import transform

logger = logging.getLogger(__name__)


def kernel_passes() -> list[Any]:
    """Return the passes that turn operators into scheduled kernels, in order."""
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
    ]


def machine_passes() -> list[Any]:
    """Return the passes from kernels to the instructions of the Relax virtual machine, in order."""
    return [
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


def compile_module(module: tvm.IRModule, threads: int | None = None, *, virtual_machine: bool = False) -> Any:
    """Return the runtime module of a Relax module, for the machine this runs on.

    A function without branches becomes one host function (``host``): a call costs what its kernels cost. What needs more (sizes that
    depend on data, functions of the runtime), and everything if ``virtual_machine`` says so, becomes code of the Relax virtual machine.
    """
    target = tvm.target.Target(isa.target_description(threads=threads))
    with COMPILE_LOCK, target:
        lowered = tvm.transform.Sequential(kernel_passes())(module)
        if not virtual_machine:
            try:
                return tvm.tirx.build(_host_module(lowered), target)
            except NoSequence as reason:
                logger.info("the model runs in a virtual machine: %s", reason)
        lowered = tvm.transform.Sequential(machine_passes())(lowered)
        lowered[CONNECT] = connector()
        return tvm.relax.build(lowered, target, relax_pipeline=None)


def compile_kernel(kernel: tirx.PrimFunc, threads: int) -> Any:
    """Return one kernel as a function for the machine this runs on, without a model; the calling thread's team runs its loops."""
    name = str(kernel.attrs["global_symbol"])
    with COMPILE_LOCK:
        module = tvm.tirx.build(
            tvm.IRModule({name: kernel, CONNECT: connector()}), tvm.target.Target(isa.target_description(threads=threads))
        )
    connect(module)
    set_threads(threads)
    return module[name]


def _host_module(module: tvm.IRModule) -> tvm.IRModule:
    """Return the kernels that are called, under their own names, and the host functions."""
    sequence = read_sequence(module)
    called = {call.kernel for call in sequence.calls}
    kernels = {v.name_hint: f.with_attr("global_symbol", v.name_hint) for v, f in module.functions.items() if v.name_hint in called}
    return tvm.IRModule(kernels | {CONNECT: connector()} | host_functions(sequence, plan_arena(sequence)))

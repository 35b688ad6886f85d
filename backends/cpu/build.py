"""Build an executable for the CPU from a graph."""

from __future__ import annotations

from qcompile.backends.cpu import pipeline
from qcompile.backends.cpu.executable import Executable
from qcompile.backends.cpu.interface import Interface, Port
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.processor import machine
from qcompile.backends.cpu.legalize import LEGALIZE
from qcompile.backends.cpu.spool import keeper
from qcompile.backends.cpu.tiling import Tiling
from qcompile.backends.lowering.converters import fixed_point_refused, named_arguments
from qcompile.backends.lowering.shapes import dtype_name
from qcompile.backends.lowering.translate import COMPILE_LOCK, translate
from torch import fx

from qcompile.graph.code_operators import is_fixed_point
from qcompile.graph.file_tensor import forget_values


def build(
    graph_module: fx.GraphModule,
    *,
    threads: int | None = None,
    taps: tuple[str, ...] = (),
    kernels: bool = True,
    library: bytes | None = None,
    tiling: Tiling | None = None,
) -> Executable:
    """Compile a graph of ATen core and qc operators for the machine this runs on, or for the instruction set that ``QCOMPILE_CPU`` names.

    Args:
        graph_module: constants are ``get_attr`` nodes, every node carries ``meta["val"]``.
        threads: threads of one call; None takes every processor this process may use.
        taps: names of nodes whose values are returned after the outputs, see ``Executable.tapped``.
        kernels: False leaves the target's kernels out: the slow, plain lowering, to compare with.
        library: the code of an earlier build of this very graph and tiling, loaded instead of compiled; constants are packed again.
        tiling: the tiles of kernels, by default each kernel's own.

    Raises:
        Refused: naming the node and the operator that cannot be lowered; or ``QCOMPILE_CPU`` names a set that cannot run here.
    """
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and is_fixed_point(named_arguments(node)):
            raise fixed_point_refused(node)  # before a legalizer, which would read the scales
    with COMPILE_LOCK:  # building Relax runs TVM's passes too
        lowered = translate(
            graph_module, legalize=LEGALIZE if kernels else {}, taps=taps, tiling=tiling or Tiling(), keep=keeper(graph_module)
        )
    forget_values()  # the compiler needs room, and no weight
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    inputs = tuple(Port(node.name, dtype_name(node.meta["val"].dtype), _shape(node)) for node in placeholders)
    features = isa.required_features(isa.target_description())
    interface = Interface(
        inputs, tuple(lowered.outputs), len(taps), tuple(lowered.constants), tuple(lowered.fallbacks), machine(), features
    )  # fmt: skip
    if library is not None:
        return Executable.from_code(library, lowered.constants, interface, threads)
    return Executable(pipeline.compile_module(lowered.module, threads), lowered.constants, interface, threads)


def _shape(node: fx.Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)

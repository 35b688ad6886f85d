"""What a target is: the schemes it has kernels for, where quantizers are placed for it, and how it builds and runs a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qcompile.errors import Refused
from qcompile.formats import Integer, LayerScheme, Scheme
from qcompile.graph.graph import Graph
from qcompile.kernel_tiles import KernelTiles, Tuning

if TYPE_CHECKING:
    from qcompile.arena.from_graph import Kernels


@dataclass(frozen=True)
class Kernel:
    """One line of a target's support table: an operator and the schemes its kernel takes.

    Attributes:
        operator: the integer-stage operator, such as ``qc.linear``.
        weight_bits: bit widths of the weight, empty for operators without one.
        weight_granularity: names of granularities (``tensor``, ``channel``, ``group``) of the weight, ``none`` where it has no scale.
        activation: ``static``, ``dynamic`` or ``float``, or the name of a format without a scale (``bf16``).
        summary: one line for the docs' table.
        formats: families of the weight's format: ``int``, ``ternary``, ``nf``, ``codebook``, ``pvq``, ``bf16``.
    """

    operator: str
    weight_bits: tuple[int, ...]
    weight_granularity: tuple[str, ...]
    activation: str
    summary: str = ""
    formats: tuple[str, ...] = ("int", "ternary")


@dataclass(frozen=True)
class Limits:
    """What a machine can do at most with a number of threads, measured.

    Attributes:
        threads: that number.
        read_gb_per_s: 1e9 bytes read from memory in a second.
        float32_gflops: 1e9 float32 additions and multiplications in a second.
        int8_gops: the same of int8 products summed in int32, in vectors; None where there is no instruction for them.
        tile_gops: the same in tile registers; None where there are none.
    """

    threads: int
    read_gb_per_s: float
    float32_gflops: float
    int8_gops: float | None
    tile_gops: float | None = None

    @property
    def integer_gops(self) -> float | None:
        """The faster of the two ways to multiply int8."""
        return self.tile_gops or self.int8_gops


@dataclass(frozen=True)
class MemoryLimits:
    """What a model may take of a board, each in bytes or None for no limit.

    Attributes:
        board: whose memories are meant, by its name; empty for none.
        arena: for values, at one time.
        flash: for constants and code.
    """

    board: str = ""
    arena: int | None = None
    flash: int | None = None


@dataclass(frozen=True)
class OperatorTime:
    """What one kernel does in one call of a model.

    Attributes:
        kernel: its name.
        calls: how often it is called.
        milliseconds: of all of its calls together.
        operations: additions and multiplications of all calls; None where they are not counted.
        bytes: of its arguments and results, all calls.
        integer: it multiplies integers.
    """

    kernel: str
    calls: int
    milliseconds: float
    operations: int | None
    bytes: int
    integer: bool


def activation_kind(scheme: Scheme | None) -> str:
    """Return ``float``, ``static`` or ``dynamic``, or the name of a format without a scale."""
    if scheme is not None and not scheme.format.scaled:
        return str(scheme.format)
    return "float" if scheme is None else "dynamic" if scheme.dynamic else "static"


def scale_kind(scheme: Scheme) -> str:
    """Return the name of a weight's granularity, ``none`` where its format has no scale."""
    return str(scheme.granularity).split("=")[0] if scheme.format.scaled else "none"


def _holds(row: Kernel, weight: Scheme) -> bool:
    return weight.bits in row.weight_bits and weight.format.family in row.formats


def _words(row: Kernel) -> str:
    """Return what a message says of a kernel's formats; those of most kernels go without saying."""
    return "" if row.formats == Kernel.formats else f"{'/'.join(row.formats)} of "


class Executable(Protocol):
    """A built graph: call it with one tensor for each input, get one for each output."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...


class Target(ABC):
    """A place to run. Subclasses are declarations; building loads the compiler only when it is called.

    Attributes:
        name: the name on the command line.
        summary: one line for ``qcompile targets``.
        kernels: the support table.
        measures: kernel times can be measured on this machine.
        native: ``native_code`` builds code that an artifact can hold.
        tunes: ``tune`` finds tiles for kernels, see ``qcompile.kernel_tiles``.
        writes_folder: what comes out of a compile is a folder of source code, see ``write_folder``.
    """

    name: str
    summary: str
    kernels: tuple[Kernel, ...] = ()
    measures: bool = False
    native: bool = False
    tunes: bool = False
    writes_folder: bool = False

    def variant(self, name: str) -> Target:
        """Return the target for one of what it is made for, such as a processor.

        Raises:
            Refused: it has no variants, or none of this name.
        """
        raise Refused(f"target {self.name} has no variants", node=f"{self.name}:{name}", way_out=f"--target {self.name}")

    def with_limits(self, limits: MemoryLimits) -> Target:
        """Return the target as it refuses models that need more memory.

        Raises:
            Refused: its memory is not limited, or there is no such board.
        """
        raise Refused(f"target {self.name} has no limits of memory", way_out="leave out --board, --arena-limit and --flash-limit")

    def write_folder(self, graph: Graph, golden: Sequence[torch.Tensor], folder: Path, *, name: str = "model") -> dict[str, Any]:
        """Write a graph as a folder of source code; only where ``writes_folder``.

        Args:
            graph: is not changed.
            golden: one input for each of the graph's.
            folder: exists; files of other names in it stay as they are.
            name: what the code calls the model.

        Returns:
            What ``report.json`` in the folder says.

        Raises:
            Refused: an operator has no form there, or a limit is exceeded; then nothing is written.
        """
        raise NotImplementedError(f"{self.name} writes no folder")

    def supports(self, operator: str, scheme: LayerScheme) -> str | None:
        """Return None if there is a kernel for this operator and scheme, else the reason with the nearest scheme that runs."""
        if scheme.weight is None and scheme.activation is None:
            return None
        rows = [kernel for kernel in self.kernels if kernel.operator == operator]
        if not rows:
            return f"{self.name} has no low-bit kernel for {operator}"
        if scheme.activation and scheme.activation.format.scaled and not isinstance(scheme.activation.format, Integer):
            return f"{self.name} rounds activations to integers, not to {scheme.activation.format}"
        kind = activation_kind(scheme.activation)
        granularity = scale_kind(scheme.weight) if scheme.weight else ""
        fits = [
            row
            for row in rows
            if row.activation == kind and (scheme.weight is None or (_holds(row, scheme.weight) and granularity in row.weight_granularity))
        ]
        if fits:
            return None
        near = min(
            rows,
            key=lambda row: (
                scheme.weight is not None and scheme.weight.format.family not in row.formats,
                row.activation != kind,
                min(abs(b - (scheme.weight.bits if scheme.weight else 8)) for b in row.weight_bits or (8,)),
            ),
        )
        if not near.weight_bits:
            return f"{self.name} has no kernel for {operator} with {scheme}; the nearest that runs: {near.activation} activations"
        return (
            f"{self.name} has no kernel for {operator} with {scheme}; the nearest that runs: weights of "
            f"{_words(near)}{'/'.join(map(str, near.weight_bits))} bits by {'/'.join(near.weight_granularity)}, "
            f"{near.activation} activations"
        )

    def check(self, graph: Graph) -> None:
        """Raise Refused naming the first operator that this target cannot run in any scheme; asked before work on data starts."""
        return

    def memory(self) -> Kernels:
        """Return what this target's kernels need and allow in an arena, for passes that plan memory."""
        from qcompile.arena.from_graph import PLAIN

        return PLAIN

    @abstractmethod
    def build(self, graph: Graph, *, threads: int | None = None) -> Executable:
        """Lower an integer-stage (or float) graph and return it ready to run on this machine.

        Args:
            graph: is not changed.
            threads: worker threads, by default every physical core this process may use.
        """

    def store(self, graph: Graph, *, threads: int | None = None) -> Path | None:
        """Build a graph's code into the user's cache, where it is not there; return its folder, which ``registry.find_runtime`` can run.

        None is returned where the target has no such code, or it cannot be kept, or needs the graph's own process.
        """
        return None

    def native_code(self, graph: Graph) -> dict[str, bytes]:
        """Return the graph's code for this machine by file name, the same bytes each time; only where ``native``.

        What ``load_native`` can make again from the graph in a moment, such as packed constants, does not belong in it.

        Raises:
            Refused: it cannot be built here.
        """
        raise NotImplementedError(f"{self.name} has no native code")

    def native_key(self) -> dict[str, str]:
        """Return by name all that native code depends on beside the graph: processor, compiler, sources.

        Code whose key is not exactly this is never loaded.
        """
        return {}

    def load_native(self, graph: Graph, code: Mapping[str, bytes], *, threads: int | None = None, keep: bool = False) -> Executable:
        """Return what ``build`` would, from code that ``native_code`` returned for this graph and key. The caller trusts the code.

        Args:
            graph: is not changed.
            code: content by file name.
            threads: as for ``build``.
            keep: this user built the code, so it may go to the user's cache; code that is merely trusted must not.
        """
        raise NotImplementedError(f"{self.name} loads no native code")

    def export(self, graph: Graph) -> bytes:
        """Return the graph as a file of the target's own format.

        Raises:
            Refused: the target has none, or an operator has no form in it.
        """
        raise Refused(f"target {self.name} exports no file")

    def verify_folder(self, folder: Path, *, sanitize: bool = False) -> dict[str, Any]:
        """Build the example in a folder of source code that was compiled for this target and run its golden inputs, emulated.

        Args:
            folder: is not changed.
            sanitize: run on this machine instead, built so that undefined behaviour ends it.

        Returns:
            ``ok``, and what was measured; ``docs/cli.md`` has the names.

        Raises:
            Refused: the target writes no folders, this is none of them, or a tool is missing.
        """
        raise Refused(f"target {self.name} writes no folders of source code")

    def with_tiles(self, tiles: KernelTiles) -> Target:
        """Return the target as it builds with a table beside the user's own, whose entries go first. Without ``tunes``, it is the same."""
        return self

    def tune(
        self,
        graph: Graph,
        batches: Sequence[Sequence[torch.Tensor]],
        *,
        seconds: float,
        again: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Tuning:
        """Search for faster tiles for a graph's kernels and put them into the user's table; only where ``tunes``.

        Args:
            graph: is not changed.
            batches: inputs to measure at; a tile that is slower at one of them is not taken.
            seconds: after which no other tile is tried. A later search goes on from there.
            again: try also what earlier searches tried.
            progress: called with a line of text as work goes on.
        """
        raise Refused(f"target {self.name} has no kernels to tune")

    def measure(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> float:
        """Return the smallest microseconds of many calls of a graph; only where ``measures``."""
        raise NotImplementedError(f"{self.name} does not measure")

    def machine(self) -> str:
        """Return what kernel times depend on: processor and threads."""
        return self.name

    def limits(self, threads: int) -> Limits | None:
        """Measure what this machine can do at most; None where nothing is measured. Takes a second or two."""
        return None

    def leftovers(self, graph: Graph) -> list[tuple[str, str, str]]:
        """Return (node, operator, reason) of every operator that no kernel of this target runs in low bits."""
        return []

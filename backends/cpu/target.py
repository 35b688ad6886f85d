"""Declaration of the CPU target, and its cache of built code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.files import cache_folder, write_atomic
from qcompile.formats import Scheme
from qcompile.graph import Graph
from qcompile.graph.file_tensor import forget_values
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.kernel_tiles import KernelTiles, Tile, Tuning, read_tiles
from qcompile.target import Executable, Kernel, Limits, OperatorTime, Target

MEASURE_SECONDS = 0.1  # for each kernel; some hundred calls of a small one
TILES = "tiles.json"  # beside the library: the tiles by layer
_LOW_BITS = tuple(range(1, 9))
_LOOKED_UP = {
    "static": "bytes looked up in registers; in groups, when packed",
    "dynamic": "the same with a scale for each token",
    "float": "floats looked up in registers; in groups that 128 does not divide, when packed",
}


class CpuTarget(Target):
    """This machine's processor through TVM and LLVM, with kernels for each instruction set of ``kernels.isa``."""

    name = "cpu"
    summary = "this machine's processor, through TVM and LLVM (AVX2, AVX512, VNNI, AMX; NEON, dotprod, i8mm, SVE; portable)"
    measures = True
    native = True
    tunes = True
    kernels = (
        Kernel("qc.linear", _LOW_BITS, ("tensor", "channel", "group"), "static", "x int8 codes, int32 accumulators, fused epilogue"),
        Kernel("qc.linear", _LOW_BITS, ("tensor", "channel", "group"), "dynamic", "the same with a scale for each token"),
        Kernel("qc.linear", _LOW_BITS, ("tensor", "channel", "group"), "float", "weights dequantized in the kernel, float32 product"),
        *(
            Kernel("qc.linear", (1, 2, 3, 4), ("tensor", "channel", "group"), kind, _LOOKED_UP[kind], formats)
            for kind, formats in (("static", ("codebook",)), ("dynamic", ("codebook",)), ("float", ("nf", "codebook")))
        ),
        *(
            Kernel("qc.linear", (8,), ("tensor", "channel", "group"), kind, "points found by number when packed: int8 kernels", ("pvq",))
            for kind in ("static", "dynamic", "float")
        ),
        Kernel(
            "qc.linear",
            (16,),
            ("none",),
            "bf16",
            "products exact, sums float32, fused epilogue; tdpbf16ps, vdpbf16ps or widened",
            ("bf16",),
        ),
        Kernel("qc.linear", (16,), ("none",), "float", "weights widened in registers, float32 product", ("bf16",)),
        Kernel(
            "qc.conv2d",
            _LOW_BITS,
            ("tensor", "channel"),
            "static",
            "dense, 1x1, depthwise and grouped; weights widened to int8 when packed",
        ),
        Kernel("qc.embedding", (4, 8), ("channel", "tensor"), "float", "rows dequantized while they are gathered"),
        Kernel("qc.embedding", (8,), ("channel", "tensor"), "float", "points found by number when packed, rows as of int8", ("pvq",)),
        Kernel("qc.matmul", (), (), "static", "batched product of two computed values, int32 accumulators", ()),
        Kernel("qc.attention_codes", (), (), "static", "int8 queries, keys and values: scores, softmax and values in one kernel", ()),
        Kernel("qc.embedding", (16,), ("none",), "float", "rows widened while they are gathered", ("bf16",)),
    )

    def __init__(self, tiles: KernelTiles | None = None) -> None:
        self._shipped = tiles or KernelTiles()

    def check(self, graph: Graph) -> None:
        from qcompile.backends.cpu.legalize import LEGALIZE
        from qcompile.backends.lowering.converters import check

        check(graph.module, LEGALIZE)

    def build(self, graph: Graph, *, threads: int | None = None) -> Executable:
        from qcompile.backends.cpu.build import build
        from qcompile.backends.cpu.tiling import Tiling

        tiles = self._tiles(graph)
        place = _cache_place(graph, tiles)
        built = _load(place, threads)
        if built is None:
            built = build(graph.module, threads=threads, tiling=Tiling(tiles))
            _store(built, place)
        forget_values()
        return _Callable(built, graph)

    def store(self, graph: Graph, *, threads: int | None = None) -> Path | None:
        from qcompile.backends.cpu.build import build
        from qcompile.backends.cpu.interface import LIBRARY
        from qcompile.backends.cpu.program import PROGRAM
        from qcompile.backends.cpu.tiling import Tiling

        tiles = self._tiles(graph)
        place = _cache_place(graph, tiles)
        if not place.is_dir():
            _store(build(graph.module, threads=threads, tiling=Tiling(tiles)), place)
        # Code for a virtual machine lacks this function, and what runs it is the compiler's library.
        return place if place.is_dir() and PROGRAM.encode() in (place / LIBRARY).read_bytes() else None

    def native_code(self, graph: Graph) -> dict[str, bytes]:
        """Return the library and its tiles: packing the constants again is quick, storing them would double an artifact."""
        from qcompile.backends.cpu.build import build
        from qcompile.backends.cpu.interface import LIBRARY
        from qcompile.backends.cpu.tiling import Tiling

        tiles = self._tiles(graph)
        # Not what the cache holds: the bytes in an artifact must not depend on what was done before.
        built = build(graph.module, tiling=Tiling(tiles))
        code = built.code()
        _store(built, _cache_place(graph, tiles))
        return {LIBRARY: code, **({TILES: json.dumps(tiles, sort_keys=True).encode()} if tiles else {})}

    def native_key(self) -> dict[str, str]:
        from qcompile.backends.cpu.kernels import isa

        processor = f"{isa.detect()} {isa.target_description()}"
        return {"processor": processor, "tvm": version("apache-tvm"), "torch": version("torch"), "sources": _source_digest()}

    def load_native(self, graph: Graph, code: Mapping[str, bytes], *, threads: int | None = None, keep: bool = False) -> Executable:
        from qcompile.backends.cpu.build import build
        from qcompile.backends.cpu.interface import LIBRARY
        from qcompile.backends.cpu.tiling import Tiling

        # Constants are packed as the code reads them, whatever the tables say by now.
        tiles = json.loads(code[TILES]) if TILES in code else {}
        place = _cache_place(graph, tiles)
        built = _load(place, threads)  # the same code, its constants packed already
        if built is None:
            built = build(graph.module, threads=threads, library=code[LIBRARY], tiling=Tiling(tiles))
            if keep:
                _store(built, place)
        return _Callable(built, graph)

    def with_tiles(self, tiles: KernelTiles) -> CpuTarget:
        return CpuTarget(tiles) if tiles.machines else self

    def tune(
        self,
        graph: Graph,
        batches: Sequence[Sequence[torch.Tensor]],
        *,
        seconds: float,
        again: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Tuning:
        from qcompile.backends.cpu.tuning import Search

        machine, table = self.machine(), _own_table()
        known = {} if again else read_tiles(table).of(machine)
        found = Search(graph.module, batches, known, progress=progress).run(seconds)
        tuning = Tuning(machine, table, found.layers, found.default_ms, found.tuned_ms)
        write_atomic(table, read_tiles(table).updated(tuning.tiles()).to_json())
        return tuning

    def _tiles(self, graph: Graph) -> dict[str, Tile]:
        """Return the tiles that the tables have for layers of a graph on this machine; the user measured here, so that table goes first."""
        from qcompile.backends.cpu.tiling import layer_name

        known = self._shipped.updated(read_tiles(_own_table())).of(self.machine())
        names = {layer_name(node) for node in graph.nodes} if known else set()
        return {name: known[name].tile for name in sorted(names & known.keys()) if known[name].tile}

    def measure(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> float:
        from qcompile.backends.cpu.build import build

        run = build(graph.module)
        for _ in range(3):
            run(*inputs)
        times: list[float] = []
        stop = time.perf_counter() + MEASURE_SECONDS
        while len(times) < 9 or (time.perf_counter() < stop and len(times) < 500):
            start = time.perf_counter()
            run(*inputs)
            times.append(time.perf_counter() - start)
        # The smallest: other processes only add, and on a busy machine they add a thousandfold (measured: 7 ms where 40 us are usual).
        return 1e6 * min(times)

    def machine(self) -> str:
        from qcompile.backends.cpu.kernels import isa
        from qcompile.backends.cpu.kernels.processor import thread_count

        description = isa.target_description()
        return f"{description.get('mcpu', '')} {isa.detect()} {thread_count()} threads"

    def limits(self, threads: int) -> Limits:
        from qcompile.backends.cpu.limits import measure_limits

        return measure_limits(threads)

    def leftovers(self, graph: Graph) -> list[tuple[str, str, str]]:
        found = []
        for node in graph.nodes:
            name = operator_name(node.target) if node.op == "call_function" else ""
            layer = name in ("qc.linear", "qc.conv2d", "qc.embedding")
            if layer and (reason := self.supports(name, _layer_scheme(node))):
                found.append((node.name, name, reason))
        return found


def _layer_scheme(node: Any) -> Any:
    from qcompile.formats import LayerScheme, parse_scheme

    def parsed(text: str | None) -> Scheme | None:
        return parse_scheme(text) if text else None

    arguments = bound_arguments(node)
    return LayerScheme(parsed(arguments.get("weight_scheme") or arguments.get("scheme")), parsed(arguments.get("x_scheme")))


# Operator -> how the names of its kernels begin (``legalize.py`` names them), integer and float.
_KERNELS = {"linear": ("linear_",), "conv2d": ("convolution_", "depthwise_"), "embedding": ("embedding",)}
_REPEATS = 5


class _Callable:
    """An executable with the calling convention of ``qcompile.target.Executable``."""

    def __init__(self, built: Any, graph: Graph) -> None:
        self.built, self.graph = built, graph

    def layer_times(self, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
        """Return the median milliseconds of each layer's kernel by node name.

        Kernels are called in the graph's order, so the n-th call of a family belongs to the n-th node of it; layers that one product
        computes share its time by their columns. A family whose counts differ (a layer that became several kernels) is left out.
        """
        from qcompile.backends.cpu.joined_layers import joined

        runs = [self.built.kernel_calls(*inputs) for _ in range(_REPEATS)]
        found: dict[str, float] = {}
        for family, prefixes in _KERNELS.items():
            nodes = [
                n for n in self.graph.nodes if n.op == "call_function" and operator_name(n.target) in (f"qc.{family}", f"aten.{family}")
            ]
            layers = [group for node in nodes if (group := joined(node))[0] is node]
            spent = [[milliseconds for name, milliseconds in run if name.startswith(prefixes)] for run in runs]
            if all(len(times) == len(layers) for times in spent):
                for group, times in zip(layers, zip(*spent, strict=True), strict=True):
                    columns = [1] if len(group) == 1 else [node.meta["val"].shape[-1] for node in group]
                    for node, width in zip(group, columns, strict=True):
                        found[node.name] = round(statistics.median(times) * width / sum(columns), 5)
        return found

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.built(*inputs))

    def operator_times(self, inputs: Sequence[torch.Tensor]) -> list[OperatorTime]:
        """Return time and work of every kernel of one call, longest first."""
        from qcompile.backends.cpu.profile import profile

        return profile(self.built, inputs, _REPEATS)


def _own_table() -> Path:
    """Return the file of the tiles that this user measured."""
    return cache_folder() / "kernel_tiles.json"


def _cache_place(graph: Graph, tiles: Mapping[str, Tile]) -> Path:
    """Return where the code of this graph lies.

    The name holds everything that decides the code: graph, processor, compiler, this package's own source, and tiles.
    """
    key = "\n".join([graph.digest, *TARGET.native_key().values(), json.dumps(tiles, sort_keys=True)])
    return cache_folder() / "cpu" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _load(place: Path, threads: int | None) -> Any:
    """Return what ``_store`` left at a place, or None."""
    from qcompile.backends.cpu.executable import Executable as Built

    if place.is_dir():
        try:
            return Built.load(place, threads)
        except Exception:  # a damaged cache is no reason to fail: build again
            shutil.rmtree(place, ignore_errors=True)
    return None


@lru_cache(maxsize=1)
def _source_digest() -> str:
    digest = hashlib.sha256()
    root = Path(str(resources.files("qcompile.backends")))
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _store(built: Any, place: Path) -> None:
    """Save the built code whole or not at all; a machine without a C compiler to link with runs without this cache."""
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".build."))
    try:
        built.save(temporary / "code")
        os.replace(temporary / "code", place)
    except (OSError, Refused, RuntimeError):  # another process was first, or nothing can be written, or linked
        pass
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


TARGET = CpuTarget()

"""A model's C, compiled by this machine's own compiler and called: what ``qcompile run`` and ``evaluate`` use for an edge target."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from qcompile.backends.edge.boundary import CHANNELS_LAST, Port, in_memory
from qcompile.backends.edge.emit import write_files
from qcompile.backends.edge.lower import ALIGNMENT, Program, lower

from qcompile.errors import Refused
from qcompile.formats import dequantize, parse_scheme, quantize
from qcompile.graph import Graph

_FROM_CHANNELS_LAST = tuple(CHANNELS_LAST.index(axis) for axis in range(4))


class Hosted:
    """Calls a program's C with the calling convention of ``qcompile.target.Executable``."""

    def __init__(self, graph: Graph, *, dsp: bool) -> None:
        self._program = lower(graph, dsp=dsp)
        self._library = _compiled(self._program)
        room = np.zeros(max(self._program.arena_bytes, ALIGNMENT) + ALIGNMENT, np.uint8)
        first = -room.ctypes.data % ALIGNMENT
        self._arena = room[first : first + max(self._program.arena_bytes, ALIGNMENT)]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        codes = [_encoded(x, port) for x, port in zip(inputs, self._program.inputs, strict=True)]
        return [_decoded(y, port) for y, port in zip(self.run_codes(codes), self._program.outputs, strict=True)]

    def run_codes(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the output codes of input codes, in the order of the graph (NCHW)."""
        given = [in_memory(x).numpy() for x in inputs]
        made = [np.zeros(port.shape, port.dtype) for port in self._program.outputs]
        pointers = [(ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)) for arrays in (given, made)]
        self._library.model_run(*pointers, ctypes.c_void_p(self._arena.ctypes.data))
        return [torch.from_numpy(y.transpose(_FROM_CHANNELS_LAST) if y.ndim == 4 else y).contiguous() for y in made]


def _encoded(x: torch.Tensor, port: Port) -> torch.Tensor:
    if port.scale is None:
        return x
    return quantize(x, torch.tensor(port.scale), torch.tensor(port.zero_point, dtype=torch.int32), parse_scheme(port.scheme))


def _decoded(y: torch.Tensor, port: Port) -> torch.Tensor:
    if port.scale is None:
        return y
    return dequantize(y, torch.tensor(port.scale), torch.tensor(port.zero_point, dtype=torch.int32), parse_scheme(port.scheme))


def _compiled(program: Program) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Refused("code for an edge target runs here through this machine's C compiler, and there is none", way_out="install gcc")
    with tempfile.TemporaryDirectory(prefix="qcompile.") as folder:
        for name, data in write_files(program).items():
            (Path(folder) / name).write_bytes(data)
        library = Path(folder) / "model.so"
        sources = [str(Path(folder) / name) for name in ("model.c", "model_weights.c")]
        command = [compiler, "-std=c99", "-O2", "-shared", "-fPIC", "-o", str(library), *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(f"the C compiler failed: {done.stderr.strip().splitlines()[0][:200]}", node=compiler)
        return ctypes.CDLL(str(library))

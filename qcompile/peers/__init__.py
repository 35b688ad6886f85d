"""Other runtimes, set up on the float model that an artifact was compiled from, to be timed beside it.

One file for each package; a peer is quantized by its own tools, with the settings its makers advise for this processor.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import Refused
from qcompile.nearest import nearest_name

Run = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Peer:
    """A runtime and a way to quantize for it.

    Attributes:
        place: module under ``qcompile.peers``; it has ``prepare_<function>(graph, inputs, folder)``, which writes the model into the
            folder and returns its path, and ``load(path, threads)``, which returns a function of the inputs.
        function: see ``place``.
        summary: one line for the docs.
        file: the model can be loaded from its file by another process.
    """

    place: str
    function: str
    summary: str
    file: bool = True


PEERS = {
    "torch": Peer("pytorch", "eager", "PyTorch float32, eager", file=False),
    "torch-compile": Peer("pytorch", "compiled", "PyTorch float32, torch.compile; needs a C++ compiler", file=False),
    "onnxruntime": Peer("onnx_runtime", "float", "ONNX Runtime float32"),
    "onnxruntime-int8": Peer("onnx_runtime", "dynamic", "ONNX Runtime, quantize_dynamic: int8 weights, uint8 activations"),
    "onnxruntime-static-int8": Peer("onnx_runtime", "static", "ONNX Runtime, quantize_static: uint8 activations, int8 weights by channel"),
    "onnxruntime-int4": Peer("onnx_runtime", "int4", "ONNX Runtime MatMulNBits: int4 weights by 32, int8 arithmetic"),
    "openvino": Peer("openvino_runtime", "float", "OpenVINO, float32 asked for"),
    "openvino-int8": Peer("openvino_runtime", "nncf", "OpenVINO, int8 by NNCF post-training quantization"),
    "openvino-qdq": Peer("openvino_runtime", "qdq", "OpenVINO, int8 by ONNX Runtime's static QDQ"),
    "qcompile-float": Peer("float_build", "float", "this project's float path on the target cpu", file=False),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A runtime ready to be timed, and the file that another process can load it from."""

    run: Run
    path: Path | None


def make_peer(name: str, graph: Any, inputs: Sequence[Any], threads: int, folder: Path) -> Contender:
    """Set another runtime up on the float graph; its files go to the folder.

    Raises:
        Refused: an unknown name, or a package that is not installed.
    """
    if name not in PEERS:
        raise Refused(f"unknown runtime '{name}'", way_out=nearest_name(name, PEERS))
    peer = PEERS[name]
    try:
        module = importlib.import_module(f"qcompile.peers.{peer.place}")
        with contextlib.redirect_stdout(sys.stderr):  # some show their progress on standard output
            prepared = getattr(module, f"prepare_{peer.function}")(graph, inputs, folder)
        return Contender(module.load(prepared, threads), prepared if peer.file else None)
    except ImportError as error:
        raise Refused(f"{name} is not installed ({error.name})", way_out="pip install qcompile[bench]") from error


def load_peer(name: str, path: Path, threads: int) -> Run:
    """Return a function that runs a model that ``make_peer`` wrote, or for ``qcompile`` an artifact."""
    if name == "qcompile":
        from qcompile.artifact import load

        return load(path, threads=threads).executable
    return importlib.import_module(f"qcompile.peers.{PEERS[name].place}").load(path, threads)

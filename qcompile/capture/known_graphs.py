"""Captured graphs of Hugging Face folders, kept in the cache folder: tracing a model takes longer than many compiles of it.

An entry is found by what decides the graph: ``config.json``, name, shape and dtype of every tensor in the files, the versions of torch and
transformers, and the source of capture. It refers to weights by their names in the files, so values decide nothing, and holds what is in
no file. One that is damaged counts as none.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from qcompile.errors import Refused
from qcompile.files import atomic_file, cache_folder
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.file_tensor import FileTensor
from qcompile.graph.graph import set_digest
from qcompile.graph.text import DIGEST_LENGTH
from qcompile.safetensors_file import Content, open_path

_FOLDER = "graphs"
_TEXT, _SUM, _EXAMPLE = "text", "sum", "example."
Examples = tuple[torch.Tensor, ...]


def known_graph(folder: Path, weights: Mapping[str, FileTensor]) -> tuple[Graph, Examples] | None:
    """Return graph and example inputs of an earlier capture of such a folder, with the weights of this one; None where there is none."""
    path = _path(folder, weights)
    if not path.is_file():
        return None
    try:
        held = {name: tensor.read() for name, tensor in open_path(path).items()}
        text, checksum = (held.pop(name).numpy().tobytes() for name in (_TEXT, _SUM))
        examples = tuple(held.pop(f"{_EXAMPLE}{i}") for i in range(sum(name.startswith(_EXAMPLE) for name in held)))
        if hashlib.sha256(text + "".join(map(tensor_digest, examples)).encode()).digest() != checksum:
            return None
        entry = json.loads(text)
        stand_ins = {name: _stand_in(name, weights[name]) for name in entry["weights"].values()}
        graph = parse_graph(entry["graph"], held | {tensor_digest(t)[:DIGEST_LENGTH]: t for t in stand_ins.values()})
        for node in graph.nodes:
            if node.name in entry["sources"]:
                node.meta["source"] = entry["sources"][node.name]
            if node.op == "get_attr" and str(node.target) in entry["weights"]:
                graph.set_constant(node, weights[entry["weights"][str(node.target)]])
        return graph, examples
    except (Refused, KeyError, ValueError, TypeError, AttributeError):
        return None


def remember_graph(folder: Path, weights: Mapping[str, FileTensor], graph: Graph, examples: Examples) -> None:
    """Keep a captured graph; where the cache folder cannot be written, nothing is kept."""
    names = {id(tensor): name for name, tensor in weights.items()}
    used = {name: names[id(value)] for name, value in graph.constants.items() if id(value) in names}
    without = graph.copy()
    for node in without.nodes:
        if node.op == "get_attr" and str(node.target) in used:
            name = used[str(node.target)]
            without.set_constant(node, _stand_in(name, weights[name]))
    sources = {node.name: node.meta["source"] for node in graph.nodes if node.meta.get("source")}
    text = json.dumps({"graph": print_graph(without), "weights": used, "sources": sources}).encode()
    checksum = hashlib.sha256(text + "".join(map(tensor_digest, examples)).encode()).digest()
    tensors = {tensor_digest(t)[:DIGEST_LENGTH]: t for name, t in graph.constants.items() if name not in used}
    tensors |= {f"{_EXAMPLE}{i}": example for i, example in enumerate(examples)}
    tensors |= {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in ((_TEXT, text), (_SUM, checksum))}
    try:
        path = _path(folder, weights)
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path, flush=False) as file:
            for part in Content(tensors).parts():
                file.write(part)
    except (OSError, Refused):
        return


def _stand_in(name: str, weight: FileTensor) -> FileTensor:
    """Return a tensor whose digest says the weight's name in the files instead of its values."""
    made = FileTensor(weight.file, weight.offset, weight.stored, tuple(weight.shape), weight.dtype)
    set_digest(made, hashlib.sha256(f"weight {name}".encode()).hexdigest())
    return made


def _path(folder: Path, weights: Mapping[str, FileTensor]) -> Path:
    kinds = sorted((name, str(tensor.stored), list(tensor.shape)) for name, tensor in weights.items())
    parts = [(folder / "config.json").read_bytes(), json.dumps(kinds).encode(), _versions().encode()]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return cache_folder() / _FOLDER / f"{key}.safetensors"


@functools.cache
def _versions() -> str:
    """Return what else decides a captured graph: versions of packages, and the source of capture and of the graph."""
    found = []
    for package in ("torch", "transformers"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("none")
    root = Path(__file__).parents[1]
    files = sorted([*root.glob("capture/*.py"), *root.glob("graph/*.py")])
    return "\n".join([*found, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)])

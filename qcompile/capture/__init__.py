"""Capture: whatever a user calls a model becomes a float graph with example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qcompile.capture.examples import make_examples
from qcompile.capture.torch_export import DynamicShapes, capture_module, capture_program, without_torch_notices
from qcompile.errors import Refused
from qcompile.graph import Graph

Examples = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph: its float graph (or an integer one, if the model was quantized already).
        example_inputs: one batch, in graph order.
        folder: where its tokenizer lies, if it has one.
        end_tokens: tokens that end a text, for a language model that names them.
        tokenizer: content of a ``tokenizer.json``, where there is one.
        config: the Hugging Face configuration, where there is one.
    """

    graph: Graph
    example_inputs: tuple[torch.Tensor, ...]
    folder: Path | None = None
    end_tokens: tuple[int, ...] = ()
    tokenizer: bytes | None = None
    config: dict[str, Any] | None = None

    @property
    def brings_codes(self) -> bool:
        """Whether weights have codes already, which the recipe ``stored`` keeps."""
        return any("codes" in node.meta.get("notes", {}) for node in self.graph.nodes)


def capture(model: Any, example_inputs: Examples | None = None, dynamic_shapes: DynamicShapes | None = None) -> Captured:
    """Return the graph of a model.

    Args:
        model: a module, an exported program, a Graph, a model captured before, an ONNX ModelProto, or the path of an ``.onnx`` file, a
            ``.pt2`` file, a ``.gguf`` file, a Hugging Face folder (its weights may be quantized by GPTQ, AWQ or compressed-tensors), or
            ``python:FILE_OR_MODULE:FUNCTION`` where the function returns (module, example inputs) or (module, example inputs, dynamic
            shapes).
        example_inputs: one batch; needed for a module, else made from the input types.
        dynamic_shapes: see ``capture_module``.

    Raises:
        Refused: naming the file, operator, node and source line.
    """
    if isinstance(model, Captured):
        return replace(model, graph=model.graph.copy())
    if isinstance(model, Graph):
        graph = model.copy()
    elif isinstance(model, torch.nn.Module):
        return _capture_module(model, example_inputs, dynamic_shapes)
    elif isinstance(model, torch.export.ExportedProgram):
        graph = capture_program(model, dynamic_shapes)
        example_inputs = example_inputs if example_inputs is not None else _program_examples(model)
    elif isinstance(model, (str, os.PathLike)):
        return _capture_path(str(model), example_inputs, dynamic_shapes)
    elif type(model).__module__.startswith("onnx") or isinstance(model, bytes):
        graph = _capture_onnx(model)
    else:
        raise Refused(
            f"a {type(model).__name__} is no model that can be compiled",
            way_out="give a torch module, an exported program, an ONNX model or a path",
        )
    return Captured(graph, _ordered(graph, example_inputs) or make_examples(graph))


def _capture_module(module: torch.nn.Module, examples: Examples | None, shapes: DynamicShapes | None) -> Captured:
    if examples is None:
        raise Refused("a module is traced with example inputs, none were given", node=type(module).__name__)
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    graph = capture_module(module, examples, shapes)
    return Captured(graph, _ordered(graph, examples))


def _capture_path(path: str, examples: Examples | None, shapes: DynamicShapes | None) -> Captured:
    if path.startswith("python:"):
        return _capture_python(path, examples, shapes)
    place = Path(path)
    if not place.exists():
        raise Refused("there is no such file or folder", node=path)
    if place.is_dir():
        return _capture_folder(place, examples)
    if place.suffix == ".gguf":
        return _capture_gguf(place, examples)
    if place.suffix == ".onnx":
        graph = _capture_onnx(place)
        tokenizer = place.parent / "tokenizer.json"
        found = (place.parent, (), tokenizer.read_bytes()) if tokenizer.is_file() else (None, (), None)
        return Captured(graph, _ordered(graph, examples) or make_examples(graph), *found)
    if place.suffix == ".pt2":
        return capture(_load_program(place), examples, shapes)
    raise Refused(
        "the kind of model is not known",
        node=path,
        way_out="give an .onnx file, a .pt2 file, a .gguf file, a Hugging Face folder, or python:FILE_OR_MODULE:FUNCTION",
    )


def _capture_folder(place: Path, examples: Examples | None) -> Captured:
    from qcompile.capture.huggingface import capture_folder, end_tokens, read_config
    from qcompile.interchange import capture_checkpoint, is_quantized_folder, read_folder

    if is_quantized_folder(place):
        checkpoint = read_folder(place)
        graph, made = capture_checkpoint(checkpoint, str(place))
        return Captured(graph, _ordered(graph, examples) or made, place, checkpoint.end_tokens, checkpoint.tokenizer, checkpoint.config)
    graph, made = capture_folder(place)
    tokenizer = place / "tokenizer.json"
    text = tokenizer.read_bytes() if tokenizer.is_file() else None
    return Captured(graph, _ordered(graph, examples) or made, place, end_tokens(place), text, read_config(place))


def _capture_gguf(place: Path, examples: Examples | None) -> Captured:
    from qcompile.interchange import capture_checkpoint
    from qcompile.interchange.gguf import read_gguf

    checkpoint = read_gguf(place)
    graph, made = capture_checkpoint(checkpoint, str(place))
    inputs = _ordered(graph, examples) or made
    return Captured(graph, inputs, None, checkpoint.end_tokens, checkpoint.tokenizer, checkpoint.config)


def _capture_onnx(model: Any) -> Graph:
    from qcompile.capture.onnx import capture_onnx

    return capture_onnx(model)


def _load_program(path: Path) -> torch.export.ExportedProgram:
    try:
        with without_torch_notices():
            return torch.export.load(path)
    except Exception as error:
        raise Refused(f"no exported program, or a damaged one: {' '.join(str(error).split())[:200]}", node=str(path)) from error


def _program_examples(program: torch.export.ExportedProgram) -> Examples | None:
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    return tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _capture_python(text: str, examples: Examples | None, shapes: DynamicShapes | None) -> Captured:
    """Import the file or module and call the function; this runs the user's own code."""
    parts = text.removeprefix("python:").rsplit(":", 1)
    if len(parts) != 2 or not all(parts):
        raise Refused("write python:FILE_OR_MODULE:FUNCTION", node=text)
    place, name = parts
    module = _import(place, text)
    function = getattr(module, name, None)
    if not callable(function):
        raise Refused(f"there is no function {name}", node=place)
    try:
        result = function()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{name}() failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", node=place) from error
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise Refused(f"{name}() must return (module, example inputs) or (module, example inputs, dynamic shapes)", node=place)
    model, made = result[:2]
    return capture(model, examples if examples is not None else made, shapes or (result[2] if len(result) == 3 else None))


def _import(place: str, text: str) -> Any:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise Refused(f"the module cannot be imported: {error}", node=text) from error
    path = Path(place)
    if not path.is_file():
        raise Refused("there is no such file", node=place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent))  # a model file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Refused(f"the file cannot be imported: {type(error).__name__}: {error}", node=place) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _ordered(graph: Graph, examples: Examples | None) -> tuple[torch.Tensor, ...]:
    """Return example inputs in graph order; empty where there are none.

    Raises:
        Refused: they do not fit the graph's inputs.
    """
    if examples is None:
        return ()
    from qcompile.runtime import check_inputs

    if isinstance(examples, Mapping):
        return tuple(check_inputs(graph, (), examples)[0])
    return tuple(check_inputs(graph, tuple(examples), {})[0])

"""Write an artifact as a checkpoint of another tool, and hold what was written to the artifact's outputs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from qcompile.artifact import Artifact
from qcompile.capture.huggingface import described_model
from qcompile.errors import Refused
from qcompile.files import write_atomic
from qcompile.formats import Scheme
from qcompile.interchange import compressed_tensors, gguf
from qcompile.interchange.checkpoint import Checkpoint, StoredWeight
from qcompile.interchange.collect import check_agrees, collect_checkpoint
from qcompile.interchange.folder import read_folder

_WEIGHTS = "model.safetensors"


@dataclass
class Exported:
    """What was written.

    Attributes:
        bytes: of all files.
        codes: weights that kept their codes.
        floats: name -> why a weight with codes was written as the floats that they mean.
        notes: other lines for the user.
    """

    bytes: int
    codes: int
    floats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export_compressed_tensors(artifact: Artifact, output: Path, place: str) -> Exported:
    """Write a folder of the format ``pack-quantized`` of compressed-tensors, which transformers and vLLM load.

    A weight that the format cannot hold is written as float32, its values exactly those of its codes.

    Raises:
        Refused: the artifact is no Hugging Face model any more, none of its weights has a form in the format, or the folder exists and
            holds something.
    """
    checkpoint = collect_checkpoint(artifact, place)
    described = described_model(checkpoint.config, place)
    _untie(checkpoint, described.tied)
    done = Exported(0, 0)
    tensors: dict[str, torch.Tensor] = {}
    schemes: dict[str, Scheme] = {}
    for name, weight in checkpoint.weights.items():
        layer = name.removesuffix(".weight")
        if not isinstance(weight, StoredWeight):
            tensors[name] = weight
        elif reason := compressed_tensors.why_not(weight) if name in described.linear else "transformers reads codes of linear layers only":
            tensors[name], done.floats[name] = weight.dequantize(), reason
        else:
            tensors |= compressed_tensors.write_weight(layer, weight)
            schemes[layer] = weight.quantized.scheme
    done.codes = len(schemes)
    _require_codes(done, place)
    ignored = [name.removesuffix(".weight") for name in tensors if name in described.linear]
    settings = compressed_tensors.settings_of(schemes, ignored)
    config = {**checkpoint.config, "dtype": "float32", "quantization_config": settings}
    config.pop("torch_dtype", None)
    files = {"config.json": _json(config), _WEIGHTS: safetensors.torch.save(_own(tensors), {"format": "pt"})}
    if checkpoint.end_tokens:
        files["generation_config.json"] = _json({"eos_token_id": list(checkpoint.end_tokens)})
    if checkpoint.tokenizer:
        files |= {"tokenizer.json": checkpoint.tokenizer, "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast"})}
    done.bytes = sum(map(len, files.values()))
    _write_folder(output, files, lambda folder: check_agrees(artifact, lambda: read_folder(folder), place))
    return done


def export_gguf(artifact: Artifact, output: Path, place: str) -> Exported:
    """Write a GGUF file that llama.cpp runs: Q4_0, Q8_0 and TQ2_0 hold codes, see ``gguf.write_checkpoint``.

    Raises:
        Refused: the artifact is none of the models that are written, or none of its weights has a block type.
    """
    written = gguf.write_checkpoint(collect_checkpoint(artifact, place), place)
    done = Exported(len(written.data), written.codes, written.floats, written.notes)
    _require_codes(done, place)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.gguf"
        copy.write_bytes(written.data)
        check_agrees(artifact, lambda: gguf.read_gguf(copy), place)
    write_atomic(output, written.data)
    return done


def _untie(checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Make a table of codes and the head that shares it two weights: loaders tie floats only."""
    for name, source in tied.items():
        if name not in checkpoint.weights and isinstance(checkpoint.weights[source], StoredWeight):
            checkpoint.weights = {**checkpoint.weights, name: checkpoint.weights[source]}
            checkpoint.config["tie_word_embeddings"] = False


def _require_codes(done: Exported, place: str) -> None:
    if not done.codes:
        reason = next(iter(done.floats.values()), "the artifact has no weights in low bits")
        raise Refused(f"no weight has a form in this format: {reason}", node=place)


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that share no memory, as the file format wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write_folder(output: Path, files: dict[str, bytes], check: Callable[[Path], None]) -> None:
    """Write files to a folder beside the output, check them there, then give it the output's name."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Refused("it exists and is no empty folder", node=str(output), way_out="choose another name with -o")
    try:
        work = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"))
    except OSError as error:
        raise Refused(f"cannot write here: {error.strerror}", node=str(output.parent)) from error
    try:
        for name, data in files.items():
            (work / name).write_bytes(data)
        check(work)
        work.chmod(0o755)
        work.replace(output)
    except OSError as error:
        raise Refused(f"cannot be written: {error.strerror}", node=str(output)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)

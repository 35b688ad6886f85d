"""Hugging Face folders whose weights are quantized: which format, and what it says, as a ``Checkpoint``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.capture.huggingface import end_tokens, read_config, read_object
from qcompile.errors import Refused
from qcompile.interchange import awq, compressed_tensors, gptq
from qcompile.interchange.checkpoint import Checkpoint, StoredWeight
from qcompile.interchange.tensors import Tensors

# Reads the weights of a folder by what its configuration says of quantization.
Reader = Callable[[Tensors, Mapping[str, Any]], dict[str, StoredWeight]]

_READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {  # and the endings of the tensors that such a weight is stored in
    "gptq": (gptq.read_weights, gptq.ENDINGS),
    "awq": (awq.read_weights, awq.ENDINGS),
    "compressed-tensors": (compressed_tensors.read_weights, compressed_tensors.ENDINGS),
}


def is_quantized_folder(folder: Path) -> bool:
    """Return whether a folder's configuration says that its weights are quantized."""
    return bool(_settings(folder, read_config(folder)))


def read_folder(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder of GPTQ, AWQ or compressed-tensors.

    Raises:
        Refused: the format or an option of it is not known, or a file or tensor is missing or damaged; the message names it.
    """
    config = read_config(folder)
    settings = _settings(folder, config)
    method = str(settings.get("quant_method"))
    if method not in _READERS:
        raise Refused(f"weights quantized by '{method}' are not read", node=str(folder), way_out=f"known are {', '.join(_READERS)}")
    read, endings = _READERS[method]
    tensors = Tensors(folder)
    stored = read(tensors, settings)
    if not stored:
        raise Refused(f"the folder holds no weight of {method}", node=str(folder))
    weights: dict[str, torch.Tensor | StoredWeight] = {}
    for name in tensors:
        if name.endswith(endings) and f"{name.rpartition('.')[0]}.weight" in stored:
            continue
        weights[name] = tensors.read(name)
        if weights[name].is_floating_point():  # type: ignore[union-attr]
            weights[name] = weights[name].to(torch.float32)  # type: ignore[union-attr]
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    tokenizer = folder / "tokenizer.json"
    return Checkpoint(plain, weights | stored, tokenizer.read_bytes() if tokenizer.is_file() else None, end_tokens(folder))


def _settings(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the folder says of quantization: in its configuration, or in the file of older GPTQ folders; empty where nothing."""
    found = config.get("quantization_config") or config.get("compression_config")
    older = folder / "quantize_config.json"
    if found is None and older.is_file():
        found = {"quant_method": "gptq", **read_object(older)}
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Refused("quantization_config is no object", node=str(folder / "config.json"))
    return found

"""Capture of Hugging Face folders: encoders, classifiers and, as one function of the tokens, decoders.

Only local files are read and no code from the folder is run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused
from qcompile.graph import Graph

EXAMPLE_TOKENS = 16


class _TokenModel(torch.nn.Module):
    """Gives the model's first tensor, logits or last hidden state, as a function of tokens and mask."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]


class _TokenModelWithTypes(_TokenModel):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[self.output]


class _Decoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class _ImageModel(torch.nn.Module):
    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values)[self.output]


def capture_folder(folder: Path) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    """Return graph and example inputs of the model in a Hugging Face folder.

    Raises:
        Refused: no configuration, an unknown architecture, missing or damaged weights.
    """
    config = read_config(folder)
    model, output = _load(folder, config)
    return _capture(model, output, config)


def capture_weights(config: dict[str, Any], weights: dict[str, torch.Tensor], place: str) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    """Return graph and example inputs of the model that a configuration describes, with these weights.

    Args:
        config: as ``config.json`` holds it, without ``quantization_config``.
        weights: float32, by the model's own names.
        place: file or folder, for messages.

    Raises:
        Refused: an unknown architecture, or weights that are missing or of another shape.
    """
    transformers = _transformers()
    kind = _architecture(transformers, config, place)
    name = kind.__name__
    blocks = config.get("num_hidden_layers", 0)
    if not isinstance(blocks, int) or blocks > len(weights):
        raise Refused(f"{len(weights)} weights are no model of {blocks} blocks", node=place)
    shapes = described_model(config, place).shapes
    weights = {weight: value for weight, value in weights.items() if weight in shapes or not _says_nothing(weight, value)}
    for weight, value in weights.items():
        if tuple(value.shape) != shapes.get(weight, tuple(value.shape)):
            raise Refused(f"the weight is {list(value.shape)}, the configuration says {list(shapes[weight])}", node=f"{place} {weight}")
    with _quietly(transformers, place):
        described = transformers.AutoConfig.for_model(**config)
        model, found = kind.from_pretrained(
            None, config=described, state_dict=weights, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise Refused(f"{len(missing)} weights of {name} are missing", node=f"{place} {missing[0]}")
    if unexpected := sorted(found["unexpected_keys"]):
        raise Refused(f"{name} has no such weight", node=f"{place} {unexpected[0]}")
    return _capture(model.eval(), "logits" if _is_decoder(config) else "last_hidden_state", config)


@dataclass(frozen=True)
class Described:
    """What a configuration says of a model's parameters.

    Attributes:
        shapes: by name.
        tied: names of parameters that are stored under another name, and that name.
        linear: the weights of linear layers.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    linear: frozenset[str]


def described_model(config: dict[str, Any], place: str) -> Described:
    """Return the parameters of the model that a configuration describes; nothing is allocated.

    Raises:
        Refused: transformers is missing, or does not know the architecture.
    """
    transformers = _transformers()
    kind = _architecture(transformers, config, place)
    with _quietly(transformers, place), torch.device("meta"):
        model = kind(transformers.AutoConfig.for_model(**config))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    linear = frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return Described({name: tuple(value.shape) for name, value in model.state_dict().items()}, dict(tied), linear)


def _architecture(transformers: Any, config: dict[str, Any], place: str) -> Any:
    name = (config.get("architectures") or [""])[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise Refused(f"transformers has no architecture '{name}'", node=place)
    return kind


def _says_nothing(name: str, value: torch.Tensor) -> bool:
    """Return whether a tensor that the model has no place for may be left out: older tools store angles, and biases of zero."""
    return name.endswith(".rotary_emb.inv_freq") or (name.endswith(".bias") and not bool(value.any()))


def _capture(model: torch.nn.Module, output: str, config: dict[str, Any]) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    if config.get("image_size") and "vocab_size" not in config:
        side = config["image_size"]
        pixels = torch.randn(1, config.get("num_channels", 3), side, side, generator=torch.Generator().manual_seed(0))
        return capture_module(_ImageModel(model, output), (pixels,), [{0: "batch"}]), (pixels,)
    tokens = torch.randint(0, min(1000, config.get("vocab_size", 1000)), (1, EXAMPLE_TOKENS), generator=torch.Generator().manual_seed(0))
    if output == "logits" and _is_decoder(config):
        graph = capture_module(_Decoder(model), (tokens,), [{0: "batch", 1: "seq"}])
        low, high = graph.symbols.ranges["seq"]
        longest = getattr(model.config, "max_position_embeddings", None) or high
        graph.symbols.ranges["seq"] = (low, min(high, longest))
        return graph, (tokens,)
    examples: tuple[torch.Tensor, ...] = (tokens, torch.ones_like(tokens))
    kind = _TokenModel
    if output == "logits" and config.get("type_vocab_size", 0) > 1:  # sentence pairs
        kind, examples = _TokenModelWithTypes, (*examples, torch.zeros_like(tokens))
    return capture_module(kind(model, output), examples, [{0: "batch", 1: "seq"}] * len(examples)), examples


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a text, by ``generation_config.json``, else by ``config.json``; none where neither names any."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_object(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(int(token) for token in (found if isinstance(found, list) else [found]))
    return ()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's configuration.

    Raises:
        Refused: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise Refused("the folder holds no config.json", node=str(folder), way_out="give a Hugging Face model folder")
    config = read_object(path)
    if "model_type" not in config:
        raise Refused("the configuration names no model_type", node=str(path))
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises Refused for anything else."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise Refused(f"the file is no JSON: {error}", node=str(path)) from error
    if not isinstance(read, dict):
        raise Refused("the file holds no JSON object", node=str(path))
    return read


def _is_decoder(config: dict[str, Any]) -> bool:
    return any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or [])


def _load(folder: Path, config: dict[str, Any]) -> tuple[torch.nn.Module, str]:
    transformers = _transformers()
    architecture = (config.get("architectures") or [""])[0]
    kind, output = transformers.AutoModel, "last_hidden_state"
    if architecture.endswith("ForSequenceClassification"):
        kind, output = transformers.AutoModelForSequenceClassification, "logits"
    elif architecture.endswith("ForImageClassification"):
        kind, output = transformers.AutoModelForImageClassification, "logits"
    elif _is_decoder(config):
        kind, output = transformers.AutoModelForCausalLM, "logits"
    with _quietly(transformers, str(folder)):
        model = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
        )
    return model.eval(), output


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Refused("reading Hugging Face folders needs transformers", way_out="pip install qcompile[hf]") from error
    return transformers


@contextlib.contextmanager
def _quietly(transformers: Any, place: str) -> Iterator[None]:
    """Load without progress bars and notices; what fails is refused in one line."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise Refused(f"the model cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}", node=place) from error
    finally:
        transformers.logging.set_verbosity(verbosity)

"""Capture of Hugging Face folders: encoders, classifiers and, as one function of the tokens, decoders.

Only local files are read and no code from the folder is run.

Weights in safetensors files are not loaded. The model is built with parameters whose memory nothing ever writes to, so they take none; it
is traced, and then each constant of the graph that is a parameter becomes the tensor of that name in the files (``FileTensor``).
Buffers that no file holds, such as frequencies of rotary positions, have the values that the model's own code gave them. Weights that
transformers would put together from several tensors, that are quantized, or in other files, are loaded whole, by transformers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.capture.known_graphs import known_graph, remember_graph
from qcompile.capture.torch_export import capture_module
from qcompile.capture.weight_files import open_weights
from qcompile.errors import Refused
from qcompile.graph import Graph, tensor_digest
from qcompile.graph.file_tensor import FileTensor

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
    files = None if "quantization_config" in config else open_weights(folder)
    if files and (known := known_graph(folder, files)):
        return known
    model, output, weights = _load(folder, config, files)
    graph, examples = _capture(model, output, config)
    _place(graph, weights, folder)
    if files and weights.places:
        remember_graph(folder, files, graph, examples)
    return graph, examples


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
        model, found = _with_attention(
            kind.from_pretrained, None, config=described, state_dict=weights, dtype=torch.float32, output_loading_info=True
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
    module, examples, shapes = _wrapped(config, model, output)
    graph = capture_module(module, examples, shapes)
    if isinstance(module, _Decoder):
        low, high = graph.symbols.ranges["seq"]
        longest = getattr(model.config, "max_position_embeddings", None) or high
        graph.symbols.ranges["seq"] = (low, min(high, longest))
    return graph, examples


def _wrapped(config: dict[str, Any], model: Any, output: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return the function to trace, with example inputs and the names of their dynamic axes."""
    if config.get("image_size") and "vocab_size" not in config:
        side = config["image_size"]
        pixels = torch.randn(1, config.get("num_channels", 3), side, side, generator=torch.Generator().manual_seed(0))
        return _ImageModel(model, output), (pixels,), [{0: "batch"}]
    tokens = torch.randint(0, min(1000, config.get("vocab_size", 1000)), (1, EXAMPLE_TOKENS), generator=torch.Generator().manual_seed(0))
    axes = {0: "batch", 1: "seq"}
    if output == "logits" and _is_decoder(config):
        return _Decoder(model), (tokens,), [axes]
    if output == "logits" and config.get("type_vocab_size", 0) > 1:  # sentence pairs
        return _TokenModelWithTypes(model, output), (tokens, torch.ones_like(tokens), torch.zeros_like(tokens)), [axes] * 3
    return _TokenModel(model, output), (tokens, torch.ones_like(tokens)), [axes] * 2


def _place(graph: Graph, weights: _Weights, folder: Path) -> None:
    """Make each constant that is a weight the tensor in its file.

    Raises:
        Refused: the files do not hold it.
    """
    for node in graph.nodes:
        name = str(node.target).removeprefix("model.")  # the model is the member of this name of what was traced
        if node.op != "get_attr":
            continue
        if name in weights.missing:
            raise Refused("the files of the model do not hold this weight", node=name, way_out=f"complete {folder}")
        if name in weights.places:
            graph.set_constant(node, weights.places[name])


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


@dataclass(frozen=True)
class _Weights:
    """Where the weights of a model lie.

    Attributes:
        places: tensors in files, by the model's names; a name that is in neither has its value in the model.
        missing: names that no file holds.
    """

    places: Mapping[str, FileTensor]
    missing: frozenset[str]


def _load(folder: Path, config: dict[str, Any], files: Mapping[str, FileTensor] | None) -> tuple[torch.nn.Module, str, _Weights]:
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
        model: Any = _build_empty(kind, folder) if files is not None else None
        weights = _find_weights(model, files) if files is not None else None
        if weights is None:
            model, weights = _load_whole(kind, folder)
    return model.eval(), output, weights


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
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"the model cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}", node=place) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


_OPTIONS: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}


def _with_attention(make: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Return what ``make`` does for a model whose attention is one operator, or several where its kind cannot say it with one."""
    try:
        return make(*given, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return make(*given, attn_implementation="eager", **options)


def _load_whole(kind: Any, folder: Path) -> tuple[Any, _Weights]:
    model, said = _with_attention(kind.from_pretrained, folder, local_files_only=True, output_loading_info=True, **_OPTIONS)
    return model, _Weights({}, frozenset(said["missing_keys"]))


def _build_empty(kind: Any, folder: Path) -> Any:
    """Return the model with parameters that nothing was written to."""
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with no_init_weights():
        model = _with_attention(kind.from_config, config, **_OPTIONS)
    model.tie_weights()
    return model


def _find_weights(model: Any, files: Mapping[str, FileTensor]) -> _Weights | None:
    """Return the place of each weight under the names that transformers gives it; None where only transformers can say what they are.

    Raises:
        Refused: a tensor has another shape than the model's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state = model.state_dict()
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if not isinstance(change, WeightRenaming)]
    places: dict[str, FileTensor] = {}
    for name, tensor in files.items():
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, converter = rename_source_key(name, [], [], model.base_model_prefix, state)
        if renamed not in state:
            continue
        if converter is not None or tensor.dtype != state[renamed].dtype:
            return None
        if tensor.shape != state[renamed].shape:
            raise Refused(
                f"the file holds it as {list(tensor.shape)}, the configuration asks for {list(state[renamed].shape)}",
                node=name, way_out="take config.json and weights of one model",
            )  # fmt: skip
        places[renamed] = tensor
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held: dict[int, FileTensor] = {}
    for name, place in places.items():
        other = held.setdefault(id(parameters.get(name)), place)
        if name in parameters and other is not place and tensor_digest(other) != tensor_digest(place):
            return None  # tied by the configuration and different in the files: transformers decides
    places |= {name: held[id(parameter)] for name, parameter in parameters.items() if id(parameter) in held}
    return _Weights(places, frozenset(name for name in parameters if name not in places))

"""GGUF files of Llama, Qwen2 and Qwen3 models: names, configuration and the order of rows that llama.cpp wants.

llama.cpp rotates neighbouring pairs of a head where Hugging Face's Llama rotates its halves, so rows of queries and keys lie otherwise in
a file of the architecture ``llama``: row ``2 i + h`` of a head is row ``i + h d / 2`` of the model. Rows move with their codes; nothing is
rounded. Source: llama.cpp, ``convert_hf_to_gguf.py`` (``LlamaModel.permute``) and ``src/llama-arch.cpp``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.errors import Refused
from qcompile.formats import Tensor
from qcompile.interchange import gguf_tokenizer
from qcompile.interchange.checkpoint import Checkpoint, StoredWeight
from qcompile.interchange.gguf_blocks import BY_NUMBER, choose_block, read_blocks, write_blocks
from qcompile.interchange.gguf_file import GgufFile, write_gguf

_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # the same names in both worlds
_PERMUTED = ("llama",)
_BF16 = 30  # its bits are the upper half of a float32's
_FLOATS: dict[int, tuple[np.dtype[Any], int]] = {0: (np.dtype("<f4"), 4), 1: (np.dtype("<f2"), 2), _BF16: (np.dtype("<u2"), 2)}
_F32, _F16 = 0, 1
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "TQ2_0": 37}  # llama.cpp's name for a file that is mostly of one type

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER_NAMES, _INNER_NAMES = ({ours: theirs for theirs, ours in names.items()} for names in (_OUTER, _INNER))


# ---- reading --------------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> Checkpoint:
    """Return the checkpoint in a GGUF file; a ``tokenizer.json`` beside it is taken before what the file says of its tokens.

    Raises:
        Refused: an architecture, a kind of positions or a block type that is not known, or a damaged file; the message names the tensor.
    """
    file = GgufFile(path)
    config = _config(file)
    weights: dict[str, torch.Tensor | StoredWeight] = {}
    for stored in file.tensors:
        name = _our_name(stored, path)
        if name in weights:
            raise Refused("two tensors have this weight", node=f"{path} {name}")
        weights[name] = _read(file, stored)
    _check_sizes(config, weights, path)
    weights = {name: _with_rows(weight, name, config, path, to_model=True) for name, weight in weights.items()}
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in weights
    beside = path.parent / "tokenizer.json"
    tokenizer = beside.read_bytes() if beside.is_file() else gguf_tokenizer.read_tokenizer(file.metadata)
    ends = [file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return Checkpoint(config, weights, tokenizer, tuple(dict.fromkeys(end for end in ends if isinstance(end, int))))


def _check_sizes(config: dict[str, Any], weights: Mapping[str, torch.Tensor | StoredWeight], path: Path) -> None:
    """Hold the sizes of the metadata to those of the tensors before a model of them is made; the table gives the number of tokens."""
    table = weights.get("model.embed_tokens.weight")
    if table is None or len(table.shape) != 2:
        raise Refused("the file has no table of tokens, token_embd.weight", node=str(path))
    config["vocab_size"] = int(table.shape[0])
    hidden, width = config["hidden_size"], config["head_dim"]
    inner = {
        "self_attn.q_proj": (config["num_attention_heads"] * width, hidden),
        "self_attn.k_proj": (config["num_key_value_heads"] * width, hidden),
        "mlp.up_proj": (config["intermediate_size"], hidden), "mlp.down_proj": (hidden, config["intermediate_size"]),
    }  # fmt: skip
    blocks = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
    if blocks != config["num_hidden_layers"] or table.shape[1] != hidden:
        raise Refused(
            f"the metadata say {config['num_hidden_layers']} blocks of {hidden}, the tensors {blocks} of {table.shape[1]}", node=str(path)
        )
    for name, weight in weights.items():
        expected = next((size for part, size in inner.items() if name.endswith(f"{part}.weight")), tuple(weight.shape))
        if tuple(weight.shape) != expected:
            raise Refused(f"its sizes are {list(weight.shape)}, the metadata say {list(expected)}", node=f"{path} {name}")


def _read(file: GgufFile, name: str) -> torch.Tensor | StoredWeight:
    info = file.tensors[name]
    elements = int(np.prod(info.shape, dtype=object))
    place = f"{file.path} {name}"
    if info.type in _FLOATS:
        dtype, width = _FLOATS[info.type]
        values = np.frombuffer(file.read(name, elements * width), dtype).reshape(info.shape)
        if info.type == _BF16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return torch.from_numpy(values.astype(np.float32))
    block = BY_NUMBER.get(info.type)
    if block is None:
        raise Refused(
            f"its block type has number {info.type}",
            node=place,
            way_out=f"known are F32, F16, BF16, {', '.join(b.name for b in BY_NUMBER.values())}",
        )
    if len(info.shape) != 2 or info.shape[1] % block.elements:
        raise Refused(f"blocks of {block.name} do not divide the sizes {list(info.shape)}", node=place)
    try:
        return read_blocks(file.read(name, elements // block.elements * block.bytes), block, info.shape)
    except ValueError as error:
        raise Refused(str(error), node=place) from error


def _our_name(name: str, path: Path) -> str:
    if match := re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name):
        if match[2] in _INNER:
            return f"model.layers.{int(match[1])}.{_INNER[match[2]]}.{match[3]}"
    elif (parts := name.rpartition("."))[0] in _OUTER and parts[2] == "weight":
        return f"{_OUTER[parts[0]]}.weight"
    hint = "scaled rotary positions are not read" if name == "rope_freqs.weight" else "the model's parts are not those of a Llama"
    raise Refused(f"the tensor has no place: {hint}", node=f"{path} {name}")


def _config(file: GgufFile) -> dict[str, Any]:
    """Return the Hugging Face configuration that a file's metadata say."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _MODELS:
        raise Refused(f"the architecture '{architecture}' is not read", node=str(file.path), way_out=f"known are {', '.join(_MODELS)}")

    def entry(key: str, kind: type, default: Any = None) -> Any:
        value: Any = file.metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, kind) or (isinstance(value, int) and not 0 < value < 1 << 24):
            raise Refused(f"the entry {architecture}.{key} is {value!r}", node=str(file.path))
        return value

    heads, hidden = entry("attention.head_count", int), entry("embedding_length", int)
    width = entry("attention.key_length", int, max(1, hidden // heads))
    if entry("attention.value_length", int, width) != width or entry("rope.dimension_count", int, width) != width:
        raise Refused("keys, values and rotary positions are not of one width", node=str(file.path))
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or file.metadata.get(f"{architecture}.expert_count", 0):
        raise Refused(f"rotary positions scaled by '{scaling}', or experts, are not read", node=str(file.path))
    return {
        "architectures": [_MODELS[architecture]], "model_type": architecture, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": entry("feed_forward_length", int), "num_hidden_layers": entry("block_count", int),
        "num_attention_heads": heads, "num_key_value_heads": entry("attention.head_count_kv", int, heads), "head_dim": width,
        "max_position_embeddings": entry("context_length", int),
        "rms_norm_eps": _shortest(entry("attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": {"rope_type": "default", "rope_theta": _shortest(entry("rope.freq_base", float, 10000.0))},
    }  # fmt: skip


def _shortest(value: float) -> float:
    """Return the number that a float32 was rounded from, where it has few digits: 1e-05 and not 9.99999974e-06."""
    return float(str(np.float32(value)))


# ---- rows of queries and keys ---------------------------------------------------------------------------------------------


def _with_rows(
    weight: torch.Tensor | StoredWeight, name: str, config: Mapping[str, Any], path: Path, *, to_model: bool
) -> torch.Tensor | StoredWeight:
    """Return a weight with the rows of queries and keys in the order of the model, or of the file."""
    kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    heads = next((int(config[key]) for kind, key in kinds.items() if f".{kind}." in name), 0)
    if not heads or config["model_type"] not in _PERMUTED:
        return weight
    rows = int(weight.shape[0])
    if rows % (2 * heads):
        raise Refused(f"{rows} rows are not {heads} heads", node=f"{path} {name}")
    halves = (-1, 2) if to_model else (2, rows // heads // 2)
    order = torch.arange(rows).unflatten(0, (heads, *halves)).transpose(1, 2).flatten()
    if isinstance(weight, torch.Tensor):
        return weight[order].contiguous()
    quantized = weight.quantized

    def moved(value: torch.Tensor | None) -> torch.Tensor | None:
        return value if value is None or isinstance(quantized.scheme.granularity, Tensor) else value[order].contiguous()

    scale = moved(quantized.scale)
    assert scale is not None
    return StoredWeight(
        dataclasses.replace(quantized, codes=quantized.codes[order].contiguous(), scale=scale, zero_point=moved(quantized.zero_point)),
        moved(weight.minimum),
        weight.order,
    )


# ---- writing --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Written:
    """A file's bytes, how many weights kept their codes, why others did not, and lines for the user."""

    data: bytes
    codes: int
    floats: dict[str, str]
    notes: list[str]


def write_checkpoint(checkpoint: Checkpoint, place: str) -> Written:
    """Return the GGUF file of a checkpoint.

    Codes go into blocks of Q4_0, Q8_0 or TQ2_0 where one holds them exactly. Other weights are written as float16 where that is exact, and
    as float32.

    Raises:
        Refused: the model is none of those that llama.cpp runs by the names used here.
    """
    config = checkpoint.config
    written = Written(b"", 0, {}, [])
    metadata = _metadata(config, place)
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = []
    types: dict[str, int] = {}
    for name, weight in checkpoint.weights.items():
        stored = _their_name(name, place)
        moved = _with_rows(weight, name, config, Path(place), to_model=False)
        block, reason = choose_block(moved) if isinstance(moved, StoredWeight) else (None, "")
        if block is not None and isinstance(moved, StoredWeight):
            tensors.append((stored, moved.shape, block.number, write_blocks(moved, block)))
            types[block.name] = types.get(block.name, 0) + int(np.prod(moved.shape))
            written.codes += 1
            continue
        if isinstance(moved, StoredWeight):
            written.floats[name], moved = reason, moved.dequantize()
        tensors.append((stored, tuple(moved.shape), *_float_bytes(moved)))
    most = max(types, key=lambda name: types[name]) if types else ""
    metadata |= {"general.file_type": _FILE_TYPES.get(most, 0), "general.quantization_version": 2}
    tokens, note = gguf_tokenizer.write_tokenizer(checkpoint.tokenizer, int(config["vocab_size"]), checkpoint.end_tokens)
    written.notes += [note] if note else []
    written.data = write_gguf(metadata | tokens, tensors)
    return written


def _float_bytes(value: torch.Tensor) -> tuple[int, bytes]:
    half = value.to(torch.float16)
    if value.ndim == 2 and torch.equal(half.to(torch.float32), value):
        return _F16, half.contiguous().numpy().tobytes()
    return _F32, value.to(torch.float32).contiguous().numpy().tobytes()


def _their_name(name: str, place: str) -> str:
    layer, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer):
        if match[2] in _INNER_NAMES:
            return f"blk.{match[1]}.{_INNER_NAMES[match[2]]}.{kind}"
    elif layer in _OUTER_NAMES:
        return f"{_OUTER_NAMES[layer]}.{kind}"
    raise Refused("llama.cpp has no name for this weight", node=f"{place} {name}")


def _metadata(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = config.get("model_type")
    if kind not in _MODELS:
        raise Refused(f"models of the type '{kind}' are not written", node=place, way_out=f"known are {', '.join(_MODELS)}")
    positions = config.get("rope_parameters") or config.get("rope_scaling") or {}
    form = positions.get("rope_type", positions.get("type", "default"))
    if form != "default" or config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window"):
        raise Refused(f"positions '{form}', activation '{config.get('hidden_act')}', or a sliding window are not written", node=place)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    width = int(config.get("head_dim") or hidden // heads)
    return {
        "general.architecture": kind,
        f"{kind}.vocab_size": int(config["vocab_size"]),
        f"{kind}.context_length": int(config["max_position_embeddings"]),
        f"{kind}.embedding_length": hidden,
        f"{kind}.block_count": int(config["num_hidden_layers"]),
        f"{kind}.feed_forward_length": int(config["intermediate_size"]),
        f"{kind}.attention.head_count": heads,
        f"{kind}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{kind}.attention.key_length": width,
        f"{kind}.attention.value_length": width,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{kind}.rope.dimension_count": width,
        f"{kind}.rope.freq_base": float(positions.get("rope_theta") or config.get("rope_theta") or 10000.0),
    }

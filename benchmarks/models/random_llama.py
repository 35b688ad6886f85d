"""Llama-type decoders of well-known shape with seeded random weights, as Hugging Face folders: for speed and memory, never for accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TINY_LLAMA: dict[str, Any] = {  # 1.1 billion weights
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip


def write_folder(folder: Path, layers: int | None = None, **changes: Any) -> int:
    """Write config.json, a tokenizer of words ``<0>``, ``<1>``, .. and one file of f16 weights for each layer.

    Returns the number of weights; ``layers`` makes it shorter.
    """
    config = {**TINY_LLAMA, **changes, **({"num_hidden_layers": layers} if layers else {})}
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    width, middle, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = size * config["num_attention_heads"], size * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).half()

    shards: list[dict[str, Any]] = []
    for number in range(config["num_hidden_layers"]):
        part = {
            "self_attn.q_proj": matrix(heads, width), "self_attn.k_proj": matrix(kv_heads, width),
            "self_attn.v_proj": matrix(kv_heads, width), "self_attn.o_proj": matrix(width, heads), "mlp.gate_proj": matrix(middle, width),
            "mlp.up_proj": matrix(middle, width), "mlp.down_proj": matrix(width, middle),
            "input_layernorm": torch.ones(width).half(), "post_attention_layernorm": torch.ones(width).half(),
        }  # fmt: skip
        shards.append({f"model.layers.{number}.{name}.weight": value for name, value in part.items()})
        _write_shard(folder, shards, config["num_hidden_layers"] + 1)
    ends = {"model.embed_tokens": matrix(config["vocab_size"], width), "model.norm": torch.ones(width).half()}
    ends |= {} if config["tie_word_embeddings"] else {"lm_head": matrix(config["vocab_size"], width)}
    shards.append({f"{name}.weight": value for name, value in ends.items()})
    _write_shard(folder, shards, config["num_hidden_layers"] + 1)
    words = {f"<{i}>": i for i in range(config["vocab_size"])}
    split = {"type": "WhitespaceSplit"}
    tokenizer = {"version": "1.0", "pre_tokenizer": split, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<0>"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    index = {name: _shard_name(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(count for shard in shards for count in shard.values())


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_shard(folder: Path, shards: list[dict[str, Any]], count: int) -> None:
    """Write the last shard and keep its names and sizes alone."""
    save_file(shards[-1], folder / _shard_name(len(shards) - 1, count), {"format": "pt"})
    shards[-1] = {name: tensor.numel() for name, tensor in shards[-1].items()}

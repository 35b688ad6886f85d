"""wikilm-5m: a Llama-type language model of 5.4 M parameters (6 layers, width 256, 8 heads on 4, SwiGLU, RMSNorm, tied head).

Input tokens i64[batch,tokens], byte-level BPE of 4,096 tokens; output logits f32[batch,tokens,4096]. No cache.
Perplexity per token on WikiText-2 test (raw, first 120,000 tokens, windows of 512): 126.5. Weights stored as f16, computed in f32.

``wikilm_planted`` is the same function with four outlier channels in front of every linear layer: the gain of four channels of each
normalisation times 30, the same columns of its consumers divided by 30. The model normalises before each layer, so the
residual stream is untouched. Small models have no such channels of their own; large ones do (Dettmers et al., 2022).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PLANTED_CHANNELS, PLANTED_FACTOR = (3, 77, 130, 201), 30.0


def folder() -> Path:
    """Return the model's Hugging Face folder."""
    data = os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(data) / "wikilm-5m"


class Attention(nn.Module):
    """Causal attention with grouped keys and values and rotary positions (halves, not pairs)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.heads, self.kv_heads, self.size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)  # [batch, heads, tokens, size]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.size)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.size)).transpose(1, 2)
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, middle = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, middle, bias=False)
        self.up_proj = nn.Linear(width, middle, bias=False)
        self.down_proj = nn.Linear(middle, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class WikiLM(nn.Module):
    """forward(tokens) -> logits; state-dict keys are those of the Hugging Face file without ``model.``."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, positions = config["head_dim"], config["max_position_embeddings"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        frequencies = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(positions), frequencies).repeat(1, 2)  # [positions, size]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        cos, sin = self.cos[:count], self.sin[:count]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def plant_outliers(net: WikiLM, channels: tuple[int, ...] = PLANTED_CHANNELS, factor: float = PLANTED_FACTOR) -> None:
    """Multiply these channels of every normalisation's gain by ``factor`` and divide its consumers' columns by it, in place."""
    pairs: list[tuple[nn.RMSNorm, list[nn.Linear]]] = [(net.norm, [net.lm_head])]
    for layer in net.layers:
        pairs.append((layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]))
        pairs.append((layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]))
    index = list(channels)
    with torch.no_grad():
        for norm, consumers in pairs:
            norm.weight[index] *= factor
            for linear in consumers:
                linear.weight[:, index] /= factor


def wikilm() -> tuple[WikiLM, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return the trained model in f32 and one example input i64[1,64]; batch and length are dynamic."""
    from safetensors.torch import load_file

    net = WikiLM(json.loads((folder() / "config.json").read_text()))
    weights = {name.removeprefix("model."): value.float() for name, value in load_file(folder() / "model.safetensors").items()}
    # The head is tied; it gets its own copy so that a change for the head (planting, rotation) leaves the embedding alone.
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"].clone())
    net.load_state_dict(weights)
    example = torch.randint(0, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    return net.eval(), (example,), [{0: "batch", 1: "seq"}]


def wikilm_planted() -> tuple[WikiLM, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return the same function with planted outlier channels, and the same example input."""
    net, example, dynamic = wikilm()
    plant_outliers(net)
    return net, example, dynamic


def tokenize(text: str) -> torch.Tensor:
    """Return the tokens i64[count] of a text."""
    from tokenizers import Tokenizer

    return torch.tensor(Tokenizer.from_file(str(folder() / "tokenizer.json")).encode(text).ids)

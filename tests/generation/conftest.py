"""Small decoders with random weights, as Hugging Face folders, and their models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 5}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "phi": ("PhiConfig", SMALL),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "gpt2": ("GPT2Config", {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPTConfig", {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
                          "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}  # fmt: skip
# Heads of whole vectors, which kernels read as codes; not among the kinds that stand for shapes of models.
WIDE = {"wide": ("LlamaConfig", {**GROUPED, "hidden_size": 64, "head_dim": 32})}

Decoder = tuple[Path, torch.nn.Module]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    """Return folder and model of a kind of decoder."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

    @functools.cache
    def make(kind: str) -> Decoder:
        torch.manual_seed(0)
        name, options = {**KINDS, **WIDE}[kind]
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # larger than the usual first weights: a wrong position must show
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return folder, model

    return make

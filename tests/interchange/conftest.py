"""A small Llama with random weights, and codes for its linear layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "eos_token_id": 3, "hidden_act": "silu",
}  # fmt: skip


@dataclass
class Llama:
    """Configuration and float weights of a model."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @property
    def layers(self) -> list[str]:
        """The linear layers that formats quantize: all but the head."""
        return [name.removesuffix(".weight") for name in self.weights if name.endswith("_proj.weight")]

    def logits(self, tokens: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what transformers computes with some of the weights replaced."""
        transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.for_model(**self.config)).eval()
        model.load_state_dict({**self.weights, **weights}, strict=False)
        model.tie_weights()
        with torch.no_grad():
            result: torch.Tensor = model(input_ids=tokens).logits
        return result

    def write(self, folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
        """Write a folder whose quantized layers have these tensors in place of their weights."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = {name.rpartition(".")[0] for name in tensors}
        rest = {name: value for name, value in self.weights.items() if name.rpartition(".")[0] not in stored}
        save_file({name: value.clone().contiguous() for name, value in {**rest, **tensors}.items()}, folder / "model.safetensors")
        quantized = {"quantization_config": settings} if settings else {}
        (folder / "config.json").write_text(json.dumps({**self.config, **quantized}))
        return folder


def make_llama(**changes: Any) -> Llama:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = {**CONFIG, **changes}
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.for_model(**config))
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            value.copy_(1 + 0.1 * torch.randn(value.shape))
    return Llama(config, weights)


@pytest.fixture(scope="session")
def llama() -> Llama:
    return make_llama()


@pytest.fixture(scope="session")
def llama_of() -> Callable[..., Llama]:
    """Make a Llama with other sizes."""
    return make_llama


@dataclass
class Codes:
    """Unsigned codes [out, in] of a weight with scales and zero points [out, groups] and the group of each input, as numpy arrays."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: np.ndarray

    @property
    def values(self) -> torch.Tensor:
        """Scale * (code - zero point), float32."""
        centred = self.codes.astype(np.float32) - self.zero[:, self.group].astype(np.float32)
        return torch.from_numpy(centred * self.scale[:, self.group].astype(np.float32))


def random_codes(
    shape: tuple[int, int], bits: int, size: int, *, symmetric: bool = False, shuffled: bool = False, dtype: Any = np.float16, seed: int = 0
) -> Codes:
    """Return codes that use the whole range, the extreme ones included."""
    random = np.random.default_rng([seed, *shape])
    groups = shape[1] // size
    codes = random.integers(0, 2**bits, shape, dtype=np.uint8)
    codes[0, :2] = 0, 2**bits - 1
    zero = np.full((shape[0], groups), 2 ** (bits - 1)) if symmetric else random.integers(0, 2**bits, (shape[0], groups))
    if not symmetric:
        zero[0, 0] = 0
        zero[1, 0] = 2**bits - 1
    scale = (random.uniform(0.5, 1.5, (shape[0], groups)) / 2**bits / 4).astype(dtype)
    group = np.arange(shape[1]) // size
    return Codes(codes, scale, zero.astype(np.int32), random.permutation(group) if shuffled else group)


@pytest.fixture(scope="session")
def random_codes_of() -> Callable[..., Codes]:
    """Make random codes, see ``random_codes``."""
    return random_codes

"""Decoders whose attention is no single operator (a bias by distance, a cap on scores) are captured with its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.capture.huggingface import capture_folder

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gemma2": ("Gemma2Config", {
        "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 5, "attn_logit_softcapping": 0.01,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    name, options = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options), attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    graph, _ = capture_folder(tmp_path)
    for shape in ((1, 3), (2, 17)):
        tokens = torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(tokens).logits
        torch.testing.assert_close(graph(tokens)[0], expected, rtol=1e-4, atol=1e-5)

"""A Llama-type Hugging Face folder as GGUF files, by the package ``gguf`` and llama.cpp's own quantizer: what llama.cpp is measured with.

The file has no tokenizer: both sides are fed the same token numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_f16(folder: Path, path: Path) -> None:
    """Write a folder's weights, f16 as they are (others are rounded), normalisation gains in f32."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                value = tensors.get_tensor(name)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    value = _adjacent_pairs(value, heads if "q_proj" in name else kv_heads)
                writer.add_tensor(_tensor_name(name), value.astype(np.float32 if value.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_LAYER[rest]}.weight"


def _adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows [heads * size, in]: rotary halves of a head become neighbours, as llama.cpp turns them."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def quantize(source: Path, path: Path, kind: str, threads: int) -> None:
    """Quantize an f16 file to a type such as ``Q4_0``, ``Q4_K_M`` or ``Q2_K``, without an importance matrix.

    Raises:
        RuntimeError: llama.cpp failed.
    """
    import llama_cpp

    options: Any = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), options):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")


def stored_bits(path: Path) -> tuple[float, str]:
    """Return bits per weight over all matrices of a file, and how many matrices each type has, such as ``Q2_K 20, Q4_0 6``."""
    import gguf

    matrices = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1]
    kinds = [tensor.tensor_type.name for tensor in matrices]
    bits = 8 * sum(int(tensor.n_bytes) for tensor in matrices) / sum(int(tensor.n_elements) for tensor in matrices)
    return bits, ", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds)))

#!/usr/bin/env python
"""Memory of compiling and running a language model of 1.1 billion random weights, each step in a process of its own.

    python benchmarks/large_model.py                         # TinyLlama's shape, 4 bits in groups of 128, rounded to nearest
    python benchmarks/large_model.py --layers 2 --kill --json

Writes a Hugging Face folder of that shape in float16, one shard for each block, compiles it, and generates a few tokens. Printed are the
high-water marks of the resident memory (VmHWM), sizes and bits per weight. With ``--kill`` the compile is killed while it solves weights,
then resumed: how many weights were solved before and after is printed, and whether the artifact has the bytes of the compile that was
not disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
RECIPE = """name: {name}
summary: 4-bit weights in groups of 128, without data
needs_data: false
schemes: {{linear: W4A16, embedding: "weight=int8 channel=0 sym; activation=float"}}
pipeline: [canonicalize, fold-constants, fold-batch-norm, recognize-attention, assign-bits, insert-quantizers,
           "quantize-weights{{solver={solver}}}", materialize, fuse-epilogue]
"""


def shards(layers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each shard; standard deviation 0.02, as such models start with."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32).normal_(0, 0.02, generator=generator).half()

    yield {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    keys = HIDDEN // HEADS * KV_HEADS
    for layer in range(layers):
        names = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (keys, HIDDEN), "self_attn.v_proj": (keys, HIDDEN),
                 "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
                 "mlp.down_proj": (HIDDEN, INNER)}  # fmt: skip
        block = {f"{name}.weight": draw(*shape) for name, shape in names.items()}
        norms = {f"{name}.weight": torch.ones(HIDDEN).half() for name in ("input_layernorm", "post_attention_layernorm")}
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in (block | norms).items()}
    yield {"model.norm.weight": torch.ones(HIDDEN).half(), "lm_head.weight": draw(VOCABULARY, HIDDEN)}


def write_model(folder: Path, layers: int) -> int:
    """Write the folder and return the number of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
              "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": False,
              "dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    words = {f"<{i}>": i for i in range(VOCABULARY)}
    split = {"type": "WhitespaceSplit"}
    tokenizer = {"version": "1.0", "pre_tokenizer": split, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<0>"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    places, weights = {}, 0
    for number, tensors in enumerate(shards(layers)):
        name = f"model-{number + 1:05}-of-{layers + 2:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        weights += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return weights


# ---- children ---------------------------------------------------------------------------------------------------------------

_CHILD = """
import json, re, sys
from qcompile.cli import main
sys.argv = ["qcompile", *json.loads(sys.argv[1])]
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
"""


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-c", _CHILD, json.dumps([*arguments, "--json"])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> tuple[dict[str, Any], int]:
    """Return what the command printed, and the bytes it held at most."""
    out, error = child.communicate()
    found = re.search(r"^VmHWM (\d+)$", error, re.MULTILINE)
    if child.returncode or not found:
        raise SystemExit(f"the command failed with status {child.returncode}:\n{error[-2000:]}")
    return json.loads(out), int(found[1]) * 1024


def solved(output: Path) -> int:
    """Return how many weights the unfinished pass has solved."""
    lines = [line for path in output.with_name(f"{output.name}.partial").glob("*.parts") for line in path.read_text().splitlines()]
    return sum(bool(line) for line in lines)


def kill_and_resume(arguments: list[str], output: Path, after: int) -> tuple[int, int]:
    """Kill a compile when it has solved so many weights, resume it; return how many were solved before, and that pass's missing ones."""
    child = start(arguments)
    while child.poll() is None and solved(output) < after:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    before = solved(output)
    again = start([*arguments, "--resume"])
    seen = before
    while again.poll() is None:
        seen = max(seen, solved(output))
        time.sleep(0.01)
    finish(again)
    return before, seen - before


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--solver", default="nearest", choices=("nearest", "mse"))
    parser.add_argument("--folder", type=Path, help="keep model and artifacts here; a model that is there is not written again")
    parser.add_argument("--kill", action="store_true", help="also kill a compile and resume it")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="large_model."))
    try:
        results = measure(folder, chosen)
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder)
    if chosen.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:28} {value}")


def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Write, compile and run the model; return the figures."""
    model, recipe, output = folder / "model", folder / "recipe.yaml", folder / "model.qc"
    marker = folder / f"{chosen.layers}_layers"
    if not marker.exists():
        marker.write_text(str(write_model(model, chosen.layers)))
    weights = int(marker.read_text())
    recipe.write_text(RECIPE.format(name=f"w4-{chosen.solver}", solver=chosen.solver))
    arguments = ["compile", str(model), "--recipe", str(recipe), "-o", str(output)]
    done, peak = finish(start(arguments))
    results: dict[str, Any] = {"weights": weights, "model_mib": mebibytes(2 * weights), "artifact_mib": mebibytes(done["bytes"]),
                               "bits_per_weight": done["bits_per_weight"], "compile_seconds": done["seconds"],
                               "compile_peak_mib": mebibytes(peak)}  # fmt: skip
    prompt = " ".join(f"<{i}>" for i in range(10, 26))
    told, peak = finish(start(["generate", str(output), "--prompt", prompt, "--max-tokens", "8", "--temperature", "0"]))
    again, warm = finish(start(["generate", str(output), "--prompt", prompt, "--max-tokens", "8", "--temperature", "0"]))
    assert told["token_ids"] == again["token_ids"]
    results |= {"generate_first_peak_mib": mebibytes(peak), "generate_peak_mib": mebibytes(warm),
                "generate_tokens": len(told["token_ids"]), "import_peak_mib": mebibytes(_import_peak())}  # fmt: skip
    if chosen.kill:
        digest = hashlib.file_digest(output.open("rb"), "sha256").hexdigest()
        before, after = kill_and_resume(arguments, output, after=7 * chosen.layers // 2)
        same = hashlib.file_digest(output.open("rb"), "sha256").hexdigest() == digest
        results |= {"solved_before_kill": before, "solved_after_resume": after, "same_bytes": same}
    return results


def _import_peak() -> int:
    """Return what a process holds that has loaded the compiler and no model."""
    return finish(start(["targets"]))[1]


def mebibytes(count: int) -> float:
    """Return bytes as MiB, to one digit."""
    return round(count / 2**20, 1)


if __name__ == "__main__":
    main()

"""A language model's folder or prompt that is not what it should be: exit code 2, one line that names it, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in several shards: vocabulary 50, context 32."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def shard_of(folder: Path, name: str) -> Path:
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / str(places[name])


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Put another tensor in the place of one, or none."""
    path = shard_of(folder, name)
    held = load_file(path)
    changed = change(held.pop(name))
    save_file(held if changed is None else held | {name: changed.contiguous()}, path)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def overflow(folder: Path) -> None:
    """Leave every weight finite and let sums of the head's products overflow."""
    change_tensor(folder, "model.norm.weight", lambda w: torch.full_like(w, 3e38))
    change_tensor(folder, HEAD, lambda w: w.sign() * 9)


HEAD, DOWN, EMBEDDING = "lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda folder: shard_of(folder, DOWN).unlink(), r"model-0000\d-of-0000\d\.safetensors: a shard of the weights is"),
    "cut shard": (
        lambda folder: shard_of(folder, DOWN).write_bytes(shard_of(folder, DOWN).read_bytes()[:-7]),
        r"model-0000\d-of-0000\d\.safetensors: .*cut short",
    ),
    "no shard": (lambda folder: shard_of(folder, DOWN).write_bytes(b"GIF89a" * 30), r"model-0000\d-of-0000\d\.safetensors: no safetensors"),
    "missing tensor": (lambda folder: change_tensor(folder, DOWN, lambda _: None), re.escape(DOWN)),
    "transposed tensor": (lambda folder: change_tensor(folder, DOWN, lambda w: w.t()), rf"{re.escape(DOWN)}.*\[48, ?32\].*\[32, ?48\]"),
    "short tensor": (lambda folder: change_tensor(folder, EMBEDDING, lambda w: w[:-1]), rf"{re.escape(EMBEDDING)}.*49.*50"),
    "wider model": (lambda folder: change_config(folder, intermediate_size=64), r"mlp\.\w+_proj\.weight.*48.*64"),
    "another architecture": (lambda folder: change_config(folder, model_type="llama9", architectures=["Llama9ForCausalLM"]), "llama9"),
    "unknown activation": (lambda folder: change_config(folder, hidden_act="frobnicate"), "frobnicate"),
    "unknown positions": (lambda folder: change_config(folder, rope_scaling={"rope_type": "spiral", "factor": 2.0}), "spiral"),
    "no number of heads": (lambda folder: change_config(folder, num_attention_heads=0), "cannot be loaded|config"),
    "NaN weight": (lambda folder: change_tensor(folder, DOWN, lambda w: w.index_fill(0, torch.tensor([3]), torch.nan)), "holds NaN"),
    "infinite weight": (lambda folder: change_tensor(folder, HEAD, lambda w: w * 1e40), "infinity"),
    "no finite logits": (overflow, "the value is not finite on the calibration data"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_compile_refuses_a_damaged_decoder(cli: Cli, folder: Path, tmp_path: Path, files: Any, damage: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change, message = DAMAGES[damage]
    change(copy)
    (tmp_path / "out").mkdir()
    done = cli("compile", copy, "--recipe", "w4a16", "--target", "reference", "-o", tmp_path / "out" / "model.qc")
    refused(done, message)
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import qcompile

    path = tmp_path_factory.mktemp("artifact") / "model.qc"
    qcompile.compile(str(folder), recipe="w4a16", target="reference").save(path)
    return path


LONG = ",".join(["7"] * 33)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt-tokens", LONG, "--max-tokens", "1"), r"prompt 0: 33 tokens and 1 new ones do not fit in the context of 32"),
        (("--prompt-tokens", "1", "--prompt-tokens", LONG), "prompt 1|prompt 0"),
        (("--prompt-tokens", "1,2", "--max-tokens", "32"), r"prompt 0: 2 tokens and 32 new ones do not fit in the context of 32"),
        (("--prompt-tokens", "1,2,3", "--max-tokens", "8", "--context", "9"), r"3 tokens and 8 new ones do not fit in the context of 9"),
        (("--prompt-tokens", "1", "--context", "33"), r"a context of 33 tokens is not possible: the model takes texts of 1 to 32 tokens"),
        (("--prompt-tokens", "50"), "the prompt holds token 50, the model has 50 tokens"),
    ],
)
def test_generate_refuses_what_no_cache_holds(cli: Cli, artifact: Path, words: tuple[str, ...], message: str) -> None:
    before = artifact.read_bytes()
    refused(cli("generate", artifact, *words), message)
    assert artifact.read_bytes() == before


def test_generate_refuses_nan_logits(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.generation.artifact_model import ArtifactModel

    step = ArtifactModel.step

    def broken(self: Any, *given: Any) -> Any:
        logits, caches = step(self, *given)
        logits[0, 3] = float("nan")
        return logits, caches

    monkeypatch.setattr(ArtifactModel, "step", broken)
    done = cli("generate", artifact, "--prompt-tokens", "1,2", "--max-tokens", "4", "--json")
    refused(done, "the model's logits hold NaN or infinity")


def refused(done: Any, message: str) -> None:
    """Check that a command ended with exit code 2, no traceback, and one line of error that fits a pattern."""
    lines = [line for line in done.err.splitlines() if not line.startswith(("[", "recipe w4a16 reads calibration data"))]
    assert done.code == 2, done.err
    assert len(lines) == 1, done.err
    assert lines[0].startswith("qcompile: ")
    assert "internal error" not in lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert done.out == ""

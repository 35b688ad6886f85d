"""Graphs of Hugging Face folders in the cache: found again with the folder's own weights, and never where anything differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qcompile.capture import Captured, capture, huggingface
from qcompile.files import cache_folder

pytest.importorskip("transformers", reason="the extra hf is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a small model with positions from a table, whose mask is in no file; the cache is empty."""
    import transformers

    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    options = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, max_position_embeddings=32)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[Captured, bool]]:
    """Return a function that captures, and says whether the model was traced for it."""
    count, trace = [0], huggingface.capture_module

    def counted(*arguments: object) -> object:
        count[0] += 1
        return trace(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface, "capture_module", counted)

    def run(folder: Path) -> tuple[Captured, bool]:
        before = count[0]
        return capture(folder), count[0] > before

    return run


def entry() -> Path:
    (path,) = (cache_folder() / "graphs").iterdir()
    return path


def test_a_graph_is_found_again_as_it_was(folder: Path, traced: Callable[[Path], tuple[Captured, bool]]) -> None:
    first, again = traced(folder), traced(folder)
    assert (first[1], again[1]) == (True, False)
    assert again[0].graph.digest == first[0].graph.digest
    assert list(again[0].graph.constants) == list(first[0].graph.constants)
    assert [node.meta.get("source", "") for node in again[0].graph.nodes] == [node.meta.get("source", "") for node in first[0].graph.nodes]
    assert [node.meta.get("scope", "") for node in again[0].graph.nodes] == [node.meta.get("scope", "") for node in first[0].graph.nodes]
    assert all(torch.equal(a, b) for a, b in zip(again[0].example_inputs, first[0].example_inputs, strict=True))
    assert torch.equal(*(captured.graph(*captured.example_inputs)[0] for captured, _ in (first, again)))


def test_weights_are_the_folder_s_own(folder: Path, traced: Callable[[Path], tuple[Captured, bool]]) -> None:
    first, _ = traced(folder)
    digest, constants = first.graph.digest, {name: value.clone() for name, value in first.graph.constants.items()}
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    again, was_traced = traced(folder)
    assert not was_traced
    assert again.graph.digest != digest
    assert any(name.removeprefix("model.") not in tensors for name in constants)
    for name, value in again.graph.constants.items():
        assert torch.equal(value, constants[name] * (2 if name.removeprefix("model.") in tensors else 1)), name


@pytest.mark.parametrize("change", ["config", "dtype"])
def test_another_model_is_traced(folder: Path, traced: Callable[[Path], tuple[Captured, bool]], change: str) -> None:
    traced(folder)
    if change == "config":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    else:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file({n: t.half() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert traced(folder)[1]


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "text", "folder"])
def test_a_damaged_entry_counts_as_none(folder: Path, traced: Callable[[Path], tuple[Captured, bool]], damage: str) -> None:
    digest = traced(folder)[0].graph.digest
    path = entry()
    data = path.read_bytes()
    place = data.index(b"aten.mul") + len("aten.")
    changed = {"empty": b"", "short": data[:-5], "flipped": data[:place] + b"add" + data[place + 3 :], "text": b"{}" * 40}
    if damage == "folder":
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("")
    else:
        path.write_bytes(changed[damage])
    again, was_traced = traced(folder)
    assert was_traced
    assert again.graph.digest == digest
    if damage != "folder":
        assert not traced(folder)[1]  # and it is written anew

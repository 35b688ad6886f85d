"""Weights stay in their safetensors files: the same graphs as from a loaded model, and folders that are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qcompile import Refused
from qcompile.capture import capture, huggingface
from qcompile.capture.weight_files import open_weights
from qcompile.graph.file_tensor import FileTensor, TensorFile
from qcompile.safetensors_file import open_path

_SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
          "max_position_embeddings": 32}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "AutoModelForCausalLM", {**_SIZES, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", "AutoModelForCausalLM", {**_SIZES, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "AutoModelForCausalLM", {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
    "bert": ("BertConfig", "AutoModelForSequenceClassification", {**_SIZES, "num_labels": 3}),
    "vit": ("ViTConfig", "AutoModelForImageClassification", {**{k: v for k, v in _SIZES.items() if k.startswith(("h", "num", "int"))},
                                                             "image_size": 16, "patch_size": 8}),
}  # fmt: skip


def make_folder(folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    config, auto, options = KINDS[kind]
    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**options))
    with torch.no_grad():
        for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            value.add_(torch.rand_like(value) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path / "model", "llama", torch.float16, "2KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def file_tensors(model: Path) -> list[FileTensor]:
    return [value for value in capture(model).graph.constants.values() if isinstance(value, FileTensor)]


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("llama", torch.bfloat16), ("llama_tied", torch.float16)], ids=str
)
def test_the_graph_is_that_of_the_loaded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    folder = make_folder(tmp_path, kind, dtype)
    mine = capture(folder)
    assert any(isinstance(value, FileTensor) for value in mine.graph.constants.values())
    monkeypatch.setattr(huggingface, "open_weights", lambda folder: None)
    loaded = capture(folder)
    assert not any(isinstance(value, FileTensor) for value in loaded.graph.constants.values())
    assert mine.graph.digest == loaded.graph.digest
    results, expected = (captured.graph(*captured.example_inputs) for captured in (mine, loaded))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_weights_are_found_in_shards(sharded: Path, tmp_path: Path) -> None:
    whole = make_folder(tmp_path / "whole", "llama", torch.float16)
    assert capture(sharded).graph.digest == capture(whole).graph.digest


def test_tied_weights_share_one_place(tmp_path: Path) -> None:
    tied, apart = (len(file_tensors(make_folder(tmp_path / kind, kind))) for kind in ("llama_tied", "llama"))
    assert tied == apart - 1


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    """Transformers ties no weights that the files hold with different values, whatever the configuration says."""
    folder = make_folder(tmp_path, "llama_tied")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    head = next(value for name, value in capture(folder).graph.constants.items() if name.endswith("lm_head.weight"))
    assert torch.equal(head, tensors["lm_head.weight"])


# ---- folders that are not what they say -------------------------------------------------------------------------------------


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as caught:
        capture(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)
    assert "is missing" in refusal(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path, name: str) -> None:
    safetensors.torch.save_file({"model.norm.weight": torch.ones(16)}, sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda places: places.update({"model.norm.weight": name}))
    assert "outside the folder" in refusal(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    def swap(places: dict[str, str]) -> None:
        places["model.norm.weight"] = next(p for p in places.values() if p != places["model.norm.weight"])

    edit_index(sharded, swap)
    assert "model.norm.weight: " in refusal(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "holds no weight_map" in refusal(sharded)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama")
    edit_tensors(folder, lambda tensors: tensors.__delitem__("model.layers.0.mlp.up_proj.weight"))
    assert "model.layers.0.mlp.up_proj.weight: the files of the model do not hold this weight" in refusal(folder)


def test_a_tensor_missing_in_other_files_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors["model.norm.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "model.norm.weight: the files of the model do not hold this weight" in refusal(folder)


def test_a_tensor_that_nothing_reads_may_be_missing(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    import transformers

    model = transformers.BertModel(transformers.BertConfig(**_SIZES))
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.__delitem__("pooler.dense.weight"))
    assert not any("pooler" in name for name in capture(tmp_path).graph.constants)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(15)}))
    assert "model.norm.weight: the file holds it as [15], the configuration asks for [16]" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 9, 200, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    folder = make_folder(tmp_path, "llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept])
    text = refusal(folder)
    assert "model.safetensors" in text
    assert "cut short" in text or "damaged" in text


def head(**claim: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | claim}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "data",
    [head(dtype="F3"), head(shape=[3]), head(shape=[-1, -2]), head(shape=[True, 2]), head(shape=7), head(data_offsets=[8, 16]),
     head(data_offsets=[-8, 0]), head(data_offsets=[0]), head(dtype=None), head(shape=["2"]),
     (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"\xff{", (1 << 60).to_bytes(8, "little") + b"{}"],
)  # fmt: skip
def test_a_head_that_lies_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(Refused):
        open_weights(tmp_path)


def test_a_file_that_changes_later_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(head())
    tensor = open_path(path)["a"]
    assert tensor.tolist() == [0, 0]
    path.write_bytes(head() + b"x")
    with pytest.raises(Refused, match="changed since"):
        tensor.values() if list(tensor.chunks()) else None


# ---- tensors in files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[FileTensor, torch.Tensor]:
    value = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    path = tmp_path / "values"
    path.write_bytes(b"head" + value.view(torch.uint8).numpy().tobytes())
    return FileTensor(TensorFile.of(path), 4, torch.bfloat16, (7, 3), torch.float32), value.float()


def test_operators_read_a_tensor_in_a_file(pair: tuple[FileTensor, torch.Tensor]) -> None:
    lazy, value = pair
    x = torch.randn(2, 3)
    assert torch.equal(torch.ops.aten.linear.default(x, lazy, None), torch.ops.aten.linear.default(x, value, None))
    assert torch.equal(lazy.to(torch.float64), value.to(torch.float64))
    assert torch.equal(torch.cat([lazy, lazy]), torch.cat([value, value]))
    assert torch.equal(torch.from_numpy(lazy.numpy()), value)
    assert (lazy.tolist(), lazy.shape, lazy.dtype, lazy.nbytes, len(lazy)) == (value.tolist(), value.shape, value.dtype, value.nbytes, 7)


def test_rows_are_read_without_the_others(pair: tuple[FileTensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, value = pair
    read: list[int] = []
    monkeypatch.setattr(
        TensorFile, "read", lambda self, offset, count, plain=TensorFile.read: read.append(count) or plain(self, offset, count)
    )
    for rows in (slice(2, 4), slice(-1, None), slice(5, 2), slice(None), slice(3, 100)):
        assert torch.equal(lazy[rows], value[rows])
    assert read == [12, 6, 42, 24]


def test_asking_for_its_kind_reads_nothing(pair: tuple[FileTensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, _ = pair
    monkeypatch.setattr(TensorFile, "read", None)
    assert (lazy.ndim, lazy.numel(), lazy.is_floating_point(), lazy.size(0), lazy.stride()) == (2, 21, True, 7, (3, 1))
    assert lazy.detach() is lazy
    assert lazy.contiguous() is lazy


@pytest.mark.parametrize("write", [lambda t: t.mul_(2), lambda t: t.__setitem__(0, 1.0), lambda t: t.copy_(t), lambda t: t.__iadd__(1),
                                   lambda t: torch.ops.aten.add_.Tensor(t, t)])  # fmt: skip
def test_a_tensor_in_a_file_is_not_written_to(pair: tuple[FileTensor, torch.Tensor], write: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(Refused, match="cannot be written"):
        write(pair[0])

"""GGUF files: what is read computes what the blocks say, what is written is read back the same, and bad files are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile
from qcompile import Refused
from qcompile.interchange.gguf import read_gguf
from qcompile.interchange.gguf_blocks import BY_NAME, Block
from qcompile.interchange.gguf_file import GgufFile, Typed, write_gguf

TOKENS = torch.tensor([[1, 5, 9, 39, 0, 7, 22]])
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 40, "tie_word_embeddings": True}
LLAMA = {"general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 256, "llama.block_count": 1,
         "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
         "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
         "tokenizer.ggml.eos_token_id": 3}  # fmt: skip
PLACES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
          "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
          "ffn_norm": "post_attention_layernorm"}  # fmt: skip
# Every block type that the issue of such files is about, at one place of the model.
KINDS = {"attn_q": "Q4_K", "attn_k": "Q6_K", "attn_v": "Q2_K", "attn_output": "Q5_K", "ffn_gate": "Q4_0", "ffn_up": "Q8_0",
         "ffn_down": "TQ2_0"}  # fmt: skip
HALVES = {"Q4_0": [0], "Q8_0": [0], "Q2_K": [80, 82], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "TQ2_0": [64], "Q4_1": [0, 2]}


def random_blocks(block: Block, rows: int, columns: int, seed: int) -> bytes:
    """Return blocks of random bits whose values are about as large as a model's weights."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * columns // block.elements, block.bytes), dtype=np.uint8)
    if block.name == "TQ2_0":
        data[:, :64] = np.array([0, 1, 4, 5, 2, 8, 10, 0x55], np.uint8)[random.integers(0, 8, (len(data), 64))]
    for place in HALVES[block.name]:
        steps = 2.0 ** -{"Q2_K": 9, "Q4_K": 13, "Q5_K": 14, "Q6_K": 16, "TQ2_0": 5, "Q8_0": 11}.get(block.name, 7)
        data[:, place : place + 2] = (random.uniform(0.5, 1, len(data)) * steps).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return data.tobytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def packed(metadata: dict[str, Any], tensors: list[tuple[str, list[int], int, bytes]]) -> bytes:
    """Write a file as docs/gguf.md says, sizes given fastest first."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind = 8 if isinstance(value, str) else 6 if isinstance(value, float) else 4
        out += text(key) + struct.pack("<I", kind) + (text(value) if kind == 8 else struct.pack("<f" if kind == 6 else "<I", value))
    place, body = 0, b""
    for name, sizes, kind, data in tensors:
        out += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, place)
        body += data + bytes(-len(data) % 32)
        place = len(body)
    return out + bytes(-len(out) % 32) + body


@pytest.fixture(scope="module")
def llama(llama_of: Callable[..., Any]) -> Any:
    return llama_of(**SIZES)


def tensors_of(llama: Any, table: str, kinds: dict[str, str]) -> list[tuple[str, list[int], int, bytes]]:
    """Return a file's tensors: blocks of random bits, norms of the model."""
    block = BY_NAME[table]
    found = [("token_embd.weight", [256, 40], block.number, random_blocks(block, 40, 256, 1))]
    found.append(("output_norm.weight", [256], 0, llama.weights["model.norm.weight"].numpy().tobytes()))
    for number, (theirs, ours) in enumerate(PLACES.items()):
        weight = llama.weights[f"model.layers.0.{ours}.weight"]
        sizes = list(reversed(weight.shape))
        if theirs in kinds:
            block = BY_NAME[kinds[theirs]]
            found.append((f"blk.0.{theirs}.weight", sizes, block.number, random_blocks(block, sizes[1], sizes[0], number + 2)))
        else:
            found.append((f"blk.0.{theirs}.weight", sizes, 0, weight.numpy().tobytes()))
    return found


@pytest.fixture(scope="module")
def file(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    path.write_bytes(packed(LLAMA, tensors_of(llama, "Q4_K", KINDS)))
    return path


def model_rows(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of queries or keys in the order of Hugging Face: those of a head's even places first."""
    width = len(values) // heads
    return torch.cat([values[head * width : (head + 1) * width][half::2] for head in range(heads) for half in (0, 1)])


def values_of(tensors: list[tuple[str, list[int], int, bytes]]) -> dict[str, torch.Tensor]:
    """Return what the blocks mean, by the model's names; blocks alone are tested beside this file."""
    from qcompile.interchange.gguf_blocks import BY_NUMBER, read_blocks

    found = {}
    for name, sizes, kind, data in tensors:
        shape = tuple(reversed(sizes))
        value = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape) if kind == 0 else None
        value = read_blocks(data, BY_NUMBER[kind], shape).dequantize() if value is None else value
        part = name.split(".")[-2]
        value = model_rows(value, {"attn_q": 4, "attn_k": 2}[part]) if part in ("attn_q", "attn_k") else value
        outer = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "output": "lm_head.weight"}
        found[outer.get(part) or f"model.layers.0.{PLACES[part]}.weight"] = value
    return found


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_file_of_all_block_types_computes_what_they_say(llama: Any, file: Path, target: str) -> None:
    artifact = qcompile.compile(file, target=target)
    expected = llama.logits(TOKENS, values_of(tensors_of(llama, "Q4_K", KINDS)))
    found = torch.as_tensor(artifact(TOKENS))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    kept = sorted(layer["weight"].split()[0] for layer in artifact.report["layers"] if layer["op"] == "qc.linear")
    assert kept == sorted(["uint4", "int6", "uint2", "uint5", "int4", "int8", "ternary", "uint4"])  # the head too
    assert artifact.end_tokens == (3,)


def test_codes_are_those_of_the_file(llama: Any, file: Path) -> None:
    checkpoint = read_gguf(file)
    tensors = {name: (sizes, data) for name, sizes, _, data in tensors_of(llama, "Q4_K", KINDS)}
    assert set(checkpoint.stored) == {f"model.layers.0.{PLACES[part]}.weight" for part in KINDS} | {"model.embed_tokens.weight"}
    up = np.frombuffer(tensors["blk.0.ffn_up.weight"][1], np.uint8).reshape(-1, 34)[:, 2:].view(np.int8).reshape(512, 256)
    assert (checkpoint.stored["model.layers.0.mlp.up_proj.weight"].quantized.codes.numpy() == up).all()
    for name, value in values_of(tensors_of(llama, "Q4_K", KINDS)).items():
        weight = checkpoint.weights[name]
        assert torch.equal(weight if isinstance(weight, torch.Tensor) else weight.dequantize(), value)
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["head_dim"] == 64


def test_float_types_are_read(llama: Any, tmp_path: Path) -> None:
    tensors = tensors_of(llama, "Q8_0", {})
    value = llama.weights["model.layers.0.mlp.up_proj.weight"]
    half, brain = value.half(), value.bfloat16()
    for place, (name, sizes, _, _) in enumerate(tensors):
        if name == "blk.0.ffn_up.weight":
            tensors[place] = (name, sizes, 1, half.numpy().tobytes())
        if name == "blk.0.ffn_gate.weight":
            tensors[place] = (name, sizes, 30, brain.view(torch.int16).numpy().tobytes())
    (tmp_path / "model.gguf").write_bytes(packed(LLAMA, tensors))
    weights = read_gguf(tmp_path / "model.gguf").weights
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], half.float())
    assert torch.equal(weights["model.layers.0.mlp.gate_proj.weight"], brain.float())


# ---- writing --------------------------------------------------------------------------------------------------------------

RECIPE = """
name: blocks
summary: codes that GGUF holds
needs_data: false
schemes:
  linear: "weight=int4 group=32 sym scale=f16; activation=float"
  embedding: "weight=int8 channel=0 sym scale=f16; activation=float"
  layers:
    "*up_proj": "weight=int8 group=32 sym scale=f16; activation=float"
    "*down_proj": "weight=ternary channel=0 sym scale=f16; activation=float"
    "*v_proj": float
pipeline: [canonicalize, fold-constants, recognize-attention, assign-bits, insert-quantizers, quantize-weights, materialize, fuse-epilogue]
"""


def tokenizer_json() -> bytes:
    """A byte-level BPE of 39 tokens that splits as GPT-2 does; token 3 is special."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")
    letters = ["e", "t", "\u0120", "<end>", *"abcdfghijklmnopqrsuvwxyz.,'", "\u0120t", "he", "\u0120the", "in", "er", "an", "at", "on"]
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("i", "n"), ("e", "r"), ("a", "n"), ("a", "t"), ("o", "n")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: n for n, name in enumerate(letters)}, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return bytes(made.to_str().encode())


@pytest.fixture(scope="module")
def written(llama_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, qcompile.Artifact]:
    """A folder for files, with model.gguf as it was written from an artifact."""
    from qcompile.interchange.export import export_gguf

    folder = tmp_path_factory.mktemp("written")
    llama_of(**SIZES).write(folder / "float", {}, {})
    (folder / "float" / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "recipe.yaml").write_text(RECIPE)
    artifact = qcompile.compile(folder / "float", recipe=folder / "recipe.yaml", target="reference")
    done = export_gguf(artifact, folder / "model.gguf", "model.qc")
    assert (done.codes, done.floats, done.notes) == (8, {}, [])
    return folder, artifact


def test_a_written_file_is_compiled_and_written_again_as_the_same_bytes(written: Any, cli: Any) -> None:
    folder, artifact = written
    again = qcompile.compile(folder / "model.gguf", target="reference")
    assert torch.equal(torch.as_tensor(again(TOKENS)), torch.as_tensor(artifact(TOKENS)))
    again.save(folder / "again.qc")
    done = cli("export", folder / "again.qc", "--format", "gguf", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) | {"bytes": 0} == {
        "file": str(folder / "again.gguf"), "format": "gguf", "bytes": 0, "codes": 8, "floats": {}, "notes": []
    }  # fmt: skip
    assert (folder / "again.gguf").read_bytes() == (folder / "model.gguf").read_bytes()


def test_the_types_of_a_written_file(written: Any) -> None:
    tensors = GgufFile(written[0] / "model.gguf").tensors
    types = {name.removeprefix("blk.0.").removesuffix(".weight"): info.type for name, info in tensors.items()}
    q4, q8, tq2 = (BY_NAME[name].number for name in ("Q4_0", "Q8_0", "TQ2_0"))
    assert types == {
        "token_embd": q8, "output": q4, "output_norm": 0, "attn_norm": 0, "ffn_norm": 0, "attn_q": q4, "attn_k": q4, "attn_v": 0,
        "attn_output": q4, "ffn_gate": q4, "ffn_up": q8, "ffn_down": tq2,
    }  # fmt: skip


def test_the_tokenizer_comes_back(written: Any) -> None:
    from tokenizers import Tokenizer

    folder, artifact = written
    before, after = (Tokenizer.from_str(data.decode()) for data in (artifact.tokenizer, read_gguf(folder / "model.gguf").tokenizer))
    for line in ("the cat in the hat<end> on, er", " he 's there.", ""):
        assert after.encode(line).ids == before.encode(line).ids
        assert after.decode(before.encode(line).ids) == before.decode(before.encode(line).ids)


def test_scales_that_are_no_float16_are_named(llama_of: Callable[..., Any], tmp_path: Path, cli: Any) -> None:
    llama_of(**SIZES).write(tmp_path / "float", {}, {})
    assert cli("compile", tmp_path / "float", "--recipe", "canonicalize, assign-bits{scheme=w4g32}, insert-quantizers, quantize-weights, "
               "materialize", "--target", "reference", "-o", tmp_path / "model.qc").code == 0  # fmt: skip
    done = cli("export", tmp_path / "model.qc", "--format", "gguf")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "no float16: compile with scale=f16 in the scheme" in done.err
    assert not (tmp_path / "model.gguf").exists()


def test_the_package_gguf_reads_the_same(written: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    folder, _ = written
    theirs, ours = gguf.GGUFReader(folder / "model.gguf"), GgufFile(folder / "model.gguf")
    assert {field.name for field in theirs.fields.values()} - set(ours.metadata) == {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value
    values = read_gguf(folder / "model.gguf").weights
    for tensor in theirs.tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(found, values["model.layers.0.mlp.down_proj.weight"].dequantize().numpy())


def test_llama_cpp_runs_a_written_file(written: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the package llama-cpp-python is not installed")
    folder, artifact = written
    model = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=64, n_batch=1, logits_all=True, verbose=False, n_threads=1)
    tokens = TOKENS[0].tolist()
    for token in tokens:  # one by one: batches take other kernels, which not every machine's build has
        model.eval([token])
    theirs, ours = torch.tensor(np.array(model.scores[: len(tokens)]))[:, :40], torch.as_tensor(artifact(TOKENS))[0]
    error = (theirs - ours).square().sum() / ours.square().sum()
    assert error < 1e-3  # llama.cpp rounds what a product of codes reads to 8 bits


# ---- bad files ------------------------------------------------------------------------------------------------------------


def swapped(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


def entry(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


TABLE = struct.pack("<IQQI", 2, 256, 40, 12)  # rank, sizes and type of token_embd.weight


def table(rank: int, columns: int, rows: int, kind: int) -> Callable[[bytes], bytes]:
    return lambda data: swapped(data, TABLE, struct.pack("<IQQI", rank, columns, rows, kind))


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no file of this kind": (lambda d: b"GGML" + d[4:], "no GGUF file"),
    "empty": (lambda d: b"", "no GGUF file"),
    "big endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "version 50331648"),
    "version 1": (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1"),
    "tensors without end": (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "ends inside of .* tensors"),
    "entries without end": (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "ends inside of .* entries"),
    "long key": (lambda d: d[:24] + struct.pack("<Q", 1 << 40) + d[32:], "a name of"),
    "long text": (lambda d: swapped(d, text("llama"), struct.pack("<Q", 1 << 40) + b"llama"), "ends inside of a text|a name of"),
    "architecture": (lambda d: swapped(d, text("llama"), text("mamba")), "architecture 'mamba'"),
    "no heads": (lambda d: swapped(d, entry("llama.attention.head_count", 4), entry("llama.attention.head_count", 0)), "head_count is 0"),
    "many blocks": (lambda d: swapped(d, entry("llama.block_count", 1), entry("llama.block_count", 1 << 20)), "say 1048576 blocks"),
    "wide": (lambda d: swapped(d, entry("llama.embedding_length", 256), entry("llama.embedding_length", 512)), "of 512"),
    "other heads": (lambda d: swapped(d, entry("llama.attention.head_count", 4), entry("llama.attention.head_count", 2)), "attn_k|k_proj"),
    "block type": (table(2, 256, 40, 22), "token_embd.weight: .*22"),
    "sizes": (table(2, 1 << 33, 1 << 33, 12), "token_embd.weight: .*fit"),
    "rank": (table(900, 256, 40, 12), "token_embd.weight: .*900"),
    "columns": (table(2, 255, 40, 12), "token_embd.weight: .*divide"),
    "rows": (lambda d: swapped(d, struct.pack("<IQQI", 2, 256, 512, 2), struct.pack("<IQQI", 2, 256, 256, 2)), "gate_proj"),
    "cut data": (lambda d: d[:-64], "beyond the file's end"),
    "name": (lambda d: swapped(d, text("blk.0.ffn_up.weight"), text("blk.0.ffn_xx.weight")), "blk.0.ffn_xx.weight: .*no place"),
    "missing": (lambda d: swapped(d, text("output_norm.weight"), text("output.weight_norm")), "output.weight_norm"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_by_name(file: Path, tmp_path: Path, what: str) -> None:
    change, message = BAD[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(file.read_bytes()))
    with pytest.raises(Refused, match=message) as caught:
        qcompile.compile(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_headers_are_read_or_refused_and_nothing_else(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    path = tmp_path / "bad.gguf"
    random = np.random.default_rng(0)
    head = 1200
    refused = 0
    for number in range(200):
        damaged = bytearray(data[: head + 4000] if number % 4 == 0 else data)
        for place in random.integers(0, head, 1 + number % 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except Refused:
            refused += 1
    assert refused > 50


def test_metadata_of_every_type_come_back(tmp_path: Path) -> None:
    metadata = {"a": True, "b": 7, "c": 0.5, "d": "text \u0120", "e": ["x", ""], "f": [1, 2], "g": Typed(5, [-1, 2]), "h": Typed(12, 1e300),
                "i": Typed(0, 255), "j": [], "k": [0.25, 0.5]}  # fmt: skip
    (tmp_path / "m.gguf").write_bytes(write_gguf(metadata, [("t", (2, 3), 0, bytes(24))]))
    found = GgufFile(tmp_path / "m.gguf")
    assert found.metadata == {key: value.value if isinstance(value, Typed) else value for key, value in metadata.items()}
    assert found.tensors["t"].shape == (2, 3)
    assert bytes(found.read("t", 24)) == bytes(24)

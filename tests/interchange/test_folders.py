"""GPTQ, AWQ and compressed-tensors folders: codes arrive bit for bit, and the model computes what they mean.

The packers here are written from the formats' descriptions, one code at a time.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompile
from qcompile import Refused
from qcompile.formats import parse_scheme
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.interchange import StoredWeight, read_folder

TOKENS = torch.tensor([[1, 5, 9, 100, 0, 7, 22]])


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Lay codes [rows, n] end to end in words of 32 bits, the first code lowest."""
    rows = []
    for row in codes:
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return np.array(rows, dtype=np.uint32).view(np.int32)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def pack_gptq(q: Any, bits: int, *, less: int, ordered: bool) -> dict[str, np.ndarray]:
    stored = (q.zero - less) % 2**bits
    packed = {"qweight": words(q.codes, bits).T, "qzeros": words(stored.T, bits), "scales": q.scale.T}
    return packed | ({"g_idx": q.group.astype(np.int32)} if ordered else {})


def pack_awq(q: Any) -> dict[str, np.ndarray]:
    def mixed(rows: np.ndarray) -> np.ndarray:
        place = np.concatenate([8 * block + np.array([0, 2, 4, 6, 1, 3, 5, 7]) for block in range(rows.shape[1] // 8)])
        return words(rows[:, place], 4)

    return {"qweight": mixed(q.codes.T), "qzeros": mixed(q.zero.T), "scales": q.scale.T}


def pack_compressed(q: Any, bits: int, *, symmetric: bool, ordered: bool) -> dict[str, np.ndarray]:
    packed = {"weight_packed": words(q.codes, bits), "weight_scale": q.scale, "weight_shape": np.array(q.codes.shape)}
    packed |= {} if symmetric else {"weight_zero_point": words(q.zero.T, bits).T}
    return packed | ({"weight_g_idx": q.group.astype(np.int32)} if ordered else {})


def gptq(bits: int, size: int, **options: Any) -> tuple[dict[str, Any], Callable[[Any], dict[str, np.ndarray]]]:
    less = 0 if options.get("checkpoint_format") == "gptq_v2" else 1
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, **options}
    return settings, lambda q: pack_gptq(q, bits, less=less, ordered="desc_act" in options)


def awq(size: int) -> tuple[dict[str, Any], Callable[[Any], dict[str, np.ndarray]]]:
    return {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}, pack_awq


def compressed(bits: int, size: int | None, symmetric: bool, actorder: str | None = None) -> Any:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if size else "channel", "group_size": size,
               "actorder": actorder}  # fmt: skip
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    return settings, lambda q: pack_compressed(q, bits, symmetric=symmetric, ordered=actorder == "group")


# name -> settings and packer, bits, group size (0: whole rows), options of the random codes, scheme that is read
CASES: dict[str, tuple[Any, int, int, dict[str, Any], str]] = {
    "gptq": (gptq(4, 32), 4, 32, {}, "uint4 group=32 affine scale=f16"),
    "gptq-sym": (gptq(4, 32, sym=True), 4, 32, {"symmetric": True}, "int4 group=32 sym scale=f16"),
    "gptq-order": (gptq(4, 32, desc_act=True), 4, 32, {"shuffled": True}, "uint4 group=32 affine scale=f16"),
    "gptq-v2": (gptq(8, -1, checkpoint_format="gptq_v2"), 8, 0, {}, "uint8 channel=0 affine scale=f16"),
    "gptq-3": (gptq(3, 32, desc_act=False), 3, 32, {}, "uint3 group=32 affine scale=f16"),
    "awq": (awq(32), 4, 32, {}, "uint4 group=32 affine scale=f16"),
    "compressed": (compressed(4, 32, True), 4, 32, {"symmetric": True, "dtype": np.float32}, "int4 group=32 sym"),
    "compressed-affine": (compressed(4, 32, False), 4, 32, {}, "int4 group=32 affine scale=f16"),
    "compressed-8": (compressed(8, None, True), 8, 0, {"symmetric": True}, "int8 channel=0 sym scale=f16"),
    "compressed-5": (compressed(5, 32, False), 5, 32, {}, "int5 group=32 affine scale=f16"),
    "compressed-order": (compressed(4, 32, False, "group"), 4, 32, {"shuffled": True}, "int4 group=32 affine scale=f16"),
}


@pytest.fixture
def folder_of(tmp_path: Path, llama: Any, request: pytest.FixtureRequest) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Return the folder of a case, and the codes that its layers hold."""
    random_codes = request.getfixturevalue("random_codes_of")

    def make(case: str) -> tuple[Path, dict[str, Any]]:
        (settings, pack), bits, size, options, _ = CASES[case]
        codes, tensors = {}, {}
        for number, layer in enumerate(llama.layers):
            shape = tuple(llama.weights[f"{layer}.weight"].shape)
            codes[layer] = random_codes(shape, bits, size or shape[1], seed=number, **options)
            tensors |= {f"{layer}.{name}": tensor(value) for name, value in pack(codes[layer]).items()}
        return llama.write(tmp_path / case, settings, tensors), codes

    return make


@pytest.mark.parametrize("case", CASES)
def test_codes_and_values_arrive_bit_for_bit(folder_of: Any, llama: Any, case: str) -> None:
    folder, codes = folder_of(case)
    checkpoint = read_folder(folder)
    assert checkpoint.end_tokens == (3,)
    assert "quantization_config" not in checkpoint.config
    assert set(checkpoint.weights) == set(llama.weights)
    for layer, q in codes.items():
        weight = checkpoint.weights[f"{layer}.weight"]
        assert isinstance(weight, StoredWeight)
        assert str(weight.quantized.scheme) == CASES[case][4]
        found = weight.quantized.codes.numpy().astype(np.int32)
        found = found + (2 ** (weight.quantized.scheme.bits - 1) if weight.quantized.codes.dtype == torch.int8 else 0)
        assert (weight.order is not None) == ("order" in case)
        expected = q.codes if weight.order is None else q.codes[:, weight.order]
        assert (found == expected).all()
        assert torch.equal(weight.dequantize(), q.values)


@pytest.mark.parametrize("case", ["gptq-order", "awq", "compressed-8"])
def test_a_compiled_folder_keeps_the_codes_and_computes_them(folder_of: Any, llama: Any, case: str) -> None:
    folder, codes = folder_of(case)
    artifact = qcompile.compile(folder, target="cpu" if case == "gptq-order" else "reference")
    kept = {bound_arguments(node)["weight"].target: node for node in artifact.graph.nodes if node.op == "call_function"
            and operator_name(node.target) == "qc.linear"}  # fmt: skip
    assert len(kept) == len(codes)
    for layer, q in codes.items():
        name = f"model.{layer}.weight{'_scaled' if 'order' in case else ''}_codes"
        arguments = bound_arguments(kept[name])
        scheme = parse_scheme(arguments["weight_scheme"])
        stored = scheme.format.unpack(artifact.graph.constant(arguments["weight"]), arguments["in_features"]).numpy().astype(np.int32)
        order = np.argsort(q.group, kind="stable")
        assert (stored + (2 ** (scheme.bits - 1) if scheme.format.signed else 0) == q.codes[:, order]).all()
    expected = llama.logits(TOKENS, {f"{layer}.weight": q.values for layer, q in codes.items()})
    assert (torch.as_tensor(artifact(TOKENS)) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert artifact.config["hidden_size"] == 64
    assert "stored" in artifact.recipe


def test_biases_of_zero_and_stored_angles_are_left_out(folder_of: Any, llama: Any) -> None:
    folder, codes = folder_of("awq")
    extra = {f"{layer}.bias": torch.zeros(len(q.codes)) for layer, q in codes.items()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    changed_tensors(folder, lambda tensors: tensors.update(extra))
    assert not [name for name in qcompile.compile(folder, target="reference").graph.constants if "bias" in name]
    changed_tensors(folder, lambda tensors: tensors[next(iter(extra))].fill_(1))
    with pytest.raises(Refused, match=r"_proj\.bias: .*no such weight"):
        qcompile.compile(folder, target="reference")


def test_another_recipe_quantizes_the_values_again(folder_of: Any) -> None:
    folder, _ = folder_of("awq")
    artifact = qcompile.compile(folder, recipe="w8a8-dynamic", target="reference")
    assert {layer["weight"] for layer in artifact.report["layers"]} == {"int8 channel=0 sym"}


def test_codes_are_refused_where_a_pass_has_changed_the_weight(folder_of: Any) -> None:
    from qcompile.capture import capture
    from qcompile.pipeline import Context
    from qcompile.registry import find_pass, find_target

    folder, codes = folder_of("compressed")
    graph = capture(str(folder)).graph
    name = f"model.{next(iter(codes))}.weight"
    node = graph.node(name)
    value = graph.constant(node).clone()
    value[0, 0] += 1
    graph.set_constant(node, value)
    with pytest.raises(Refused, match=f"{name}.*changed the weight"):
        find_pass("keep-codes")().run(graph, Context(find_target("reference")))


# ---- bad folders ----------------------------------------------------------------------------------------------------------


def changed_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def changed_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


LAYER = "model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "method": ("awq", lambda f: changed_config(f, quant_method="vptq"), "quantized by 'vptq'"),
    "awq version": ("awq", lambda f: changed_config(f, version="gemv"), "version 'gemv'"),
    "gptq bits": ("gptq", lambda f: changed_config(f, bits=5), "5 bits"),
    "gptq format": ("gptq", lambda f: changed_config(f, checkpoint_format="marlin"), "'marlin'"),
    "group size": ("gptq", lambda f: changed_config(f, group_size=48), "_proj: scales are"),
    "negative group": ("gptq", lambda f: changed_config(f, group_size=-7), "group size of -7"),
    "no scales": ("gptq", lambda f: changed_tensors(f, lambda t: t.pop(f"{LAYER}.scales")), f"{LAYER}.scales: .*no such tensor"),
    "zeros": ("awq", lambda f: changed_tensors(f, lambda t: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"][:1].clone()})),
              f"{LAYER}: .*zero points"),
    "dtype": ("awq", lambda f: changed_tensors(f, lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()})),
              f"{LAYER}.qweight: .*float32"),
    "group index": ("gptq-order", lambda f: changed_tensors(f, lambda t: t[f"{LAYER}.g_idx"].fill_(1)), f"{LAYER}: g_idx gives"),
    "group beyond": ("gptq-order", lambda f: changed_tensors(f, lambda t: t[f"{LAYER}.g_idx"].fill_(9)), f"{LAYER}: g_idx does not"),
    "shape": ("compressed", lambda f: changed_tensors(f, lambda t: t[f"{LAYER}.weight_shape"].fill_(1 << 40)), f"{LAYER}: weight_shape"),
    "wide shape": ("compressed", lambda f: changed_tensors(f, lambda t: t[f"{LAYER}.weight_shape"].copy_(torch.tensor([64, 1 << 40]))),
                   f"{LAYER}: .*are no scales"),
    "packed format": ("compressed", lambda f: changed_config(f, config_groups={"a": {"targets": ["Linear"], "format": "float-quantized"}}),
                      "float-quantized"),
    "no target": ("compressed", lambda f: changed_config(f, config_groups={"a": {"targets": ["re:nothing"]}}), "no config group"),
    "activations": ("compressed", lambda f: changed_config(f, config_groups={"a": {"targets": ["Linear"], "input_activations": {"a": 1}}}),
                    "activations are quantized"),
    "cut file": ("awq", lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors"),
    "no file": ("awq", lambda f: (f / "model.safetensors").unlink(), "model.safetensors: .*missing"),
    "traversal": ("awq", lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
                  "does not map"),
    "missing shard": ("awq", lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}'),
                      "other.safetensors: .*missing"),
    "lost weight": ("awq", lambda f: changed_tensors(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight: .*missing"),
    "foreign weight": ("awq", lambda f: changed_tensors(f, lambda t: t.update({"model.extra": torch.ones(2)})), "model.extra: .*no such"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_refused_by_name(folder_of: Any, what: str) -> None:
    case, break_, message = BAD[what]
    folder, _ = folder_of(case)
    break_(folder)
    with pytest.raises(Refused, match=message) as caught:
        qcompile.compile(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# ---- writing compressed-tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["compressed", "compressed-affine", "awq"])
def test_a_written_folder_holds_the_same_words(folder_of: Any, tmp_path: Path, cli: Any, case: str) -> None:
    folder, codes = folder_of(case)
    qcompile.compile(folder, target="reference").save(tmp_path / "model.qc")
    done = cli("export", tmp_path / "model.qc", "--format", "compressed-tensors", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["codes"] == len(codes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer, q in codes.items():
        assert (tensors[f"{layer}.weight_packed"].numpy() == words(q.codes, q.codes.max().item().bit_length())).all()
        assert (tensors[f"{layer}.weight_scale"].numpy() == q.scale.astype(np.float32)).all()
        if case != "compressed":
            assert (tensors[f"{layer}.weight_zero_point"].numpy() == words(q.zero.T, 4).T).all()
    again = read_folder(tmp_path / "out")
    for layer, q in codes.items():
        assert torch.equal(again.stored[f"{layer}.weight"].dequantize(), q.values)


@pytest.mark.parametrize("case", ["compressed", "compressed-affine"])
def test_transformers_loads_what_was_written(folder_of: Any, tmp_path: Path, case: str) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig

    from qcompile.interchange.export import export_compressed_tensors

    folder, _ = folder_of(case)
    artifact = qcompile.compile(folder, target="reference")
    export_compressed_tensors(artifact, tmp_path / "out", "model.qc")
    # Weights that stay compressed in memory have no packed zero points in transformers 5.23 with compressed-tensors 0.20.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if case == "compressed-affine" else {}
    with warnings.catch_warnings(action="ignore"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    expected = torch.as_tensor(artifact(TOKENS))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_activations_in_codes_are_not_written(llama: Any, tmp_path: Path) -> None:
    from qcompile.interchange.export import export_compressed_tensors

    llama.write(tmp_path / "float", {}, {})
    artifact = qcompile.compile(tmp_path / "float", recipe="w8a8-dynamic", target="reference")
    with pytest.raises(Refused, match="activations or the cache are quantized"):
        export_compressed_tensors(artifact, tmp_path / "out", "model.qc")
    assert not (tmp_path / "out").exists()


def test_a_model_that_passes_have_changed_is_not_written(folder_of: Any, tmp_path: Path) -> None:
    from qcompile.interchange.export import export_compressed_tensors

    artifact = qcompile.compile(folder_of("compressed")[0], target="reference")
    norm = artifact.graph.node("model.model.norm.weight")
    artifact.graph.set_constant(norm, artifact.graph.constant(norm) * 1.001)
    with pytest.raises(Refused, match=r"outputs would agree to .* dB only"):
        export_compressed_tensors(artifact, tmp_path / "out", "model.qc")
    assert not (tmp_path / "out").exists()

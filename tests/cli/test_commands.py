"""The other commands: what each prints, its JSON, its exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile
from qcompile.cli.main import COMMANDS

Cli = Callable[..., Any]


def test_run_prints_and_writes_outputs(cli: Cli, saved: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "x.npy", x)
    expected = qcompile.load(saved)(x)
    for file in ("x.npz", "x.npy"):
        done = cli("run", saved, "--input", tmp_path / file, "-o", tmp_path / "y.npz", "--json")
        assert done.code == 0
        assert np.array_equal(np.load(tmp_path / "y.npz")["output0"], expected)
        (output,) = done.json["outputs"]
        assert (output["name"], output["dtype"], output["shape"]) == ("output0", "float32", [3, 4])
        assert output["max"] == pytest.approx(float(expected.max()))
    text = cli("run", saved)
    assert text.code == 0
    assert text.out.startswith("output0: float32[1, 4] mean ")


def test_inspect(cli: Cli, saved: Path) -> None:
    done = cli("inspect", saved, "--json")
    assert done.code == 0
    assert {"layers", "float_ops", "bits_per_weight", "bytes"} <= set(done.json)
    assert [set(layer) for layer in done.json["layers"]] == [
        {"name", "op", "weight", "activation", "bits_per_weight", "sqnr_db", "ms", "reason"}
    ] * 2
    assert [layer["name"] for layer in done.json["layers"]] == ["first", "second"]
    assert all(25 < layer["sqnr_db"] < 70 for layer in done.json["layers"])
    assert done.json["bytes"] == saved.stat().st_size
    assert done.json["bits_per_weight"] == pytest.approx(
        (256 * 8 + 32 * 32 + 128 * 8 + 4 * 32) / 384, abs=1e-3
    )  # codes and a f32 scale a row
    assert all(set(item) == {"node", "op", "reason"} and item["reason"] for item in done.json["float_ops"])
    text = cli("inspect", saved)
    assert "int8 channel=0 sym" in text.out
    assert cli("inspect", saved, "--graph").out.count("qc.linear(") == 2


def test_inspect_shows_the_entries_of_a_decoder(cli: Cli, tiny_artifact: Any, tmp_path: Path) -> None:
    path = tmp_path / "decoder.qc"
    tiny_artifact("language_model", "float").save(path)
    found = {entry["name"]: entry for entry in cli("inspect", path, "--no-times", "--json").json["entries"]}
    assert list(found) == ["main", "prefill", "decode"]
    assert found["main"]["outputs"] == [{"name": "output0", "type": "f32[batch,seq,20]"}]
    caches = [{"name": name, "type": "f32[batch,capacity,8]"} for name in ("key_0", "value_0")]
    assert found["decode"]["inputs"][1:] == [{"name": "past", "type": "i64[batch]"}, *caches]
    assert found["prefill"]["outputs"] == [{"name": "logits", "type": "f32[batch,20]"}, *caches]
    lines = [line for line in cli("inspect", path, "--no-times").out.splitlines() if line.startswith("entry ")]
    assert lines[2].startswith("entry decode(tokens i64[batch,1], past i64[batch], key_0 f32[batch,capacity,8], value_0 f32")


def test_inspect_gives_the_reason_of_float_layers(cli: Cli, tiny_artifact: Any, tmp_path: Path) -> None:
    tiny_artifact("two", "float").save(tmp_path / "f.qc")
    found = cli("inspect", tmp_path / "f.qc", "--json").json
    assert all(layer["weight"] == "float32" and layer["reason"] for layer in found["layers"])
    assert {item["op"] for item in found["float_ops"]} >= {"aten.linear", "aten.add.Tensor"}


def test_diff(cli: Cli, saved: Path, tiny_artifact: Any, tmp_path: Path) -> None:
    tiny_artifact("mlp", "w4a8").save(tmp_path / "w4.qc")
    found = cli("diff", saved, tmp_path / "w4.qc", "--json").json
    assert [row["name"] for row in found["layers"]] == ["first", "second"]
    assert "int8" in found["layers"][0]["left"]
    assert "int4" in found["layers"][0]["right"]
    assert 5 < found["outputs_sqnr_db"][0] < 40
    same = cli("diff", saved, saved)
    assert "0 layers differ" in same.out
    assert "equal bit for bit" in same.out


def test_verify(cli: Cli, saved: Path, tmp_path: Path) -> None:
    done = cli("verify", saved, "--json")
    assert done.code == 0
    assert (done.json["ok"], done.json["first_mismatch"]) == (True, None)
    assert [layer["ok"] for layer in done.json["layers"]] == [True, True]
    assert cli("verify", saved).out.splitlines()[-1] == "ok"


@pytest.mark.parametrize("target", ["reference", "cpu", "onnx"])
@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8"])
def test_verify_probes_layers_whose_scales_come_at_run_time(cli: Cli, tiny_artifact: Any, tmp_path: Path, recipe: str, target: str) -> None:
    tiny_artifact("mlp", recipe).save(tmp_path / "dynamic.qc")
    done = cli("verify", tmp_path / "dynamic.qc", "--target", target, "--json")
    assert (done.code, [layer["ok"] for layer in done.json["layers"]]) == (0, [True, True])


@pytest.mark.parametrize("wrong", ["probe", "golden"])
def test_verify_names_what_differs(cli: Cli, saved: Path, tmp_path: Path, wrong: str) -> None:
    artifact = qcompile.load(saved)
    if wrong == "probe":
        name = list(artifact.report["probes"])[1]
        artifact.report["probes"][name] = "0" * 64
    else:
        name = "output output0"
        artifact.golden_outputs = [output + 1 for output in artifact.golden_outputs]
    artifact.save(tmp_path / "wrong.qc")
    done = cli("verify", tmp_path / "wrong.qc", "--json")
    assert done.code == 1
    assert (done.json["ok"], done.json["first_mismatch"]) == (False, name)
    assert f"FAILED, first mismatch: {name}" in cli("verify", tmp_path / "wrong.qc").out


def test_bench(cli: Cli, saved: Path) -> None:
    done = cli(
        "bench", saved, "--against", "torch,onnxruntime", "--rounds", 2, "--calls", 1, "--threads", 1, "--shape", "batch=3", "--json"
    )
    assert done.code == 0, done.err
    assert [run["name"] for run in done.json["runs"]] == ["qcompile", "torch", "onnxruntime"]
    for run in done.json["runs"]:
        assert set(run) == {"name", "median_ms", "min_ms", "p90_ms", "threads"}
        assert 0 < run["min_ms"] <= run["median_ms"] <= run["p90_ms"]
        assert run["threads"] == 1
    assert set(done.json["speedup"]) == {"torch", "onnxruntime"}
    assert done.json["inputs"] == {"x": [3, 8]}
    assert (done.json["limits"], done.json["operators"]) == (None, None)
    assert "qcompile is " in cli("bench", saved, "--against", "torch", "--rounds", 1, "--calls", 1).out


def test_what_a_peer_prints_stays_out_of_the_document(cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.peers import onnx_runtime

    prepare = onnx_runtime.prepare_float
    monkeypatch.setattr(onnx_runtime, "prepare_float", lambda *given: print("100 %") or prepare(*given))
    done = cli("bench", saved, "--against", "onnxruntime", "--rounds", 1, "--calls", 1, "--json")
    assert (done.code, "100 %" in done.err, set(done.json["speedup"])) == (0, True, {"onnxruntime"})


def test_bench_measures_memory_and_draws(cli: Cli, saved: Path, tmp_path: Path) -> None:
    few = ("--rounds", 1, "--calls", 2, "--against", "onnxruntime,torch", "--plot")
    done = cli("bench", saved, "--memory", *few, tmp_path / "bench.svg", "--json")
    assert done.code == 0, done.err
    memory = {run["name"]: run["peak_memory_bytes"] for run in done.json["runs"]}
    assert memory["torch"] is None  # it has no file that another process could load
    assert 20e6 < memory["onnxruntime"] < memory["qcompile"] < 2e9
    drawn = (tmp_path / "bench.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")
    assert cli("bench", saved, *few, tmp_path / "bench.png").code == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    refused = cli("bench", saved, *few, tmp_path / "bench.bmp")
    assert (refused.code, "end it in .png or .svg" in refused.err) == (2, True)


@pytest.mark.parametrize("task", ["sqnr", "kl"])
def test_evaluate(cli: Cli, saved: Path, tiny: Any, tmp_path: Path, task: str) -> None:
    x = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    done = cli("evaluate", saved, "--task", task, "--data", tmp_path / "x.npy", "--limit", 10, "--json")
    assert done.code == 0
    assert {"task", "value", "unit", "samples", "float_value"} <= set(done.json)
    assert (done.json["task"], done.json["samples"]) == (task, 10)
    with torch.no_grad():
        exact, found = tiny.mlp()[0](torch.from_numpy(x[:10])).double(), qcompile.load(saved)(torch.from_numpy(x[:10])).double()
    sqnr = 10 * torch.log10(exact.square().sum() / (exact - found).square().sum())
    p, q = exact.softmax(-1), found.softmax(-1)
    expected = sqnr if task == "sqnr" else (p * (p / q).log()).sum(-1).mean()
    assert done.json["value"] == pytest.approx(float(expected), rel=1e-3)
    assert cli("evaluate", saved, "--task", task).code == 0


def test_evaluate_needs_the_float_model(cli: Cli, saved: Path, mlp: str, tmp_path: Path) -> None:
    artifact = qcompile.load(saved)
    artifact.report["notes"] = [["x", "unlike the other"]]
    artifact.save(tmp_path / "moved.qc")
    done = cli("evaluate", tmp_path / "moved.qc")
    assert done.code == 2
    assert "give --model MODEL" in done.err
    assert cli("evaluate", tmp_path / "moved.qc", "--model", mlp).code == 0


def test_export(cli: Cli, saved: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = cli("export", saved, "-o", tmp_path / "m.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json == {"file": str(tmp_path / "m.onnx"), "format": "onnx", "bytes": (tmp_path / "m.onnx").stat().st_size}
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x})
    assert np.allclose(found, qcompile.load(saved)(x), atol=1e-5)  # the same codes, float sums in another order


@pytest.mark.parametrize(
    ("command", "known"),
    [("passes", "materialize"), ("recipes", "w8a8"), ("targets", "reference"), ("formats", "int4"), ("solvers", "gptq"), ("methods", "")],
)
def test_lists(cli: Cli, command: str, known: str) -> None:
    done = cli(command, "--json")
    assert done.code == 0
    assert all(row["name"] and isinstance(row["summary"], str) for row in done.json)
    names = [row["name"] for row in done.json]
    assert len(names) == len(set(names))
    assert known in names or command == "methods"
    text = cli(command)
    assert text.code == 0
    assert all(name in text.out for name in names)


def test_lists_tell_more(cli: Cli) -> None:
    passes = {row["name"]: row for row in cli("passes", "--json").json}
    assert (passes["materialize"]["stage"], passes["materialize"]["gives"]) == ("simulated", "integer")
    assert passes["fuse-epilogue"]["keeps"] == "bits"
    assert passes["insert-quantizers"]["options"]["range"] == "minmax"
    targets = {row["name"]: row for row in cli("targets", "--json").json}
    assert any(kernel["operator"] == "qc.linear" and 8 in kernel["weight_bits"] for kernel in targets["cpu"]["kernels"])
    formats = {row["name"]: row for row in cli("formats", "--json").json}
    assert (formats["int4"]["lowest"], formats["int4"]["highest"]) == (-8, 7)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert "--json" in done.out


def test_version_and_overview(cli: Cli) -> None:
    assert cli("--version").out.strip().endswith(qcompile.__version__)
    overview = cli("--help").out
    assert all(command in overview for command in ("compile", "evaluate", "methods"))

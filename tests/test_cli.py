"""The command line: what each command prints, its JSON, its exit codes, and one line for everything that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qcompile
from qcompile.cli.main import COMMANDS
from qcompile.source_notes import remember_source

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def python_model(repository: Path) -> Callable[[str], str]:
    return lambda name: f"python:{repository / 'tests' / 'tiny_models.py'}:{name}"


@pytest.fixture(scope="module")
def mlp(python_model: Callable[[str], str]) -> str:
    return python_model("mlp")


@pytest.fixture(scope="module")
def saved(tiny_artifact: Callable[..., qcompile.Artifact], mlp: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose float model is known on this machine."""
    path = tmp_path_factory.mktemp("saved") / "model.qc"
    tiny_artifact("mlp").save(path)
    remember_source(path, mlp)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))


# ---- compile --------------------------------------------------------------------------------------------------------------


def test_compile_writes_one_file_and_says_what_it_did(
    cli: Cli, mlp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("compile", mlp, "--target", "reference", "--calibrate", "random")
    assert done.code == 0
    assert files() == ["mlp.qc"]
    assert "mlp.qc: 0.0" in done.out
    assert "2 of 2 layers in low bits" in done.out
    steps = [line.partition("] ") for line in done.err.splitlines()]
    names = [text.partition("{")[0] for _, _, text in steps]
    assert [place for place, _, _ in steps] == [f"[{number}/{len(steps)}" for number in range(1, len(steps) + 1)]
    assert names == [item.name() for item in qcompile.load_recipe("w8a8").parsed_pipeline().passes]


def test_compile_json(cli: Cli, mlp: str, tmp_path: Path) -> None:
    done = cli("compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--json")
    assert done.code == 0
    assert done.err == ""
    assert done.json["artifact"] == str(tmp_path / "m.qc")
    assert done.json["bytes"] == (tmp_path / "m.qc").stat().st_size
    assert (done.json["recipe"], done.json["target"]) == ("w8a8-dynamic", "reference")
    assert done.json["seconds"] > 0
    assert done.json["weight_bytes"] == qcompile.load(tmp_path / "m.qc").report["bytes"]


def test_compile_without_data_warns(cli: Cli, mlp: str, tmp_path: Path) -> None:
    done = cli("compile", mlp, "--target", "reference", "-o", tmp_path / "m.qc")
    assert done.code == 0
    assert "reads calibration data and none was given: random inputs are used" in done.err


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a8", "w4a16", "float"])
def test_dry_run_predicts_and_writes_nothing(
    cli: Cli, python_model: Any, tiny_artifact: Any, tmp_path: Path, monkeypatch: Any, files: Any, recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("compile", python_model("wide"), "--recipe", recipe, "--target", "reference", "--dry-run", "--json")
    assert done.code == 0
    assert files() == []
    report = tiny_artifact("wide", recipe).report
    assert done.json["bytes"] == pytest.approx(report["bytes"], rel=0.01)
    assert done.json["float_bytes"] == pytest.approx(report["float_bytes"], rel=0.01)
    assert done.json["bits_per_weight"] == pytest.approx(report["bits_per_weight"], rel=0.01)
    assert done.json["peak_memory_bytes"] > 3 * report["float_bytes"]
    assert sum(kernel["count"] for kernel in done.json["kernels"]) == (0 if recipe == "float" else 3)
    assert {item["op"] for item in done.json["float_ops"]} <= {"aten.linear", "aten.relu", "aten.embedding"}
    text = cli("compile", python_model("wide"), "--recipe", recipe, "--target", "reference", "--dry-run")
    assert text.code == 0
    assert text.out.startswith("artifact     about ")


RECIPE = "name: mine\nneeds_data: false\npipeline: [canonicalize, assign-bits]\nschemes: {linear: W8A8-dynamic, conv2d: W8A8, layers: %s}\n"
WARNING = "schemes.layers['*secnd'] fits no layer; the nearest of the 2 layers are 'second', 'first'"


def test_a_pattern_that_fits_no_layer_is_shown_and_kept_in_the_report(cli: Cli, mlp: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE % '{"fir*": float, "*secnd": float}')
    arguments = "compile", mlp, "--recipe", tmp_path / "mine.yaml", "--target", "reference", "-o", tmp_path / "m.qc"
    text = cli(*arguments)
    assert text.code == 0
    assert text.err.splitlines()[-1] == f"warning: {WARNING}"
    assert qcompile.load(tmp_path / "m.qc").report["warnings"] == [WARNING]
    assert cli(*arguments, "--json").json["warnings"] == [WARNING]
    assert cli(*arguments, "--dry-run").err == f"warning: {WARNING}\n"
    assert cli(*arguments, "--dry-run", "--json").json["warnings"] == [WARNING]
    assert cli("inspect", tmp_path / "m.qc", "--json").json["warnings"] == [WARNING]
    assert f"warning: {WARNING}" in cli("inspect", tmp_path / "m.qc").out


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["compile", "dry run"])
def test_a_name_that_fits_no_layer_is_refused(cli: Cli, mlp: str, tmp_path: Path, files: Any, flags: tuple[str, ...]) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE % "{secnd: float}")
    done = cli("compile", mlp, "--recipe", tmp_path / "mine.yaml", "--target", "reference", "-o", tmp_path / "m.qc", *flags)
    assert done.code == 2
    assert "schemes.layers['secnd'] fits no layer; the nearest of the 2 layers are 'second', 'first'" in done.err
    assert files() == ["mine.yaml"]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a8", "w4a16", "dfq", "float"])
def test_recipes_that_ship_warn_of_nothing(cli: Cli, mlp: str, recipe: str) -> None:
    done = cli("compile", mlp, "--recipe", recipe, "--target", "reference", "--dry-run")
    assert (done.code, done.err) == (0, "")


def test_dump_writes_the_graph_after_every_pass(cli: Cli, mlp: str, tmp_path: Path) -> None:
    done = cli("compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--dump", tmp_path / "dump")
    assert done.code == 0
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names[0] == "000_capture.txt"
    assert names[1] == "001_canonicalize.txt"
    assert names[-1].endswith("_fuse_epilogue.txt")
    assert "aten.linear" in (tmp_path / "dump" / names[0]).read_text()
    assert "qc.linear" in (tmp_path / "dump" / names[-1]).read_text()


def test_print_after_prints_one_graph(cli: Cli, mlp: str, tmp_path: Path) -> None:
    done = cli(
        "compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--print-after", "insert-quantizers"
    )
    assert done.code == 0
    assert done.out.count("graph @main") == 1
    assert "graph @main simulated(" in done.out
    assert "quantizer(%x)" in done.out


def test_diff_prints_what_changed(cli: Cli, mlp: str, tmp_path: Path) -> None:
    done = cli("compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--diff")
    assert done.code == 0
    lines = done.out.splitlines()
    assert "+++ materialize" in lines
    assert any(line.startswith("-  %linear = aten.linear(") for line in lines)
    assert any(line.startswith("+") and "qc.linear(" in line for line in lines)


def test_stop_after_ends_early_and_writes_nothing(cli: Cli, mlp: str, tmp_path: Path, files: Any) -> None:
    done = cli(
        "compile",
        mlp,
        "--recipe",
        "w8a8-dynamic",
        "--target",
        "reference",
        "-o",
        tmp_path / "m.qc",
        "--stop-after",
        "assign-bits",
        "--print-after",
        "assign-bits",
    )
    assert done.code == 0
    assert "graph @main float(" in done.out
    assert files() == []
    wrong = cli("compile", mlp, "--stop-after", "asign-bits", "-o", tmp_path / "m.qc")
    assert wrong.code == 2
    assert "the pipeline has no pass 'asign-bits'" in wrong.err


def test_time_and_check_print_a_table(cli: Cli, mlp: str, tmp_path: Path) -> None:
    done = cli("compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--time", "--check")
    assert done.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()}
    changes, _, kept = rows["materialize"]
    assert int(changes) > 0
    assert float(kept) > 20
    assert rows["qc.linear-quantized"][:2] == ["2", "2"]  # tried, matched


def test_bisect_names_the_pass_that_loses_most(cli: Cli, mlp: str, tmp_path: Path, files: Any) -> None:
    pipeline = "canonicalize, assign-bits{scheme=W2A8-dynamic}, insert-quantizers, quantize-weights, materialize"
    done = cli("compile", mlp, "--recipe", pipeline, "--target", "reference", "-o", tmp_path / "m.qc", "--bisect")
    assert done.code == 0
    assert "the pass that loses most is insert-quantizers: it keeps " in done.out
    assert files() == []


def test_why_not_gives_the_reasons_of_rules(cli: Cli, python_model: Any, tmp_path: Path) -> None:
    done = cli(
        "compile", python_model("cnn"), "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--why-not", "relu"
    )
    assert done.code == 0
    assert "activation: %add_25 (aten.add.Tensor) is not qc.conv2d or qc.linear" in done.out
    none = cli(
        "compile", python_model("cnn"), "--recipe", "float", "--target", "reference", "-o", tmp_path / "m.qc", "--why-not", "nothing"
    )
    assert "no rule was tried at nothing" in none.out


def test_an_interrupt_is_resumable(cli: Cli, mlp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompile.compiler.build_report", interrupted)
    done = cli("compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc")
    assert done.code == 3
    assert done.err.splitlines()[-1] == "qcompile: interrupted; 'qcompile compile --resume' goes on where it stopped"
    monkeypatch.undo()
    assert cli("compile", mlp, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "m.qc", "--resume").code == 0


# ---- the other commands ---------------------------------------------------------------------------------------------------


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
    ("command", "known"), [("passes", "materialize"), ("recipes", "w8a8"), ("targets", "reference"), ("formats", "int4"), ("methods", "")]
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


# ---- refusals: exit code 2, one line, nothing written ---------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path: Path, saved: Path, tiny: Any) -> Path:
    """A folder of files that are not what they should be."""
    folder = tmp_path / "bad"
    folder.mkdir()
    module, examples, _ = tiny.mlp()
    torch.export.save(torch.export.export(module, examples), folder / "whole.pt2")
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    good = helper.make_model(helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight]), ir_version=9)
    odd = helper.make_model(helper.make_graph([helper.make_node("Frobnicate", ["x"], ["y"], name="frob")], "g", [x], [y]), ir_version=9)
    onnx.save(odd, folder / "unknown.onnx")
    data = good.SerializeToString()
    (folder / "cut.onnx").write_bytes(data[: len(data) // 2])
    (folder / "magic.onnx").write_bytes(b"\x89PNG" + data)
    (folder / "empty.onnx").write_bytes(b"")
    whole = (folder / "whole.pt2").read_bytes()
    (folder / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    (folder / "magic.pt2").write_bytes(b"GIF89a" + bytes(100))
    artifact = saved.read_bytes()
    (folder / "cut.qc").write_bytes(artifact[: len(artifact) // 2])
    (folder / "magic.qc").write_bytes(b"XX" + artifact[2:])
    np.savez(folder / "shape.npz", x=np.zeros((4, 9), np.float32))
    np.savez(folder / "name.npz", y=np.zeros((4, 8), np.float32))
    np.savez(folder / "nan.npz", x=np.full((4, 8), np.nan, np.float32))
    np.savez(folder / "objects.npz", x=np.array([None, {}]))
    (folder / "cut.npz").write_bytes((folder / "shape.npz").read_bytes()[:60])
    (folder / "text.txt").write_text("hello")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "raises.py").write_text("raise RuntimeError('no')\n")
    return folder


COMPILE = [
    ("absent.onnx", "there is no such file or folder"),
    ("BAD/cut.onnx", r"cut\.onnx"),
    ("BAD/magic.onnx", r"magic\.onnx"),
    ("BAD/empty.onnx", r"empty\.onnx"),
    ("BAD/unknown.onnx", "Frobnicate"),
    ("BAD/cut.pt2", r"cut\.pt2: no exported program, or a damaged one"),
    ("BAD/magic.pt2", r"magic\.pt2: no exported program, or a damaged one"),
    ("BAD/text.txt", "the kind of model is not known"),
    ("BAD/empty", "the folder holds no config.json"),
    ("BAD/broken", "the file is no JSON"),
    ("python:mlp", "write python:FILE_OR_MODULE:FUNCTION"),
    ("python:BAD/none.py:mlp", "there is no such file"),
    ("python:no.such.module:mlp", "the module cannot be imported"),
    ("python:BAD/raises.py:mlp", "the file cannot be imported: RuntimeError: no"),
    ("TINY:absent", "there is no function absent"),
    ("TINY:failing", r"failing\(\) failed: RuntimeError: out of ideas"),
    ("TINY:damaged", r"first\.weight: the weight holds NaN"),
    ("TINY:untraceable", r"tiny_models\.py:\d+: the model cannot be traced"),
    ("TINY:mlp --calibrate BAD/shape.npz", r"input 'x' is f32\[batch,8\].*, the data is f32\[4,9\]"),
    ("TINY:mlp --calibrate BAD/name.npz", "input 'x' is missing; it has y"),
    ("TINY:mlp --calibrate BAD/nan.npz", "input 'x' holds NaN or infinity"),
    ("TINY:mlp --calibrate BAD/objects.npz", r"objects\.npz"),
    ("TINY:mlp --calibrate BAD/cut.npz", r"cut\.npz"),
    ("TINY:mlp --calibrate absent.npz", "there is no such file"),
    ("TINY:mlp --calibrate nonsense", "'nonsense' is no calibration data"),
    ("TINY:mlp --calibrate random?sed=1", r"unknown option 'sed'; did you mean 'seed'\?"),
    ("TINY:mlp --recipe w8b8", r"unknown recipe 'w8b8'; did you mean 'w8a8'\?"),
    ("TINY:mlp --recipe absent.yaml", "there is no such recipe file"),
    ("TINY:mlp --recipe fold-batchnorm,smooth", r"unknown pass 'fold-batchnorm'; did you mean 'fold-batch-norm'\?"),
    ("TINY:mlp --recipe smooth{alhpa=1}", r"unknown option 'alhpa' of smooth; did you mean 'alpha'\?"),
    ("TINY:mlp --recipe assign-bits{scheme=W8B8},insert-quantizers", "unknown scheme name 'W8B8'"),
    ("TINY:mlp --recipe assign-bits{scheme=W8A9},insert-quantizers", "9"),
    ("TINY:mlp --recipe assign-bits,insert-quantizers{range=minmx}", "minmx"),
    ("TINY:mlp --recipe assign-bits,insert-quantizers,quantize-weights{solver=gtpq}", r"unknown solver 'gtpq'; did you mean 'gptq'\?"),
    ("TINY:mlp --target cpx", r"unknown target 'cpx'; did you mean 'cpu'\?"),
    (
        "TINY:cnn --target cpu --recipe assign-bits{scheme=W4A16},insert-quantizers",
        "cpu has no kernel for qc.conv2d with .*; the nearest that runs: weights of",
    ),
    ("TINY:spectrum --target cpu", r"fft_fft \(aten.fft_fft.default\) at .*tiny_models.py:\d+: this operator cannot be lowered"),
    ("TINY:spectrum --target cpu --recipe float", "this operator cannot be lowered"),
    ("TINY:mlp -o absent/model.qc", "absent: there is no such folder"),
    ("TINY:mlp -o /proc/model.qc", "cannot write here|cannot be written"),
    ("TINY:mlp -o .", "is a directory"),
    ("TINY:mlp --recip w8a8", "No such option '?--recip"),
    ("", "Missing argument 'MODEL'"),
]


@pytest.mark.parametrize(("line", "message"), COMPILE, ids=[case[0] or "nothing" for case in COMPILE])
def test_compile_refuses(
    cli: Cli, bad: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("TINY", f"python:{repository / 'tests' / 'tiny_models.py'}").replace("BAD", str(bad)) for word in line.split()]
    words += [] if "--target" in words else ["--target", "reference"]
    words += [] if "--calibrate" in words else ["--calibrate", "random"]
    before = files()
    refused(cli("compile", *words), message)
    assert files() == before


def refused(done: Any, message: str) -> None:
    """Check that a command ended with exit code 2 and one line of error that fits a pattern."""
    import re

    lines = [line for line in done.err.splitlines() if not line.startswith(("[", "calibrating on random data"))]
    assert done.code == 2, done.err
    assert len(lines) == 1, done.err
    assert lines[0].startswith("qcompile: ")
    assert "internal error" not in lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert done.out == ""


@pytest.mark.parametrize("command", ["run", "inspect", "verify", "tune", "bench", "evaluate", "export", "diff"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("BAD/cut.qc", "no qcompile artifact"),
        ("BAD/magic.qc", "damaged|artifact"),
        ("absent.qc", "there is no such file"),
        ("BAD/text.txt", "no qcompile artifact"),
    ],
)
def test_commands_refuse_damaged_artifacts(
    cli: Cli, bad: Path, saved: Path, tmp_path: Path, monkeypatch: Any, files: Any, command: str, file: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files()
    refused(cli(command, file.replace("BAD", str(bad)), *([saved] if command == "diff" else [])), message)
    assert files() == before


OTHERS = [
    ("run SAVED --input absent.npz", "there is no such file"),
    ("run SAVED --input BAD/text.txt", "no NumPy file, or a damaged one"),
    ("run SAVED --input BAD/objects.npz", "no NumPy file, or a damaged one"),
    ("run SAVED --input BAD/shape.npz", "x: axis 1 has size 9, expected 8"),
    ("run SAVED --input BAD/name.npz", "y: there is no such input"),
    ("run SAVED -o absent/y.npz", "cannot write here: No such file or directory"),
    ("run SAVED --target cpx", r"unknown target 'cpx'; did you mean 'cpu'\?"),
    ("bench SAVED --against onnxruntim", r"unknown runtime 'onnxruntim'; did you mean 'onnxruntime'\?"),
    ("bench SAVED --shape bach=2", r"'bach=2' is no size of a symbol; symbols: batch in 1\.\."),
    ("evaluate SAVED --task top1", "task top1 needs data"),
    ("evaluate SAVED --task sts --data absent.csv", "there is no such file"),
    ("evaluate SAVED --task accuracy", "Invalid value for '--task'"),
    ("export SAVED -o absent/m.onnx", "cannot write here: No such file or directory"),
    ("export SAVED --format gguf", "Invalid value for '--format'"),
    ("inspct SAVED", r"unknown command 'inspct'; did you mean 'inspect'\?"),
    ("inspect SAVED --jsn", "No such option"),
    ("--jsn", "No such option"),
]


@pytest.mark.parametrize(("line", "message"), OTHERS, ids=[case[0] for case in OTHERS])
def test_other_commands_refuse(
    cli: Cli, bad: Path, saved: Path, tmp_path: Path, monkeypatch: Any, files: Any, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files()
    refused(cli(*[word.replace("BAD", str(bad)).replace("SAVED", str(saved)) for word in line.split()]), message)
    assert files() == before


def test_an_error_of_the_program_is_one_line_and_no_refusal(cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.artifact.parse_graph", lambda *_: 1 / 0)
    monkeypatch.setattr("qcompile.verification.verify", lambda *_: 1 / 0)
    done = cli("methods", "--json")
    assert done.code == 0
    monkeypatch.setattr("qcompile.artifact.load", lambda *_, **__: 1 / 0)
    done = cli("inspect", saved)
    assert done.code == 1
    assert (
        done.err == "qcompile: internal error, please report it: ZeroDivisionError: division by zero (QCOMPILE_TRACEBACK=1 shows where)\n"
    )


def test_control_characters_of_a_name_are_not_printed(cli: Cli) -> None:
    done = cli("inspect", "model\x1b[31m\nred.qc")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert "\x1b" not in done.err


def test_a_closed_pipe_is_no_error(saved: Path) -> None:
    command = f"{sys.executable} -m qcompile.cli formats --json | head -c 5"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout == "[\n {\n"

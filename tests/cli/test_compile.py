"""``qcompile compile``: what it prints, its JSON, its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcompile

Cli = Callable[..., Any]


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

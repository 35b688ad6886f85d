"""Wrong use and bad input: exit code 2, one line, nothing written."""

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

Cli = Callable[..., Any]


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
    ("TINY:mlp -o .", "this is a folder; name a file"),
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
    ("export SAVED --format tflite", "Invalid value for '--format'"),
    ("export SAVED --format gguf", "holds no configuration of a Hugging Face model; compile it from a Hugging Face folder"),
    ("export SAVED --format compressed-tensors", "holds no configuration of a Hugging Face model"),
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

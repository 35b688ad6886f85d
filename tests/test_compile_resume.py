"""A compile that is killed leaves nothing half written, and ``--resume`` ends with the very bytes of one that nothing disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile.checkpoint import Checkpoints
from qcompile.compiler import Options, finish, run_compile

# Forks one process for each line of its input, {"arguments": [...], "kill": null or [FILE, N, WHEN]}: the process kills itself before
# or after the Nth time that it moves a finished file of this name in place. Prints the exit status of each.
DRIVER = """
import json, os, pathlib, signal, sys
import torch, qcompile.compiler
from qcompile.cli import main

# What a compile imports when it first needs it is imported here, once for all the forked processes.
qcompile.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), recipe="w4a8", target="reference", calibration=[(torch.zeros(1, 2),)])
place = pathlib.Path.replace

def die(file, number, when):
    left = [number]
    def replace(self, target):
        left[0] -= pathlib.Path(target).match(file)
        dies = pathlib.Path(target).match(file) and left[0] == 0
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = place(self, target)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    pathlib.Path.replace = replace

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        sys.argv = ["qcompile", *job["arguments"]]
        if job["kill"] is not None:
            die(*job["kill"])
        try:
            main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Driver:
    """Runs the command line in forked processes that kill themselves at a given moment."""

    def __init__(self, folder: Path) -> None:
        self.errors = (folder / "errors.txt").open("w+")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "QCOMPILE_CACHE": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment, text=True
        )

    def __call__(self, *arguments: object, kill: tuple[str, int, str] | None = None) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], "kill": kill}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline() or -99)

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("resume")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    driver = Driver(folder)
    yield folder, driver
    driver.close()


@pytest.fixture(scope="module")
def arguments(work: Any, repository: Path) -> list[object]:
    model = f"python:{repository / 'tests' / 'tiny_models.py'}:cnn"
    return ["compile", model, "--recipe", "w4a8", "--target", "reference", "--calibrate", work[0] / "data.npz", "-o"]


@pytest.fixture(scope="module")
def whole(work: Any, arguments: list[object]) -> bytes:
    folder, driver = work
    (folder / "whole").mkdir()
    assert driver(*arguments, folder / "whole" / "model.qc") == 0
    assert [item.name for item in (folder / "whole").iterdir()] == ["model.qc"]
    return (folder / "whole" / "model.qc").read_bytes()


def journal(output: Path) -> list[str]:
    path = output.with_name("model.qc.partial") / "journal.json"
    return json.loads(path.read_text())["passes"] if path.exists() else []


MOMENTS = {
    "inside the first constant": (("*.safetensors", 1, "before"), 0, False),
    "between two passes": (("journal.json", 7, "after"), 7, False),
    "inside a late graph": (("009.txt", 1, "before"), 9, False),
    "before the artifact is in place": (("model.qc", 1, "before"), 12, False),
    "after the artifact is in place": (("model.qc", 1, "after"), 12, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_gives_the_same_bytes(work: Any, arguments: list[object], whole: bytes, tmp_path: Path, moment: str) -> None:
    _, driver = work
    output = tmp_path / "model.qc"
    kill, done, written = MOMENTS[moment]
    assert driver(*arguments, output, kill=kill) == -9
    assert output.exists() == written
    assert not written or output.read_bytes() == whole
    assert len(journal(output)) == done
    assert driver(*arguments, output, "--resume") == 0
    assert output.read_bytes() == whole
    assert [item.name for item in tmp_path.iterdir()] == ["model.qc"]


def test_killed_twice_and_resumed_gives_the_same_bytes(work: Any, arguments: list[object], whole: bytes, tmp_path: Path) -> None:
    _, driver = work
    output = tmp_path / "model.qc"
    assert driver(*arguments, output, kill=("journal.json", 5, "before")) == -9
    assert driver(*arguments, output, "--resume", kill=("journal.json", 3, "after")) == -9
    assert len(journal(output)) == 7
    assert driver(*arguments, output, "--resume") == 0
    assert output.read_bytes() == whole


def test_without_resume_a_compile_starts_afresh(work: Any, arguments: list[object], whole: bytes, tmp_path: Path) -> None:
    _, driver = work
    output = tmp_path / "model.qc"
    assert driver(*arguments, output, kill=("journal.json", 5, "after")) == -9
    assert driver(*arguments, output, kill=("journal.json", 2, "after")) == -9
    assert len(journal(output)) == 2
    assert driver(*arguments, output) == 0
    assert output.read_bytes() == whole
    assert [item.name for item in tmp_path.iterdir()] == ["model.qc"]


# ---- in this process: what a resumed compile does -------------------------------------------------------------------------


class Stopped(Exception):
    pass


def compiled(tiny: Any, output: Path, *, stop: int | None = None, recipe: str = "w8a8", seed: int = 0, resume: bool = True) -> list[str]:
    """Compile the tiny net, breaking off before the pass of number ``stop``; return the passes that ran."""
    import torch

    ran: list[str] = []

    def progress(line: str) -> None:
        if line.startswith("["):
            if stop is not None and len(ran) == stop:
                raise Stopped
            ran.append(line.partition("] ")[2])

    module, examples, sizes = tiny.mlp()
    data = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)),)]
    options = Options(output=output, resume=resume, progress=progress)
    try:
        done = run_compile(module, examples, recipe=recipe, target="reference", calibration=data, dynamic_shapes=sizes, options=options)
    except Stopped:
        return ran
    finish(done.artifact, output)
    return ran


def test_resume_runs_only_what_is_left(tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "model.qc"
    first = compiled(tiny, output, stop=6)
    rest = compiled(tiny, output)
    assert first + rest == compiled(tiny, tmp_path / "whole.qc")
    assert len(first) == 6
    assert output.read_bytes() == (tmp_path / "whole.qc").read_bytes()


def test_a_resumed_compile_keeps_its_warnings(tiny: Any, tmp_path: Path) -> None:
    shipped = qcompile.load_recipe("w8a8-dynamic")
    (tmp_path / "mine.yaml").write_text(
        shipped.model_copy(update={"schemes": shipped.schemes.model_copy(update={"layers": {"no*": "float"}})}).canonical()
    )
    output, recipe = tmp_path / "model.qc", str(tmp_path / "mine.yaml")
    first = compiled(tiny, output, stop=7, recipe=recipe)
    assert "assign-bits" in first
    assert "assign-bits" not in compiled(tiny, output, recipe=recipe)
    assert [line[:35] for line in qcompile.load(output).report["warnings"]] == ["schemes.layers['no*'] fits no layer"]


@pytest.mark.parametrize("change", [{"recipe": "w8a8-dynamic"}, {"seed": 1}, {"resume": False}], ids=["recipe", "calibration", "no resume"])
def test_resume_with_other_inputs_starts_afresh(tiny: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    output = tmp_path / "model.qc"
    compiled(tiny, output, stop=6)
    assert compiled(tiny, output, **change)[0] == "canonicalize"
    compiled(tiny, tmp_path / "whole.qc", **change)
    assert output.read_bytes() == (tmp_path / "whole.qc").read_bytes()


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": "another"}', ""])
def test_a_damaged_journal_starts_afresh(tiny: Any, tmp_path: Path, damage: str) -> None:
    output = tmp_path / "model.qc"
    compiled(tiny, output, stop=4)
    (tmp_path / "model.qc.partial" / "journal.json").write_text(damage)
    assert compiled(tiny, output)[0] == "canonicalize"


@pytest.mark.parametrize("place", [0, 12, -1], ids=["length", "header", "data"])
def test_a_damaged_checkpoint_starts_afresh(tiny: Any, tmp_path: Path, place: int) -> None:
    output = tmp_path / "model.qc"
    compiled(tiny, output, stop=4)
    for file in (tmp_path / "model.qc.partial").glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
    assert compiled(tiny, output)[0] == "canonicalize"


def test_a_compile_that_is_refused_leaves_nothing(tiny: Any, tmp_path: Path) -> None:
    import torch

    module, examples, _ = tiny.mlp()
    with pytest.raises(qcompile.Refused, match=r"insert-quantizers|calibration"):
        run_compile(module, examples, target="reference", calibration=[(torch.zeros(1, 9),)], options=Options(output=tmp_path / "model.qc"))
    assert not list(tmp_path.iterdir())


def test_checkpoints_hold_each_constant_once(tiny_artifact: Callable[..., qcompile.Artifact], tmp_path: Path) -> None:
    graph = tiny_artifact("cnn").graph
    checkpoints = Checkpoints(tmp_path / "model.qc", "key", resume=False)
    for number in range(3):
        checkpoints.save(graph, f"pass {number}", {"number": number})
    files = list((tmp_path / "model.qc.partial").glob("*.safetensors"))
    assert len(files) == len(
        {tensor.numpy().tobytes() + str(tensor.dtype).encode() + str(tensor.shape).encode() for tensor in graph.tensors}
    )
    again = Checkpoints(tmp_path / "model.qc", "key", resume=True)
    assert (again.done, again.journal["state"]) == (3, {"number": 2})
    assert again.load(2).digest == graph.digest

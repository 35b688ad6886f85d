"""Built code of the cache, run without a graph: the same tokens, nothing heavy in the process, and a way back where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qcompile.backends.cpu.stored import StoredExecutable

import qcompile
from qcompile import Refused
from qcompile.generation import Generator, stored
from qcompile.generation.artifact_model import ArtifactModel
from qcompile.generation.stored import StoredModel

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [18, 28, 18]]


@pytest.fixture(scope="module")
def path(decoder: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = decoder("llama")
    path = tmp_path_factory.mktemp("artifact") / "llama.qc"
    qcompile.compile(str(folder), recipe="w4a16", target="cpu").save(path)
    return path


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    """What the artifact's graph gives."""
    return tokens_of(Generator(qcompile.load(path)))


def tokens_of(generator: Generator) -> list[list[int]]:
    return [found.tokens for found in generator.generate(PROMPTS, max_tokens=12, ignore_end=True)]


def notes() -> list[Path]:
    return list((Path(os.environ["QCOMPILE_CACHE"]) / "decoders").glob("*.json"))


def test_a_process_of_its_own_builds_and_this_one_runs(path: Path, expected: list[list[int]]) -> None:
    generator = Generator.open(path)
    assert isinstance(generator.model, StoredModel)
    assert tokens_of(generator) == expected
    artifact = ArtifactModel(qcompile.load(path))
    model = generator.model
    assert (model.context, model.vocabulary) == (artifact.context, artifact.vocabulary)
    assert list(model.caches) == list(artifact.caches)
    assert (model.tokenizer, tuple(model.end_tokens)) == (artifact.tokenizer, artifact.end_tokens)
    assert any(json.loads(note.read_text())["checked"] for note in notes())


def test_nothing_heavy_is_loaded(path: Path, expected: list[list[int]]) -> None:
    Generator.open(path)
    code = (
        "import sys, json\nfrom qcompile.generation import Generator\n"
        f"found = Generator.open({os.fspath(path)!r}).generate({PROMPTS!r}, max_tokens=12, ignore_end=True)\n"
        "print(json.dumps([[f.tokens for f in found], [n for n in ('torch', 'tvm', 'tvm_ffi', 'transformers') if n in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [expected, []]


@pytest.mark.parametrize("damage", ["note", "library", "team", "constants", "nothing kept"])
def test_where_stored_code_cannot_run_the_graph_is_built(path: Path, expected: list[list[int]], damage: str) -> None:
    Generator.open(path)
    (note,) = [note for note in notes() if json.loads(note.read_text())["checked"]]
    read = json.loads(note.read_text())
    files = {"library": "library.so", "team": "team.so", "constants": "constants.safetensors"}
    if damage in files:
        file = Path(read["code"]) / files[damage]
        whole = file.read_bytes()
        file.unlink()  # a mapped library must not be written to
        if damage == "constants":
            file.write_bytes(whole[: len(whole) // 2])
    else:
        note.write_text('{"code": 3' if damage == "note" else json.dumps(read | {"code": ""}))
    try:
        assert tokens_of(Generator.open(path)) == expected
    finally:
        if damage in files:
            file.write_bytes(whole)
        note.write_text(json.dumps(read))


def test_a_wrong_answer_to_the_golden_text_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Generator.open(path)
    for note in notes():
        note.write_text(json.dumps(json.loads(note.read_text()) | {"checked": False}))
    monkeypatch.setattr("qcompile.generation.session.AGREEMENT_DB", float("inf"))
    with pytest.raises(Refused, match="an operator beside attention mixes tokens"):
        Generator.open(path)
    monkeypatch.undo()
    assert isinstance(Generator.open(path).model, StoredModel)


def test_what_building_refuses_is_refused_here(path: Path, tmp_path: Path, tiny_artifact: Callable[..., qcompile.Artifact]) -> None:
    with pytest.raises(Refused, match="a context of 999 tokens is not possible: the model takes texts of 1 to 64 tokens"):
        Generator.open(path, context=999)
    tiny_artifact("mlp", "float", "cpu").save(tmp_path / "mlp.qc")
    with pytest.raises(Refused, match="a decoder takes tokens"):
        Generator.open(tmp_path / "mlp.qc")


def test_a_target_without_stored_code_runs_the_graph(path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_build_apart", lambda *_: pytest.fail("nothing is there to build"))
    generator = Generator.open(path, target="reference")
    assert isinstance(generator.model, ArtifactModel)
    assert generator.generate(PROMPTS[1], max_tokens=3, ignore_end=True)[0].tokens == expected[1][:3]


def test_stored_code_checks_shapes_and_serves_threads(path: Path) -> None:
    Generator.open(path)
    run = StoredExecutable(Path(json.loads(notes()[0].read_text())["code"]), threads=2)

    def given(count: int) -> list[Any]:
        caches = [np.zeros((1, 16, *port.shape[2:]), port.dtype) for port in run.interface.inputs[3:]]
        return [np.arange(count).reshape(1, count), np.zeros(1, np.int64), np.full(1, count), *caches]

    with pytest.raises(Refused, match="input_ids: has 2 axes, not 1"):
        run([np.arange(3), *given(3)[1:]])
    expected = run(given(5))[0]
    found: list[Any] = []
    workers = [threading.Thread(target=lambda: found.append(run(given(5))[0])) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3
    assert all(np.array_equal(logits, expected) for logits in found)
    child = os.fork()
    if not child:
        os._exit(int(not np.array_equal(run(given(5))[0], expected)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

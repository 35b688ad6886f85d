"""The artifact's file: the same bytes each time, refused when damaged, written whole or not at all."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import qcompile
from qcompile import Artifact, Refused
from qcompile.artifact_file import ALIGNMENT, LARGEST_HEADER, read_members


@pytest.fixture(scope="module")
def saved(tiny_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.qc"
    tiny_artifact("two", "w4a8").save(path)
    return path


def content(path: Path) -> tuple[Any, ...]:
    """Return all that a loaded artifact says."""
    a = qcompile.load(path)
    tensors = [t.numpy().tobytes() for t in (*a.golden_inputs, *a.golden_outputs)]
    return a.graph.digest, tensors, json.dumps(a.report), a.recipe, a.pipeline, a.target, a.versions, a.tokenizer


# ---- the same bytes -------------------------------------------------------------------------------------------------------


def test_save_load_save_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    loaded = qcompile.load(saved)
    size = loaded.save(tmp_path / "again.qc")
    assert (tmp_path / "again.qc").read_bytes() == saved.read_bytes()
    assert size == saved.stat().st_size
    assert loaded.digest() == hashlib.sha256(saved.read_bytes()).hexdigest()


def test_a_loaded_artifact_computes_the_same(tiny_artifact: Callable[..., Artifact], saved: Path) -> None:
    compiled, loaded = tiny_artifact("two", "w4a8"), qcompile.load(saved)
    inputs = torch.randint(0, 20, (3, 6)), torch.randn(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), loaded(*inputs), strict=True))


def test_two_processes_write_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    """In other folders, with other hash seeds, caches and environments."""
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32))
    code = "import sys; from qcompile.cli import main; sys.argv = ['qcompile', *sys.argv[1:]]; main()"
    running = []
    for seed, name in (("1", "one"), ("2", "another place")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(repository / "tests" / "tiny_models.py", folder)
        shutil.copy(tmp_path / "data.npz", folder)
        arguments = [
            "compile",
            "python:tiny_models.py:cnn",
            "--recipe",
            "w8a8",
            "--target",
            "reference",
            "--calibrate",
            "data.npz",
            "-o",
            "model.qc",
        ]
        environment = os.environ | {"PYTHONHASHSEED": seed, "QCOMPILE_CACHE": str(folder / "cache"), "LC_ALL": "C", "TZ": f"UTC{seed}"}
        running.append(
            subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, another = ((tmp_path / name / "model.qc").read_bytes() for name in ("one", "another place"))
    assert one == another
    assert str(tmp_path).encode() not in one


# ---- the form -------------------------------------------------------------------------------------------------------------


def test_members_are_stored_aligned_and_declared(saved: Path) -> None:
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        infos = archive.infolist()
        assert archive.testzip() is None
    names = [info.filename for info in infos]
    assert names == ["manifest.json", "graph.txt", "constants.safetensors", "golden.safetensors", "report.json"]
    for info in infos:
        name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
        assert (info.header_offset + 30 + name_length + extra_length) % ALIGNMENT == 0
        assert info.compress_type == zipfile.ZIP_STORED
        assert info.date_time == (1980, 1, 1, 0, 0, 0)
    manifest = json.loads(zipfile.ZipFile(saved).read("manifest.json"))
    assert manifest["format"] == 1
    assert set(manifest["members"]) == set(names) - {"manifest.json"}
    assert [value["type"] for value in manifest["entries"][0]["inputs"]] == ["i64[batch,seq]", "f32[batch,8]"]


def test_members_are_text_or_safetensors(saved: Path) -> None:
    members = read_members(saved)
    for name, data in members.items():
        if name.endswith(".safetensors"):
            assert safetensors.torch.load(data)
        else:
            assert data.decode().replace("\n", "").isprintable(), name
        assert b"\x80\x04" not in data[:2], "a pickle"


def test_no_source_reads_pickles(repository: Path) -> None:
    banned = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    sources = [file for folder in ("qcompile", "passes", "backends") for file in (repository / folder).rglob("*.py")]
    assert len(sources) > 50
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.split(".")[0] for name in names} & banned, file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load", "torch.load"):
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert safe.get("allow_pickle") == "False" or safe.get("weights_only") == "True", f"{file}:{node.lineno}"


# ---- damage ---------------------------------------------------------------------------------------------------------------


def refused_or_same(path: Path, data: bytes, expected: tuple[Any, ...]) -> bool:
    """Return whether the changed file is refused; where it is accepted it must say what the whole one says."""
    path.write_bytes(data)
    try:
        found = content(path)
    except Refused as error:
        return "\n" not in str(error)
    assert found == expected, "a damaged artifact was accepted and says something else"
    return False


def test_every_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    lengths = {*range(130), *range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 150, len(data))}
    for length in sorted(lengths):
        (tmp_path / "cut.qc").write_bytes(data[:length])
        with pytest.raises(Refused, match=r"cut\.qc"):
            read_members(tmp_path / "cut.qc")


def test_single_byte_damage_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    data, expected, chance = saved.read_bytes(), content(saved), random.Random(0)
    refused = 0
    for _ in range(300):
        place = chance.randrange(len(data))
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        refused += refused_or_same(tmp_path / "flipped.qc", bytes(changed), expected)
    assert refused > 250  # what is left are time stamps and padding of the archive's headers


def test_block_damage_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    data, expected, chance = saved.read_bytes(), content(saved), random.Random(1)
    for turn in range(120):
        start, length = chance.randrange(len(data)), chance.choice([1, 2, 4, 8, 64, 512])
        other = chance.randrange(len(data))
        block = data[other : other + length]
        changed = [
            data[:start] + data[start + length :],  # cut out
            data[:start] + block + data[start:],  # inserted
            data[:start] + block + data[start + len(block) :],  # copied over
            data[:start] + struct.pack("<q", chance.choice([-1, 2**31, 2**62, 0])) + data[start + 8 :],  # a number
        ][turn % 4]
        if changed != data:
            refused_or_same(tmp_path / "block.qc", changed, expected)


def rebuild(
    path: Path, members: dict[str, bytes], *, comment: bytes | None = None, kind: int = zipfile.ZIP_STORED, repeat: str = ""
) -> Path:
    """Write members as an archive whose manifest and comment are honest, unless given."""
    if "manifest.json" in members and comment is None:
        comment = b"qcompile 1 " + hashlib.sha256(members["manifest.json"]).hexdigest().encode()
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if repeat:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(repeat, members[repeat])
        archive.comment = comment or b""
    return path


def declared(members: dict[str, bytes]) -> dict[str, bytes]:
    """Return the members with a manifest that declares them as they are."""
    manifest = json.loads(members["manifest.json"])
    manifest["members"] = {
        n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in members.items() if n != "manifest.json"
    }
    return {"manifest.json": json.dumps(manifest).encode()} | {n: d for n, d in members.items() if n != "manifest.json"}


def test_the_forger_of_these_tests_writes_files_that_load(saved: Path, tmp_path: Path) -> None:
    assert content(rebuild(tmp_path / "honest.qc", declared(read_members(saved)))) == content(saved)


def forgeries(members: dict[str, bytes], path: Path) -> dict[str, tuple[Callable[[], Path], str]]:
    altered = members["golden.safetensors"][:-1] + bytes([members["golden.safetensors"][-1] ^ 1])  # the archive's checksum is right
    rest = {name: data for name, data in members.items() if name != "graph.txt"}
    swapped = members | {"golden.safetensors": members["constants.safetensors"], "constants.safetensors": members["golden.safetensors"]}
    other = members["graph.txt"].replace(b"size=8", b"size=9", 1)
    assert other != members["graph.txt"]

    def manifest(**changed: Any) -> dict[str, bytes]:
        return members | {"manifest.json": json.dumps(json.loads(members["manifest.json"]) | changed).encode()}

    def prefixed() -> Path:
        data = rebuild(path, members).read_bytes()
        path.write_bytes(b"#!/bin/sh\n" + data)
        return path

    def overlapping() -> Path:
        buffer = BytesIO(rebuild(path, members).read_bytes())
        data = bytearray(buffer.getvalue())
        with zipfile.ZipFile(buffer) as archive:
            first, place = archive.infolist()[1].header_offset, archive.start_dir
        place = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02", data.index(b"PK\x01\x02", place) + 4) + 4)
        struct.pack_into("<I", data, place + 42, first)
        path.write_bytes(data)
        return path

    def bomb() -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("manifest.json", b" " * (64 << 20))
            archive.comment = b"qcompile 1 " + bytes(64)
        assert path.stat().st_size < 100_000
        return path

    return {
        "magic": (lambda: rebuild(path, members, comment=b"another 1 " + bytes(64)), "no qcompile artifact"),
        "no-comment": (lambda: rebuild(path, members, comment=b""), "no qcompile artifact"),
        "version": (lambda: rebuild(path, members, comment=b"qcompile 2 " + bytes(64)), "has format 2, this is qcompile for format 1"),
        "manifest-digest": (lambda: rebuild(path, members, comment=b"qcompile 1 " + b"0" * 64), "the manifest is damaged"),
        "extra": (lambda: rebuild(path, members | {"code/run.so": b"\x7fELF"}), r"do not hold the same members: code/run\.so"),
        "missing": (lambda: rebuild(path, rest), r"do not hold the same members: graph\.txt"),
        "missing-undeclared": (lambda: rebuild(path, declared(rest)), "a member is not what its name says: KeyError"),
        "twice": (lambda: rebuild(path, members, repeat="graph.txt"), "twice, compressed, or larger"),
        "other-bytes": (
            lambda: rebuild(path, members | {"golden.safetensors": altered}),
            r"golden\.safetensors is damaged: its digest is not",
        ),
        "swapped": (lambda: rebuild(path, swapped), r"(golden|constants)\.safetensors is damaged"),
        "swapped-declared": (lambda: rebuild(path, declared(swapped)), "constant|digest"),
        "wrong-graph": (lambda: rebuild(path, declared(members | {"graph.txt": other})), "line|type"),
        "no-graph": (lambda: rebuild(path, declared(members | {"graph.txt": b"\xff\xfe"})), "a member is not what its name says"),
        "compressed": (lambda: rebuild(path, members, kind=zipfile.ZIP_DEFLATED), "twice, compressed, or larger|beside the members"),
        "bomb": (bomb, "twice, compressed, or larger|beside the members"),
        "huge-manifest": (
            lambda: rebuild(path, members | {"manifest.json": b" " * (LARGEST_HEADER + 1)}),
            f"larger than {LARGEST_HEADER} bytes",
        ),
        "huge-report": (
            lambda: rebuild(path, declared(members | {"report.json": b" " * (LARGEST_HEADER + 1)})),
            r"report\.json is larger than",
        ),
        "deep-report": (
            lambda: rebuild(path, declared(members | {"report.json": b"[" * 100_000})),
            "a member is not what its name says: RecursionError",
        ),
        "deep-manifest": (
            lambda: rebuild(path, members | {"manifest.json": b"[" * 100_000}),
            "the manifest is damaged: it is not understood",
        ),
        "manifest-type": (lambda: rebuild(path, manifest(recipe=7)), "the manifest is damaged: it is not understood"),
        "manifest-key": (lambda: rebuild(path, manifest(run="rm")), "the manifest is damaged: it is not understood"),
        "manifest-format": (lambda: rebuild(path, manifest(format=2)), "format 2"),
        "unknown-target": (lambda: rebuild(path, manifest(target="os")), "unknown target 'os'"),
        "no-manifest": (
            lambda: rebuild(path, {n: d for n, d in members.items() if n != "manifest.json"}, comment=b"qcompile 1 " + bytes(64)),
            "manifest",
        ),
        "prefix": (prefixed, "something beside the members"),
        "overlap": (overlapping, "something beside the members"),
    }


FORGED = [
    "magic",
    "no-comment",
    "version",
    "manifest-digest",
    "extra",
    "missing",
    "missing-undeclared",
    "twice",
    "other-bytes",
    "swapped",
    "swapped-declared",
    "wrong-graph",
    "no-graph",
    "compressed",
    "bomb",
    "huge-manifest",
    "huge-report",
    "deep-report",
    "deep-manifest",
    "manifest-type",
    "manifest-key",
    "manifest-format",
    "unknown-target",
    "no-manifest",
    "prefix",
    "overlap",
]


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    known = forgeries(read_members(saved), tmp_path / "forged.qc")
    assert list(known) == FORGED
    make, message = known[kind]
    path = make()
    with pytest.raises(Refused, match=message):
        qcompile.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"\x93NUMPY", b"PK\x05\x06" + bytes(18), bytes(1000)], ids=["empty", "short", "numpy", "empty-zip", "zeros"]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other.qc").write_bytes(data)
    with pytest.raises(Refused, match=r"other\.qc.*no qcompile artifact"):
        qcompile.load(tmp_path / "other.qc")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.qc", tmp_path):
        with pytest.raises(Refused, match="there is no such file"):
            qcompile.load(path)


# ---- writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(
    tiny_artifact: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "model.qc"
    path.write_bytes(b"the old one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fails, full)
    with pytest.raises(Refused, match=r"model\.qc: cannot be written: No space left on device"):
        tiny_artifact("mlp").save(path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_compile_that_fails_while_writing_leaves_the_old_file(
    tiny_artifact: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.qc"
    path.write_bytes(b"the old one")
    monkeypatch.setattr(Artifact, "_write", lambda self, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_artifact("mlp").save(path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_strays_of_killed_writers_are_removed(tiny_artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    path = tmp_path / "model[1].qc"
    (tmp_path / ".model[1].qc.abc123.tmp").write_bytes(b"half")
    (tmp_path / ".model1.qc.abc123.tmp").write_bytes(b"of another file")
    tiny_artifact("mlp").save(path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".model1.qc.abc123.tmp", "model[1].qc"]


def test_a_folder_that_is_not_there_is_refused(tiny_artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot write here: No such file or directory"):
        tiny_artifact("mlp").save(tmp_path / "absent" / "model.qc")

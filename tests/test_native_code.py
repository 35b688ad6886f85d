"""Native code in an artifact: loaded where this user built it or says that it is trusted, and only where it fits; else built again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qcompile.backends.cpu import pipeline
from qcompile.backends.cpu.target import TARGET

import qcompile
from qcompile import Artifact, Refused
from qcompile.artifact_file import ALIGNMENT, read_members
from qcompile.native_code import KEY_BYTES, NativeCode, build_native_code
from qcompile.target import Executable, Target

NOT_BUILT_HERE = "this user did not build it on this machine"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration folder of the user who builds."""
    folder = tmp_path_factory.mktemp("home") / "qcompile"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_CONFIG", str(folder))
        yield folder


@pytest.fixture(scope="module")
def compiled(tiny: Any) -> Callable[[str], Artifact]:
    """Compile a tiny model with native code, each once."""
    made: dict[str, Artifact] = {}

    def compiled(name: str = "mlp") -> Artifact:
        if name not in made:
            module, examples, sizes = getattr(tiny, name)()
            made[name] = qcompile.compile(module, examples, recipe="w4a16", dynamic_shapes=sizes, native=True)
        return made[name]

    return compiled


@pytest.fixture(scope="module")
def saved(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.qc"
    compiled().save(path)
    return path


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache that knows nothing: what runs was loaded from the artifact or built."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """From here on another user: nothing was built under this key."""
    monkeypatch.setenv("QCOMPILE_CONFIG", str(tmp_path / "stranger"))
    return tmp_path / "stranger"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that were compiled since."""
    seen: list[Any] = []
    genuine = pipeline.compile_module

    def compile_module(module: Any, threads: int | None = None) -> Any:
        seen.append(module)
        return genuine(module, threads)

    monkeypatch.setattr(pipeline, "compile_module", compile_module)
    return seen


def agrees(artifact: Artifact, compiled: Any) -> bool:
    return bool(torch.equal(artifact(*artifact.golden_inputs), compiled()(*artifact.golden_inputs)))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "qcompile.native_code"]


def with_native(path: Path, artifact: Artifact, **changed: Any) -> Path:
    """Save an artifact with its native code changed and otherwise honest."""
    whole = Artifact(
        artifact.graph, recipe=artifact.recipe, pipeline=artifact.pipeline, target=artifact.target, golden_inputs=artifact.golden_inputs,
        golden_outputs=artifact.golden_outputs, report=artifact.report, versions=artifact.versions,
        native=replace(artifact.native, **changed) if changed.get("native", True) else None,
    )  # fmt: skip
    whole.save(path)
    return path


# ---- what stands in the file ----------------------------------------------------------------------------------------------


def test_native_code_is_stored_only_where_it_is_asked_for(tiny_artifact: Callable[..., Artifact], saved: Path, tmp_path: Path) -> None:
    tiny_artifact("mlp").save(tmp_path / "portable.qc")
    assert not [name for name in read_members(tmp_path / "portable.qc") if name.startswith("code/")]
    assert "native" not in json.loads(read_members(tmp_path / "portable.qc")["manifest.json"])
    members = read_members(saved)
    assert [name for name in members if name.startswith("code/")] == ["code/cpu/library.so"]
    assert members["code/cpu/library.so"].startswith(b"\x7fELF")


def test_members_are_aligned_and_say_nothing_of_user_and_place(saved: Path, home: Path, repository: Path) -> None:
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        info = archive.getinfo("code/cpu/library.so")
    extra = int.from_bytes(data[info.header_offset + 28 : info.header_offset + 30], "little")
    assert (info.header_offset + 30 + len(info.filename) + extra) % ALIGNMENT == 0
    key = (home / "native_code.key").read_bytes()
    for secret in (key, key.hex().encode(), hashlib.sha256(key).hexdigest().encode(), str(home).encode(), str(repository).encode()):
        assert secret not in data
    assert set(json.loads(read_members(saved)["manifest.json"])["native"]) == {"target", "key", "signature"}


def test_save_load_save_gives_the_same_bytes_and_no_other_signature(saved: Path, stranger: Path, tmp_path: Path) -> None:
    """Whoever saves code again must not make it their own."""
    build_native_code(_Stub(), qcompile.load(saved).graph)  # the stranger has a key
    qcompile.load(saved).save(tmp_path / "again.qc")
    assert (tmp_path / "again.qc").read_bytes() == saved.read_bytes()
    assert (stranger / "native_code.key").is_file()


def test_two_processes_write_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    """In other folders, with other hash seeds and caches: the library too."""
    code = "import sys; from qcompile.cli import main; sys.argv = ['qcompile', *sys.argv[1:]]; main()"
    arguments = ["compile", "python:tiny_models.py:cnn", "--recipe", "w4a16", "--native", "-o", "model.qc"]
    running = []
    for seed, name in (("1", "one"), ("2", "another place")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(repository / "tests" / "tiny_models.py", folder)
        environment = os.environ | {"PYTHONHASHSEED": seed, "QCOMPILE_CACHE": str(folder / "cache"), "LC_ALL": "C", "TZ": f"UTC{seed}"}
        running.append(
            subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, another = ((tmp_path / name / "model.qc").read_bytes() for name in ("one", "another place"))
    assert one == another
    assert b"code/cpu/library.so" in one
    assert str(tmp_path).encode() not in one


# ---- loaded or built again ------------------------------------------------------------------------------------------------


def test_code_built_here_is_loaded_and_kept(
    saved: Path, compiled: Any, empty_cache: Path, builds: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compile_module", lambda *_: pytest.fail("the graph was compiled"))
        assert agrees(qcompile.load(saved), compiled)
        assert len(list((empty_cache / "cpu").iterdir())) == 1
        assert agrees(with_code_removed(saved, compiled, empty_cache), compiled)
    assert (builds, lines(caplog)) == ([], [])
    assert [path.name for path in empty_cache.iterdir()] == ["cpu"], "nothing temporary is left"


def with_code_removed(saved: Path, compiled: Any, folder: Path) -> Artifact:
    """Return the portable artifact of the same graph, which finds what the cache holds."""
    return qcompile.load(with_native(folder.parent / "portable.qc", qcompile.load(saved), native=None))


def test_code_of_another_user_is_built_again(
    saved: Path, compiled: Any, empty_cache: Path, stranger: Path, builds: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert agrees(qcompile.load(saved), compiled)
    assert len(builds) == 1
    assert len(list((empty_cache / "cpu").iterdir())) == 1
    assert [NOT_BUILT_HERE in line for line in lines(caplog)] == [True]
    assert agrees(qcompile.load(saved), compiled)
    assert len(builds) == 1, "the second process finds it in the cache"
    assert not stranger.exists(), "a key is made only where code is signed"


def test_trusted_code_is_loaded_and_not_kept(
    saved: Path, compiled: Any, empty_cache: Path, stranger: Path, builds: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert agrees(qcompile.load(saved, trust_code=True), compiled)
    assert (builds, lines(caplog)) == ([], [])
    assert not (empty_cache / "cpu").exists(), "without the flag it would be found there the next time"
    assert agrees(qcompile.load(saved), compiled)
    assert len(builds) == 1


def test_code_that_cannot_be_loaded_is_built_again(
    saved: Path, compiled: Any, empty_cache: Path, builds: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_native(tmp_path / "garbage.qc", qcompile.load(saved), files={"library.so": b"\x7fELF no more"})
    assert agrees(qcompile.load(path, trust_code=True), compiled)
    assert len(builds) == 1
    assert ["loading it failed" in line for line in lines(caplog)] == [True]


def test_another_target_does_not_look_at_it(saved: Path, stranger: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = qcompile.load(saved, target="reference")
    assert torch.equal(artifact(*artifact.golden_inputs), artifact.golden_outputs[0])
    assert lines(caplog) == []


def test_a_damaged_member_is_refused(saved: Path, tmp_path: Path) -> None:
    data = bytearray(saved.read_bytes())
    place = data.index(b"\x7fELF") + 100
    data[place] ^= 1
    (tmp_path / "damaged.qc").write_bytes(data)
    with pytest.raises(Refused, match=r"damaged"):
        qcompile.load(tmp_path / "damaged.qc", trust_code=True)


# ---- what the signature covers --------------------------------------------------------------------------------------------


class _Stub(Target):
    """A target that remembers what it was asked to load."""

    name, summary, native = "stub", "", True

    def __init__(self) -> None:
        self.loaded: list[tuple[Mapping[str, bytes], bool]] = []

    def build(self, graph: Any, *, threads: int | None = None) -> Executable:
        raise AssertionError("the artifact builds, not the code")

    def native_code(self, graph: Any) -> dict[str, bytes]:
        return {"code": b"\x90", "data": b"\x00"}

    def native_key(self) -> dict[str, str]:
        return {"processor": "this", "compiler": "1"}

    def load_native(self, graph: Any, code: Mapping[str, bytes], *, threads: int | None = None, keep: bool = False) -> Executable:
        self.loaded.append((code, keep))
        return list


@pytest.fixture
def stub() -> _Stub:
    return _Stub()


def loads(code: NativeCode, target: Target, graph: Any, trust: bool = False) -> bool:
    return code.load(target, graph, threads=1, trust=trust) is not None


@pytest.mark.parametrize("trust", [False, True])
def test_the_builder_loads_it(compiled: Any, stub: _Stub, trust: bool) -> None:
    graph = compiled().graph
    code = build_native_code(stub, graph)
    assert code == build_native_code(stub, graph)
    assert loads(code, stub, graph, trust)
    assert stub.loaded == [({"code": b"\x90", "data": b"\x00"}, True)]


SWAPS: dict[str, dict[str, Any]] = {
    "content": {"files": {"code": b"\xcc", "data": b"\x00"}},
    "one file more": {"files": {"code": b"\x90", "data": b"\x00", "more": b""}},
    "one file less": {"files": {"code": b"\x90"}},
    "names exchanged": {"files": {"code": b"\x00", "data": b"\x90"}},
    "other target": {"target": "another"},
    "no signature": {"signature": ""},
    "other signature": {"signature": "0" * 64},
}


@pytest.mark.parametrize("kind", SWAPS)
def test_changed_code_is_not_loaded(compiled: Any, stub: _Stub, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    graph = compiled().graph
    changed = replace(build_native_code(stub, graph), **SWAPS[kind])
    assert not loads(changed, stub, graph)
    assert [NOT_BUILT_HERE in line for line in lines(caplog)] == [True]
    assert stub.loaded == []
    assert loads(changed, stub, graph, trust=True)
    assert [keep for _, keep in stub.loaded] == [False]


FOREIGN: dict[str, tuple[dict[str, str], str]] = {
    "processor": ({"processor": "that"}, "it was built for another processor;"),
    "two": ({"processor": "that", "compiler": "2"}, "it was built for another processor, compiler;"),
    "graph": ({"graph": "0" * 64}, "it was built for another graph;"),
    "more": ({"flavour": "\x1b[2J"}, "it was built for another what else its key names;"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_code_for_something_else_is_never_loaded(
    compiled: Any, stub: _Stub, kind: str, trust: bool, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    """Not even where this user signed it with that key, or trusts it."""
    changed, message = FOREIGN[kind]
    code = build_native_code(stub, compiled().graph)
    foreign = replace(code, key={**code.key, **changed})
    signed = replace(foreign, signature=foreign._sign((home / "native_code.key").read_bytes()))
    assert signed.signed_by_user()
    assert not loads(signed, stub, compiled().graph, trust)
    assert stub.loaded == []
    assert [message in line for line in lines(caplog)] == [True]


@pytest.mark.parametrize("name", ["graph", "processor"])
def test_code_built_for_something_else_cannot_be_relabelled(
    compiled: Any, stub: _Stub, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The signature covers the key: who edits the manifest of code that was built here makes it nobody's."""
    if name == "graph":
        built = build_native_code(stub, compiled("cnn").graph)
    else:
        older = _Stub()
        older.native_key = lambda: {"processor": "older", "compiler": "1"}  # type: ignore[method-assign]
        built = build_native_code(older, compiled().graph)
    relabelled = replace(built, key=build_native_code(stub, compiled().graph).key)
    assert not loads(relabelled, stub, compiled().graph)
    assert [NOT_BUILT_HERE in line for line in lines(caplog)] == [True]
    assert stub.loaded == []


def test_a_key_that_lacks_a_field_fits_nothing(compiled: Any, stub: _Stub) -> None:
    code = build_native_code(stub, compiled().graph)
    for missing in code.key:
        fewer = replace(code, key={name: value for name, value in code.key.items() if name != missing})
        assert not loads(fewer, stub, compiled().graph, trust=True)


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_another_model_is_not_loaded(
    compiled: Any, empty_cache: Path, builds: list[Any], trust: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both were built here: only the graph tells them apart."""
    mlp, other = compiled("mlp"), compiled("cnn")
    assert other.native.signed_by_user()
    builds.clear()
    path = with_native(tmp_path / "swapped.qc", mlp, files=other.native.files, key=other.native.key, signature=other.native.signature)
    assert agrees(qcompile.load(path, trust_code=trust), compiled)
    assert len(builds) == 1
    assert ["another graph" in line for line in lines(caplog)] == [True]


@pytest.mark.parametrize("name", ["processor", "tvm", "torch", "sources"])
def test_the_cpu_target_names_what_its_code_depends_on(
    saved: Path, compiled: Any, empty_cache: Path, builds: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    loaded = qcompile.load(saved)
    path = with_native(tmp_path / "foreign.qc", loaded, key={**loaded.native.key, name: "another"})
    assert agrees(qcompile.load(path, trust_code=True), compiled)
    assert len(builds) == 1
    assert [f"built for another {name};" in line for line in lines(caplog)] == [True]


# ---- the key --------------------------------------------------------------------------------------------------------------


def test_the_key_is_the_users_alone(compiled: Any, stub: _Stub, stranger: Path) -> None:
    build_native_code(stub, compiled().graph)
    found = (stranger / "native_code.key").stat()
    assert (found.st_size, stat.S_IMODE(found.st_mode), stat.S_IMODE(stranger.stat().st_mode)) == (KEY_BYTES, 0o600, 0o700)
    assert [path.name for path in stranger.iterdir()] == ["native_code.key"]


def other_bytes(path: Path) -> None:
    path.write_bytes(bytes(KEY_BYTES))


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00")


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


SPOILED: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink, "other bytes": other_bytes, "shorter": shorter, "longer": longer, "a link": linked, "a folder": folder,
    "a pipe": pipe, "the group reads": lambda path: path.chmod(0o640), "others read": lambda path: path.chmod(0o604),
    "others write": lambda path: path.chmod(0o602),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_with_a_spoiled_key_nothing_was_built_here(compiled: Any, stub: _Stub, stranger: Path, kind: str) -> None:
    graph = compiled().graph
    code = build_native_code(stub, graph)
    assert loads(code, stub, graph)
    SPOILED[kind](stranger / "native_code.key")
    assert not code.signed_by_user()
    assert not loads(code, stub, graph)
    assert len(stub.loaded) == 1


def test_a_key_of_another_user_counts_for_nothing(compiled: Any, stub: _Stub, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = build_native_code(stub, compiled().graph)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert not code.signed_by_user()


def test_a_key_that_others_may_know_is_replaced(compiled: Any, stub: _Stub, stranger: Path) -> None:
    before, path = build_native_code(stub, compiled().graph), stranger / "native_code.key"
    path.chmod(0o644)
    after = build_native_code(stub, compiled().graph)
    assert (before.signed_by_user(), after.signed_by_user()) == (False, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_where_no_key_can_be_kept_the_code_is_not_signed(
    compiled: Any, stub: _Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QCOMPILE_CONFIG", str(tmp_path / "file" / "folder"))
    code = build_native_code(stub, compiled().graph)
    assert code.signature == ""
    assert ["the native code is not signed" in line for line in lines(caplog)] == [True]
    assert not loads(code, stub, compiled().graph)


def test_many_who_make_a_key_at_once_make_one(compiled: Any, stranger: Path) -> None:
    graph = compiled().graph
    with ThreadPoolExecutor(8) as pool:
        signatures = {code.signature for code in pool.map(lambda _: build_native_code(_Stub(), graph), range(32))}
    assert len(signatures) == 1


# ---- files that lie -------------------------------------------------------------------------------------------------------


def forged(path: Path, members: Mapping[str, bytes], **native: Any) -> Path:
    """Write members with an honest list of digests and anything at all about native code; None takes the entry out."""
    manifest = json.loads(members["manifest.json"])
    rest = {name: data for name, data in members.items() if name != "manifest.json"}
    manifest["members"] = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in rest.items()}
    manifest["native"] = manifest.get("native", {}) | native
    if None in native.values():
        del manifest["native"]
    data = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"manifest.json": data, **rest}.items():
            archive.writestr(name, content)
        archive.comment = b"qcompile 1 " + hashlib.sha256(data).hexdigest().encode()
    return path


def test_the_forger_of_these_tests_writes_files_that_load(saved: Path, tmp_path: Path) -> None:
    assert qcompile.load(forged(tmp_path / "honest.qc", read_members(saved))).native == qcompile.load(saved).native


UNDERSTOOD = "the manifest is damaged: it is not understood"
LIES: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "code without an entry": ({"code/cpu/library.so": b"x"}, {"target": None}, "not what the manifest says"),
    "entry without code": ({}, {}, "not what the manifest says"),
    "of another target": ({"code/os/library.so": b"x"}, {}, "not what the manifest says"),
    "target above": ({"code/../library.so": b"x"}, {"target": "cpu"}, "not what the manifest says"),
    "above": ({"code/cpu/../library.so": b"x"}, {}, "not what the manifest says"),
    "dots": ({"code/cpu/..": b"x"}, {}, "not what the manifest says"),
    "no name": ({"code/cpu/": b""}, {}, "not what the manifest says"),
    "deeper": ({"code/cpu/a/b": b"x"}, {}, "not what the manifest says"),
    "a line": ({"code/cpu/a\nb": b"x"}, {}, "not what the manifest says"),
    "short signature": ({"code/cpu/library.so": b"x"}, {"signature": "0" * 63}, UNDERSTOOD),
    "signature and line": ({"code/cpu/library.so": b"x"}, {"signature": "0" * 64 + "\n"}, UNDERSTOOD),
    "signature beyond ASCII": ({"code/cpu/library.so": b"x"}, {"signature": "\u00e9" * 64}, UNDERSTOOD),
    "key of numbers": ({"code/cpu/library.so": b"x"}, {"key": {"graph": 7}}, UNDERSTOOD),
    "one entry more": ({"code/cpu/library.so": b"x"}, {"run": "now"}, UNDERSTOOD),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_lies_about_code_is_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    members = {name: data for name, data in read_members(saved).items() if not name.startswith("code/")}
    code, native, message = LIES[kind]
    with pytest.raises(Refused, match=message):
        qcompile.load(forged(tmp_path / "lie.qc", members | code, **native), trust_code=True)


# ---- the command line and the compiler ------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Any, ...]] = {
    "run": (), "bench": ("--rounds", 1, "--calls", 1), "evaluate": ("--data", "random", "--limit", 2), "inspect": (), "verify": (),
}  # fmt: skip


@pytest.mark.parametrize("command", CALLS)
def test_every_command_that_runs_an_artifact_can_trust_it(
    cli: Any, saved: Path, repository: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    loaded: list[bool] = []
    genuine = TARGET.load_native

    def load_native(*given: Any, keep: bool, **named: Any) -> Any:
        loaded.append(keep)
        return genuine(*given, keep=keep, **named)

    monkeypatch.setattr(TARGET, "load_native", load_native)
    more = ("--model", f"python:{repository / 'tests' / 'tiny_models.py'}:mlp") if command == "evaluate" else ()
    call = command, saved, *CALLS[command], *more, "--threads", 1, "--json"
    assert cli(*call).code == 0
    assert (loaded, len(lines(caplog))) == ([], 1)
    assert cli(*call, "--trust-code").json
    assert (loaded, len(lines(caplog))) == ([False], 1)


def test_the_reason_is_one_line_on_standard_error(saved: Path, stranger: Path) -> None:
    command = [sys.executable, "-m", "qcompile.cli", "run", str(saved), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert json.loads(done.stdout)["outputs"]
    said = [line for line in done.stderr.splitlines() if "native code" in line]
    assert len(said) == 1
    assert NOT_BUILT_HERE in said[0]
    assert "--trust-code" in said[0]


def test_compile_stores_code_where_it_is_asked_to(cli: Any, repository: Path, tmp_path: Path) -> None:
    call = "compile", f"python:{repository / 'tests' / 'tiny_models.py'}:mlp", "--recipe", "w4a16", "-o", tmp_path / "model.qc"
    assert cli(*call).code == 0
    assert qcompile.load(tmp_path / "model.qc").native is None
    assert cli(*call, "--native").code == 0
    assert qcompile.load(tmp_path / "model.qc").native.signed_by_user()


def test_a_target_without_native_code_is_refused_before_any_work(
    cli: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.compiler.capture", lambda *_: pytest.fail("work was started"))
    model = f"python:{repository / 'tests' / 'tiny_models.py'}:mlp"
    done = cli("compile", model, "--target", "reference", "--native", "-o", tmp_path / "model.qc")
    assert (done.code, done.err) == (2, "qcompile: target reference has no native code to store; leave out --native\n")
    assert list(tmp_path.iterdir()) == []


def test_without_a_c_compiler_graphs_run_and_code_is_refused(
    saved: Path, compiled: Any, empty_cache: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    caplog.set_level(logging.ERROR)
    assert agrees(qcompile.load(saved), compiled)
    assert list((empty_cache / "cpu").iterdir()) == []
    with pytest.raises(Refused, match="there is no C compiler to link native code with"):
        TARGET.native_code(compiled().graph)

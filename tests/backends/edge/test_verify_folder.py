"""``qcompile verify FOLDER --qemu``: what it prints, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qcompile.backends.edge.processors import PROCESSORS

WriteFolder = Callable[..., Path]
pytestmark = pytest.mark.edge
M4 = PROCESSORS["cortex-m4"]


def test_a_folder_that_is_right(cli: Any, write_folder: WriteFolder) -> None:
    done = cli("verify", write_folder(M4), "--qemu")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert lines[:2] == [
        "3 of 3 golden inputs equal bit for bit on qemu-system-arm -M mps2-an386",
        "arena_high_water 64 of 64 bytes planned",
    ]
    assert [line.split()[0] for line in lines[2:5]] == ["stack_high_water", "flash", "instructions"]
    assert lines[-1] == "ok"


def test_its_figures_as_json(cli: Any, write_folder: WriteFolder) -> None:
    found = cli("verify", write_folder(M4), "--qemu", "--json").json
    assert (found["ok"], found["first_mismatch"], found["target"]) == (True, None, "edge:cortex-m4")
    assert (found["arena_bytes"], found["arena_high_water"], found["cases"], found["equal"], found["weights_bytes"]) == (64, 64, 3, 3, 16)
    assert found["instructions"] == sum(found["functions"].values())
    assert 0 < found["code_bytes"] < 500


def test_with_sanitizers_it_runs_on_this_machine(cli: Any, write_folder: WriteFolder) -> None:
    found = cli("verify", write_folder(PROCESSORS["x86-64"]), "--qemu", "--sanitize", "--json").json
    assert (found["ok"], found["emulator"], found["instructions"], found["stack_high_water"]) == (True, None, None, None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"after": "y[2] ^= 1;"}, "FAILED, first mismatch: case 0, output 0, byte 2"),
        ({"after": "((volatile uint8_t *)arena)[64] = 1;"}, "FAILED, first mismatch: the arena is larger than planned"),
        ({"before": "*(volatile uint32_t *)0xC0000000u = 1u;"}, "FAILED, first mismatch: the example did not come to its end: fault"),
    ],
)
def test_a_folder_that_is_wrong(cli: Any, write_folder: WriteFolder, wrong: dict[str, str], said: str) -> None:
    folder = write_folder(M4, **wrong)
    done = cli("verify", folder, "--qemu")
    assert (done.code, done.err, done.out.splitlines()[-1]) == (1, "", said)
    done = cli("verify", folder, "--qemu", "--json")
    assert (done.code, done.json["ok"]) == (1, False)


def test_an_arena_beyond_its_plan_is_wrong(cli: Any, write_folder: WriteFolder) -> None:
    folder = write_folder(M4)
    (folder / "report.json").write_text(json.dumps({"target": "edge:cortex-m4", "arena_bytes": 60}))
    done = cli("verify", folder, "--qemu")
    assert (done.code, done.out.splitlines()[-1]) == (1, "FAILED, first mismatch: the arena is larger than planned")


def damage_report(folder: Path) -> None:
    (folder / "report.json").write_text('{"target": "edge:cortex-m4", "arena_bytes": null}')


def name_another(folder: Path) -> None:
    (folder / "report.json").write_text('{"target": "edge:cortex-m5", "arena_bytes": 64}')


def name_other_target(folder: Path) -> None:
    (folder / "report.json").write_text('{"target": "reference", "arena_bytes": 64}')


def break_code(folder: Path) -> None:
    (folder / "model.c").write_text("int other;\nfoo\n")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no report": (lambda folder: (folder / "report.json").unlink(), "there is no folder of C with a report.json; name a folder that"),
    "damaged report": (damage_report, "its report.json is damaged"),
    "unknown processor": (name_another, "unknown processor 'cortex-m5'; did you mean 'cortex-m55'?"),
    "another target": (name_other_target, "target reference writes no folders of source code"),
    "no Makefile": (lambda folder: (folder / "Makefile").unlink(), "there is no Makefile of an example; name a folder that"),
    "wrong C": (break_code, "the example cannot be built: model.c:2:1: error:"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_folder_of_c_is_refused(cli: Any, write_folder: WriteFolder, kind: str) -> None:
    folder = write_folder(M4)
    spoil, said = REFUSED[kind]
    spoil(folder)
    done = cli("verify", folder, "--qemu")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert said in done.err


def test_a_folder_without_the_option_and_a_file_with_it_are_refused(cli: Any, tmp_path: Path) -> None:
    done = cli("verify", tmp_path)
    assert (done.code, done.err) == (2, f"qcompile: {tmp_path}: this is a folder; --qemu builds its example and runs it\n")
    done = cli("verify", tmp_path / "absent", "--qemu")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "absent: there is no folder of C" in done.err


@pytest.mark.parametrize(
    ("tool", "packages"),
    [("qemu-system-arm", "qemu-system-arm"), ("arm-none-eabi-gcc", "gcc-arm-none-eabi libnewlib-arm-none-eabi"), ("make", "make")],
)
def test_a_missing_tool_is_named_with_its_package(
    cli: Any, write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch, tool: str, packages: str
) -> None:
    folder = write_folder(M4)
    monkeypatch.setattr("qcompile.backends.edge.firmware.build.shutil.which", lambda name: None if name == tool else f"/usr/bin/{name}")
    done = cli("verify", folder, "--qemu")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"qcompile: {tool} is not installed; apt-get install {packages}, or make edge-tools\n"

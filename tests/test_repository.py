"""The repository keeps its own rules: package list, import borders, light imports, nothing of one machine in its text."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"qcompile": "qcompile", "passes": "qcompile.passes", "backends": "qcompile.backends"}

# What a folder may not import. The core finds passes and backends by name, through its registry.
BORDERS = {
    "qcompile": ("qcompile.passes", "qcompile.backends", "tvm", "tvm_ffi"),
    "passes": ("qcompile.backends", "tvm", "tvm_ffi"),
    "backends": ("qcompile.passes",),
}
HEAVY = ("torch", "tvm", "onnx", "onnxruntime", "transformers", "scipy")

# Words that only make sense on one machine or in one workplace, spelled in two parts so that this file does not hold them.
FORBIDDEN = [
    "/wo" + "rk/",
    "/ro" + "ot/",
    "/ho" + "me/",
    "pypi" + ".org",
    "python" + "hosted",
    "download.py" + "torch",
    "/opt/" + "wheels",
    "/opt/" + "pypi",
    "find-" + "links",
    "--index" + "-url",
]


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def packages_on_disk() -> set[str]:
    found = set()
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    return found


def module_name(file: Path) -> tuple[str, bool]:
    """Return the dotted name a file has once installed, and whether it is a package."""
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    is_package = rest[-1] == "__init__"
    return ".".join([FOLDERS[folder], *(rest[:-1] if is_package else rest)]), is_package


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything a source imports; of ``from a import b`` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                parents = parts[: len(parts) - node.level + 1]
                base = ".".join(parents + ([base] if base else []))
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def crossings(source: str, module: str, is_package: bool, banned: tuple[str, ...]) -> list[str]:
    return [
        f"line {line} imports {name}"
        for line, name in imported_modules(source, module, is_package)
        if any(name == ban or name.startswith(f"{ban}.") for ban in banned)
    ]


def test_package_list_equals_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["packages"]) == packages_on_disk()
    assert {folder: package for package, folder in setuptools["package-dir"].items()} == FOLDERS


def test_every_folder_with_code_is_a_package() -> None:
    missing = {file.parent.relative_to(ROOT) for folder in FOLDERS for file in python_files(folder)}
    assert not [str(folder) for folder in missing if not (ROOT / folder / "__init__.py").is_file()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_package_is_marked_as_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_stay_inside_their_border(folder: str) -> None:
    files = python_files(folder)
    assert files
    found = {}
    for file in files:
        if lines := crossings(file.read_text(encoding="utf-8"), *module_name(file), BORDERS[folder]):
            found[str(file.relative_to(ROOT))] = lines
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import tvm",
        "import tvm.relax as relax",
        "from tvm import relax",
        "def later():\n    from qcompile.backends.cpu import build",
        "from qcompile import backends",
        "from .. import backends",
        "from ..backends.cpu import target",
    ],
)
def test_a_crossing_is_seen_in_every_spelling(source: str) -> None:
    assert crossings(source, "qcompile.graph.text", False, BORDERS["qcompile"])


def test_names_that_only_look_alike_may_be_imported() -> None:
    source = "import tvmlike\nfrom qcompile import backends_table\nfrom . import backends\n"
    assert not crossings(source, "qcompile.graph.text", False, BORDERS["qcompile"])


def loaded_after(code: str) -> set[str]:
    """Return the heavy packages in sys.modules of a fresh interpreter after it ran this code."""
    tail = f"\nimport sys\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_the_import_check_sees_a_heavy_package() -> None:
    assert loaded_after("import onnx") >= {"onnx"}


def test_import_loads_no_heavy_package() -> None:
    assert loaded_after("import qcompile; qcompile.Refused, dir(qcompile)") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["evaluate", "--help"]])
def test_help_loads_no_heavy_package(arguments: list[str]) -> None:
    run = "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    code = f"import sys\nfrom qcompile.cli import main\nsys.argv = {['qcompile', *arguments]!r}\n{run}"
    assert loaded_after(code) == set()


def tracked_files() -> list[Path]:
    """Return the files git tracks or would track; outside a checkout, every file that is not made by a build."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    made = {".venv", "build", "dist", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not made & set(path.relative_to(ROOT).parts)]


def test_no_file_speaks_of_one_machine() -> None:
    files = tracked_files()
    assert Path(__file__) in files
    pattern = re.compile("|".join(map(re.escape, FORBIDDEN)))
    found = []
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


def test_constraints_pin_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["hf"] + extras["dev"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {re.split(r"==", line)[0].lower().replace("_", "-") for line in lines}
    assert all("==" in line for line in lines)
    assert not {re.split(r"[<>=!~ ]", name)[0].lower().replace("_", "-") for name in declared} - pinned
    assert not [line for line in lines if line.startswith(("nvidia", "triton"))]


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make ([a-z0-9-]+)", printed, re.MULTILINE) == phony[1].split()

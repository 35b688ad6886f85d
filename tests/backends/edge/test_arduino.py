"""The library for Arduino: its one C file computes what the folder does, its sketch compiles, its descriptions are whole."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from qcompile.backends.edge.firmware.arduino import arduino_library
from qcompile.backends.edge.firmware.emulate import measure
from qcompile.backends.edge.processors import PROCESSORS

WriteFolder = Callable[..., Path]
pytestmark = pytest.mark.edge
M4 = PROCESSORS["cortex-m4"]

# What the sketch uses of Arduino's core.
ARDUINO_H = """
#include <stddef.h>
#include <stdint.h>
struct Port { void begin(long); void print(const char *); void println(const char *); void println(unsigned long); void println(int); };
extern Port Serial;
unsigned long micros();
void delay(unsigned long);
"""


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.[ch]")}


@pytest.mark.parametrize("prefix", ["model", "keywords"])
def test_the_one_file_computes_the_same(write_folder: WriteFolder, prefix: str) -> None:
    folder = write_folder(M4, prefix=prefix)
    library = arduino_library(texts(folder), prefix)
    source = library[f"src/{prefix}.c"]
    assert re.findall(r'#include "(.*)"', source) == [f"{prefix}.h"]
    (folder / f"{prefix}.c").write_text(source)
    (folder / f"{prefix}_weights.c").write_text("typedef int nothing;\n")
    (folder / "runtime.h").unlink()
    assert measure(folder, M4).ok


def test_the_sketch_compiles_as_arduino_does_it(write_folder: WriteFolder, tmp_path: Path) -> None:
    library = arduino_library(texts(write_folder(M4)), "model")
    assert sorted(library) == ["examples/run_model/run_model.ino", "library.json", "library.properties", "src/model.c", "src/model.h"]
    (tmp_path / "model.h").write_text(library["src/model.h"])
    (tmp_path / "sketch.cpp").write_text(ARDUINO_H + library["examples/run_model/run_model.ino"])
    command = ["arm-none-eabi-g++", "-mcpu=cortex-m4", "-mthumb", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "sketch.cpp", "-I."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_its_descriptions_have_what_arduino_and_platformio_ask_for(write_folder: WriteFolder) -> None:
    library = arduino_library(texts(write_folder(M4)), "model")
    properties = dict(line.split("=", 1) for line in library["library.properties"].splitlines())
    asked = {"name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url", "architectures"}
    assert asked <= set(properties)
    assert {"name", "version"} <= set(json.loads(library["library.json"]))

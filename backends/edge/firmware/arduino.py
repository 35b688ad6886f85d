"""A model as a library for Arduino and PlatformIO: one C file and one header, a sketch that runs it, and the two descriptions.

The C file is what ``compile`` writes with the included files in their places, so nothing else has to be found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

VERSION = "1.0.0"
_OWN_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)

SKETCH = """\
// Runs @NAME@ on codes of zeros and prints the codes and the time that it took.
#include <@NAME@.h>

static uint8_t arena[@UPPER@_ARENA_BYTES] __attribute__((aligned(@UPPER@_ARENA_ALIGNMENT)));
@BUFFERS@
void setup() {
  Serial.begin(115200);
  if (@NAME@_init(arena, sizeof arena) != 0) {
    Serial.println("the arena is too small or not aligned");
  }
}

void loop() {
  const void *const inputs[@UPPER@_INPUT_COUNT] = {@INPUTS@};
  void *const outputs[@UPPER@_OUTPUT_COUNT] = {@OUTPUTS@};
  const unsigned long start = micros();
  (void)@NAME@_run(inputs, outputs, arena);
  Serial.print("microseconds: ");
  Serial.println(micros() - start);
  for (size_t i = 0; i < @UPPER@_OUTPUT_0_ELEMENTS; i++) {
    Serial.println((int)output_0[i]);
  }
  delay(1000);
}
"""


def single_file(files: Mapping[str, str], name: str) -> str:
    """Return ``NAME.c`` with ``runtime.h`` and ``NAME_weights.c`` in it; it includes ``NAME.h`` and headers of C.

    Args:
        files: text of the files of a compiled model by name.
        name: prefix of files and of everything that C sees.
    """
    parts = [files["runtime.h"], files[f"{name}_weights.c"], files[f"{name}.c"]]
    return f'#include "{name}.h"\n\n' + "\n".join(_OWN_INCLUDE.sub("", part) for part in parts)


def arduino_library(files: Mapping[str, str], name: str) -> dict[str, str]:
    """Return by path the files of a library: ``library.properties`` (Arduino), ``library.json`` (PlatformIO), ``src`` and a sketch.

    Args:
        files: text of the files of a compiled model by name.
        name: prefix of files and of everything that C sees.
    """
    sentence = f"The compiled model {name}: no heap, one arena."
    properties = {
        "name": f"qcompile_{name}", "version": VERSION, "author": "qcompile", "maintainer": "qcompile", "sentence": sentence,
        "paragraph": "Written by qcompile.", "category": "Data Processing", "url": "", "architectures": "*", "includes": f"{name}.h",
    }  # fmt: skip
    package = {"name": f"qcompile_{name}", "version": VERSION, "description": sentence, "frameworks": "*", "platforms": "*"}
    return {
        "library.properties": "".join(f"{key}={value}\n" for key, value in properties.items()),
        "library.json": json.dumps(package, indent=1) + "\n",
        f"src/{name}.h": files[f"{name}.h"],
        f"src/{name}.c": single_file(files, name),
        f"examples/run_{name}/run_{name}.ino": _sketch(files[f"{name}.h"], name),
    }


def _sketch(header: str, name: str) -> str:
    buffers, words = "", {}
    for kind in ("input", "output"):
        count = re.search(rf"^#define {name.upper()}_{kind.upper()}_COUNT (\d+)", header, re.MULTILINE)
        assert count, "the header has a count of inputs and outputs"
        names = [f"{kind}_{number}" for number in range(int(count[1]))]
        buffers += "".join(f"static {name}_{own}_t {own}[{name.upper()}_{own.upper()}_ELEMENTS];\n" for own in names)
        words[kind] = ", ".join(names)
    values = {"NAME": name, "UPPER": name.upper(), "BUFFERS": buffers, "INPUTS": words["input"], "OUTPUTS": words["output"]}
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], SKETCH)

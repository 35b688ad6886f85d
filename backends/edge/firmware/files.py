"""The files beside a model's C: golden inputs, an example that runs them, and what builds it.

The C of ``sources/`` is written for the prefix ``model``; for another one, names that begin with it are changed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from qcompile.backends.edge.processors import Machine, Processor

NUMBERS_A_LINE = 24


def example_files(
    processor: Processor, sources: Sequence[str] = ("model.c", "model_weights.c"), prefix: str = "model", *, decoder: bool = False
) -> dict[str, str]:
    """Return by path the example, its Makefile and CMakeLists.txt, for a folder that holds the model's C and golden.h.

    Args:
        processor: that the example is built for and runs on.
        sources: names of the model's own C files.
        prefix: of the model's names.
        decoder: the example continues a text.
    """
    values = {
        "NAME": processor.name,
        "SOURCES": " ".join(sources),
        "OBJECTS": " ".join(f"$(BUILD)/{name.removesuffix('.c')}.o" for name in sources),
        "CROSS": processor.prefix,
        "CPU": " ".join(processor.flags),
        "LINK": " ".join(processor.link),
        "PORT": processor.port,
        "RUN": shlex.join(processor.emulator),
        **(_memories(processor.machine, processor.emulator) if processor.machine else {}),
    }
    paths = {name: name for name in ("Makefile", "CMakeLists.txt")}
    paths |= {f"example/{name}": name for name in ("main.c", "measure.h", "stream.c", "port.h", f"port_{processor.port}.c")}
    if processor.machine:
        paths["example/link.ld"] = "link.ld"
    if decoder:
        del paths["example/stream.c"]
        paths["example/main.c"] = "main_decoder.c"
    return {path: _with_prefix(_filled(_source(name), values), prefix) for path, name in paths.items()}


def decoder_header(prompt: Sequence[int], tokens: Sequence[int], input_bytes: Sequence[int], prefix: str = "model") -> str:
    """Return golden.h of a decoder: a prompt, the tokens that follow it, and the bytes of each input; the third is the first cache."""
    caches = sum(-(-size // 16) * 16 for size in input_bytes[2:])
    lines = [
        "/* A prompt, and the tokens that follow by greedy decoding. */",
        "#ifndef MODEL_GOLDEN_H",
        "#define MODEL_GOLDEN_H",
        "",
        '#include "model.h"',
        "",
        f"#define MODEL_GOLDEN_PROMPT {len(prompt)}u",
        f"#define MODEL_GOLDEN_TOKENS {len(tokens)}u",
        f"#define MODEL_GOLDEN_CACHE_BYTES {caches}",
        "",
        *_array(f"static const int32_t model_golden_prompt[{len(prompt)}]", np.array(prompt)),
        *_array(f"static const int32_t model_golden_tokens[{len(tokens)}]", np.array(tokens)),
        f"static const size_t model_golden_input_bytes[MODEL_INPUT_COUNT] = {{{', '.join(map(str, input_bytes))}}};",
        "",
        "#endif",
        "",
    ]
    return _with_prefix("\n".join(lines), prefix)


def golden_header(inputs: Sequence[Sequence[np.ndarray]], outputs: Sequence[Sequence[np.ndarray]], prefix: str = "model") -> str:
    """Return golden.h: for each case the input codes and the output codes that the model gives, as the model's C takes and gives them.

    Args:
        inputs: of each case, one array of codes for each input, in the order of memory.
        outputs: of each case, one array of codes for each output.
        prefix: of the model's names.

    Raises:
        ValueError: there is no case, or a case has other sizes than the first.
    """
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} sets of inputs and {len(outputs)} of outputs")
    lines = [
        "/* Golden inputs and the output codes that they give, bit for bit. */",
        "#ifndef MODEL_GOLDEN_H",
        "#define MODEL_GOLDEN_H",
        "",
        '#include "model.h"',
        "",
        f"#define MODEL_GOLDEN_COUNT {len(inputs)}",
        f"#define MODEL_GOLDEN_INPUT_BYTES {_room(inputs[0])}  /* of one case, each array rounded up to 16 bytes */",
        f"#define MODEL_GOLDEN_RESULT_BYTES {_room(outputs[0])}",
        "",
    ]
    for word, cases in (("input", inputs), ("output", outputs)):
        sizes = [array.nbytes for array in cases[0]]
        if any([array.nbytes for array in case] != sizes for case in cases):
            raise ValueError(f"the cases have {word}s of different sizes")
        for number, case in enumerate(cases):
            for which, array in enumerate(case):
                lines += _array(f"static const model_{word}_{which}_t model_golden_{number}_{word}_{which}[{array.size}]", array)
        upper = word.upper()
        lines.append(f"static const size_t model_golden_{word}_bytes[MODEL_{upper}_COUNT] = {{{', '.join(map(str, sizes))}}};")
        lines.append(f"static const void *const model_golden_{word}s[MODEL_GOLDEN_COUNT][MODEL_{upper}_COUNT] = {{")
        for number, case in enumerate(cases):
            lines.append("    {" + ", ".join(f"model_golden_{number}_{word}_{which}" for which in range(len(case))) + "},")
        lines += ["};", ""]
    return _with_prefix("\n".join([*lines, "#endif", ""]), prefix)


def _room(case: Sequence[np.ndarray]) -> int:
    return sum(-(-array.nbytes // 16) * 16 for array in case)


def _array(declaration: str, array: np.ndarray) -> list[str]:
    numbers = [str(number) for number in array.reshape(-1).tolist()]
    rows = [", ".join(numbers[at : at + NUMBERS_A_LINE]) for at in range(0, len(numbers), NUMBERS_A_LINE)]
    return [f"{declaration} = {{", *(f"    {row}," for row in rows), "};"]


def _memories(machine: Machine, emulator: tuple[str, ...]) -> dict[str, str]:
    return {
        "MACHINE": emulator[emulator.index("-M") + 1],
        "VECTORS_AT": f"0x{machine.vectors_at:08x}",
        "FLASH_AT": f"0x{machine.flash_at:08x}",
        "FLASH_BYTES": str(machine.flash_bytes),
        "RAM_AT": f"0x{machine.ram_at:08x}",
        "RAM_BYTES": str(machine.ram_bytes),
    }


def _source(name: str) -> str:
    return (files(__package__) / "sources" / name).read_text(encoding="utf-8")


def _filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], text)


def _with_prefix(text: str, prefix: str) -> str:
    return re.sub(r"\bMODEL_", f"{prefix.upper()}_", re.sub(r'\bmodel(_|\.h")', rf"{prefix}\1", text))

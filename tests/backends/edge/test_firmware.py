"""The example firmware measures what it says: right codes, wrong codes, arena, stack, instructions, faults; on every processor."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qcompile.backends.edge.boards import BOARDS, find_board
from qcompile.backends.edge.firmware.build import measure_objects
from qcompile.backends.edge.firmware.emulate import measure, run_inputs
from qcompile.backends.edge.firmware.files import example_files, golden_header
from qcompile.backends.edge.processors import PACKAGES, PROCESSORS, find_processor

from qcompile import Refused

WriteFolder = Callable[..., Path]
pytestmark = pytest.mark.edge
M4, M0, X86 = PROCESSORS["cortex-m4"], PROCESSORS["cortex-m0+"], PROCESSORS["x86-64"]
EVERY = pytest.mark.parametrize("name", PROCESSORS)

# A loop of two instructions, on every processor.
LOOP = """
    static const volatile unsigned long rounds = @COUNT@;
    unsigned long left = rounds;
#if defined(__arm__)
    __asm__ volatile(".syntax unified\\n1: subs %0, %0, #1\\n\\tbne 1b" : "+l"(left) : : "cc");
#elif defined(__aarch64__)
    __asm__ volatile("1: subs %0, %0, #1\\n\\tb.ne 1b" : "+r"(left) : : "cc");
#elif defined(__riscv)
    __asm__ volatile("1: addi %0, %0, -1\\n\\tbnez %0, 1b" : "+r"(left));
#else
    __asm__ volatile("1: dec %0\\n\\tjnz 1b" : "+r"(left) : : "cc");
#endif
"""


@EVERY
def test_the_codes_are_right_and_the_arena_is_as_large_as_it_says(write_folder: WriteFolder, name: str) -> None:
    found = measure(write_folder(PROCESSORS[name]), PROCESSORS[name])
    assert (found.ok, found.cases, found.equal, found.mismatch) == (True, 3, 3, None)
    assert found.arena_high_water == 64
    assert found.sizes
    assert (found.sizes.weights, found.sizes.variables) == (16, 0)
    assert found.instructions == sum(found.functions.values())
    assert max(found.functions, key=found.functions.__getitem__) == "model_run"


@EVERY
def test_instructions_are_counted_one_by_one(write_folder: WriteFolder, name: str) -> None:
    """Whatever else runs, a longer loop of two instructions takes two more for each round."""
    counts = [
        measure(write_folder(PROCESSORS[name], before=LOOP.replace("@COUNT@", str(rounds))), PROCESSORS[name]).instructions
        for rounds in (1000, 250_000)
    ]
    assert counts[1] - counts[0] == 2 * 249_000  # type: ignore[operator]


@EVERY
def test_stack_that_is_used_is_seen(write_folder: WriteFolder, name: str) -> None:
    """An array of 3000 bytes, of which the far end is written, and what a frame takes beside it."""
    before = "volatile uint8_t room[3000];\n    room[0] = 1;\n    room[2999] = room[0];\n    (void)room[5];"
    found = measure(write_folder(PROCESSORS[name], before=before), PROCESSORS[name])
    plain = measure(write_folder(PROCESSORS[name]), PROCESSORS[name])
    assert found.stack_high_water
    assert plain.stack_high_water
    assert 3000 <= found.stack_high_water <= 3000 + 256
    assert plain.stack_high_water <= 256


@EVERY
def test_the_stack_that_the_compiler_names_is_what_is_used(write_folder: WriteFolder, name: str) -> None:
    """Measured is more: the frame that calls, and what lies between frames. The array is written by a function of its own."""
    head = "__attribute__((noinline)) static int deep(int x) { volatile int room[300]; room[0] = x; return room[x & 0]; }\n"
    folder = write_folder(PROCESSORS[name], head=head, before="(void)deep(x[0]);")
    sizes, stack = measure_objects(folder, PROCESSORS[name])
    found = measure(folder, PROCESSORS[name])
    assert found.stack_high_water
    assert found.sizes == sizes
    assert 1200 <= stack <= found.stack_high_water <= stack + 128


@EVERY
def test_many_inputs_one_after_the_other(write_folder: WriteFolder, name: str, cases: Any, expected: Any) -> None:
    folder = write_folder(PROCESSORS[name])
    data = b"".join(array.tobytes() for case in cases for array in case)
    assert run_inputs(folder, PROCESSORS[name], data) == b"".join(array.tobytes() for case in expected for array in case)


# ---- what goes wrong is seen ------------------------------------------------------------------------------------------------


def test_a_wrong_code_is_named(write_folder: WriteFolder) -> None:
    found = measure(write_folder(M4, after="sum[7] ^= 256;"), M4)
    assert (found.ok, found.equal, found.mismatch) == (False, 0, "case 0, output 1, byte 15")


def test_an_error_that_the_model_returns_is_named(write_folder: WriteFolder) -> None:
    found = measure(write_folder(M4, before="if (x[0] != 42) { return 3; }"), M4)
    assert (found.ok, found.mismatch) == (False, "case 0: model_init or model_run returned 3")


def test_what_was_in_the_arena_before_may_not_matter(write_folder: WriteFolder) -> None:
    """Right over memory painted with one pattern, wrong over the other."""
    found = measure(write_folder(M4, before="int8_t left = *(int8_t *)arena;", after="y[3] = (int8_t)(y[3] + (left == 0x5A));"), M4)
    assert (found.ok, found.equal, found.mismatch) == (False, 0, "case 0, output 0, byte 3")


def test_a_write_behind_the_arena_is_a_failure(write_folder: WriteFolder) -> None:
    found = measure(write_folder(M4, after="((volatile uint8_t *)arena)[64] = 1;"), M4)
    assert (found.ok, found.equal, found.arena_high_water) == (False, 3, 65)


def test_an_arena_that_is_not_used_up_is_seen(write_folder: WriteFolder) -> None:
    """All sixteen products lie in the first four places, one after the other."""
    folder = write_folder(M4)
    (folder / "model.c").write_text((folder / "model.c").read_text().replace("products[i]", "products[i % 4]"))
    assert measure(folder, M4).arena_high_water == 16


def test_a_variable_outside_of_the_arena_is_seen(write_folder: WriteFolder) -> None:
    found = measure(write_folder(M4, head="static int calls;\n", before="calls++;"), M4)
    assert found.sizes
    assert found.sizes.variables == 4


@pytest.mark.parametrize("processor", [M0, M4], ids=lambda processor: processor.name)
def test_a_fault_ends_the_run(write_folder: WriteFolder, processor: Any) -> None:
    found = measure(write_folder(processor, before="*(volatile uint32_t *)0xC0000000u = 1u;"), processor)
    assert not found.ok
    assert found.mismatch == "the example did not come to its end: fault"


def test_the_smallest_core_traps_at_what_is_not_aligned(write_folder: WriteFolder) -> None:
    before = "y[0] = (int8_t) * (volatile uint32_t *)((uintptr_t)arena + 1u);"
    assert not measure(write_folder(M0, before=before), M0).ok
    assert measure(write_folder(M4, before=before), M4).ok


def test_a_stack_that_is_too_small_is_no_wrong_result(write_folder: WriteFolder) -> None:
    before = "volatile uint8_t room[33000];\n    for (int i = 0; i < 33000; i++) { room[i] = 1; }\n    (void)room[5];"
    assert measure(write_folder(M4, before=before), M4).mismatch == "case 0: the stack was used up"


# ---- sanitizers -------------------------------------------------------------------------------------------------------------


def test_sanitizers_have_nothing_to_say(write_folder: WriteFolder, cases: Any, expected: Any) -> None:
    folder = write_folder(X86)
    found = measure(folder, X86, sanitize=True)
    assert (found.ok, found.arena_high_water, found.stack_high_water, found.sizes) == (True, 64, None, None)
    data = b"".join(array.tobytes() for array in cases[0])
    assert run_inputs(folder, X86, data, sanitize=True) == b"".join(array.tobytes() for array in expected[0])


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("const int8_t *volatile far = model_weights;\n    y[0] = far[16];", "AddressSanitizer: global-buffer-overflow"),
        ("y[0] = (int8_t)(0x7FFFFFFF + (x[0] | 1) * (x[0] | 1));", "signed integer overflow"),
        ("y[0] = (int8_t)((uint32_t)1 << (32 + (x[0] & 0)));", "shift exponent 32 is too large"),
        ("y[0] = (int8_t) * (volatile int32_t *)((uintptr_t)arena + 1u);", "misaligned address"),
    ],
)
def test_sanitizers_see_what_is_wrong(write_folder: WriteFolder, before: str, said: str) -> None:
    found = measure(write_folder(X86, before=before), X86, sanitize=True)
    assert not found.ok
    assert found.mismatch
    assert said in found.mismatch


# ---- the files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", [M4, X86], ids=lambda processor: processor.name)
def test_another_prefix(write_folder: WriteFolder, processor: Any) -> None:
    folder = write_folder(processor, prefix="keywords")
    assert measure(folder, processor).ok
    text = "".join(path.read_text() for path in folder.rglob("*.[ch]"))
    assert not re.findall(r"\bmodel_|\bMODEL_|\bmodel\.h", text)


def test_make_run_needs_nothing_of_qcompile(write_folder: WriteFolder) -> None:
    done = subprocess.run(["make", "-C", str(write_folder(M4)), "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "ok" in (done.stdout + done.stderr).splitlines()


def test_cmake_builds_the_library(write_folder: WriteFolder, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed ('make edge-tools')")
    folder, to = write_folder(X86), tmp_path / "cmake"
    subprocess.run(["cmake", "-S", str(folder), "-B", str(to), "-G", "Unix Makefiles"], capture_output=True, check=True)
    subprocess.run(["cmake", "--build", str(to)], capture_output=True, check=True)
    assert (to / "libqcompile_model.a").is_file()


def test_building_changes_nothing_in_the_folder(write_folder: WriteFolder) -> None:
    folder = write_folder(M4)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    measure(folder, M4)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_cases_of_different_sizes_are_no_golden_inputs() -> None:
    small, large = np.zeros(3, np.int8), np.zeros(4, np.int8)
    with pytest.raises(ValueError, match="inputs of different sizes"):
        golden_header([[small], [large]], [[small], [small]])
    with pytest.raises(ValueError, match="0 sets of inputs"):
        golden_header([], [])


def test_the_files_are_the_same_each_time() -> None:
    assert example_files(M4) == example_files(M4)
    own = [f"example/{name}" for name in ("main.c", "measure.h", "port.h", "port_hosted.c", "stream.c")]
    assert sorted(example_files(X86)) == ["CMakeLists.txt", "Makefile", *own]


# ---- tables -----------------------------------------------------------------------------------------------------------------


def test_make_edge_tools_installs_every_tool(repository: Path) -> None:
    text = (repository / "Makefile").read_text().replace("\\\n", " ")
    installed = re.search(r"^EDGE_PACKAGES := (.*)$", text, re.MULTILINE)
    assert installed
    assert {package for packages in PACKAGES.values() for package in packages} | {"cmake"} == set(installed[1].split())
    assert {tool for processor in PROCESSORS.values() for tool in processor.tools} | {"make"} == set(PACKAGES)


def test_boards_have_processors_and_memory() -> None:
    for board in BOARDS.values():
        assert board.core.name == board.processor
        assert board.flash_bytes >= 256 * 1024
        assert board.ram_bytes >= 32 * 1024
    assert find_board("stm32f746-disco").ram_bytes == 320 * 1024


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(Refused, match=r"unknown board 'stm32f746-disc'; did you mean 'stm32f746-disco'\?"):
        find_board("stm32f746-disc")
    with pytest.raises(Refused, match=r"unknown processor 'cortex-m5'; did you mean 'cortex-m55'\?"):
        find_processor("cortex-m5")

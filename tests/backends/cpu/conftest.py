"""Compiles TIR kernels and calls them on torch tensors, for the kernel tests beside it; on this machine or on an emulated one."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
import tvm_ffi
from qcompile.backends.cpu.kernels import isa as instruction_sets

HARNESS = Path(__file__).with_name("harness.c")
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
# Processors with the set and little more: an instruction that the set does not have stops the test.
PROCESSORS = {
    instruction_sets.NEON: "cortex-a53",
    instruction_sets.DOTPROD: "neoverse-n1",
    instruction_sets.I8MM: "max,sve=off",
    instruction_sets.SVE: "max,sve-max-vq=2",  # vectors of at most 2 x 128 bits
}
TYPE_CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}  # DLPack's

Kernel = Callable[..., None]


@pytest.fixture(scope="session")
def compile_kernel() -> Callable[..., Kernel]:
    """Return a function from a PrimFunc (and an instruction set) to a kernel that takes and writes torch tensors."""

    def build(function: Any, isa: str | None = None) -> Kernel:
        plain = isa == instruction_sets.PORTABLE and "x86" in tvm.target.codegen.llvm_get_system_triple()
        return _native(function, instruction_sets.target_description("x86-64-v3" if plain else None))

    return build


@pytest.fixture(scope="session")
def compile_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Kernel]:
    """Return a function from a PrimFunc and an instruction set to a kernel, compiled for the set and nothing more.

    Sets of this machine's architecture run on it, those of aarch64 elsewhere under QEMU. A test is skipped where its set cannot run.
    """

    def build(function: Any, isa: str) -> Kernel:
        target = instruction_sets.target_description(isa=isa)
        if instruction_sets.SETS[isa].machine == "aarch64" != instruction_sets.machine():
            return _emulated(function, target, PROCESSORS[isa], tmp_path_factory.mktemp("kernel"))
        return _native(function, target)

    return build


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Return the test's instruction set (an indirect parameter), where this machine or its emulator can run it."""
    isa: str = request.param
    if instruction_sets.SETS[isa].machine == "aarch64" != instruction_sets.machine():
        if missing := [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]:
            pytest.skip(f"{isa} needs {' and '.join(missing)} ('make edge-tools')")
    elif reason := instruction_sets.cannot_run(isa):
        pytest.skip(reason)
    return isa


def _native(function: Any, target: dict[str, Any]) -> Kernel:
    name = function.attrs["global_symbol"]
    compiled = tvm.compile(tvm.IRModule({name: function}), tvm.target.Target(target))[name]

    def call(*arguments: torch.Tensor) -> None:
        # TVM takes memory on 64 bytes, which torch's allocator gives and NumPy's may not.
        aligned = (argument if argument.data_ptr() % 64 == 0 else argument.clone() for argument in arguments)
        compiled(*(tvm.runtime.from_dlpack(argument) for argument in aligned))

    return call


def _emulated(function: Any, target: dict[str, Any], processor: str, folder: Path) -> Kernel:
    """Compile a kernel to an object, link it with the harness; calls run it under QEMU and copy all tensors back."""
    name = function.attrs["global_symbol"]
    compiled = tvm.tirx.build(tvm.IRModule({name: function}), tvm.target.Target(target))
    compiled.write_to_file(str(folder / "kernel.o"), "o")
    includes = Path(tvm_ffi.__file__).parent / "include"
    command = [COMPILER, "-O1", "-Wall", "-Werror", "-static", f"-I{includes}", f"-DKERNEL=__tvm_ffi_{name}", HARNESS, "kernel.o", "-lm"]
    subprocess.run([*command, "-o", "kernel"], cwd=folder, check=True)

    def call(*arguments: torch.Tensor) -> None:
        (folder / "inputs").write_bytes(b"".join(map(_serialized, arguments)))
        command = [EMULATOR, "-cpu", processor, "./kernel", "inputs", "outputs"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
        data = bytearray((folder / "outputs").read_bytes())
        for argument in arguments:
            size = argument.numel() * argument.element_size()
            if size:
                found = torch.frombuffer(data[:size], dtype=argument.dtype).reshape(argument.shape)
                argument.copy_(found)
            del data[:size]

    return call


def _serialized(tensor: torch.Tensor) -> bytes:
    name = str(tensor.dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    head = struct.pack("<iii", TYPE_CODES[kind], 8 * tensor.element_size(), tensor.dim())
    return head + struct.pack(f"<{tensor.dim()}q", *tensor.shape) + tensor.contiguous().numpy().tobytes()

"""A compiled model on the CPU: built once, saved, loaded, called from any thread."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
import tvm
import tvm_ffi
from qcompile.backends.cpu.interface import CONSTANTS, INTERFACE, LIBRARY, TEAM, Interface, check_processor, check_shape, read_interface
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.processor import thread_count
from qcompile.backends.cpu.machine import Step
from qcompile.backends.cpu.memory import aligned, place
from qcompile.backends.cpu.team import connect, library, set_threads
from qcompile.backends.cpu.tensor_machine import ModuleFunctions, TensorMachine, read_program
from qcompile.backends.lowering.fallback import Fallback
from qcompile.backends.lowering.translate import COMPILE_LOCK
from tvm import relax
from tvm.support import cc

from qcompile.errors import Refused
from qcompile.files import cache_folder
from qcompile.safetensors_file import Content, open_path


@dataclass(frozen=True)
class KernelTime:
    """Time spent in one kernel during one call."""

    kernel: str
    calls: int
    milliseconds: float


class Executable:
    """A compiled model. Call it with one tensor (torch or NumPy) for each input; it returns a tuple of torch tensors.

    Calls may come from several threads: each gets a machine of its own with its own arena, all share the weights and the code.

    Args:
        module: the runtime module that holds the code.
        constants: the tensors named in the interface.
        interface: inputs and outputs.
        threads: threads of one call; None takes every processor this process may use.
    """

    def __init__(self, module: Any, constants: Mapping[str, torch.Tensor], interface: Interface, threads: int | None = None) -> None:
        self.interface = interface
        self.threads = threads or thread_count()
        self._module = module
        self._code: bytes | None = None
        self._constants = {name: constants[name] for name in interface.constants}
        self._placing, self._placed = threading.Lock(), False
        connect(module)  # compiles just in time, which alters LLVM's module: the bytes of ``code`` must not depend on later calls
        self._program = read_program(module)
        self._machines = threading.local()
        self._dtypes = [getattr(torch, port.dtype) for port in interface.inputs]
        self._accepted: tuple[list[torch.Size], dict[str, int]] = ([], {})  # the shapes of the last call, found right, and their symbols

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Nodes that run without a kernel of this target, with the reason."""
        return self.interface.fallbacks

    def __call__(self, *inputs: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, ...]:
        """Run the model.

        Raises:
            Refused: the number of inputs, a dtype or a shape is not what the interface says.
        """
        tensors, sizes = self._prepare(inputs)
        set_threads(self.threads)
        if self._program is not None:
            result: tuple[torch.Tensor, ...] = self._machine()(tensors, sizes)
            return result
        machine, arguments = self._machine(), [tvm_ffi.from_dlpack(tensor) for tensor in tensors]
        return tuple(torch.utils.dlpack.from_dlpack(result) for result in machine(*arguments, self._argument))

    def tapped(self, *inputs: torch.Tensor | np.ndarray) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Run the model; return its outputs, and by node name the values it was built to tap."""
        results = self(*inputs)
        count = len(results) - self.interface.taps
        return results[:count], dict(zip(self.interface.outputs[count:], results[count:], strict=True))

    def profile(self, *inputs: torch.Tensor | np.ndarray) -> list[KernelTime]:
        """Run the model once with timers around every kernel; return the time of each, longest first."""
        times: dict[str, list[float]] = {}
        for kernel, milliseconds in self.kernel_calls(*inputs):
            times.setdefault(kernel, []).append(milliseconds)
        found = [KernelTime(name, len(spent), sum(spent)) for name, spent in times.items()]
        return sorted(found, key=lambda kernel: -kernel.milliseconds)

    def kernel_calls(self, *inputs: torch.Tensor | np.ndarray) -> list[tuple[str, float]]:
        """Run the model once; return name and milliseconds of every kernel call in the order of the calls."""
        if self._program is not None:
            return [(step.kernel, step.milliseconds) for step in self.steps(*inputs)]
        tensors, _ = self._prepare(inputs)
        arguments = [tvm_ffi.from_dlpack(tensor) for tensor in tensors]
        set_threads(self.threads)
        self._place()
        machine = relax.VirtualMachine(self._module, tvm.cpu())
        calls: list[tuple[str, float]] = []
        starts: list[float] = []

        def instrument(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> None:
            if before:
                starts.append(time.perf_counter())
            else:
                calls.append((name, 1e3 * (time.perf_counter() - starts.pop())))

        machine["main"](*arguments, self._argument)  # the first call allocates
        machine.set_instrument(instrument)
        machine["main"](*arguments, self._argument)
        return calls

    def steps(self, *inputs: torch.Tensor | np.ndarray) -> list[Step]:
        """Run the model twice; return every kernel call of the second time with its time and the shapes it worked on.

        Raises:
            Refused: the model runs in a virtual machine.
        """
        tensors, sizes = self._prepare(inputs)
        set_threads(self.threads)
        if self._program is None:
            raise Refused("a model that runs in a virtual machine has no fixed steps")
        machine = self._machine()
        machine(tensors, sizes)
        found: list[Step] = machine.steps(tensors, sizes)
        return found

    @property
    def arena_bytes(self) -> int | None:
        """Return the bytes that values between kernels take in this thread, of its largest call; None in a virtual machine."""
        return self._machine().arena_bytes if self._program is not None else None

    def copy(self) -> Executable:
        """Return the same code with its constants, and what it will allocate, at other places in memory."""
        self._place()
        constants = {name: tensor.clone() for name, tensor in self._constants.items()}
        return Executable(self._module, constants, self.interface, self.threads)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder with the code, its constants and its interface (see ``interface``); it appears whole or not at all."""
        folder = Path(path)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        (partial / LIBRARY).write_bytes(self.code())
        (partial / TEAM).write_bytes(library())
        with open(partial / CONSTANTS, "wb") as file:
            file.writelines(Content(self._constants).parts())
        (partial / INTERFACE).write_text(json.dumps(asdict(self.interface), indent=1))
        partial.rename(folder)

    def code(self) -> bytes:
        """Return the code as a shared library; the same model gives the same bytes.

        Raises:
            Refused: there is no C compiler to link with, or it fails.
        """
        if self._code is None and cc.get_cc() is None:
            raise Refused("there is no C compiler to link native code with", way_out="install one, such as gcc")
        if self._code is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / LIBRARY
                with COMPILE_LOCK, _without_native_log(), tvm.target.Target(isa.target_description()):
                    try:
                        self._module.export_library(os.fspath(path))
                    except RuntimeError as error:
                        raise Refused(f"native code cannot be linked: {' '.join(str(error).split())[:200]}") from error
                self._code = path.read_bytes()
        return self._code

    @classmethod
    def from_code(cls, code: bytes, constants: Mapping[str, torch.Tensor], interface: Interface, threads: int | None = None) -> Executable:
        """Load what ``code`` returned for the same model. This runs native code: load only what you trust."""
        # The folder is the user's alone: nobody can change the library before it is loaded. It may go once it is.
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".code.") as folder:
            path = Path(folder) / LIBRARY
            path.write_bytes(code)
            with _without_native_log():
                module = tvm.runtime.load_module(os.fspath(path))
        made = cls(module, constants, interface, threads)
        made._code = code
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str], threads: int | None = None) -> Executable:
        """Load what ``save`` wrote. This runs native code: load only what you trust.

        Raises:
            Refused: the folder is incomplete, or the code is for another processor.
        """
        folder = Path(path)
        missing = [name for name in (LIBRARY, CONSTANTS, INTERFACE) if not (folder / name).is_file()]
        if missing:
            raise Refused(f"{', '.join(missing)} is missing", node=str(folder), way_out="compile the model again")
        interface = read_interface(folder)
        check_processor(interface, folder, isa.features_here())
        with _without_native_log():
            module = tvm.runtime.load_module(os.fspath(folder / LIBRARY))
        return cls(module, open_path(folder / CONSTANTS), interface, threads)

    def _machine(self) -> Any:
        """Return the calling thread's machine: it keeps an arena, so sharing one between threads gives wrong answers."""
        if not hasattr(self._machines, "main"):
            self._place()
            if self._program is not None:
                addresses = [tensor.data_ptr() for tensor in self._addressed]
                self._machines.main = TensorMachine(ModuleFunctions(self._module), self._program, addresses)
            else:
                self._machines.machine = relax.VirtualMachine(self._module, tvm.cpu())
                self._machines.main = self._machines.machine["main"]
        return self._machines.main

    def _place(self) -> None:
        """Put the constants where kernels read them, at the first call; until then those in files stay there."""
        with self._placing:
            if self._placed:
                return
            self._constants = dict(zip(self._constants, place(list(self._constants.values())), strict=True))
            if self._program is not None:
                literals = [aligned(torch.from_numpy(literal)) for literal in self._program.literals]
                self._addressed = [*self._constants.values(), *literals]
            else:
                self._argument = tvm_ffi.convert([tvm.runtime.from_dlpack(tensor) for tensor in self._constants.values()])
            self._placed = True

    def _prepare(self, inputs: Sequence[torch.Tensor | np.ndarray]) -> tuple[list[torch.Tensor], tuple[int, ...]]:
        """Return the inputs in memory as kernels read it, and the values of the program's symbols."""
        ports = self.interface.inputs
        if len(inputs) != len(ports):
            names = ", ".join(port.name for port in ports)
            raise Refused(f"the model takes {len(ports)} inputs ({names}), not {len(inputs)}")
        tensors = [value if isinstance(value, torch.Tensor) else torch.from_numpy(value) for value in inputs]
        for port, dtype, tensor in zip(ports, self._dtypes, tensors, strict=True):
            if tensor.dtype != dtype or not tensor.is_cpu:
                found = str(tensor.dtype).removeprefix("torch.") + ("" if tensor.is_cpu else f" on {tensor.device}")
                raise Refused(f"is {port.dtype}, not {found}", node=port.name)
        shapes = [tensor.shape for tensor in tensors]
        known, sizes = self._accepted
        if shapes != known:
            sizes = {}
            for port, shape in zip(ports, shapes, strict=True):
                check_shape(port, tuple(shape), sizes)
            self._accepted = (shapes, sizes)
        symbols = self._program.symbols if self._program is not None else ()
        return [aligned(tensor) for tensor in tensors], tuple(sizes[symbol] for symbol in symbols)


@contextmanager
def _without_native_log() -> Iterator[None]:
    """Send what native code writes to standard error nowhere: TVM logs an empty warning for every constant that it saves."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

"""Runs built code of the cache without compiler, TVM or PyTorch: a process that does nothing else holds the weights and little more.

Libraries are called by ``ctypes``. What they take of TVM's runtime is what two small libraries of its packages have: where to say that a
kernel failed, and memory for a kernel's own use. Parallel loops go to the teams of ``team``, which is saved beside each library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from qcompile.backends.cpu.interface import CONSTANTS, LIBRARY, TEAM, Interface, check_processor, check_shape, read_interface
from qcompile.backends.cpu.kernels.processor import CHOICE, features, machine, system_flags, thread_count
from qcompile.backends.cpu.machine import Machine, address, zeros
from qcompile.backends.cpu.pages import ALIGNMENT, allocate, pieces
from qcompile.backends.cpu.program import ARGUMENTS, CALLS, PROGRAM, SIZES, Program, parse_program

from qcompile.errors import Refused
from qcompile.files import cache_folder

_INTEGER, _TENSOR = 1, 7  # kinds of a value of TVM's calling convention
_CPU = 1
_SIGNED = 0


class _Value(ctypes.Structure):
    """TVMFFIAny."""

    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", ctypes.c_int64))


class _Array(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("device_number", ctypes.c_int32), ("rank", ctypes.c_int32),
        ("kind", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64),
    )  # fmt: skip


class _Bound:
    """An array i64 as kernels take it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array, self._shape, self._strides = array, (ctypes.c_int64 * 1)(len(array)), (ctypes.c_int64 * 1)(1)
        self._view = _Array(address(array), _CPU, 0, 1, _SIGNED, 64, 1, self._shape, self._strides, 0)
        self.value = _Value(_TENSOR, 0, ctypes.addressof(self._view))


class _Library:
    """A shared library of functions of TVM's calling convention."""

    def __init__(self, path: Path) -> None:
        self.code = ctypes.CDLL(os.fspath(path))

    def call(self, name: str, *arguments: _Bound | int) -> int:
        """Call a function and return its integer.

        Raises:
            RuntimeError: it failed.
        """
        values = [_Value(_INTEGER, 0, given) if isinstance(given, int) else given.value for given in arguments]
        result = _Value()
        failed = self.code[f"__tvm_ffi_{name}"](None, (_Value * len(values))(*values), len(values), ctypes.byref(result))
        if failed:
            raise RuntimeError(f"{name} failed")
        return int(result.value)


class _Functions(_Library):
    """The host functions of a model's library; see ``machine.Functions``."""

    def __init__(self, path: Path, launcher: int) -> None:
        runtime = _runtime()
        super().__init__(path)  # whose undefined symbols the runtime has
        for name in ("TVMBackendAllocWorkspace", "TVMBackendFreeWorkspace"):
            self._set(name, ctypes.cast(runtime[name], ctypes.c_void_p).value)
        self._set("TVMBackendParallelLaunch", launcher)

    def _set(self, name: str, target: int | None) -> None:
        """Let the library's variable for one of the runtime's functions point there, where it has one."""
        with contextlib.suppress(ValueError):
            ctypes.c_void_p.in_dll(self.code, f"__{name}").value = target

    def bind(self, array: np.ndarray[Any, Any]) -> _Bound:
        return _Bound(array)

    def calls(self, table: _Bound, first: int, last: int) -> None:
        self.call(CALLS, table, first, last)

    def sizes(self, table: _Bound) -> None:
        self.call(SIZES, table)

    def arguments(self, table: _Bound, shapes: _Bound) -> None:
        self.call(ARGUMENTS, table, shapes)

    def program(self) -> Program:
        place = zeros(2)
        self.call(PROGRAM, _Bound(place))
        text = np.empty(int(place[1]), np.uint8)
        place[0] = address(text)
        self.call(PROGRAM, _Bound(place))
        return parse_program(text.tobytes())


@functools.cache
def _runtime() -> ctypes.CDLL:
    """Return TVM's runtime library; nothing of its packages is imported."""
    ctypes.CDLL(os.fspath(_inside("tvm_ffi", "libtvm_ffi.so")), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(os.fspath(_inside("tvm", "libtvm_runtime.so")))


def _inside(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    return next(Path(folder) / "lib" / name for folder in folders)


class _Teams(_Library):
    """The code of teams. One serves a process; its threads may run until that has ended."""

    made: _Teams | None = None
    _making = threading.Lock()

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.launcher = self.call("start")
        self._own = threading.local()  # how many threads the calling thread's team was given
        os.register_at_fork(after_in_child=self._forget)

    @classmethod
    def of(cls, path: Path) -> _Teams:
        """Return the code that was loaded first: all that is stored beside libraries of these sources is the same."""
        with cls._making:
            cls.made = cls.made or cls(path)
            return cls.made

    def set_threads(self, threads: int) -> None:
        """Give the calling thread a team of this many threads, itself among them; the others end with it."""
        if getattr(self._own, "threads", None) != threads:
            self.call("resize", threads)
            self._own.threads = threads

    def _forget(self) -> None:
        """Drop the calling thread's team, in a process that was forked: its threads are not there."""
        self.call("forget")
        self._own.__dict__.clear()


class StoredExecutable:
    """Built code of a folder that ``executable.Executable.save`` wrote. Call it with arrays; it returns a tuple of arrays.

    Args:
        folder: of the user's own cache: it holds native code.
        threads: threads of one call; None takes every processor this process may use.

    Raises:
        Refused: the code needs what only the compiler's process has, or another processor.
        OSError: something is missing.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.interface: Interface = read_interface(folder)
        available = features()
        if available is None:
            raise Refused("this system does not tell what its processor has")
        check_processor(self.interface, folder, available)
        self._threads = threads or thread_count()
        self._teams = _Teams.of(folder / TEAM)
        self._functions = _Functions(folder / LIBRARY, self._teams.launcher)
        try:
            self._program = self._functions.program()
        except AttributeError:
            raise Refused("the code runs in a virtual machine") from None
        self._constants = _read_constants(folder / CONSTANTS, self.interface.constants)
        self._constants += [aligned(literal) for literal in self._program.literals]
        self._machines = threading.local()

    def __call__(self, inputs: Sequence[np.ndarray[Any, Any]]) -> tuple[np.ndarray[Any, Any], ...]:
        """Run the model.

        Raises:
            Refused: a shape is not what the interface says.
        """
        self._teams.set_threads(self._threads)
        sizes: dict[str, int] = {}
        for port, array in zip(self.interface.inputs, inputs, strict=True):
            check_shape(port, array.shape, sizes)
        given = [aligned(np.asarray(array, port.dtype)) for port, array in zip(self.interface.inputs, inputs, strict=True)]
        if not hasattr(self._machines, "main"):
            self._machines.main = Machine(self._functions, self._program, [address(array) for array in self._constants])
        found: tuple[np.ndarray[Any, Any], ...] = self._machines.main(given, tuple(sizes[symbol] for symbol in self._program.symbols))
        return found


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array contiguous and on an address that is a multiple of 64; copied only if it is not so already."""
    if array.flags.c_contiguous and address(array) % ALIGNMENT == 0:
        return array
    copy = allocate(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _read_constants(path: Path, names: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Return the bytes of constants, read straight to where kernels read them."""
    with open(path, "rb", buffering=0) as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        head = json.loads(os.pread(file.fileno(), first - 8, 8))
        places = [head[name]["data_offsets"] for name in names]
        memory = list(pieces([end - begin for begin, end in places]))
        for (begin, _), piece in zip(places, memory, strict=True):
            file.seek(first + begin)
            view = piece.data
            while view:
                got = file.readinto(view)
                if not got:
                    raise OSError(f"{path} is cut short")
                view = view[got:]
    return memory


def machine_key() -> dict[str, str]:
    """Return what decides which built code runs a graph here, by what can be known without a compiler."""
    table = cache_folder() / "kernel_tiles.json"
    tiles = hashlib.sha256(table.read_bytes()).hexdigest() if table.is_file() else ""
    return {
        "processor": " ".join([machine(), os.environ.get(CHOICE, ""), *sorted(system_flags())]), "threads": str(thread_count()),
        "tiles": tiles, "tvm": version("apache-tvm"), "torch": version("torch"), "sources": _sources(),
    }  # fmt: skip


@functools.cache
def _sources() -> str:
    """Return a digest of all of the project's own code: what derives a graph's entries decides the built code too."""
    digest = hashlib.sha256()
    folders = [str(resources.files(package)) for package in ("qcompile", "qcompile.backends")]
    found = {Path(folder) / name for root in folders for folder, _, names in os.walk(root, followlinks=True) for name in names}
    for path in sorted(path for path in found if path.suffix == ".py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()

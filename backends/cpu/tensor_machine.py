"""A machine for tensors of PyTorch and code that TVM holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm_ffi
from qcompile.backends.cpu.machine import Machine, address, zeros
from qcompile.backends.cpu.program import ARGUMENTS, CALLS, PROGRAM, SIZES, Program, parse_program


class TensorMachine(Machine):
    """A machine that takes and returns tensors."""

    @staticmethod
    def _dtype(name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _new(shape: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device="cpu")

    @staticmethod
    def _address(array: Any) -> int:
        return int(array.data_ptr())


class ModuleFunctions:
    """The host functions of a module of TVM's runtime; see ``machine.Functions``."""

    def __init__(self, module: Any) -> None:
        self.calls, self.sizes, self.arguments = (getattr(module, "mod", module)[name] for name in (CALLS, SIZES, ARGUMENTS))

    def bind(self, array: np.ndarray[Any, Any]) -> Any:
        return tvm_ffi.from_dlpack(array)


def read_program(module: Any) -> Program | None:
    """Return the program of a runtime module; None where it is code of the Relax virtual machine."""
    module = getattr(module, "mod", module)
    if not module.implements_function(PROGRAM):
        return None
    place = zeros(2)
    module[PROGRAM](tvm_ffi.from_dlpack(place))
    text = np.empty(int(place[1]), np.uint8)
    place[0] = address(text)
    module[PROGRAM](tvm_ffi.from_dlpack(place))
    return parse_program(text.tobytes())

"""Compiles TIR kernels and calls them on torch tensors, for the kernel tests beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm
from qcompile.backends.cpu.kernels import isa as instruction_sets


@pytest.fixture(scope="session")
def compile_kernel() -> Callable[..., Callable[..., None]]:
    """Return a function from a PrimFunc (and an instruction set) to a kernel that takes and writes torch tensors."""

    def build(function: Any, isa: str | None = None) -> Callable[..., None]:
        plain = isa == instruction_sets.PORTABLE and "x86" in tvm.target.codegen.llvm_get_system_triple()
        target = tvm.target.Target(instruction_sets.target_description("x86-64-v3" if plain else None))
        name = function.attrs["global_symbol"]
        compiled = tvm.compile(tvm.IRModule({name: function}), target)[name]

        def call(*arguments: torch.Tensor) -> None:
            # TVM takes memory on 64 bytes, which torch's allocator gives and NumPy's may not.
            aligned = (argument if argument.data_ptr() % 64 == 0 else argument.clone() for argument in arguments)
            compiled(*(tvm.runtime.from_dlpack(argument) for argument in aligned))

        return call

    return build

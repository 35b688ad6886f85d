"""The CPU target: TVM through LLVM, for the instruction sets of ``kernels.isa``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.backends.cpu.build import build
    from qcompile.backends.cpu.executable import Executable
    from qcompile.backends.cpu.target import TARGET

__all__ = ["TARGET", "Executable", "build"]


def __getattr__(name: str) -> Any:
    # TVM takes a second to import: only when something is built or loaded.
    if name == "build":
        from qcompile.backends.cpu.build import build

        return build
    if name == "Executable":
        from qcompile.backends.cpu.executable import Executable

        return Executable
    if name == "TARGET":
        from qcompile.backends.cpu.target import TARGET

        return TARGET
    raise AttributeError(f"module {__name__} has no attribute {name}")

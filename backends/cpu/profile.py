"""What every kernel of a built model does in one call: time, arithmetic, bytes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import tvm
from qcompile.backends.cpu.executable import Executable, set_threads
from tvm import relax

from qcompile.target import OperatorTime

Shapes = list[tuple[int, ...]]


def profile(executable: Executable, inputs: Sequence[torch.Tensor], repeats: int) -> list[OperatorTime]:
    """Return time and work of every kernel of one call, longest first; of each kernel the fastest of some calls of the model.

    The timers around a kernel take about a microsecond of their own.
    """
    arguments = executable._prepare(inputs)
    set_threads(executable.threads)
    machine = relax.VirtualMachine(executable._module, tvm.cpu())
    spent: dict[str, list[float]] = {}
    work: dict[str, list[tuple[int | None, int]]] = {}
    starts: list[float] = []

    def instrument(_function: Any, name: str, before: bool, _result: Any, *values: Any) -> None:
        if before:
            starts.append(time.perf_counter())
            return
        spent.setdefault(name, []).append(1e3 * (time.perf_counter() - starts.pop()))
        tensors = [] if name.startswith("vm.builtin") else [value for value in values if isinstance(value, tvm.runtime.Tensor)]
        shapes = [tuple(map(int, tensor.shape)) for tensor in tensors]
        touched = sum(math.prod(s) * int(t.dtype.itemsize) for s, t in zip(shapes, tensors, strict=True))
        work.setdefault(name, []).append((operations(name, shapes), touched))

    machine["main"](*arguments, executable._argument)  # the first call allocates
    machine.set_instrument(instrument)
    best: dict[str, float] = {}
    for _ in range(repeats):
        spent.clear()
        work.clear()
        machine["main"](*arguments, executable._argument)
        best |= {name: min(sum(times), best.get(name, math.inf)) for name, times in spent.items()}
    rows = [_row(name, milliseconds, work[name]) for name, milliseconds in best.items()]
    return sorted(rows, key=lambda row: -row.milliseconds)


def _row(name: str, milliseconds: float, work: list[tuple[int | None, int]]) -> OperatorTime:
    counts = [count for count, _ in work if count is not None]
    integer = re.match(r"(linear_u?int8|(convolution|depthwise)_[ui])", name) is not None
    return OperatorTime(
        name, len(work), milliseconds, sum(counts) if len(counts) == len(work) else None, sum(size for _, size in work), integer
    )  # fmt: skip


def _linear(_name: re.Match[str], shapes: Shapes) -> int:
    return 2 * math.prod(shapes[0]) * shapes[-1][-1]


def _convolution(name: re.Match[str], shapes: Shapes) -> int:
    rows, columns, channels = int(name[2]), int(name[3]), 1 if name[1] == "depthwise" else int(name[4])
    return 2 * math.prod(shapes[-1]) * rows * columns * channels


def _attention(_name: re.Match[str], shapes: Shapes) -> int:
    batch, queries, width = shapes[0]
    return 4 * batch * queries * shapes[1][1] * width


# A kernel's name, as the legalizers make it -> additions and multiplications of a call, from the shapes of its arguments, the result last.
_COUNTS: dict[str, Callable[[re.Match[str], Shapes], int]] = {
    r"linear_": _linear,
    r"(convolution|depthwise)_[a-z]+_(\d+)x(\d+)_(\d+)_\d+$": _convolution,
    r"attention_": _attention,
}


def operations(name: str, shapes: Shapes) -> int | None:
    """Return the additions and multiplications of one call of a kernel; None where its name does not tell."""
    for pattern, count in _COUNTS.items():
        if (found := re.match(pattern, name)) and shapes:
            try:
                return count(found, shapes)
            except (IndexError, ValueError):
                return None
    return None

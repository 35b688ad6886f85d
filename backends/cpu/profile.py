"""What every kernel of a built model does in one call: time, arithmetic, bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from qcompile.backends.cpu.executable import Executable
from qcompile.backends.cpu.machine import Step

from qcompile.errors import Refused
from qcompile.target import OperatorTime

Shapes = list[tuple[int, ...]]


def profile(executable: Executable, inputs: Sequence[torch.Tensor], repeats: int) -> list[OperatorTime]:
    """Return time and work of every kernel of one call, longest first; of each kernel the fastest of some calls of the model.

    The timers around a kernel take up to a microsecond of their own. Of a model that runs in a virtual machine only times are known.
    """
    best: dict[str, float] = {}
    rows: dict[str, list[Step]] = {}
    for _ in range(repeats):
        rows = {}
        for step in _steps(executable, inputs):
            rows.setdefault(step.kernel, []).append(step)
        best |= {name: min(sum(s.milliseconds for s in steps), best.get(name, math.inf)) for name, steps in rows.items()}
    return sorted((_row(steps, best[name]) for name, steps in rows.items()), key=lambda row: -row.milliseconds)


def _steps(executable: Executable, inputs: Sequence[torch.Tensor]) -> list[Step]:
    try:
        return executable.steps(*inputs)
    except Refused:
        return [Step(name, milliseconds, (), 0) for name, milliseconds in executable.kernel_calls(*inputs)]


def _row(steps: list[Step], milliseconds: float) -> OperatorTime:
    name = steps[0].kernel
    counts = [operations(name, list(step.shapes)) for step in steps]
    known = [count for count in counts if count is not None]
    integer = re.match(r"(linear_u?int8|matmul_u?int8|attention_codes|(convolution|depthwise)_[ui])", name) is not None
    total = sum(known) if len(known) == len(counts) else None
    return OperatorTime(name, len(steps), milliseconds, total, sum(step.bytes for step in steps), integer)


def _linear(name: re.Match[str], shapes: Shapes) -> int:
    results = int(name[1] or 1)
    return 2 * math.prod(shapes[0]) * sum(shape[-1] for shape in shapes[-results:])


def _convolution(name: re.Match[str], shapes: Shapes) -> int:
    rows, columns, channels = int(name[2]), int(name[3]), 1 if name[1] == "depthwise" else int(name[4])
    return 2 * math.prod(shapes[-1]) * rows * columns * channels


def _attention(_name: re.Match[str], shapes: Shapes) -> int:
    batch, queries, width = shapes[0]
    return 4 * batch * queries * shapes[1][1] * width


# A kernel's name, as the legalizers make it -> additions and multiplications of a call, from the shapes of its arguments, the result last.
_COUNTS: dict[str, Callable[[re.Match[str], Shapes], int]] = {
    r"linear_[a-z0-9]+_(?:(\d+)_)?(?:w|ternary|codebook|tables)": _linear,
    r"(convolution|depthwise)_[a-z]+_(\d+)x(\d+)_(\d+)_\d+(_add\d*)?$": _convolution,
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

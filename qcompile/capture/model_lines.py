"""Which line of the model's own code a node or an error came from: not one of PyTorch, of this package or of the standard library."""

from __future__ import annotations

import linecache
import re
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType

import torch


def _folders() -> tuple[str, ...]:
    # The project's three folders may lie apart (editable install): a user's folder may well be called qcompile too.
    packages = [find_spec(name) for name in ("torch", "qcompile", "qcompile.passes", "qcompile.backends")]
    return tuple(f"{Path(place).resolve()}/" for spec in packages if spec for place in spec.submodule_search_locations or ())


_OTHERS = _folders()
_STANDARD = f"{Path(sysconfig.get_path('stdlib')).resolve()}/"


def is_model_code(file: str) -> bool:
    """Return whether a frame's file is the user's: on disk, and in none of the packages that only carry the call."""
    path = str(Path(file).resolve())
    return not file.startswith("<") and not path.startswith(_OTHERS) and (not path.startswith(_STANDARD) or "site-packages" in path)


def line_in_trace(trace: str) -> str:
    """Return ``file.py:line`` of the innermost line of model code in a printed stack trace, empty for none."""
    found = [place for place in re.findall(r'File "([^"]+)", line (\d+)', trace) if is_model_code(place[0])]
    return ":".join(found[-1]) if found else ""


@dataclass(frozen=True)
class Place:
    """Where tracing broke off.

    Attributes:
        source: ``file.py:line`` of the innermost line of model code.
        code: that line.
        module: dotted name of the module whose code it is, for the whole model its class.
        operator: the operator that was being traced, empty where it was Python code.
    """

    source: str = ""
    code: str = ""
    module: str = ""
    operator: str = ""


def place_of(error: BaseException, module: torch.nn.Module) -> Place:
    """Return where an error of ``torch.export`` came from in the code of ``module``."""
    names = {id(part): name or type(part).__name__ for name, part in module.named_modules()}
    place, inside = Place(), False
    for frame, line in _frames(error.__traceback__):
        file, owner = frame.f_code.co_filename, frame.f_locals.get("self")
        inside |= file.startswith(_OTHERS[0])  # frames before those of PyTorch called for the capture
        if inside and is_model_code(file):
            place = Place(f"{file}:{line}", linecache.getline(file, line).strip(), names.get(id(owner), place.module))
        elif not place.operator and isinstance(operator := frame.f_locals.get("func"), torch._ops.OpOverload):
            # The first one is what the line called; those after it are what PyTorch makes of it.
            place = Place(place.source, place.code, place.module, str(operator))
    return place


def _frames(trace: TracebackType | None) -> list[tuple[FrameType, int]]:
    found = []
    while trace is not None:
        found.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return found

"""``qcompile verify FOLDER --qemu``: a folder's example runs its golden inputs on the instruction set that the folder is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.backends.edge.firmware.emulate import measure
from qcompile.backends.edge.processors import find_processor

from qcompile.errors import Refused


def verify_folder(folder: Path, *, sanitize: bool = False) -> dict[str, Any]:
    """Build and run the example of a folder that ``compile --target edge:..`` wrote.

    Args:
        folder: is not changed.
        sanitize: build with sanitizers for this machine instead, and run without an emulator.

    Returns:
        ``ok`` (all codes are the reference's, the arena is as large as planned at most), ``target``, ``emulator``, ``cases``, ``equal``
        (cases with the right codes), ``first_mismatch`` (text or None), ``arena_bytes`` (planned), ``arena_high_water``,
        ``stack_high_water``, ``instructions`` (of the first case, exact), ``functions`` (the same by C function), ``code_bytes``,
        ``weights_bytes`` (of the object files). What sanitizers change is None.

    Raises:
        Refused: this is no such folder, or a tool is missing.
    """
    target, arena_bytes = read_report(folder)
    processor = find_processor(target.removeprefix("edge:"))
    found = measure(folder, processor, sanitize=sanitize)
    return {
        "ok": found.ok and (found.arena_high_water or 0) <= arena_bytes,
        "target": target,
        "emulator": None if sanitize else " ".join(processor.emulator[: 3 if processor.machine else None]),
        "cases": found.cases,
        "equal": found.equal,
        "first_mismatch": found.mismatch,
        "arena_bytes": arena_bytes,
        "arena_high_water": found.arena_high_water,
        "stack_high_water": found.stack_high_water,
        "instructions": found.instructions,
        "functions": dict(found.functions),
        "code_bytes": found.sizes.code if found.sizes else None,
        "weights_bytes": found.sizes.weights if found.sizes else None,
    }


def read_report(folder: Path) -> tuple[str, int]:
    """Return target and planned arena of a folder's report.json.

    Raises:
        Refused: there is none, or it says neither.
    """
    way_out = "name a folder that compile --target edge:.. wrote"
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return str(report["target"]), int(report["arena_bytes"])
    except OSError:
        raise Refused("there is no report.json in it", node=str(folder), way_out=way_out) from None
    except (ValueError, KeyError, TypeError):
        raise Refused("its report.json is damaged", node=str(folder), way_out=way_out) from None

"""Finding passes, targets, solvers and recipes by name, without importing the others.

Built-in ones are modules of the packages ``qcompile.passes``, ``qcompile.backends``, ``qcompile.solvers``: the name
``fold-batch-norm`` is the
module ``fold_batch_norm`` with the class ``FoldBatchNorm``. Others plug in by entry points of the groups ``qcompile.passes``,
``qcompile.targets`` and ``qcompile.solvers``; a name that exists already is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, get_type_hints

from qcompile.errors import Refused
from qcompile.nearest import nearest_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcompile.pipeline import Pass
    from qcompile.target import Target


@dataclass(frozen=True)
class _Kind:
    word: str  # "pass", for messages
    package: str  # where the built-in ones live
    group: str  # entry-point group
    folders: bool = False  # one folder each (backends), or one module each


_KINDS = {
    "pass": _Kind("pass", "qcompile.passes", "qcompile.passes"),
    "target": _Kind("target", "qcompile.backends", "qcompile.targets", folders=True),
    "solver": _Kind("solver", "qcompile.solvers", "qcompile.solvers"),
}


@cache
def _known(kind: str) -> dict[str, str | EntryPoint]:
    """Map each name to the module that holds it, or to its entry point."""
    spec = _KINDS[kind]
    package = importlib.import_module(spec.package)
    found: dict[str, str | EntryPoint] = {
        module.name.replace("_", "-"): f"{spec.package}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_") and module.ispkg == spec.folders and module.name != "lowering"
    }
    for point in entry_points(group=spec.group):
        if point.name in found:
            raise Refused(
                f"two {spec.word} plug-ins have the name '{point.name}'", node=str(point.value), way_out="uninstall or rename one"
            )
        found[point.name] = point
    return found


def names(kind: str) -> list[str]:
    """Return all names of a kind: ``pass``, ``target`` or ``solver``."""
    return sorted(_known(kind))


def check_name(kind: str, name: str) -> None:
    """Raise Refused, with the nearest name, unless there is a ``pass``, ``target`` or ``solver`` of this name."""
    family = name.partition(":")[0] if kind == "target" else name
    if family not in _known(kind):
        raise Refused(f"unknown {_KINDS[kind].word} '{name}'", way_out=nearest_name(name, _known(kind)))


def _load(kind: str, name: str, attribute: Callable[[str], str]) -> Any:
    check_name(kind, name)
    place = _known(kind)[name]
    if isinstance(place, EntryPoint):
        return place.load()
    return getattr(importlib.import_module(place), attribute(name))


def find_pass(name: str) -> type[Pass]:
    """Return the pass of this text name.

    Raises:
        Refused: there is none; the message gives the nearest name.
    """
    return _load("pass", name, lambda n: "".join(part.capitalize() for part in n.split("-")))


def find_target(name: str) -> Target:
    """Return the target of this name, such as ``cpu``, or ``edge:cortex-m4``: a target and what it is made for.

    Raises:
        Refused: there is none; the message gives the nearest name.
    """
    family, colon, variant = name.partition(":")
    target: Target = _load("target", family, lambda n: "TARGET")
    return target.variant(variant) if colon else target


def find_runtime(name: str) -> Any:
    """Return the module that runs a target's built code of the cache without building anything; None where the target has none.

    It has ``StoredExecutable``, an executable of a folder that ``Target.store`` returned, and ``machine_key``: by name what decides,
    beside the artifact, which code runs here.
    """
    check_name("target", name)
    place = _known("target")[name]
    if isinstance(place, EntryPoint) or importlib.util.find_spec(f"{place}.stored") is None:
        return None
    return importlib.import_module(f"{place}.stored")


def find_solver(name: str) -> Callable[..., Any]:
    """Return the ``solve`` function of this solver, such as ``gptq``."""
    return _load("solver", name, lambda n: "solve")


def solver_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of this solver: the keyword parameters of its function that text can write, their types resolved."""
    solve = find_solver(name)
    types = get_type_hints(solve)
    return {
        key: parameter.replace(annotation=types[key])
        for key, parameter in inspect.signature(solve).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and types.get(key) in (int, float, bool, str)
    }

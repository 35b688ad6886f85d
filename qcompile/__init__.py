"""qcompile: a quantization compiler. A trained network in, a low-bit artifact out.

    import qcompile
    artifact = qcompile.compile(model, example_inputs, recipe="w8a8", calibration=batches)
    artifact.save("model.qc")
    y = qcompile.load("model.qc")(x)

Names are loaded when they are first used, so that importing this package loads neither torch nor tvm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.artifact import Artifact, load
    from qcompile.compiler import compile
    from qcompile.errors import Refused
    from qcompile.graph.graph import Graph
    from qcompile.pipeline import BITS, VALUES, Context, Keeps, Pass, Pipeline, approximately
    from qcompile.recipe import Recipe, load_recipe

_HOME = {
    "Artifact": "artifact", "load": "artifact", "compile": "compiler", "Refused": "errors", "Graph": "graph.graph", "Recipe": "recipe",
    "load_recipe": "recipe", "BITS": "pipeline", "VALUES": "pipeline", "Context": "pipeline", "Keeps": "pipeline", "Pass": "pipeline",
    "Pipeline": "pipeline", "approximately": "pipeline",
}  # fmt: skip

__all__ = [
    "BITS", "VALUES", "Artifact", "Context", "Graph", "Keeps", "Pass", "Pipeline", "Recipe", "Refused", "approximately", "compile", "load",
    "load_recipe",
]  # fmt: skip

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qcompile.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qcompile' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

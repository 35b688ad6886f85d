"""The dry run: what a compile would give, from shapes and schemes alone. No data is read, no weight is rounded, nothing is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qcompile.capture import capture
from qcompile.formats import LayerScheme, parse_layer_scheme, stored_bytes
from qcompile.graph import Graph
from qcompile.graph.file_tensor import KEPT, FileTensor
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline
from qcompile.recipe import CODES_RECIPE, DEFAULT_RECIPE, Recipe, load_recipe
from qcompile.registry import find_target
from qcompile.report import float_operators

# Passes whose result decides schemes and which need no data: these are run, on weights shared with the model.
_PLANNED = ("canonicalize", "fold-constants", "fold-batch-norm", "recognize-attention", "assign-bits")
COMPILER_BYTES = 700 << 20  # torch, tvm and the interpreter: measured 500 to 700 MB resident


def plan(model: Any, *, recipe: str | Path | Recipe | None = None, target: str = "cpu") -> dict[str, Any]:
    """Return what a compile is predicted to give.

    The keys are ``bytes``, ``float_bytes``, ``bits_per_weight``, ``peak_memory_bytes``, ``kernels``, ``float_ops``, ``warnings``,
    ``pipeline``, ``recipe`` and ``target``.

    Raises:
        Refused: the model cannot be captured, or a scheme has no kernel on the target.
    """
    chosen, place = load_recipe(recipe or DEFAULT_RECIPE), find_target(target)
    captured = capture(model)
    if recipe is None and captured.brings_codes:
        chosen = load_recipe(CODES_RECIPE)
    pipeline = chosen.parsed_pipeline()
    graph, context = captured.graph, Context(place, chosen, example_inputs=captured.example_inputs)
    Pipeline(tuple(p for p in pipeline.passes if p.name() in _PLANNED)).run(graph, context)
    layers = [(node, parse_layer_scheme(node.meta["notes"]["scheme"])) for node in graph.nodes if "scheme" in node.meta["notes"]]
    quantizable = [(str(bound_arguments(n)["weight"].target), n, s.weight) for n, s in layers if s.weight]
    stored = {(name, str(scheme)): (stored_bytes(scheme, _shape(n)), 4 * _elements(n)) for name, n, scheme in quantizable}  # tied: once
    rest = sum(t.numel() * t.element_size() for name, t in graph.constants.items() if name not in {weight for weight, _, _ in quantizable})
    kernels = Counter(
        (operator_name(n.target).replace("aten.", "qc."), str(s.weight or "float32"), str(s.activation or "float32"))
        for n, s in layers
        if s != LayerScheme()
    )
    float_bytes = rest + sum(4 * _elements(n) for _, n, _ in quantizable)
    quantized = [node.name for node, scheme in layers if scheme != LayerScheme()]
    return {
        "bytes": rest + sum(size for size, _ in stored.values()), "float_bytes": float_bytes,
        "bits_per_weight": round(32 * sum(s for s, _ in stored.values()) / sum(f for _, f in stored.values()), 4) if stored else 32.0,
        "peak_memory_bytes": _peak_memory(graph, float_bytes) + COMPILER_BYTES,
        "kernels": [{"op": op, "weight": w, "activation": a, "count": count} for (op, w, a), count in sorted(kernels.items())],
        "float_ops": [{"node": n, "op": op, "reason": reason} for n, op, reason in float_operators(graph) if n not in quantized],
        "warnings": context.warnings, "pipeline": str(pipeline), "recipe": chosen.name, "target": target,
    }  # fmt: skip


def _peak_memory(graph: Graph, float_bytes: int) -> int:
    """Return the bytes that weights take at most: all of them with what is made of them, or of those in files a few at a time."""
    in_files = [tensor.nbytes for tensor in graph.constants.values() if isinstance(tensor, FileTensor)]
    held = float_bytes - sum(in_files)
    return 3 * held + min(3 * sum(in_files), KEPT + 3 * max(in_files, default=0))


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(bound_arguments(node)["weight"].meta["val"].shape)


def _elements(node: Any) -> int:
    return int(bound_arguments(node)["weight"].meta["val"].numel())

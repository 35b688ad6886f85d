"""The compile driver: capture, pipeline with checkpoints, report, artifact."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qcompile.artifact import Artifact
from qcompile.calibration import Calibration, from_iterable, parse_calibration
from qcompile.capture import Captured, capture
from qcompile.capture.sizes import fix_sizes
from qcompile.capture.torch_export import DynamicShapes
from qcompile.checkpoint import Checkpoints
from qcompile.errors import Refused
from qcompile.files import cache_folder, write_atomic
from qcompile.graph import Graph, Stage, print_graph
from qcompile.graph.file_tensor import parts_of
from qcompile.native_code import build_native_code
from qcompile.pipeline import Context, Observer, Pass, Pipeline, Step
from qcompile.recipe import CODES_RECIPE, DEFAULT_RECIPE, Recipe, load_recipe
from qcompile.registry import find_target
from qcompile.report import build_report, layer_errors
from qcompile.target import MemoryLimits

RANDOM_SAMPLES = 16  # noise tells little; more of it tells no more
VERSIONED = ("qcompile", "torch", "apache-tvm", "onnx", "onnxruntime")


@dataclass
class Options:
    """How to compile, beside what.

    Attributes:
        output: where the artifact will be written; with it, checkpoints are kept beside it until it is.
        resume: go on with the checkpoints of a killed compile.
        check: hold every pass to its promise on the example inputs.
        dump: folder that gets the graph's text after every pass.
        stop_after: name of the pass after which the pipeline ends.
        progress: called with a line of text as work goes on.
        observers: see ``Pipeline.run``.
        hold_promises: refuse the pass that breaks its promise under ``check``; False only measures (bisection).
        kernel_times: the table of measured kernel times to use and extend, by default the one in the cache folder.
        native: build the target's code too and put it into the artifact.
        sizes: symbolic sizes of the model to fix, by name.
        limits: what the target's memory holds, see ``Target.with_limits``.
    """

    output: Path | None = None
    resume: bool = False
    check: bool = False
    dump: Path | None = None
    stop_after: str = ""
    progress: Callable[[str], None] | None = None
    observers: tuple[Observer, ...] = ()
    kernel_times: Path | None = None
    hold_promises: bool = True
    native: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    limits: MemoryLimits | None = None


@dataclass
class Compilation:
    """What a compile knew and did: for the command line, where the artifact alone says too little."""

    artifact: Artifact
    steps: list[Step]
    context: Context
    pipeline: Pipeline
    seconds: dict[str, float] = field(default_factory=dict)


def compile(
    model: Any,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | None = None,
    target: str = "cpu",
    calibration: Any = None,
    dynamic_shapes: DynamicShapes | None = None,
    native: bool = False,
) -> Artifact:
    """Compile a model to a quantized artifact.

    Args:
        model: a torch module, an exported program, an ONNX ModelProto, or a path: ``.onnx``, ``.pt2``, a Hugging Face folder, or
            ``python:FILE_OR_MODULE:FUNCTION``.
        example_inputs: one batch as a tuple or dict of tensors; needed for a module.
        recipe: a name (see ``qcompile recipes``), a YAML file, a Recipe, or pipeline text; by default ``w8a8``, and ``stored`` for a model
            whose weights have codes already.
        target: a name, see ``qcompile targets``.
        calibration: an iterable of batches (tuples or dicts), or text: a file, ``text:FILE``, ``images:FOLDER?..``, ``random``.
        dynamic_shapes: for each input a map from axis to the name of its symbolic size, for a module.
        native: put the target's code for this machine into the artifact; without it, equal compiles give equal bytes on every machine.

    Returns:
        The artifact: call it, save it, read its ``report``.

    Raises:
        Refused: naming node, operator, reason and way out.
    """
    options = Options(native=native)
    return run_compile(
        model, example_inputs, recipe=recipe, target=target, calibration=calibration, dynamic_shapes=dynamic_shapes, options=options
    ).artifact


def run_compile(
    model: Any,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | None = None,
    target: str = "cpu",
    calibration: Any = None,
    dynamic_shapes: DynamicShapes | None = None,
    options: Options | None = None,
) -> Compilation:
    """Compile as ``compile`` does, with options, and return what happened on the way."""
    options = options or Options()
    chosen, place = load_recipe(recipe or DEFAULT_RECIPE), find_target(target)
    place = place.with_limits(options.limits) if options.limits else place
    if options.native and not place.native:
        raise Refused(f"target {place.name} has no native code to store", way_out="leave out --native")
    pipeline = _stopped(chosen.parsed_pipeline(), options.stop_after)
    captured = capture(model, example_inputs, dynamic_shapes)
    captured = fix_sizes(captured, options.sizes) if options.sizes else captured
    if recipe is None and captured.brings_codes:
        chosen = load_recipe(CODES_RECIPE)
        pipeline = _stopped(chosen.parsed_pipeline(), options.stop_after)
    gc.collect()  # tracing leaves the float model in cycles: its weights would stay beside those that passes make
    check_finite(captured.graph)
    data = _calibration(calibration, captured, chosen, options)
    context = Context(place, chosen, data, captured.example_inputs, cache=cache_folder())
    context.kernel_times = options.kernel_times
    context.progress = options.progress is not None and sys.stderr.isatty()
    graph, steps, errors = _run_pipeline(captured, pipeline, context, options)
    artifact = _make_artifact(captured, graph, pipeline, context, errors)
    if options.native:
        artifact.native = build_native_code(place, graph)
    return Compilation(artifact, steps, context, pipeline)


def check_finite(graph: Graph) -> None:
    """Raise Refused naming the first constant that holds NaN or infinity."""
    for name, tensor in graph.constants.items():
        for part in parts_of(tensor) if tensor.is_floating_point() and tensor.numel() else ():
            largest = part.max()  # NaN where there is one
            if torch.isnan(largest):
                raise Refused("the weight holds NaN", node=name, way_out="repair or retrain the model")
            # Masks use infinities by design; weights have more than one element for each row.
            if tensor.ndim > 0 and torch.isposinf(largest):
                raise Refused("the weight holds infinity", node=name, way_out="repair or retrain the model")


def _stopped(pipeline: Pipeline, name: str) -> Pipeline:
    if not name:
        return pipeline
    names = [item.name() for item in pipeline.passes]
    if name not in names:
        raise Refused(f"the pipeline has no pass '{name}'", way_out=f"it has {', '.join(names)}")
    return Pipeline(pipeline.passes[: names.index(name) + 1])


def _calibration(given: Any, captured: Captured, recipe: Recipe, options: Options) -> Calibration | None:
    if isinstance(given, Calibration):
        return given
    if isinstance(given, (str, os.PathLike)):
        return parse_calibration(
            os.fspath(given), example_inputs=captured.example_inputs, tokenizer_folder=captured.folder, limit=recipe.calibration_samples
        )
    if given is not None:
        return from_iterable(given, limit=recipe.calibration_samples)
    if not recipe.needs_data:
        return None
    if options.progress:
        options.progress(f"recipe {recipe.name} reads calibration data and none was given: random inputs are used, expect lower accuracy")
    return parse_calibration("random", example_inputs=captured.example_inputs, limit=min(recipe.calibration_samples, RANDOM_SAMPLES))


def compile_key(model: Captured, *, recipe: str | Path | Recipe, target: str, calibration: Any = None) -> str:
    """Return the digest of everything that the artifact of ``run_compile`` depends on, without compiling."""
    chosen = load_recipe(recipe)
    data = _calibration(calibration, model, chosen, Options())
    return _key(model, chosen.parsed_pipeline(), Context(find_target(target), chosen, data, model.example_inputs))


def _key(captured: Captured, pipeline: Pipeline, context: Context) -> str:
    """Digest of everything the artifact depends on."""
    parts = [captured.graph.digest, str(pipeline), context.recipe.canonical() if context.recipe else "", context.target.name]
    parts += [context.calibration.digest if context.calibration else "", json.dumps(versions(), sort_keys=True)]
    parts += [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in captured.example_inputs]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what comes out."""
    return {name: version(name) for name in VERSIONED}


def _run_pipeline(captured: Captured, pipeline: Pipeline, context: Context, options: Options) -> tuple[Graph, list[Step], dict[str, float]]:
    graph, state, first = captured.graph, _State(), 0
    checkpoints = None
    if options.output:
        checkpoints = Checkpoints(options.output, _key(captured, pipeline, context), resume=options.resume)
        if checkpoints.done:
            first, graph, state = _resumed(checkpoints, captured.graph, context)
        graph.keep = checkpoints.keep
        if not checkpoints.done:
            checkpoints.save(graph, "capture", state.dump(context))
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
        _dump(options.dump, 0, "capture", graph)

    def before(number: int, item: Pass) -> None:
        if graph.stage == Stage.FLOAT and item.gives == Stage.SIMULATED:
            state.float_graph, state.float_number = graph.copy(), number
        if item.stage == Stage.SIMULATED and item.gives == Stage.INTEGER and state.float_graph is not None:
            state.errors = layer_errors(state.float_graph, graph, captured.example_inputs)
            state.float_graph = None
        context.parts = checkpoints.parts() if checkpoints else None
        if options.progress:
            options.progress(f"[{number + 1}/{len(pipeline.passes)}] {item}")

    def after(number: int, item: Pass, changed: Graph, step: Step) -> None:
        if checkpoints:
            checkpoints.save(changed, step.text, state.dump(context))
        if options.dump:
            _dump(options.dump, number + 1, item.name(), changed)

    check = [captured.example_inputs] if options.check else []
    try:
        steps = pipeline.run(
            graph, context, first=first, check=check, hold=options.hold_promises, observers=(after, *options.observers), before=before
        )
        context.target.check(graph)  # for pipelines that assign no bits, where nothing asked before
    except Refused:
        if checkpoints:
            checkpoints.remove()  # the same inputs would be refused again: there is nothing to resume
        raise
    return graph, steps, state.errors


def _resumed(checkpoints: Checkpoints, captured: Graph, context: Context) -> tuple[int, Graph, _State]:
    """Return number of passes done, graph and state where a killed compile stopped; from the start where its checkpoints are damaged."""
    number = checkpoints.done - 1
    try:
        graph = checkpoints.load(number, captured)
        return number, graph, _State.restore(checkpoints, captured, context)
    except Refused:
        checkpoints.restart()
        return 0, captured, _State()


def _dump(folder: Path, number: int, name: str, graph: Graph) -> None:
    write_atomic(folder / f"{number:03}_{name.replace('-', '_')}.txt", print_graph(graph).encode())


@dataclass
class _State:
    """What the driver carries from pass to pass and a resumed compile needs again."""

    errors: dict[str, float] = field(default_factory=dict)
    float_graph: Graph | None = None
    float_number: int | None = None

    def dump(self, context: Context) -> dict[str, Any]:
        return {"errors": self.errors, "float_number": self.float_number if self.float_graph is not None else None,
                "notes": context.notes, "warnings": context.warnings,
                "kernel_times": context.kernel_times_used, "reasons": context.log.reasons}  # fmt: skip

    @classmethod
    def restore(cls, checkpoints: Checkpoints, captured: Graph, context: Context) -> _State:
        saved = checkpoints.journal["state"]
        number = saved["float_number"]
        state = cls(dict(saved["errors"]), checkpoints.load(number, captured) if number is not None else None, number)
        context.notes += [tuple(note) for note in saved["notes"]]
        context.warnings += saved["warnings"]
        context.kernel_times_used = dict(saved["kernel_times"])
        context.log.reasons.update(saved["reasons"])
        return state


def _make_artifact(captured: Captured, graph: Graph, pipeline: Pipeline, context: Context, errors: Mapping[str, float]) -> Artifact:
    assert context.recipe is not None
    examples = [example.contiguous() for example in captured.example_inputs]
    return Artifact(
        graph,
        recipe=context.recipe.canonical(),
        pipeline=str(pipeline),
        target=context.target.name,
        golden_inputs=examples,
        golden_outputs=[output.contiguous() for output in graph(*examples)],
        report=build_report(graph, context, errors),
        versions=versions(),
        tokenizer=captured.tokenizer,
        config=captured.config,
        end_tokens=captured.end_tokens,
    )


def finish(artifact: Artifact, output: Path) -> int:
    """Write the artifact, then remove the checkpoints that led to it; return its bytes."""
    size = artifact.save(output)
    artifact.move_constants(output)
    Checkpoints.discard(output)
    return size

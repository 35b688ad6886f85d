"""Passes and pipelines: what a pass is, what it promises, and how a list of them runs.

A pass is a frozen dataclass; its fields are its options. ``smooth{alpha=0.6}`` in text is ``Smooth(alpha=0.6)`` in Python; a pipeline
is passes joined by commas, and both print to and parse from text.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_type_hints

import torch

from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.graph.rewrite import RewriteLog, Rule, apply_rules
from qcompile.graph.stage import Stage
from qcompile.nearest import nearest_name

if TYPE_CHECKING:
    from qcompile.calibration import Calibration
    from qcompile.recipe import Recipe
    from qcompile.statistics import Request, Statistics
    from qcompile.target import Target


@dataclass(frozen=True)
class Keeps:
    """What a pass keeps of the model's outputs on the check batch, as the signal-to-noise ratio it guarantees, in dB.

    BITS: equal bit for bit. VALUES: equal up to float rounding. ``approximately(db)``: no worse than that; None promises nothing.
    """

    name: str
    min_sqnr_db: float | None

    def __str__(self) -> str:
        return self.name


BITS = Keeps("bits", float("inf"))
VALUES = Keeps("values", 80.0)  # float32 rounding of a deep network: measured 100-130 dB on the models of the docs


def approximately(min_sqnr_db: float | None = None) -> Keeps:
    """Return the promise of a pass that rounds: at least so many dB, or none."""
    return Keeps("approximately" if min_sqnr_db is None else f"approximately({min_sqnr_db:g} dB)", min_sqnr_db)


class Parts(Protocol):
    """What a pass has finished, by names of its own, for a compile that goes on after a kill."""

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]] | None:
        """Return tensors and notes of a part, or None where it is not finished."""

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], notes: Sequence[tuple[str, str]]) -> None:
        """Record that a part is finished."""


@dataclass
class Context:
    """What passes are given beside the graph.

    Attributes:
        target: where the artifact will run.
        recipe: the recipe being compiled.
        calibration: the data, or None where there is none.
        example_inputs: one batch in the order of the graph's inputs, for shapes and, without data, for the range of the inputs.
        statistics: what the pass asked for, gathered on the graph as it stands.
        log: counts and reasons of rewrite rules.
        notes: ``(node, text)`` lines for the report, such as why a layer stays float.
        warnings: lines that the user should see at once, such as a recipe's pattern that fits no layer; they are in the report too.
        cache: folder for cached statistics, None for no cache.
        progress: show a progress bar while data are swept.
        kernel_times: table of measured kernel times, None for the one in the cache folder.
        kernel_times_used: the entries of that table that decided something.
        parts: finished parts of the pass that runs, for one that takes long; None where nothing is kept of a killed compile.
    """

    target: Target
    recipe: Recipe | None = None
    calibration: Calibration | None = None
    example_inputs: Sequence[torch.Tensor] = ()
    statistics: Statistics | None = None
    log: RewriteLog = field(default_factory=RewriteLog)
    notes: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cache: Path | None = None
    progress: bool = False
    kernel_times: Path | None = None
    kernel_times_used: dict[str, dict[str, float]] = field(default_factory=dict)
    parts: Parts | None = None


@dataclass(frozen=True)
class Pass:
    """One transformation of a graph.

    Attributes:
        stage: the stage of the graphs it takes.
        gives: the stage it leaves the graph in, by default the same.
        keeps: what it promises about the model's outputs.
        rules: the rewrite rules that it applies, unless ``run`` is overridden.
        after: passes that must not come later than this one in a pipeline.
        needs: passes that must have run before.
    """

    stage: ClassVar[Stage] = Stage.FLOAT
    gives: ClassVar[Stage | None] = None
    keeps: ClassVar[Keeps] = VALUES
    rules: ClassVar[tuple[Rule, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def name(cls) -> str:
        """Return the text name: ``FoldBatchNorm`` is ``fold-batch-norm``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def takes(cls, stage: Stage) -> bool:
        """Say whether it takes a graph of this stage; a pass that takes two leaves both in ``gives``."""
        return stage == cls.stage

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        """Return the statistics this pass wants of this graph."""
        return ()

    def run(self, graph: Graph, context: Context) -> int:
        """Change the graph in place and return the number of changes."""
        return apply_rules(graph, self.rules, context.log)

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Pass:
        """Return the pass with these options, checked against the types of its fields.

        A pass whose options depend on one another, such as those of a solver it names, overrides this and ``settings``.

        Raises:
            Refused: an unknown option (naming the nearest) or a value of another type.
        """
        types = get_type_hints(cls)
        return cls(**check_options(options, {f.name: types[f.name] for f in dataclasses.fields(cls)}, cls.name()))

    def settings(self) -> dict[str, Any]:
        """Return the options that are not at their defaults: ``make(settings())`` is this pass again."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={_option_text(value)}" for name, value in self.settings().items())
        return f"{self.name()}{{{options}}}" if options else self.name()


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    plain = re.fullmatch(r"[\w.+-]+", value) and isinstance(_parse_value(value), str)
    return value if plain else f'"{value}"'


def check_options(options: Mapping[str, Any], types: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the options with whole numbers as float where that is their type.

    Args:
        options: value by name, as the text form gives them.
        types: of every option there is: int, float, bool or str.
        owner: whose options they are, for messages.

    Raises:
        Refused: an unknown option (naming the nearest) or a value of another type.
    """
    checked = dict(options)
    for key, value in options.items():
        if key not in types:
            raise Refused(f"unknown option '{key}' of {owner}", way_out=nearest_name(key, types))
        expected = types[key]
        if expected is float and type(value) is int:
            checked[key] = float(value)
        elif isinstance(expected, type) and type(value) is not expected:
            raise Refused(f"option {key} of {owner} is {expected.__name__}, not {value!r}")
        elif isinstance(value, str) and ('"' in value or not value.isprintable()):
            raise Refused(f"option {key} of {owner} holds a quotation mark or a control character")
    return checked


# ---- text -----------------------------------------------------------------------------------------------------------------

_PASS_TEXT = re.compile(r"\s*([\w-]+)\s*(?:\{((?:[^{}\"]|\"[^\"]*\")*)\})?\s*(?:,|$)")
_OPTION_TEXT = re.compile(r"\s*(\w+)\s*=\s*(\"[^\"]*\"|[^,\"]+?)\s*(?:,|$)")


def parse_pipeline(text: str, find: Callable[[str], type[Pass]]) -> Pipeline:
    """Parse ``fold-batch-norm, smooth{alpha=0.6}``; ``find`` maps a name to its pass.

    Raises:
        Refused: naming the text that is not understood.
    """
    passes: list[Pass] = []
    position = 0
    while position < len(text.rstrip()):
        match = _PASS_TEXT.match(text, position)
        if not match:
            raise Refused(
                f"the pipeline is not understood at '{text[position : position + 30].strip()}'", way_out="write name{option=value}, name"
            )
        passes.append(find(match[1]).make(_parse_options(match[2] or "")))
        position = match.end()
    return Pipeline(tuple(passes))


def _parse_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    position = 0
    while position < len(text.rstrip()):
        match = _OPTION_TEXT.match(text, position)
        if not match:
            raise Refused(f"the options '{text}' are not understood", way_out="write option=value, option=value")
        options[match[1]] = _parse_value(match[2])
        position = match.end()
    return options


def _parse_value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"'):
        return text[1:-1]  # as it stands: there are no escapes
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---- running --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one pass did: its text, its changes, its seconds and, under ``check``, the SQNR of what it kept."""

    text: str
    changes: int
    seconds: float
    sqnr_db: float | None = None


Observer = Callable[[int, Pass, Graph, Step], None]


@dataclass(frozen=True)
class Pipeline:
    """A list of passes that runs in order."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.passes))

    def check_order(self, stage: Stage = Stage.FLOAT) -> None:
        """Raise Refused naming the first pass that stands where it may not."""
        names = [p.name() for p in self.passes]
        for i, item in enumerate(self.passes):
            if not item.takes(stage):
                raise Refused(f"{item.name()} takes a graph of stage {item.stage}, here it is {stage}", node=f"pass {i + 1}")
            if missing := [need for need in item.needs if need not in names[:i]]:
                raise Refused(f"{item.name()} needs {missing[0]} before it", node=f"pass {i + 1}")
            if late := [other for other in item.after if other in names[i + 1 :]]:
                raise Refused(f"{item.name()} must come after {late[0]}", node=f"pass {i + 1}")
            stage = item.gives or stage

    def run(
        self,
        graph: Graph,
        context: Context,
        *,
        first: int = 0,
        check: Sequence[Sequence[torch.Tensor]] = (),
        hold: bool = True,
        observers: Iterable[Observer] = (),
        before: Callable[[int, Pass], None] | None = None,
    ) -> list[Step]:
        """Run the passes from number ``first`` on the graph, in place.

        Args:
            graph: changed in place.
            context: given to every pass.
            first: number of passes that are already done (resume).
            check: batches on which every pass is held to its ``keeps``.
            hold: refuse a pass that breaks its promise; False only measures.
            observers: called after each pass with its number, the pass, the graph and the step.
            before: called before each pass (progress).

        Raises:
            Refused: a pass breaks its promise or leaves an illegal graph; the message names it and those before it.
        """
        steps: list[Step] = []
        reference = [graph(*batch) for batch in check]
        for number, item in enumerate(self.passes[first:], first):
            if before:
                before(number, item)
            start = time.perf_counter()
            changes = self._run_one(number, item, graph, context)
            seconds = time.perf_counter() - start
            quality = self._check_promise(number, item, graph, check, reference, hold) if check else None
            reference = [graph(*batch) for batch in check]
            steps.append(Step(str(item), changes, seconds, quality))
            for observe in observers:
                observe(number, item, graph, steps[-1])
        return steps

    def _run_one(self, number: int, item: Pass, graph: Graph, context: Context) -> int:
        if not item.takes(graph.stage):
            raise Refused(f"{item.name()} takes a graph of stage {item.stage}, here it is {graph.stage}", node=f"pass {number + 1}")
        graph.maker = item.name()
        context.statistics = self._gather(item, graph, context)
        try:
            changes = item.run(graph, context)
            graph.clean()
            graph.stage = item.gives or graph.stage
            graph.check()
        except Refused as error:
            error.args = (f"pass {item.name()} (after {', '.join(graph.history)}): {error.args[0]}",)
            raise
        graph.history = (*graph.history, item.name())
        return changes

    def _gather(self, item: Pass, graph: Graph, context: Context) -> Statistics | None:
        requests = item.requests(graph, context)
        if not requests:
            return None
        from qcompile.statistics import collect

        if context.calibration is None:
            raise Refused(
                f"{item.name()} needs calibration data", way_out="give --calibrate DATA, or use a recipe without data such as dfq"
            )
        return collect(graph, requests, context.calibration, cache=context.cache, progress=context.progress)

    def _check_promise(self, number, item, graph, check, reference, hold) -> float:  # type: ignore[no-untyped-def]
        pairs = [(a, b) for batch, old in zip(check, reference, strict=True) for a, b in zip(old, graph(*batch), strict=True)]
        quality = min(sqnr_db(a, b) for a, b in pairs)
        promised = item.keeps.min_sqnr_db
        if hold and promised is not None and quality < promised:
            raise Refused(
                f"pass {item.name()} promises {item.keeps} ({promised:g} dB) and keeps {quality:.1f} dB",
                node=f"pass {number + 1} after {', '.join(graph.history[:-1])}",
            )
        return quality


def sqnr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Return 10 log10 of signal power over error power; infinite where the two are equal bit for bit."""
    if torch.equal(reference, actual):
        return float("inf")
    if reference.shape != actual.shape or not torch.isfinite(actual.to(torch.float64)).all():
        return float("-inf")
    a, b = reference.to(torch.float64), actual.to(torch.float64)
    signal, error = a.square().sum(), (a - b).square().sum()
    return float(10 * torch.log10(signal / error)) if signal > 0 else float("-inf")

"""Pipelines print to and parse from text, check their order, and hold every pass to what it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcompile.backends.reference.target import ReferenceTarget

from qcompile.capture import capture
from qcompile.errors import Refused
from qcompile.graph import Graph, Stage
from qcompile.pipeline import BITS, VALUES, Context, Keeps, Pass, Pipeline, approximately, parse_pipeline, sqnr_db
from qcompile.registry import find_pass, names, solver_options

# ---- text -----------------------------------------------------------------------------------------------------------------

WORD = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789 _.+-=,:;*/|()[]{}<>@#%'\\", max_size=12)
VALUES_OF = {int: st.integers(-(10**9), 10**9), float: st.floats(allow_nan=False, allow_infinity=False), bool: st.booleans(), str: WORD}


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    kind = find_pass(draw(st.sampled_from(names("pass"))))
    types, fixed = {name: type for name, type in get_type_hints(kind).items() if type in VALUES_OF}, {}
    if kind.name() == "quantize-weights" and draw(st.booleans()):  # its options are also those of the solver that it names
        fixed = {"solver": draw(st.sampled_from(names("solver")))}
        types = {name: type for name, type in types.items() if name != "solver"}
        types |= {name: parameter.annotation for name, parameter in solver_options(fixed["solver"]).items()}
    chosen = draw(st.lists(st.sampled_from(sorted(types)), unique=True)) if types else []
    return kind.make(fixed | {name: draw(VALUES_OF[types[name]]) for name in chosen})


@given(st.lists(passes(), max_size=6))
def test_a_pipeline_parses_from_what_it_prints(items: list[Pass]) -> None:
    pipeline = Pipeline(tuple(items))
    text = str(pipeline)
    assert "\n" not in text
    assert parse_pipeline(text, find_pass) == pipeline


def test_every_pass_has_simple_options_and_a_summary() -> None:
    assert len(names("pass")) >= 10
    for name in names("pass"):
        kind = find_pass(name)
        assert kind.name() == name
        assert (kind.__doc__ or "").splitlines()[0].endswith(".")
        assert all(get_type_hints(kind)[f.name] in VALUES_OF for f in dataclasses.fields(kind) if f.name != "options")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("smooth", "smooth"),
        (" smooth { alpha = 0.6 } ,\n canonicalize,", "smooth{alpha=0.6}, canonicalize"),
        ("insert-quantizers{percentile=99}", "insert-quantizers{percentile=99.0}"),
        (
            'assign-bits{scheme="weight=int4 group=32 sym; activation=float"}',
            'assign-bits{scheme="weight=int4 group=32 sym; activation=float"}',
        ),
        ("quantize-weights{solver=gptq, sequential=false}", "quantize-weights{solver=gptq, sequential=false}"),
        ("quantize-weights{damping=1, solver=gptq, act_order=false}", "quantize-weights{solver=gptq, act_order=false, damping=1.0}"),
        ('quantize-weights{solver="3"}', 'quantize-weights{solver="3"}'),
        ('quantize-weights{solver="true"}', 'quantize-weights{solver="true"}'),
        (r'quantize-weights{solver="a\new"}', r'quantize-weights{solver="a\new"}'),
        ("quantize-weights{solver=nearest}", "quantize-weights"),
    ],
)
def test_text_forms(text: str, shown: str) -> None:
    assert str(parse_pipeline(text, find_pass)) == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoth", r"unknown pass 'smoth'; did you mean 'smooth'\?"),
        ("smooth{alpa=0.5}", r"unknown option 'alpa' of smooth; did you mean 'alpha'\?"),
        ("smooth{alpha=high}", "option alpha of smooth is float, not 'high'"),
        ("quantize-weights{solver=3}", "option solver of quantize-weights is str, not 3"),
        ("quantize-weights{solver=gptq, act_order=1}", "option act_order of the solver gptq is bool, not 1"),
        ("quantize-weights{solver=gptq, act_ordr=true}", r"unknown option 'act_ordr' of the solver gptq; did you mean 'act_order'\?"),
        ("quantize-weights{damping=0.1}", "unknown option 'damping' of the solver nearest; known are none"),
        ("quantize-weights{solver=gtpq, damping=0.1}", r"unknown solver 'gtpq'; did you mean 'gptq'\?"),
        ("smooth{alpha=0.5", r"the pipeline is not understood at 'smooth\{alpha=0.5'"),
        ("smooth canonicalize", "the pipeline is not understood at 'smooth canonicalize'"),
        ("smooth{0.5}", r"the options '0.5' are not understood"),
        ("smooth{alpha=__import__('os')}", "option alpha of smooth is float, not"),
    ],
)
def test_text_that_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse_pipeline(text, find_pass)


# ---- order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("assign-bits, quantize-weights", "pass 2: quantize-weights takes a graph of stage simulated, here it is float"),
        ("insert-quantizers", "pass 1: insert-quantizers needs assign-bits before it"),
        ("assign-bits, insert-quantizers, canonicalize", "pass 3: canonicalize takes a graph of stage float, here it is simulated"),
        (
            "assign-bits, insert-quantizers, materialize, materialize",
            "pass 4: materialize takes a graph of stage simulated, here it is integer",
        ),
    ],
)
def test_order_is_checked(text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse_pipeline(text, find_pass).check_order()


@dataclass(frozen=True)
class Early(Pass):
    """Does nothing, and comes before Late."""

    def run(self, graph: Graph, context: Context) -> int:
        return 0


@dataclass(frozen=True)
class Late(Early):
    """Does nothing, and comes after Early."""

    after: ClassVar[tuple[str, ...]] = ("early",)


def test_what_must_come_after_may_not_come_before() -> None:
    Pipeline((Early(), Late())).check_order()
    Pipeline((Late(),)).check_order()
    with pytest.raises(Refused, match="pass 1: late must come after early"):
        Pipeline((Late(), Early())).check_order()


def test_a_pass_on_the_wrong_stage_is_refused_when_run_too(graph: Graph, context: Context) -> None:
    with pytest.raises(Refused, match="pass 1: materialize takes a graph of stage simulated, here it is float"):
        Pipeline((find_pass("materialize")(),)).run(graph, context)


# ---- promises -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def captured(tiny: Any) -> Any:
    module, examples, _ = tiny.mlp()
    return capture(module, examples)


@pytest.fixture
def graph(captured: Any) -> Graph:
    return captured.graph


@pytest.fixture
def context() -> Context:
    return Context(ReferenceTarget())


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the first constant by a factor, and promise what the class says."""

    factor: float = 1.0

    def run(self, graph: Graph, context: Context) -> int:
        node = next(node for node in graph.nodes if node.op == "get_attr")
        graph.set_constant(node, graph.constant(node) * self.factor)  # type: ignore[operator]
        return 1


def promising(keeps: Keeps) -> type[Scale]:
    return type("Scale", (Scale,), {"keeps": keeps, "__doc__": "Scale."})


def run(graph: Graph, context: Context, examples: Any, *items: Pass, hold: bool = True) -> list[float | None]:
    return [step.sqnr_db for step in Pipeline(items).run(graph, context, check=[examples], hold=hold)]


@pytest.mark.parametrize(
    ("keeps", "factor", "kept"),
    [
        (BITS, 1.0, True),
        (BITS, 1 + 2**-22, False),
        (VALUES, 1 + 1e-6, True),
        (VALUES, 1.01, False),
        (approximately(30), 1.01, True),
        (approximately(50), 1.01, False),
        (approximately(), 3.0, True),
    ],
)
def test_every_promise_is_held(captured: Any, context: Context, keeps: Keeps, factor: float, kept: bool) -> None:
    kind = promising(keeps)
    if kept:
        (quality,) = run(captured.graph, context, captured.example_inputs, kind(factor))
        assert quality is not None
        assert quality > 30 or keeps.min_sqnr_db is None
    else:
        with pytest.raises(Refused, match=r"pass scale promises .* and keeps \d"):
            run(captured.graph, context, captured.example_inputs, kind(factor))


def test_the_first_pass_that_lies_is_named_with_those_before(captured: Any, context: Context) -> None:
    honest, liar = promising(approximately(20)), promising(VALUES)
    items = (honest(1.01), liar(1.0), liar(1.02), liar(1.5))
    with pytest.raises(Refused, match=r"pass 3 after capture, scale, scale: pass scale promises values \(80 dB\) and keeps 3\d\.\d dB"):
        run(captured.graph, context, captured.example_inputs, *items)


def test_without_holding_every_loss_is_measured(captured: Any, context: Context) -> None:
    liar = promising(BITS)
    first, second, third = run(captured.graph, context, captured.example_inputs, liar(1.0), liar(1.5), liar(1.01), hold=False)
    assert first == float("inf")
    assert second is not None
    assert third is not None
    assert second < 20 < third  # each against the graph before it, not against the start


def test_without_a_check_nothing_is_held(captured: Any, context: Context) -> None:
    steps = Pipeline((promising(BITS)(2.0),)).run(captured.graph, context)
    assert [step.sqnr_db for step in steps] == [None]


@dataclass(frozen=True)
class AddQuantizer(Pass):
    """Leave an illegal graph: a quantizer where the stage stays float."""

    def run(self, graph: Graph, context: Context) -> int:
        from qcompile.formats import parse_scheme
        from qcompile.graph import Quantizer

        node = graph.call_quantizer(Quantizer(parse_scheme("int8 sym")), graph.inputs[0], before=graph.output, name="q")
        graph.output.args = ((*graph.outputs, node),)
        graph.output_names.append("q")
        return 1


def test_an_illegal_graph_is_refused_naming_the_pass(captured: Any, context: Context) -> None:
    with pytest.raises(Refused, match=r"pass add-quantizer \(after capture, early\): q \(q\): a quantizer is not allowed in stage float"):
        Pipeline((Early(), AddQuantizer())).run(captured.graph, context)


def test_a_pass_that_needs_data_says_so(captured: Any, context: Context) -> None:
    items = parse_pipeline("assign-bits, insert-quantizers", find_pass)
    with pytest.raises(Refused, match="insert-quantizers needs calibration data; give --calibrate DATA"):
        items.run(captured.graph, context)


def test_steps_observers_and_history(captured: Any, context: Context) -> None:
    seen: list[tuple[int, str, Stage, int]] = []
    observe: Callable[..., None] = lambda number, item, graph, step: seen.append((number, item.name(), graph.stage, step.changes))  # noqa: E731
    pipeline = parse_pipeline("assign-bits{scheme=W8A8-dynamic}, insert-quantizers, quantize-weights, materialize", find_pass)
    steps = pipeline.run(captured.graph, context, observers=[observe])
    assert [item[:3] for item in seen] == [
        (0, "assign-bits", Stage.FLOAT),
        (1, "insert-quantizers", Stage.SIMULATED),
        (2, "quantize-weights", Stage.SIMULATED),
        (3, "materialize", Stage.INTEGER),
    ]
    assert [step.changes for step in steps] == [item[3] for item in seen]
    assert captured.graph.history == ("capture", "assign-bits", "insert-quantizers", "quantize-weights", "materialize")


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x.clone()) == float("inf")
    assert sqnr_db(x, x * 1.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(x, torch.tensor([torch.nan, 4.0])) == float("-inf")
    assert sqnr_db(x, torch.zeros(3)) == float("-inf")
    assert sqnr_db(torch.zeros(2), x) == float("-inf")

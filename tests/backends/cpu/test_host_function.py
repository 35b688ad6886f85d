"""The host function that calls a model's kernels: what it computes and describes, and what is left to the virtual machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm
from qcompile.backends.cpu import pipeline
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.executable import Executable
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.quantization import quantize_static
from qcompile.backends.cpu.legalize import LEGALIZE
from qcompile.backends.cpu.tensor_machine import read_program
from qcompile.backends.lowering.sequence import NoSequence, read_sequence
from qcompile.backends.lowering.translate import translate
from torch import nn
from tvm import relax, tirx

from qcompile.capture.torch_export import capture_module
from qcompile.formats import parse_scheme


class Net(nn.Module):
    """A model of one function and a little state."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.table = nn.Linear(6, 5), nn.Parameter(torch.randn(4, 6))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


FUNCTIONS: dict[str, Callable[[Net, torch.Tensor], Any]] = {
    "one output": lambda net, x: torch.relu(net.linear(x)),
    "two views of one value": lambda net, x: (y := net.linear(x), y.reshape(-1, 1)),
    "views before their value": lambda net, x: (y := net.linear(x)) is None or (y.reshape(-1), y.reshape(-1, 5, 1), y),
    "one value twice": lambda net, x: (y := net.linear(x), y + 1, y),
    "an output that is read again": lambda net, x: (y := net.linear(x), torch.softmax(y, -1), torch.tanh(y) @ net.table[:, :5].t()),
    "three dtypes": lambda net, x: (y := net.linear(x), y > 0, y.argmax(-1), (x * 7).to(torch.int32)),
    "constants of the code": lambda net, x: x @ torch.ones(6, 3) + torch.arange(3),
    "values that live long": lambda net, x: (
        (a := net.linear(x), b := net.linear(torch.tanh(x)))
        and (a * b + torch.softmax(net.linear(torch.softmax(a + b, -1) @ torch.ones(5, 6)), -1) * torch.softmax(b, -1))
    ),
    "one long chain": lambda net, x: torch.tanh(net.linear(torch.tanh(torch.sigmoid(net.linear(x)) @ torch.ones(5, 6)))).sum(-1),
}
LEFT: dict[str, tuple[Callable[[Net, torch.Tensor], Any], str]] = {
    "an input is returned": (lambda net, x: (net.linear(x), x), "an input or a constant is returned"),
    "a view of an input is returned": (lambda net, x: (net.linear(x), x.reshape(-1)), "an input or a constant is returned"),
    "a constant is returned": (lambda net, x: (net.linear(x), net.table), "an input or a constant is returned"),
}
ROWS = (3, 3, 1, 0, 130, 3)  # the same again, fewer, none, more


def capture(function: Callable[..., Any]) -> Any:
    return capture_module(Net(function).eval(), (torch.randn(4, 6),), dynamic_shapes={"x": {0: "rows"}})


def in_virtual_machine(graph: Any) -> Executable:
    """Build a graph as ``build`` does, for the virtual machine."""
    built = build(graph.module, threads=1)
    lowered = translate(graph.module, legalize=LEGALIZE)
    return Executable(pipeline.compile_module(lowered.module, 1, virtual_machine=True), lowered.constants, built.interface, 1)


def assert_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_computes_what_the_virtual_machine_computes(name: str) -> None:
    graph = capture(FUNCTIONS[name])
    built, machine = build(graph.module, threads=1), in_virtual_machine(graph)
    assert built.arena_bytes is not None
    assert machine.arena_bytes is None
    kept = []
    for rows in ROWS:
        x = torch.randn(rows, 6)
        got = built(x)
        assert_same(got, machine(x))
        for value, wanted in zip(got, graph.module(x), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, check_dtype=True)
        kept.append((got, tuple(value.clone() for value in got)))
    for got, copies in kept:  # later calls left them alone
        assert_same(got, copies)


@pytest.mark.parametrize("name", LEFT)
def test_the_rest_runs_in_the_virtual_machine(name: str) -> None:
    function, reason = LEFT[name]
    graph = capture(function)
    with pytest.raises(NoSequence, match=reason):
        read_sequence(lowered_main(graph))
    built = build(graph.module, threads=1)
    assert built.arena_bytes is None
    for rows in (3, 1, 7):
        x = torch.randn(rows, 6)
        for got, wanted in zip(built(x), graph.module(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "result", "reason"), [("2 * n", "n", "is to be solved"), ("n", "m", "depends on data"), ("n", "n", "it calls")]
)
def test_what_is_no_sequence(rows: str, result: str, reason: str) -> None:
    """A function ``f32[rows] -> f32[result]`` of one kernel, or of a function of the runtime."""
    sizes = {name: tirx.Var(name, "int64") for name in ("n", "m")}
    sizes["2 * n"] = sizes["n"] * 2
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType([sizes[rows]], "float32"))
    kernel, kind = (
        builder.add_func(quantize_static(parse_scheme("int8 tensor sym")), "kernel"),
        relax.TensorType([sizes[result]], "float32"),
    )
    with builder.function("main", [x]):
        with builder.dataflow():
            packed = relax.op.call_dps_packed("a function", relax.Tuple([x]), kind)
            call = packed if reason == "it calls" else relax.op.call_tir(kernel, relax.Tuple([x]), kind)
            output = builder.emit_output(builder.emit(call))
        builder.emit_func_output(output)
    module = builder.get()
    module.update_func(module.get_global_var("main"), module["main"].with_attr("num_input", 1))
    with pytest.raises(NoSequence, match=reason):
        read_sequence(module)


def lowered_main(graph: Any) -> Any:
    """Return a graph's module as the pipeline hands it to ``read_sequence``."""
    with pipeline.COMPILE_LOCK, tvm.target.Target(isa.target_description(threads=1)):
        return tvm.transform.Sequential(pipeline.kernel_passes())(translate(graph.module, legalize=LEGALIZE).module)


def test_a_program_describes_itself() -> None:
    graph = capture(lambda net, x: (y := torch.relu(net.linear(x)), y.reshape(-1), x @ torch.full((6, 2), 0.5) > 1))
    sequence, program = read_sequence(lowered_main(graph)), read_program(build(graph.module, threads=1)._module)
    assert program is not None
    assert program.symbols == tuple(symbol.name for symbol in sequence.symbols)
    assert len(program.symbols) == 1
    assert program.outputs == ((0, "float32"), (0, "float32"), (1, "bool"))
    assert program.kernels == tuple(call.kernel for call in sequence.calls)
    assert len(program.literals) == len(sequence.literals) > 0
    for found, written in zip(program.literals, sequence.literals, strict=True):
        assert (found.dtype, found.shape) == (written.dtype, written.shape)
        assert (found == written).all()
    assert program.layout.ranks == (2, 1, 2)
    assert program.layout.outputs == 2
    assert read_program(in_virtual_machine(graph)._module) is None


def test_the_arena_grows_and_stays() -> None:
    built = build(capture(FUNCTIONS["one long chain"]).module, threads=1)
    sizes = []
    for rows in (4, 400, 4):
        built(torch.randn(rows, 6))
        sizes.append(built.arena_bytes)
    assert 0 < sizes[0] < sizes[1] == sizes[2]
    assert sizes[1] == 2 * 400 * 64, "a chain needs room for two values, and a row of a value takes whole 64 bytes"


def test_a_call_that_finds_no_memory_leaves_the_next_one_whole() -> None:
    graph = capture(FUNCTIONS["one long chain"])
    built, x = build(graph.module, threads=1), torch.randn(3, 6)
    wanted = built(x)
    with pytest.raises(MemoryError):
        built._machine()([x], (1 << 50,))
    assert_same(built(x), wanted)


def test_steps_tell_every_call_and_its_shapes() -> None:
    built = build(capture(FUNCTIONS["an output that is read again"]).module, threads=1)
    for rows in (2, 33):
        steps = built.steps(torch.randn(rows, 6))
        assert [step.kernel for step in steps] == list(read_program(built._module).kernels)  # type: ignore[union-attr]
        linear = next(step for step in steps if step.kernel.startswith("linear"))
        assert linear.shapes[0] == (rows, 6)
        assert linear.shapes[-1] == (rows, 5)
        assert linear.bytes >= 4 * (rows * 6 + rows * 5 + 5 * 6)
        assert all(step.milliseconds >= 0 for step in steps)


def test_one_kernel_at_a_time_computes_the_same() -> None:
    """A profile runs kernels one by one; results must not differ from a whole call."""
    built, x = build(capture(FUNCTIONS["one long chain"]).module, threads=1), torch.randn(5, 6)
    wanted = built(x)
    machine = built._machine()
    results = machine._bind([x], (5,))
    for i in range(len(machine._program.kernels)):
        machine._functions.calls(machine._table, i, i + 1)
    assert_same(tuple(results), wanted)

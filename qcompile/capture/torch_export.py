"""Capture of PyTorch: modules and exported programs become graphs of ATen core operators."""

from __future__ import annotations

import contextlib
import inspect
import io
import operator
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.export import ExportedProgram

from qcompile.capture.model_lines import line_in_trace, place_of
from qcompile.errors import Refused
from qcompile.graph import Graph, TensorType
from qcompile.graph.graph import build_module
from qcompile.graph.types import LARGEST_SIZE

DynamicShapes = Mapping[str, Mapping[int, str]] | Sequence[Mapping[int, str] | None]

# Calls that say something to PyTorch and nothing about values.
_DROPPED = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


def capture_module(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    dynamic_shapes: DynamicShapes | None = None,
) -> Graph:
    """Return the graph of a module, traced by ``torch.export`` with the example inputs.

    Args:
        module: any traceable module; it is captured in evaluation mode.
        example_inputs: a tuple of positional inputs or a dict of keyword inputs.
        dynamic_shapes: for each input (by position or name) a map from axis to the name of its symbolic size; inputs that share a
            name share the size. Without it every size is the example's. An example whose dynamic size is 1 is traced with two copies of
            itself: torch takes a size of 1 for a constant.

    Raises:
        Refused: the code cannot be traced; the message names the module, the operator if there is one, and the source line.
    """
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    names = list(kwargs) or list(inspect.signature(module.forward).parameters)
    _check_inputs(module, args, kwargs)
    axes = _axes_of(dynamic_shapes, names, len(args) or len(kwargs))
    args = tuple(_without_ones(value, chosen) for value, chosen in zip(args, axes, strict=False))
    kwargs = {name: _without_ones(value, chosen) for (name, value), chosen in zip(kwargs.items(), axes, strict=False)}
    was_training = module.training
    module.eval()
    said = io.StringIO()
    try:
        # Where it fails, torch.export prints the half-made graph to stderr; the error says all that a reader needs.
        with torch.no_grad(), without_torch_notices(), contextlib.redirect_stderr(said):
            shapes = _export_shapes(dynamic_shapes, args, kwargs)
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Refused:
        raise
    except Exception as error:
        raise _untraceable(error, module) from error
    finally:
        module.train(was_training)
    sys.stderr.write(said.getvalue())
    return capture_program(program, dynamic_shapes)


def _check_inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise Refused where the examples do not fit the parameters of the module's ``forward``."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        code = getattr(inspect.unwrap(module.forward), "__code__", None)
        raise Refused(
            f"the example inputs do not fit forward{signature}: {error}",
            node=type(module).__name__,
            source=f"{code.co_filename}:{code.co_firstlineno}" if code else "",
            way_out="give one example for each input",
        ) from error


@contextlib.contextmanager
def without_torch_notices() -> Iterator[None]:
    """Leave out what torch.export says about its own code at every export: nothing that a user could change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


def _axes_of(shapes: DynamicShapes | None, names: Sequence[str], count: int) -> list[Mapping[int, str]]:
    """Return the dynamic axes of each input, in the order of the inputs.

    Raises:
        Refused: axes are given for an input that there is not, or for more inputs than there are.
    """
    if isinstance(shapes, Mapping):
        if unknown := [name for name in shapes if name not in names]:
            raise Refused(
                "dynamic sizes are given for it and there is no such input", node=str(unknown[0]), way_out=f"inputs are {', '.join(names)}"
            )
        return [shapes.get(name) or {} for name in names[:count]]
    given = [axes or {} for axes in shapes or ()]
    if shapes is not None and len(given) != count:
        raise Refused(f"dynamic sizes are given for {len(given)} inputs, the examples are {count}")
    return given or [{}] * count


def _without_ones(value: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """Return the example with two copies of itself along each dynamic axis of size 1."""
    if not isinstance(value, torch.Tensor):
        return value
    counts = [2 if axis in axes and size == 1 else 1 for axis, size in enumerate(value.shape)]
    return value.repeat(counts) if 2 in counts else value


def capture_program(program: ExportedProgram, dynamic_shapes: DynamicShapes | None = None) -> Graph:
    """Return the graph of an exported program, with its dynamic sizes as symbols.

    Raises:
        Refused: the program mutates its inputs or state, takes or gives something else than tensors, or holds a call of no operator.
    """
    names = _symbol_names(program, dynamic_shapes)
    ranges = _ranges(program, names)
    with without_torch_notices():
        program = program.run_decompositions({})
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise Refused(
            "the model writes to its own state or inputs while it runs",
            node=", ".join([*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]),
            way_out="return the new value instead",
        )
    constants: dict[str, torch.Tensor] = {}
    types: list[TensorType] = []
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    # Inputs first: a graph's placeholders stand before its constants.
    for node in [n for n in program.graph.nodes if n.op == "placeholder" and n.name in signature.user_inputs]:
        if not isinstance(node.meta["val"], torch.Tensor):
            raise Refused("an input is not a tensor", node=node.name, way_out="bind it before compiling")
        types.append(_tensor_type(node.meta["val"], names))
        values[node] = graph.placeholder(node.name)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node not in values:
            name, tensor = _lifted(program, node)
            constants[name] = tensor
            values[node] = graph.get_attr(name)
        elif node.op == "call_function" and node.target not in _DROPPED:
            values[node] = _copy_call(graph, node, values)
        elif node.op == "output":
            graph.output(tuple(values[out] for out in _checked_outputs(node.args[0])))
        if node in values:
            values[node].meta |= _provenance(node)
    captured = Graph(build_module(constants, {}, graph), types, ranges, history=("capture",))
    captured.clean()
    return captured


def _checked_outputs(outputs: Sequence[Any]) -> Sequence[fx.Node]:
    """Raise Refused naming the first output that is not a tensor."""
    for position, output in enumerate(outputs):
        if not isinstance(output, fx.Node) or not isinstance(output.meta["val"], torch.Tensor):
            text = f"{output.name}, a size" if isinstance(output, fx.Node) else repr(output)
            raise Refused(f"output {position} of the model is {text}, not a tensor", way_out="return tensors only")
    return outputs


def _copy_call(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in _NAMESPACES:
            raise Refused(
                "the operator is not one of PyTorch's, and an artifact holds no code of others",
                node=node.name, operator=str(node.target), source=_source(node), way_out="write it with PyTorch's operators",
            )  # fmt: skip
    elif node.target not in _PYTHON_CALLS:
        raise Refused(
            "the call is not an operator",
            node=node.name,
            operator=str(node.target),
            source=_source(node),
            way_out="write it without control flow over tensors",
        )
    return graph.node_copy(node, lambda n: values[n])


_NAMESPACES = ("aten", "qc", "prims")  # those of the text form, ``find_operator``
_PYTHON_NAMES = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
_PYTHON_CALLS = {getattr(operator, name) for name in _PYTHON_NAMES} | {torch.sym_max, torch.sym_min, torch.sym_int}


def _lifted(program: ExportedProgram, node: fx.Node) -> tuple[str, torch.Tensor]:
    """Return dotted name and tensor of a placeholder that stands for a parameter, buffer or constant."""
    signature = program.graph_signature
    for table in (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants):
        if node.name in table:
            name = table[node.name]
            tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
            return name, tensor.detach()
    raise Refused("an input is neither a tensor nor a parameter", node=node.name)


def _tensor_type(value: torch.Tensor, names: Mapping[str, str]) -> TensorType:
    shape = tuple(names.get(str(size), str(size)) if isinstance(size, torch.SymInt) else size for size in value.shape)
    if wrong := [size for size in shape if isinstance(size, str) and not size.isidentifier()]:
        raise Refused(f"the dynamic size {wrong[0]} is an expression of others", way_out="give that dimension a name of its own")
    return TensorType(value.dtype, shape)


def _symbol_names(program: ExportedProgram, dynamic_shapes: DynamicShapes | None) -> dict[str, str]:
    """Map torch's symbols to the names given for their axes, else to ``dim0``, ``dim1``, ... in order of appearance."""
    names: dict[str, str] = {}
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs]
    for position, node in enumerate(inputs):
        if isinstance(dynamic_shapes, Mapping):
            given = dynamic_shapes.get(node.name) or {}
        else:
            given = (dynamic_shapes[position] if dynamic_shapes else None) or {}
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                names[str(size)] = given.get(axis) or f"dim{len(names)}"
            elif axis in given and not isinstance(size, torch.SymInt):
                raise Refused(f"the model works only where axis {axis} has size {size}", node=node.name, way_out="make that axis static")
    return names


def _ranges(program: ExportedProgram, names: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Return the smallest and largest size of each name; torch's own lower bound of 2 stands for 1."""
    ranges: dict[str, tuple[int, int]] = dict.fromkeys(names.values(), (1, LARGEST_SIZE))
    for symbol, allowed in program.range_constraints.items():
        if name := names.get(str(symbol)):
            low = int(allowed.lower)
            high = int(allowed.upper) if allowed.upper < LARGEST_SIZE else LARGEST_SIZE
            ranges[name] = max(ranges[name][0], low if low > 2 else 1), min(ranges[name][1], high)
    return ranges


def _export_shapes(shapes: DynamicShapes | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if shapes is None:
        return None

    def one(axes: Mapping[int, str] | None) -> dict[int, Any]:
        # AUTO finds the range that the model allows by itself; capture checks afterwards that the size stayed symbolic.
        return dict.fromkeys(axes or {}, torch.export.Dim.AUTO)

    if isinstance(shapes, Mapping):
        return {name: one(axes) for name, axes in shapes.items()}
    return tuple(one(axes) for axes in shapes) if args else dict(zip(kwargs, map(one, shapes), strict=True))


def _provenance(node: fx.Node) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    scope = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    scope = "" if scope.startswith("_empty_nn_module_stack") else re.sub(r"^L\['self'\]\.?", "", scope)
    return {"scope": scope, "source": _source(node), "made_by": "capture"}


def _source(node: fx.Node) -> str:
    """Return ``file.py:line`` of the innermost line of model code that made the node."""
    return line_in_trace(node.meta.get("stack_trace") or "")


def _untraceable(error: Exception, module: torch.nn.Module) -> Refused:
    """Say in one line why tracing failed, in which module and line of the model's code, and at which operator."""
    place = place_of(error, module)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    code = f" at '{place.code}'" if place.code else ""
    return Refused(
        f"the model cannot be traced{code}: {type(error).__name__}: {first[:300]}",
        node=place.module,
        operator=place.operator,
        source=place.source or line_in_trace(str(error)),
        way_out="make that line independent of tensor values, or export the part around it",
    )

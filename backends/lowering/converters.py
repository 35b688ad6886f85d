"""The table of ATen operators: each entry is a small function from Relax values to a Relax value.

An entry takes the walk and the operator's arguments by their schema names (nodes replaced by Relax values). ``order`` says
how it treats images: ``PLAIN`` entries get NCHW; ``POINTWISE`` entries get all operands in one order and keep it;
``SPATIAL`` entries read ``arguments.order`` and speak of axes through ``axis_in``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from qcompile.backends.lowering.translate import Walk, nodes_of_constants_only
from torch import fx

from qcompile.errors import Refused
from qcompile.formats import Tensor, parse_scheme
from qcompile.graph.code_operators import is_fixed_point

PLAIN, POINTWISE, SPATIAL = "plain", "pointwise", "spatial"
NCHW, NHWC = "NCHW", "NHWC"


class Entry(NamedTuple):
    """How one operator is emitted, and in which orders of memory it works."""

    emit: Callable[[Walk, SimpleNamespace], Any]
    order: str = PLAIN


TABLE: dict[str, Entry] = {}


def converts(*names: str, order: str = PLAIN) -> Callable[[Any], Any]:
    """Enter a function in the table under operator names such as ``aten.relu`` or ``aten.max.dim``."""

    def enter(emit: Callable[[Walk, SimpleNamespace], Any]) -> Callable[[Walk, SimpleNamespace], Any]:
        for name in names:
            if name in TABLE:
                raise ValueError(f"{name} has two converters")
            TABLE[name] = Entry(emit, order)
        return emit

    return enter


def operator_names(target: Any) -> tuple[str, str]:
    """Return the names an operator is looked up by: with its overload, then without."""
    if not isinstance(target, torch._ops.OpOverload):
        name = f"python.{getattr(target, '__name__', target)}"
        return name, name
    packet = str(target.overloadpacket).replace("::", ".")
    return f"{packet}.{target._overloadname}", packet


def entry_of(target: Any) -> Entry | None:
    """Return the table's entry of an operator, or None."""
    _load()
    full, packet = operator_names(target)
    return TABLE.get(full) or TABLE.get(packet)


def check(graph_module: fx.GraphModule, legalize: Mapping[str, Any]) -> None:
    """Look whether every operator that runs has an entry or a legalizer, before any work starts.

    Raises:
        Refused: naming the first node whose operator cannot be lowered.
    """
    constant = nodes_of_constants_only(graph_module)
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node in constant or not node.users or isinstance(node.meta.get("val"), int | torch.SymInt):
            continue
        if entry_of(node.target) is None and not legalize.keys() & set(operator_names(node.target)):
            raise _no_entry(node)


def _no_entry(node: fx.Node) -> Refused:
    return Refused(
        "this operator cannot be lowered", node=node.name, operator=operator_names(node.target)[0], source=node.meta.get("source", ""),
        way_out="decompose it, or enter a converter in qcompile.backends.lowering.converters.TABLE",
    )  # fmt: skip


def fixed_point_refused(node: fx.Node) -> Refused:
    """Return the refusal of an operator whose multipliers nothing here reads: its float form would give other codes."""
    return Refused(
        "requantization by multiplier and shift has no kernel here", node=node.name, operator=operator_names(node.target)[0],
        way_out="run it on the target reference, or compile without use-fixed-point",
    )  # fmt: skip


def convert(walk: Walk, node: fx.Node) -> None:
    """Emit one node: with the target's legalizer if it takes the node, else with the table.

    Raises:
        Refused: the operator is not in the table.
    """
    entry = entry_of(node.target)
    arguments = named_arguments(node)
    full, packet = operator_names(node.target)
    legalizer = walk.legalize.get(full) or walk.legalize.get(packet)
    if legalizer is not None:
        value = legalizer(walk, node, SimpleNamespace(**arguments))
        if not isinstance(value, str):
            if value is not None:
                walk.bind(node, value)
            return
        if value:
            walk.report(value)
    elif packet.startswith("qc."):
        walk.report("the target has no kernel for this operator")
    if entry is None:
        raise _no_entry(node)
    if is_fixed_point(arguments):
        raise fixed_point_refused(node)
    _emit(walk, node, entry, arguments)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by schema name, defaults included; ``self`` is called ``self``."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {f"argument_{i}": a for i, a in enumerate(node.args)}
    named = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            named[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def _emit(walk: Walk, node: fx.Node, entry: Entry, arguments: dict[str, Any]) -> None:
    tensors = [n for n in node.all_input_nodes if isinstance(walk.fake(n), torch.Tensor)]
    keeps = entry.order != PLAIN and all(
        parse_scheme(v).granularity == Tensor() for k, v in arguments.items() if k.endswith("scheme") and v
    )
    last = keeps and any(walk.is_channels_last(n) for n in tensors) and _result_rank(walk, node) == 4
    read = walk.channels_last if last else walk.plain
    values = {key: fx.map_arg(value, lambda n: read(n) if n in tensors else walk.plain(n)) for key, value in arguments.items()}
    value = entry.emit(walk, SimpleNamespace(**values, order=NHWC if last else NCHW))
    walk.bind(node, value, channels_last=last)


def _result_rank(walk: Walk, node: fx.Node) -> int:
    fake = walk.fake(node)
    return fake.ndim if isinstance(fake, torch.Tensor) else 0


def axis_in(order: str, axis: int) -> int:
    """Return where an axis of NCHW stands in the given order."""
    return axis % 4 if order == NCHW else (0, 3, 1, 2)[axis % 4]


def _load() -> None:
    """Import the modules that fill the table (they import this one)."""
    from qcompile.backends.lowering import arithmetic, layers, quantized, structure

    for module in (arithmetic, layers, quantized, structure):
        assert module

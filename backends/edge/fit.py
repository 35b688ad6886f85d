"""A program whose arena fits a limit: patches where the whole network needs more, and a refusal that names the operator at the peak."""

from __future__ import annotations

from dataclasses import replace

from qcompile.backends.edge.lower import ALIGNMENT, Program, lower
from qcompile.backends.edge.overlaps import overlaps
from qcompile.backends.lowering.arena import describe_sequence
from qcompile.backends.lowering.sequence import written

from qcompile.arena import Plan, plan_work
from qcompile.arena.plan import require_fit
from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.pipeline import Context
from qcompile.registry import find_pass
from qcompile.target import Target

TRIES = 4  # the plan of a graph is an estimate: where C needs more, the limit that patches are chosen by is lowered


def plan_of(program: Program) -> Plan:
    """Return the plan of a program's arena, for reports: steps and values have the names of layers."""
    work = describe_sequence(program.sequence, overlaps)
    names = list(work.names)
    for call, results, layer in zip(program.sequence.calls, written(program.sequence), program.layers, strict=True):
        for number, position in enumerate(results):
            index = program.sequence.located(call.arguments[position]).index
            names[index] = layer.name if number == 0 else f"scratch of {layer.name}"
    steps = tuple(replace(step, name=layer.name) for step, layer in zip(work.steps, program.layers, strict=True))
    return plan_work(replace(work, names=tuple(names), steps=steps), alignment=ALIGNMENT, exact=True)


def lower_within(graph: Graph, target: Target, limit: int | None, features: frozenset[str]) -> Program:
    """Return the program of a graph, its first layers in as few patches as its arena needs to fit.

    Args:
        graph: see ``lower``; is not changed.
        target: the graph's.
        limit: bytes that the arena may take, or None.
        features: see ``lower``.

    Raises:
        Refused: nothing fits; naming the operator at the peak, and what patches were found to need.
    """
    program = lower(graph, features)
    if limit is None or program.arena_bytes <= limit:
        return program
    wanted, reason = limit, ""
    for _ in range(TRIES):
        split = graph.copy()
        try:
            item = find_pass("split-patches").make({"arena_limit": max(wanted, 1), "alignment": ALIGNMENT})
            changed = item.run(split, Context(target=target))
        except Refused as refusal:
            reason = refusal.way_out
            break
        split.clean()
        found = lower(split, features) if changed else program
        if found.arena_bytes <= limit:
            return found
        wanted -= max(found.arena_bytes - limit, ALIGNMENT)
    require_fit(plan_of(program), limit, way_out=f"--arena-limit {program.arena_bytes} fits" + (f", {reason}" if reason else ""))
    return program

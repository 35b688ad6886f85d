"""One sweep over the calibration data, region by region, that gathers every statistic asked for.

Region k is run on all batches before region k + 1. Only values that cross the border between regions are kept, for each batch; inside a
region a value is dropped after its last use. What depends on constants alone is computed once for each region.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph import dialect
from qcompile.graph.file_tensor import in_memory
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.quantizer import Quantizer
from qcompile.statistics.cache import Cache
from qcompile.statistics.collectors import Collector, Request, Result
from qcompile.statistics.regions import Regions, ancestors, assign_regions, fixed_nodes, split_regions

Progress = Callable[[int, int], None]
Visit = Callable[[Sequence[fx.Node], "Statistics"], bool]
Environment = dict[fx.Node, Any]


class Data(Protocol):
    """A named source of batches that can be read again and again, such as ``qcompile.calibration.Calibration``."""

    @property
    def digest(self) -> str:
        """Digest of everything that decides the batches."""

    def batches(self, graph: Graph) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the graph's inputs in order, batch by batch."""


class Statistics(Mapping[Request, Result]):
    """What a sweep gathered: ``statistics[request]`` is a dict of tensors."""

    def __init__(self, results: Mapping[Request, Result] | None = None) -> None:
        self._results = dict(results or {})

    def __getitem__(self, request: Request) -> Result:
        return self._results[request]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)


def collect(
    graph: Graph,
    requests: Iterable[Request],
    data: Data | Iterable[Any],
    *,
    regions: Regions | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | Progress | None = None,
) -> Statistics:
    """Gather all requests in one sweep and return them.

    Args:
        graph: as it stands; it is not changed.
        requests: nodes by FX name or by the name of the text form; equal requests are gathered once.
        data: a ``Calibration``, or a list of batches that ``qcompile.calibration.from_iterable`` takes.
        regions: lists of nodes in topological order, by default ``split_regions(graph)``.
        cache: folder for results, by (graph digest, data digest, request).
        progress: True for a progress bar on the terminal, or a function given (batches done, batches in all); 0 in all if not known.

    Raises:
        Refused: an unknown node, data that does not fit the graph's inputs, no data, or a value that is not finite.
    """
    wanted = list(dict.fromkeys(requests))
    named = _canonical(graph, wanted)
    source = _as_data(data)
    store = Cache(cache, graph.digest, source.digest) if cache is not None and named else None
    found = {request: loaded for request in set(named.values()) if store and (loaded := store.load(str(request))) is not None}
    missing = [request for request in dict.fromkeys(named.values()) if request not in found]
    if missing:
        gathered = _gather(graph, missing, source, regions, progress)
        if store:
            for request, result in gathered.items():
                store.store(str(request), result)
        found |= gathered
    return Statistics({request: found[named[request]] for request in wanted})


def collect_sequentially(
    graph: Graph,
    requests: Iterable[Request],
    data: Data | Iterable[Any],
    visit: Visit,
    *,
    regions: Regions | None = None,
    progress: bool | Progress | None = None,
) -> None:
    """Sweep as ``collect`` does, and hand each region's nodes and statistics to ``visit`` before the next region runs.

    ``visit`` may change constants and quantizers (not the nodes) of its region and returns True if it did; then the region is run again,
    so that later regions see what it became. Every region's statistics are dropped after its visit.
    """
    wanted = list(dict.fromkeys(requests))
    named = _canonical(graph, wanted)

    def translate(nodes: Sequence[fx.Node], statistics: Statistics) -> bool:
        return visit(nodes, Statistics({r: statistics[named[r]] for r in wanted if named[r] in statistics}))

    _gather(graph, list(dict.fromkeys(named.values())), _as_data(data), regions, progress, translate)


def _canonical(graph: Graph, requests: Sequence[Request]) -> dict[Request, Request]:
    """Map each request to the same one with the node's text-form name, which is what the graph's digest speaks of."""
    names = {name: node_name(node) for node in graph.nodes for name in (node.name, node_name(node))}
    for request in requests:
        if request.node not in names:
            raise Refused("there is no such node to gather statistics of", node=request.node)
    return {request: dataclasses.replace(request, node=names[request.node]) for request in requests}


def _as_data(data: Data | Iterable[Any]) -> Data:
    if hasattr(data, "batches"):
        return cast(Data, data)
    from qcompile.calibration import from_iterable

    return from_iterable(data)


# ---- running --------------------------------------------------------------------------------------------------------------


class _Plan:
    """Which nodes run in which region, and where each value is used last."""

    def __init__(self, graph: Graph, requests: Sequence[Request], regions: Regions | None) -> None:
        by_name = {node_name(node): node for node in graph.nodes}
        self.requests: defaultdict[fx.Node, list[Request]] = defaultdict(list)
        for request in requests:
            self.requests[by_name[request.node]].append(request)
        self.inputs = graph.inputs
        self.fixed = fixed_nodes(graph)
        needed = ancestors(self.requests)
        assigned = assign_regions(graph, regions if regions is not None else split_regions(graph))
        kept = [[n for n in region if n in needed and n.op not in ("placeholder", "output")] for region in assigned]
        last = max((i for i, region in enumerate(kept) for node in region if node in self.requests), default=0)
        self.regions = kept[: last + 1]
        self.reads = [{x for node in region if node not in self.fixed for x in node.all_input_nodes} for region in self.regions]
        self.last_region = {node: number for number, reads in enumerate(self.reads) for node in reads}
        self.beside_float = {node for node, asked in self.requests.items() if any(request.beside_float for request in asked)}

    def fixed_in(self, number: int) -> list[fx.Node]:
        """Return the fixed nodes that a region reads or is asked about, in topological order."""
        roots = {n for n in self.reads[number] if n in self.fixed} | {
            n for n in self.regions[number] if n in self.requests and n in self.fixed
        }
        wanted = ancestors(roots)
        return [node for node in next(iter(wanted)).graph.nodes if node in wanted] if wanted else []

    def dead_after(self, number: int) -> dict[fx.Node, list[fx.Node]]:
        """Return, for each node of a region, the values that nothing reads after it."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.regions[number]:
            if node not in self.fixed:
                last |= dict.fromkeys([*node.all_input_nodes, node], node)
        dead: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        for value, node in last.items():
            if value not in self.fixed and self.last_region.get(value, -1) <= number:
                dead[node].append(value)
        return dead


_VECTORS = {f for op in (torch.ops.qc.vector_codes.default, torch.ops.qc.vectors.default) for f in (op, dialect.MEANINGS[op])}


class FloatInterpreter(fx.Interpreter):
    """Runs a simulated graph as the float model: quantizers give what they are given, and so do codes of vectors and their reading."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if target in _VECTORS else super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if isinstance(self.fetch_attr(target), Quantizer) else super().call_module(target, args, kwargs)


class _Region:
    """One region, ready to run: constants' values are computed once, here. A region of the float model observes for the other."""

    def __init__(self, graph: Graph, plan: _Plan, number: int, *, observe: bool, as_float: bool = False) -> None:
        self.plan, self.number = plan, number
        self.nodes = [node for node in plan.regions[number] if node not in plan.fixed]
        self.dead = plan.dead_after(number)
        asked = [*plan.regions[number], *(plan.inputs if number == 0 else [])]
        self.collectors: dict[fx.Node, dict[Request, Collector]] = {
            node: {request: request.start() for request in plan.requests[node]} for node in asked if observe and node in plan.requests
        }
        self.as_float = _Region(graph, plan, number, observe=False, as_float=True) if observe and plan.beside_float else None
        self.seen: dict[fx.Node, Any] = {}  # of the float model, on the batch at hand
        self.watched = plan.beside_float if as_float else set()
        self.interpreter = (FloatInterpreter if as_float else fx.Interpreter)(graph.module, garbage_collect_values=False)
        self.interpreter.env = {}
        for node in plan.fixed_in(number):
            self.interpreter.env[node] = in_memory(self.interpreter.run_node(node))  # every batch reads it
            if node in self.nodes or node in plan.regions[number]:
                self._observe(node, self.interpreter.env[node])
        self.fixed = self.interpreter.env

    def run(self, border: Environment) -> Environment:
        """Run one batch from the values at the border before; return the values at the border after."""
        env = self.interpreter.env = {**self.fixed, **border}
        for node in self.plan.inputs if self.number == 0 else ():
            self._observe(node, env[node])
        for node in self.nodes:
            env[node] = _run_node(self.interpreter, node)
            self._observe(node, env[node])
            for value in self.dead[node]:
                del env[value]
        return {n: _compact(v) for n, v in env.items() if n not in self.fixed and self.plan.last_region.get(n, -1) > self.number}

    def results(self) -> dict[Request, Result]:
        found: dict[Request, Result] = {}
        for node, collectors in self.collectors.items():
            try:
                found |= {request: collector.result() for request, collector in collectors.items()}
            except Refused as error:
                raise Refused(error.reason, node=node_name(node)) from error
        return found

    def _observe(self, node: fx.Node, value: Any) -> None:
        if node in self.watched:
            self.seen[node] = value
        for request, collector in self.collectors.get(node, {}).items():
            if not isinstance(value, torch.Tensor):
                raise Refused(f"{type(request).__name__} is of tensors, this is {type(value).__name__}", node=node_name(node))
            if not torch.isfinite(value).all():
                raise Refused("the value is not finite on the calibration data", node=node_name(node), operator=str(node.target))
            beside = (self.as_float.seen[node].detach(),) if self.as_float and request.beside_float else ()
            collector.update(value.detach(), *beside)


def _run_node(interpreter: fx.Interpreter, node: fx.Node) -> Any:
    try:
        return interpreter.run_node(node)
    except Refused:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = f"fails on the calibration data: {str(error).strip().splitlines()[0]}"
        raise Refused(reason, node=node_name(node), operator=str(node.target), source=node.meta.get("source", "")) from error


def _compact(value: Any) -> Any:
    """Return the value without the memory behind it that a view keeps alive."""
    if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 2 * value.nbytes:
        return value.clone()
    return value


def _gather(
    graph: Graph,
    requests: Sequence[Request],
    data: Data,
    regions: Regions | None,
    progress: bool | Progress | None,
    visit: Visit | None = None,
) -> dict[Request, Result]:
    plan = _Plan(graph, requests, regions)
    found: dict[Request, Result] = {}
    borders: list[Environment] = []
    float_borders: list[Environment] = []
    with _ticking(progress, len(plan.regions)) as tick, torch.no_grad():
        for number in range(len(plan.regions)):
            keep = number + 1 < len(plan.regions)
            region = _Region(graph, plan, number, observe=True)
            float_batches = _batches(plan, graph, data, float_borders, number) if region.as_float else None
            after, float_borders = _run_batches(region, _batches(plan, graph, data, borders, number), keep, tick, float_batches)
            results = region.results()
            if visit is None:
                found |= results
            elif visit(plan.regions[number], Statistics(results)) and keep:
                del after, region  # before the second run makes them again
                region = _Region(graph, plan, number, observe=False)
                after, _ = _run_batches(region, _batches(plan, graph, data, borders, number), keep, lambda count: None)
            borders = after
    return found


def _batches(plan: _Plan, graph: Graph, data: Data, borders: Sequence[Environment], number: int) -> Iterable[Environment]:
    if number:
        return borders
    return (dict(zip(plan.inputs, batch, strict=True)) for batch in data.batches(graph))


def _run_batches(
    region: _Region,
    batches: Iterable[Environment],
    keep: bool,
    tick: Callable[[int], None],
    float_batches: Iterable[Environment] | None = None,
) -> tuple[list[Environment], list[Environment]]:
    """Return the borders after the region for each batch, and those of the float model where it runs beside."""
    kept: list[Environment] = []
    float_kept: list[Environment] = []
    beside = iter(float_batches) if float_batches is not None else None
    count = 0
    for count, batch in enumerate(batches, 1):
        if region.as_float and beside is not None:
            float_after = region.as_float.run(next(beside))
            float_kept += [float_after] if keep else []
        after = region.run(batch)
        kept += [after] if keep else []
        tick(count)
    if not count:
        raise Refused("the calibration data has no batches")
    return kept, float_kept


@contextmanager
def _ticking(progress: bool | Progress | None, regions: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the number of the batch; how many batches there are is known once the first region has run."""
    state = {"done": 0, "batches": 0, "finished": 0}
    report: Progress = progress if callable(progress) else lambda done, total: None

    def tick(number: int) -> None:
        state["finished"] += number == 1
        state["batches"] = max(state["batches"], number)
        state["done"] += 1
        report(state["done"], state["batches"] * regions if state["finished"] > 1 else 0)

    if progress is not True:
        yield tick
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("calibrating", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None)

        report = show
        yield tick

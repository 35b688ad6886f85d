"""Choose the codes of every quantized weight with a solver.

    %w.quantizer = quantizer(%w) {scheme="int4 group=128 sym"} : f32[8,16]

    %w.quantizer = quantizer(%w, scale=@.., codes=@..) {scheme="int4 group=128 sym"} : f32[8,16]

A solver that knows the layer's input x minimises the error of the layer's output, tr(E H E^T) with H = x^T x, instead of the error of its
weight. x is what the layer reads in the graph as it stands: rounded, where a quantizer stands before the layer.

``sequential`` solves layers in the order in which they run, each on what the layers before it have become (Frantar et al. 2022, section 4):
the sweep runs one product at a time, and twice where weights changed. Otherwise all layers see one sweep, in which every weight is rounded
to the nearest code.

A weight is read when its turn comes, the codes of a large one go where the graph keeps constants, and each solved weight is a part of the
pass that a resumed compile takes over: memory and what a kill loses are bounded by a weight. Solvers that treat rows apart are given
runs of at most ``ROWS_AT_ONCE`` weights.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import Quantized
from qcompile.formats.granularity import Channel, Tensor
from qcompile.formats.quantize import quantize_tensor
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.quantizer import Quantizer
from qcompile.graph.stage import Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.registry import find_solver
from qcompile.solvers import mse
from qcompile.solvers.gptq import row_errors
from qcompile.statistics import Gram, Request, collect_sequentially
from qcompile.statistics.collectors import Result
from qcompile.statistics.regions import split_after_products

ROWS_AT_ONCE = 1 << 22  # weights: solvers work in float64 and with several copies


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Solve for the codes of the weights that still have none.

    Attributes:
        solver: nearest, mse, gptq, kmeans, or another of the registry.
        sequential: later layers see what the earlier ones have become; only for solvers that read the layer's input.
        damping: gptq: share of the mean of H's diagonal that is added to it.
        act_order: gptq: inputs of large magnitude first; scales of groups are then static, so nothing is reordered at run time.
        static_groups: gptq: scales of groups from the weight as it was.
        grid: gptq: ``nearest`` or ``mse`` chooses the scales.
        table_rows: kmeans: rows of a weight that share a table; 0: all.
    """

    stage: ClassVar[Stage] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()

    solver: str = "nearest"
    sequential: bool = True
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    grid: str = "mse"
    table_rows: int = 0

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if self.sequential and context.calibration is not None:
            return ()  # run() sweeps itself: what a layer reads is known only once the layers before it are solved
        return [request for weight in self._weights(graph, context) for request in weight.requests]

    def run(self, graph: Graph, context: Context) -> int:
        weights = self._weights(graph, context)
        solver = _Solver.of(self)
        waiting = [weight for weight in weights if not _restored(weight, context)]
        gathered: dict[Request, Result] = dict(context.statistics or {})

        def solve_ready(nodes: Sequence[fx.Node], statistics: Mapping[Request, Result]) -> bool:
            gathered.update(statistics)
            ready = [weight for weight in waiting if all(request in gathered for request in weight.requests)]
            for weight in ready:
                solver.install(graph, weight, [gathered[request] for request in weight.requests], context)
                waiting.remove(weight)
            for request in set(gathered) - {request for weight in waiting for request in weight.requests}:
                del gathered[request]
            return bool(ready)

        solve_ready((), {})
        if waiting:
            assert context.calibration is not None
            requests = [request for weight in waiting for request in weight.requests]
            regions = split_after_products(graph)
            collect_sequentially(graph, requests, context.calibration, solve_ready, regions=regions, progress=context.progress)
        assert not waiting
        return len(weights)

    def _weights(self, graph: Graph, context: Context) -> list[_Weight]:
        """Return the weights that still need codes, each with the statistics that the solver takes for it."""
        takes_gram = "gram" in _statistics_of(find_solver(self.solver), optional=context.calibration is not None)
        open_nodes = [
            node for node in graph.nodes if (q := graph.quantizer(node)) and q.codes is None and graph.constant(node.args[0]) is not None
        ]
        return [_describe(graph, node, takes_gram) for node in open_nodes]


def _statistics_of(solve: Callable[..., Quantized], *, optional: bool) -> tuple[str, ...]:
    """Return the statistics that a solver needs, and those that it takes where there are any."""
    module = sys.modules[solve.__module__]
    return (*getattr(module, "NEEDS", ()), *(getattr(module, "USES", ()) if optional else ()))


# ---- weights and what reads them ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight to solve.

    Attributes:
        layer: name of the node that reads it.
        quantizer: is given the codes.
        value: the weight.
        name: of the quantizer, which no other has.
        as_matrix: whether its scales lie along [out, in].
        requests: for each product that reads it, the Gram matrix of the product's other operand.
        obstacle: why there are none.
    """

    layer: str
    quantizer: Quantizer
    value: torch.Tensor
    name: str
    as_matrix: bool
    requests: tuple[Request, ...] = ()
    obstacle: str = ""


def _describe(graph: Graph, node: fx.Node, takes_gram: bool) -> _Weight:
    quantizer, value = graph.quantizer(node), graph.constant(node.args[0])
    assert quantizer is not None
    assert value is not None
    users = list(node.users)
    layer = node_name(users[0]) if users else node_name(node)
    whole_rows = value.ndim == 2 or isinstance(quantizer.scheme.granularity, (Tensor, Channel))
    if value.ndim < 2 or not whole_rows:
        return _Weight(
            layer,
            quantizer,
            value,
            node_name(node),
            False,
            (),
            f"its scales ({quantizer.scheme.granularity}) do not lie along the kernel's inputs",
        )
    found = [_gram_request(user, node) for user in users] if takes_gram else []
    requests = tuple(dict.fromkeys(request for request in found if isinstance(request, Gram)))
    obstacle = next((reason for reason in found if isinstance(reason, str)), "nothing reads it" if takes_gram else "")
    return _Weight(layer, quantizer, value, node_name(node), True, requests, "" if requests else obstacle)


def _gram_request(user: fx.Node, weight: fx.Node) -> Gram | str:
    """Return the request for what a product multiplies the weight with, or why there is none."""
    name = operator_name(user.target) if user.op == "call_function" else user.op
    if name not in ("aten.linear", "aten.conv2d"):
        return f"{name} is no product with its rows"
    arguments = bound_arguments(user)
    x = arguments["input"]
    if arguments["weight"] is not weight or not isinstance(x, fx.Node):
        return "it is not the weight of the product"
    if name == "aten.linear":
        return Gram(node_name(x))
    stride, padding, dilation = (_pair(arguments[key]) for key in ("stride", "padding", "dilation"))
    kernel_height, kernel_width = weight.meta["val"].shape[-2:]
    return Gram(node_name(x), (int(kernel_height), int(kernel_width), stride, padding, dilation, int(arguments["groups"])))


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return (int(sizes[0]), int(sizes[-1]))


# ---- solving --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Solver:
    """A solver with the options that it knows."""

    name: str
    solve: Callable[..., Quantized]
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: QuantizeWeights) -> _Solver:
        """Return the solver that a pass names.

        Raises:
            Refused: an option is set that this solver does not have.
        """
        solve = find_solver(settings.solver)
        known = inspect.signature(solve).parameters
        own = [f for f in fields(settings) if f.name not in ("solver", "sequential")]
        for f in own:
            if f.name not in known and getattr(settings, f.name) != f.default:
                raise Refused(f"the solver {settings.solver} has no option {f.name}")
        return cls(settings.solver, solve, {f.name: getattr(settings, f.name) for f in own if f.name in known})

    def install(self, graph: Graph, weight: _Weight, results: Sequence[Result], context: Context) -> None:
        """Give a weight its codes and note what was gained over nearest rounding.

        Raises:
            Refused: the solver fails; the message names the layer.
        """
        statistics, noted = _merge(results), len(context.notes)
        try:
            found = self._solve(weight, statistics, context)
        except (Refused, RuntimeError) as error:
            raise Refused(f"{self.name} fails: {str(error).splitlines()[0]}", node=weight.layer) from error
        codes = graph.keep(found.codes.reshape(weight.value.shape))
        tensors = {"scale": found.scale, "zero_point": found.zero_point, "codes": codes, "table": found.table}
        _set_codes(weight, tensors)
        if context.parts:
            context.parts.save(weight.name, {key: value for key, value in tensors.items() if value is not None}, context.notes[noted:])

    def _solve(self, weight: _Weight, statistics: Result, context: Context) -> Quantized:
        scheme = weight.quantizer.scheme
        if not weight.as_matrix:
            context.notes.append((weight.layer, f"weight rounded to nearest, not by {self.name}: {weight.obstacle}"))
            return quantize_tensor(weight.value, scheme)
        lacking = [name for name in _statistics_of(self.solve, optional=False) if name not in statistics]
        if lacking:
            context.notes.append((weight.layer, f"weight rounded with least squared error, not by {self.name}: {weight.obstacle}"))
            return _joined([mse.solve(part, {}, scheme) for part in _runs(weight, mse.BY_ROWS)])
        options, said = dict(self.options), dict[str, None]()
        if "say" in inspect.signature(self.solve).parameters:
            options["say"] = said.setdefault
        found, errors = [], []
        for part in _runs(weight, getattr(sys.modules[self.solve.__module__], "BY_ROWS", False)):
            found.append(self.solve(part, statistics, scheme, **options))
            errors.append(_errors(part, found[-1], statistics) if self.name != "nearest" else (0.0, 0.0))
        context.notes += [(weight.layer, text) for text in said]
        if self.name != "nearest":
            mine, nearest = (sum(parts) for parts in zip(*errors, strict=True))
            context.notes.append(
                (weight.layer, f"{self.name}: {mine / nearest if nearest > 0 else 1:.3f} of the error of nearest rounding")
            )
        return _joined(found)


def _runs(weight: _Weight, by_rows: bool) -> Iterator[torch.Tensor]:
    """Yield a weight as [out, in], a run of rows at a time where it is large and each has its own scales."""
    value = weight.value
    apart = by_rows and value.ndim == 2 and not isinstance(weight.quantizer.scheme.granularity, Tensor)
    rows = max(ROWS_AT_ONCE * len(value) // max(value.numel(), 1), 1) if apart else len(value)
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        yield part.reshape(len(part), -1)


def _joined(parts: Sequence[Quantized]) -> Quantized:
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    codes, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale"))
    return Quantized(codes, scale, join("zero_point"), parts[0].scheme, join("table"))


def _set_codes(weight: _Weight, tensors: Mapping[str, torch.Tensor | None]) -> None:
    for key in ("scale", "zero_point", "codes", "table"):
        setattr(weight.quantizer, key, tensors.get(key))


def _restored(weight: _Weight, context: Context) -> bool:
    """Give a weight the codes that a killed compile found for it, and return whether there are any."""
    found = context.parts.load(weight.name) if context.parts else None
    if found is None:
        return False
    tensors, notes = found
    _set_codes(weight, tensors)
    context.notes += notes
    return True


def _merge(results: Sequence[Result]) -> Result:
    """Return the Gram matrix over the inputs of all products that read one weight."""
    if not results or len({result["gram"].shape for result in results}) > 1:
        return {}
    rows = sum(result["rows"] for result in results)
    return {"gram": sum((result["gram"] * (result["rows"] / rows) for result in results), torch.zeros(())), "rows": torch.as_tensor(rows)}


def _errors(weight: torch.Tensor, found: Quantized, statistics: Result) -> tuple[float, float]:
    """Return the error of the layer's output (or of the weight, where its input is not known), and nearest rounding's."""
    gram = statistics.get("gram", torch.eye(weight.shape[1], dtype=torch.float64))
    mine, nearest = (float(row_errors(weight, q.dequantize(), gram).sum()) for q in (found, quantize_tensor(weight, found.scheme)))
    return mine, nearest

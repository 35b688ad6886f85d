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
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Channel, Tensor
from qcompile.formats.quantize import quantize_tensor
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.quantizer import Quantizer
from qcompile.graph.stage import Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately, check_options
from qcompile.registry import find_solver, solver_options
from qcompile.solvers import mse
from qcompile.solvers.gptq import row_errors
from qcompile.statistics import Gram, Request, collect_sequentially
from qcompile.statistics.collectors import Result, RowWeights
from qcompile.statistics.head_grams import head_grams
from qcompile.statistics.regions import split_after_products
from qcompile.statistics.row_weights import weigher

ROWS_AT_ONCE = 1 << 22  # weights: solvers work in float64 and with several copies


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Solve for the codes of the weights that still have none.

    Attributes:
        solver: nearest, mse, gptq, kmeans, or another of the registry (``qcompile solvers``).
        sequential: later layers see what the earlier ones have become; only for solvers that read the layer's input.
        rows: what each row of a layer's input counts: equal, attention (RSQ) or gradient (GuidedQuant), see ``statistics/row_weights.py``.
        row_groups: gradient: runs of output channels that have weights of their own.
        toward_float: aim at the layer's output in the float model on what the layer reads here: it makes up for the layers before.
        options: of the solver, as (name, value); in text they stand beside the others: ``quantize-weights{solver=gptq, damping=0.1}``.
    """

    stage: ClassVar[Stage] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()

    solver: str = "nearest"
    sequential: bool = True
    rows: str = "equal"
    row_groups: int = 1
    toward_float: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> QuantizeWeights:
        own = {f.name for f in fields(cls)} - {"options"}
        made = super().make({name: value for name, value in options.items() if name in own})
        assert isinstance(made, QuantizeWeights)
        further = {name: value for name, value in options.items() if name not in own}
        if not further:
            return made
        known = {name: parameter.annotation for name, parameter in solver_options(made.solver).items()}
        return replace(made, options=tuple(sorted(check_options(further, known, f"the solver {made.solver}").items())))

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | dict(settings.pop("options", ()))

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
        statistics = _statistics_of(find_solver(self.solver), optional=context.calibration is not None)
        if statistics and self.toward_float:
            statistics = (*statistics, "cross")
        open_nodes = [
            node for node in graph.nodes if (q := graph.quantizer(node)) and q.codes is None and graph.constant(node.args[0]) is not None
        ]
        row_weights: Mapping[fx.Node, RowWeights] = {}
        if self.rows != "equal" and statistics and context.calibration is not None and open_nodes:
            layers = [u for node in open_nodes for u in node.users if u.op == "call_function" and operator_name(u.target) == "aten.linear"]
            row_weights = weigher(self.rows, self.row_groups)(graph, layers, context.calibration)
        weights = [_describe(graph, node, statistics, row_weights) for node in open_nodes]
        if "heads" in statistics and context.calibration is not None and open_nodes:
            found = head_grams(graph, [user for node in open_nodes for user in node.users], context.calibration)
            weights = [replace(w, heads=found.get(next(iter(n.users), n))) for w, n in zip(weights, open_nodes, strict=True)]
        return weights


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
        heads: what errors of its outputs count in attention scores, see ``statistics/head_grams.py``.
    """

    layer: str
    quantizer: Quantizer
    value: torch.Tensor
    name: str
    as_matrix: bool
    requests: tuple[Request, ...] = ()
    obstacle: str = ""
    heads: torch.Tensor | None = None


def _describe(graph: Graph, node: fx.Node, statistics: Sequence[str], row_weights: Mapping[fx.Node, RowWeights]) -> _Weight:
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
    statistics = statistics if quantizer.scheme.format.scaled else ()
    found = [_gram_request(user, node) for user in users] if statistics else []
    grams = [
        replace(request, weights=row_weights.get(user), cross="cross" in statistics)
        for user, request in zip(users, found, strict=False)
        if isinstance(request, Gram)
    ]
    requests = tuple(dict.fromkeys(grams))
    obstacle = next((reason for reason in found if isinstance(reason, str)), "nothing reads it" if statistics else "")
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
    toward_float: bool = False

    @classmethod
    def of(cls, settings: QuantizeWeights) -> _Solver:
        """Return the solver that a pass names."""
        return cls(settings.solver, find_solver(settings.solver), dict(settings.options), settings.toward_float)

    def install(self, graph: Graph, weight: _Weight, results: Sequence[Result], context: Context) -> None:
        """Give a weight its codes and note what was gained over nearest rounding.

        Raises:
            Refused: the solver fails; the message names the layer.
        """
        statistics, noted = _merge(results) | ({} if weight.heads is None else {"heads": weight.heads}), len(context.notes)
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
        if not scheme.format.scaled:  # codes are values: the nearest are all there is to choose
            return quantize_tensor(weight.value, scheme)
        if not weight.as_matrix:
            context.notes.append((weight.layer, f"weight rounded to nearest, not by {self.name}: {weight.obstacle}"))
            return quantize_tensor(weight.value, scheme)
        formats = getattr(sys.modules[self.solve.__module__], "FORMATS", None)
        one_by_one = not formats and self.name not in ("nearest", "mse")
        if (formats and not isinstance(scheme.format, formats)) or (one_by_one and not scheme.format.apart):
            context.notes.append(
                (weight.layer, f"weight rounded with least squared error, not by {self.name}: that is not for {scheme.format}")
            )
            return mse.solve(_matrix(weight), statistics, scheme)
        lacking = [name for name in _statistics_of(self.solve, optional=False) if name not in statistics]
        if lacking:
            context.notes.append((weight.layer, f"weight rounded with least squared error, not by {self.name}: {weight.obstacle}"))
            return _joined([mse.solve(part, {}, scheme) for part in _runs(weight.value, scheme, mse.BY_ROWS)])
        options, said = dict(self.options), dict[str, None]()
        if "say" in inspect.signature(self.solve).parameters:
            options["say"] = said.setdefault
        aim = _toward_float(_matrix(weight), statistics) if self.toward_float and "cross" in statistics else weight.value
        # Rows with statistics of their own stay together: the solver finds theirs by their place.
        by_rows = getattr(sys.modules[self.solve.__module__], "BY_ROWS", False) and statistics.get("gram", torch.eye(1)).ndim == 2
        found, errors = [], []
        for part in _runs(aim, scheme, by_rows):
            found.append(self.solve(part, statistics, scheme, **options))
            errors.append(_errors(part, found[-1], statistics) if self.name != "nearest" else (0.0, 0.0))
        context.notes += [(weight.layer, text) for text in said]
        if self.name != "nearest":
            mine, nearest = (sum(parts) for parts in zip(*errors, strict=True))
            context.notes.append(
                (weight.layer, f"{self.name}: {mine / nearest if nearest > 0 else 1:.3f} of the error of nearest rounding")
            )
        return _joined(found)


def _matrix(weight: _Weight) -> torch.Tensor:
    return weight.value.reshape(len(weight.value), -1)


def _runs(value: torch.Tensor, scheme: Scheme, by_rows: bool) -> Iterator[torch.Tensor]:
    """Yield a weight as [out, in], a run of rows at a time where it is large and each has its own scales."""
    apart = by_rows and value.ndim == 2 and not isinstance(scheme.granularity, Tensor)
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


def _toward_float(weight: torch.Tensor, statistics: Result, damping: float = 0.1) -> torch.Tensor:
    """Return the weight W' whose output on this layer's input y is nearest to W's on the float model's input x, [out, in].

    ||y W'^T - x W^T||^2 + d ||W' - W||^2 is least for W' = W (y^T x + d)^T (y^T y + d)^-1, d being ``damping`` times the mean of the
    diagonal (Li et al. 2025, GPTAQ, arXiv 2504.02692, solve the same aim inside GPTQ). Measured on wikilm-5m at 2 bits.
    """
    G, C = (statistics[name].to(torch.float64) for name in ("gram", "cross"))
    G, C = (x.reshape(-1, *x.shape[-2:]) for x in (G, C))
    d = damping * torch.diagonal(G, dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None] * torch.eye(G.shape[1], dtype=torch.float64)
    W = weight.to(torch.float64).reshape(len(G), -1, G.shape[1])
    moved = torch.linalg.solve(G + d, (C + d) @ W.transpose(1, 2)).transpose(1, 2)
    return moved.reshape(weight.shape).to(weight.dtype)


def _merge(results: Sequence[Result]) -> Result:
    """Return the matrices over the inputs of all products that read one weight."""
    if not results or len({result["gram"].shape for result in results}) > 1:
        return {}
    rows = sum(int(result["rows"]) for result in results)
    names = set(results[0]) - {"rows"}
    merged = {name: torch.stack([result[name] * (int(result["rows"]) / rows) for result in results]).sum(0) for name in names}
    return {**merged, "rows": torch.tensor(rows)}


def _errors(weight: torch.Tensor, found: Quantized, statistics: Result) -> tuple[float, float]:
    """Return the error of the layer's output (or of the weight, where its input is not known), and nearest rounding's."""
    gram = statistics.get("gram", torch.eye(weight.shape[1], dtype=torch.float64))
    mine, nearest = (float(row_errors(weight, q.dequantize(), gram).sum()) for q in (found, quantize_tensor(weight, found.scheme)))
    return mine, nearest

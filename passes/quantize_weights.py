"""Choose the codes of every quantized weight with a solver.

    %w.quantizer = quantizer(%w) {scheme="int4 group=128 sym"} : f32[8,16]

    %w.quantizer = quantizer(%w, scale=@.., codes=@..) {scheme="int4 group=128 sym"} : f32[8,16]

A solver that knows the layer's input x minimises the error of the layer's output, tr(E H E^T) with H = x^T x, instead of the error of its
weight. x is what the layer reads in the graph as it stands: rounded, where a quantizer stands before the layer.

``sequential`` solves layers in the order in which they run, each on what the layers before it have become (Frantar et al. 2022, section 4):
the sweep runs one product at a time, and twice where weights changed. Otherwise all layers see one sweep, in which every weight is rounded to
the nearest code.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import Quantized, Scheme
from qcompile.formats.granularity import Channel, Tensor
from qcompile.formats.quantize import quantize_tensor
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.stage import Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.registry import find_solver
from qcompile.solvers import mse
from qcompile.solvers.gptq import row_errors
from qcompile.statistics import Gram, Request, Statistics, collect_sequentially
from qcompile.statistics.regions import product_count, split_regions

Solver = Callable[..., Quantized]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Solve for the codes of the weights that still have none.

    Attributes:
        solver: nearest, mse, gptq, or another of the registry.
        sequential: later layers see what the earlier ones have become; only for solvers that read the layer's input.
        damping: gptq: share of the mean of H's diagonal that is added to it.
        act_order: gptq: inputs of large magnitude first.
        static_groups: gptq: scales of groups from the weight as it was.
        grid: gptq: ``nearest`` or ``mse`` chooses the scales.
    """

    stage: ClassVar[Stage] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()

    solver: str = "nearest"
    sequential: bool = True
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = True
    grid: str = "mse"

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        if self.sequential and context.calibration is not None:
            return ()  # run() sweeps itself: what a layer reads is known only when the layers before it are solved
        return [request for weight in self._weights(graph, context) for request in weight.requests]

    def run(self, graph: Graph, context: Context) -> int:
        weights = self._weights(graph, context)
        install = self._installer(context)
        waiting, gathered = list(weights), dict[Request, dict[str, torch.Tensor]](context.statistics or {})

        def visit(nodes: Sequence[fx.Node], statistics: Mapping[Request, dict[str, torch.Tensor]]) -> bool:
            gathered.update(statistics)
            ready = [weight for weight in waiting if all(request in gathered for request in weight.requests)]
            for weight in ready:
                install(weight, [gathered[request] for request in weight.requests])
                waiting.remove(weight)
            for request in set(gathered) - {request for weight in waiting for request in weight.requests}:
                del gathered[request]
            return bool(ready)

        visit((), {})
        if waiting and context.calibration is not None:
            requests = [request for weight in waiting for request in weight.requests]
            collect_sequentially(graph, requests, context.calibration, visit, regions=split_regions(graph, 1, product_count))
        return len(weights)

    def _weights(self, graph: Graph, context: Context) -> list[_Weight]:
        """Return the weights to solve, each with the statistics that the solver takes of it."""
        module = sys.modules[find_solver(self.solver).__module__]
        needed = "gram" in getattr(module, "NEEDS", ())
        if needed and context.calibration is None and context.statistics is None and context.recipe is not None:
            raise Refused(f"the solver {self.solver} needs calibration data", way_out="give --calibrate DATA, or choose the solver mse")
        wanted = needed or ("gram" in getattr(module, "USES", ()) and context.calibration is not None)
        return [_describe(graph, node, wanted) for node in graph.nodes if _is_open(graph, node)]

    def _installer(self, context: Context) -> Callable[[_Weight, Sequence[Mapping[str, torch.Tensor]]], None]:
        solve = find_solver(self.solver)
        needs_gram = "gram" in getattr(sys.modules[solve.__module__], "NEEDS", ())
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("solver", "sequential")}
        taken = inspect.signature(solve).parameters
        unknown = [f.name for f in fields(self) if f.name in own and own[f.name] != f.default and f.name not in taken]
        if unknown:
            raise Refused(f"the solver {self.solver} has no option {unknown[0]}")
        options = {name: value for name, value in own.items() if name in taken}

        def install(weight: _Weight, results: Sequence[Mapping[str, torch.Tensor]]) -> None:
            statistics = _merge(results)
            say: dict[str, Any] = {}
            if "say" in taken:
                say = {"say": lambda text: context.notes.append((weight.layer, text))}
            flat = weight.tensor.reshape(weight.tensor.shape[0], -1)
            try:
                if needs_gram and "gram" not in statistics:
                    context.notes.append((weight.layer, f"weights by least squared error, not {self.solver}: {weight.obstacle}"))
                    found = mse.solve(flat, {}, weight.scheme) if weight.is_flat else quantize_tensor(weight.tensor, weight.scheme)
                else:
                    found = solve(flat, statistics, weight.scheme, **options, **say) if weight.is_flat else quantize_tensor(weight.tensor, weight.scheme)
            except (Refused, RuntimeError) as error:
                raise Refused(str(error).splitlines()[0], node=weight.layer, operator=f"solver {self.solver}") from error
            _note_gain(weight, flat, found, statistics, context)
            weight.quantizer.scale, weight.quantizer.zero_point = found.scale, found.zero_point
            weight.quantizer.codes = found.codes.reshape(weight.tensor.shape)

        return install

"""Ranges of activations from the model alone: batch normalization says how its outputs are spread (Nagel et al. 2019, DFQ, section 4.2).

A convolution that batch normalization was folded into carries the notes ``bn_mean`` (beta) and ``bn_std`` (gamma): each of its
channels is taken for a normal distribution. Means, deviations and ranges are carried through the operators after it, channels taken as
independent.

Files of other tools often have their batch normalization folded already, and no layer carries notes. Then the float model is run on seeded
normal noise with the mean and deviation of the example inputs' channels, and what that gives stands for the notes (our addition).
Weights alone say less: channels and neighbouring pixels are correlated, so that independent sums come out two to seven times too narrow at
the end of ResNet-20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.statistics.collectors import Moments
from qcompile.statistics.sweep import collect

DEVIATIONS = 6.0  # beta +- 6 gamma, as in the paper
NOISE = 16  # samples of noise: moments are pooled over pixels too
SEED = 0


Bound = float | torch.Tensor


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and range of each channel (axis 1) of a value, float64 [channels]."""

    mean: torch.Tensor
    std: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def normal(cls, mean: torch.Tensor, std: torch.Tensor, deviations: float = DEVIATIONS) -> Spread:
        """Return a normal distribution with its range at so many deviations."""
        return cls(mean, std, mean - deviations * std, mean + deviations * std)

    def clamp(self, low: Bound, high: Bound) -> Spread:
        """Return the distribution after a clamp to [low, high], for x normal with this mean and deviation."""
        mean, std = clamped_normal(self.mean, self.std, low, high)
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        return Spread(mean, std, self.low.clamp(low, high), self.high.clamp(low, high))

    def map(self, change) -> Spread:  # type: ignore[no-untyped-def]
        return Spread(*(change(getattr(self, part.name)) for part in fields(self)))


def _normal_cdf(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def clamped_normal(mean: torch.Tensor, std: torch.Tensor, low: Bound, high: Bound) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of clamp(x, low, high) for x ~ N(mean, std^2).

    For low 0 and high infinity this is the rectified normal.
    """
    std = std.clamp(min=1e-12)
    low, high = (torch.as_tensor(bound, dtype=torch.float64).expand_as(mean) for bound in (low, high))

    def pdf(z: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)

    a, b = (low - mean) / std, (high - mean) / std
    inside = _normal_cdf(b) - _normal_cdf(a)
    edge_a, edge_b = torch.nan_to_num(a * pdf(a)), torch.nan_to_num(b * pdf(b))  # the limit of z * pdf(z) at infinity is 0
    below, above = (torch.where(torch.isfinite(bound), bound, 0.0) for bound in (low, high))  # an infinite bound holds no mass
    first = mean * inside + std * (pdf(a) - pdf(b)) + below * _normal_cdf(a) + above * (1 - _normal_cdf(b))
    second = (mean.square() + std.square()) * inside + 2 * mean * std * (pdf(a) - pdf(b)) + std.square() * (edge_a - edge_b)
    second = second + below.square() * _normal_cdf(a) + above.square() * (1 - _normal_cdf(b))
    return first, (second - first.square()).clamp(min=0).sqrt()


_SAME = frozenset(
    {"aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.mean.dim", "aten.view", "aten.flatten.using_ints",
     "aten.dropout", "aten.clone", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze", "aten.slice.Tensor"}
)  # fmt: skip


_MEASURED = ("aten.conv2d", "aten.linear", "aten.add.Tensor")


class ModelRanges:
    """Spreads of all values of a float or simulated graph of convolutions.

    Args:
        graph: convolutions carry the notes of folded batch normalization; where none does, the graph is run on noise.
        example_inputs: one batch; an input's range is that of its example, and noise has the moments of its channels.
        deviations: a normal channel's range reaches so many standard deviations to either side of its mean.
    """

    def __init__(self, graph: Graph, example_inputs: Sequence[torch.Tensor], deviations: float = DEVIATIONS) -> None:
        self.graph, self.deviations = graph, deviations
        self.spreads: dict[fx.Node, Spread] = {}
        # Where notes are wanting, mean and deviation are estimates: the range is never narrower than the paper's.
        wide = max(deviations, DEVIATIONS)
        self.measured = {node: Spread.normal(*moments, wide) for node, moments in _moments_on_noise(graph, example_inputs).items()}
        examples = dict(zip(graph.inputs, example_inputs, strict=False))
        for node in graph.nodes:
            spread = self._input(node, examples) if node.op == "placeholder" else self.measured.get(node) or self._carry(node)
            if spread is not None:
                self.spreads[node] = spread

    def range(self, node: fx.Node) -> tuple[float, float]:
        """Return the smallest and largest value expected over all channels.

        Raises:
            Refused: the model does not say.
        """
        spread = self.spread(node)
        return float(spread.low.min()), float(spread.high.max())

    def spread(self, node: fx.Node) -> Spread:
        """Return how a value is spread.

        Raises:
            Refused: the model does not say.
        """
        spread = self.spreads.get(node)
        if spread is None:
            raise Refused(
                "its range cannot be found without data",
                node=node.name,
                operator=str(node.target),
                way_out="give calibration data and a range such as minmax",
            )
        return spread

    def _input(self, node: fx.Node, examples: dict[fx.Node, torch.Tensor]) -> Spread | None:
        x = examples.get(node)
        if x is None or not x.is_floating_point() or x.ndim < 2:
            return None
        channels = x.movedim(1, 0).flatten(1).to(torch.float64)
        return Spread(channels.mean(1), channels.std(1, correction=0), channels.amin(1), channels.amax(1))

    def _carry(self, node: fx.Node) -> Spread | None:
        if self.graph.quantizer(node):
            return self.spreads.get(node.args[0])
        if node.op != "call_function":
            return None
        name, arguments = operator_name(node.target), None
        if name in ("aten.conv2d", "aten.linear"):
            return self._product(node)
        if name == "py.getitem":
            return None
        arguments = bound_arguments(node)
        source = self.spreads.get(arguments.get("self"))
        if name == "aten.cat":
            parts = [self.spreads.get(t) for t in arguments["tensors"]]
            whole = all(part is not None for part in parts) and arguments["dim"] == 1
            return Spread(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Spread))) if whole else None
        if source is None:
            return None
        if name in ("aten.relu", "aten.relu6", "aten.hardtanh", "aten.clamp"):
            return source.clamp(*_limits(name, arguments))
        if name == "aten.clamp.Tensor":
            bounds = [self._bound(arguments[key], default, len(source.mean)) for key, default in (("min", -math.inf), ("max", math.inf))]
            return source.clamp(*bounds) if all(bound is not None for bound in bounds) else None  # type: ignore[arg-type]
        if name == "aten.add.Tensor":
            other = self.spreads.get(arguments["other"])
            return _sum(source, other, self.deviations) if other is not None else None
        if name in ("aten.pad", "aten.constant_pad_nd"):
            return _padded(source, arguments, node.meta["val"].ndim)
        if name in _SAME:
            channels = node.meta["val"].shape[1] if node.meta["val"].ndim > 1 else 0
            repeat = channels // len(source.mean) if isinstance(channels, int) and len(source.mean) else 0
            return source.map(lambda part: part.repeat_interleave(repeat)) if repeat >= 1 else None
        return None

    def _bound(self, node: object, default: float, channels: int) -> torch.Tensor | None:
        """Return a clamp's bound for each channel, or None where it is not constant or not by channel."""
        if node is None:
            return torch.full((channels,), default, dtype=torch.float64)
        value = self.graph.constant(node)
        return value.to(torch.float64).flatten().expand(channels) if value is not None and value.numel() in (1, channels) else None

    def _product(self, node: fx.Node) -> Spread | None:
        notes = node.meta.get("notes", {})
        if "bn_mean" in notes:
            return Spread.normal(notes["bn_mean"].to(torch.float64), notes["bn_std"].to(torch.float64), self.deviations)
        arguments = bound_arguments(node)
        source = self.spreads.get(arguments["input"])
        weight = self._weight(arguments["weight"])
        if source is None or weight is None:
            return None
        groups = arguments.get("groups", 1)
        w = weight.to(torch.float64).flatten(2) if weight.ndim > 2 else weight.to(torch.float64).unsqueeze(-1)
        mean, var = (
            part.view(groups, 1, -1).expand(groups, w.shape[0] // groups, -1).flatten(0, 1) for part in (source.mean, source.std.square())
        )
        bias = self.graph.constant(arguments["bias"])
        out_mean = (w.sum(-1) * mean).sum(1) + (0 if bias is None else bias.to(torch.float64))
        return Spread.normal(out_mean, (w.square().sum(-1) * var).sum(1).sqrt(), max(self.deviations, DEVIATIONS))

    def _weight(self, node: fx.Node) -> torch.Tensor | None:
        quantizer = self.graph.quantizer(node)
        return self.graph.constant(node.args[0] if quantizer else node)


def _moments_on_noise(graph: Graph, example_inputs: Sequence[torch.Tensor]) -> dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]:
    """Return mean and deviation f64 [channels] on noise of every product and sum; nothing if a layer has notes or an input no channels."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    noted = any("bn_mean" in node.meta.get("notes", {}) for node in calls)
    images = any(operator_name(node.target) == "aten.conv2d" for node in calls)
    if noted or not images or any(not x.is_floating_point() or x.ndim < 2 or not x.numel() for x in example_inputs):
        return {}
    generator = torch.Generator().manual_seed(SEED)
    count = math.ceil(NOISE / len(example_inputs[0]))
    batches = [tuple(_noise(x, generator) for x in example_inputs) for _ in range(count)]
    # Sums too: shortcut and branch are correlated. In other shapes than these axis 1 is no channel.
    nodes = [node for node in calls if operator_name(node.target) in _MEASURED and node.meta["val"].ndim in (2, 4)]
    requests = {node: Moments(node.name, axis=1) for node in nodes if node.meta["val"].is_floating_point()}
    found = collect(graph, list(requests.values()), batches)
    return {node: (found[request]["mean"], found[request]["variance"].sqrt()) for node, request in requests.items()}


def _noise(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return normal noise of the example's shape, with the mean and deviation of each of its channels (axis 1)."""
    axes = [axis for axis in range(example.ndim) if axis != 1]
    std, mean = torch.std_mean(example, axes, correction=0, keepdim=True)
    return torch.randn(example.shape, generator=generator, dtype=example.dtype) * std + mean


def _limits(name: str, arguments: dict) -> tuple[float, float]:  # type: ignore[type-arg]
    if name == "aten.relu":
        return 0.0, math.inf
    if name == "aten.relu6":
        return 0.0, 6.0
    low, high = (arguments["min_val"], arguments["max_val"]) if name == "aten.hardtanh" else (arguments["min"], arguments["max"])
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _sum(a: Spread, b: Spread, deviations: float) -> Spread:
    normal = Spread.normal(a.mean + b.mean, (a.std.square() + b.std.square()).sqrt(), deviations)
    return Spread(normal.mean, normal.std, torch.maximum(normal.low, a.low + b.low), torch.minimum(normal.high, a.high + b.high))


def _padded(source: Spread, arguments: dict, dimensions: int) -> Spread | None:  # type: ignore[type-arg]
    """Return the spread after padding; padded channels (axis 1) hold the padding alone, as in shortcuts without weights."""
    first = 2 * (dimensions - 2)  # ``pad`` counts axes from the last
    before, after = arguments["pad"][first : first + 2] or (0, 0)
    if arguments.get("mode", "constant") != "constant":
        return None if before or after else source
    value = float(arguments.get("value") or 0)
    ends = [torch.full((count,), value, dtype=torch.float64) for count in (before, after)]
    still = [torch.zeros_like(end) for end in ends]
    low, high = source.low.clamp(max=value), source.high.clamp(min=value)
    return Spread(
        *(torch.cat([end[0], part, end[1]]) for part, end in ((source.mean, ends), (source.std, still), (low, ends), (high, ends)))
    )

"""The search for the tiles with which the kernels of a model are fastest on this machine.

Each round builds the model with the next candidate of every layer at once, and times its kernels inside the model, where caches are as
they will be, in turns with the model of default tiles. Other processes may slow a single time several-fold; so what counts is the ratio
of the two times of a turn, which lie next to each other. Where weights and values lie in memory makes a difference of 10 to 20 % between
equal builds; so the turns are spread over places. A candidate leads only where it wins by 3 % in two thirds of the turns, and loses
clearly at none of the batches. The leaders are then built together and must win once more, or the luckiest of a dozen would
be chosen; and where the whole model does not get faster with them, all is left as it was.

So a search builds the model up to sixteen times, and packed weights are in memory up to four times.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.executable import Executable
from qcompile.backends.cpu.kernels.convolution_spec import Convolution
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.tiling import Tiling, candidates
from torch import fx

from qcompile.kernel_tiles import Tile, TunedLayer

MARGIN = 0.97  # a tile is taken where its time is below this share of the default's
MODEL = ""  # among the names of layers: the whole model
_CONFIDENT = 2 / 3  # of the turns must show it
_PLACES = 8  # in memory that two builds are measured at, at each batch
_SECONDS, _LEAST_TURNS, _MOST_TURNS = 0.25, 5, 30  # at one place

Batch = Sequence[torch.Tensor]
Times = Mapping[str, float]  # microseconds of all of a layer's kernels in one call
Turns = Sequence[tuple[Times, Times]]  # of two builds, one after the other


@dataclass(frozen=True)
class Build:
    """A built model.

    Attributes:
        executable: to call it.
        tiles: those it was asked to have, by layer.
        kernels: the layer of each kernel, by the kernel's name.
        specs: by layer, with default tiles.
    """

    executable: Executable
    tiles: Mapping[str, Tile]
    kernels: Mapping[str, str]
    specs: Mapping[str, Linear | Convolution]

    def elsewhere(self) -> Build:
        """Return the build at another place in memory."""
        return replace(self, executable=self.executable.copy())


# From two builds and a batch to the times of both.
Measure = Callable[[Build, Build, Batch], Turns]


@dataclass(frozen=True)
class Found:
    """What a search found: an entry for every layer, and milliseconds of the model before and after (at all batches together)."""

    layers: dict[str, TunedLayer]
    default_ms: float
    tuned_ms: float


def measure(default: Build, other: Build, batch: Batch) -> Turns:
    """Return the times of many turns; the builds go first by turns too."""
    found: list[tuple[Times, Times]] = []
    for _ in range(_PLACES):
        one, two = default.elsewhere(), other.elsewhere()
        _times(one, batch), _times(two, batch)  # first calls allocate
        turns, stop = 0, time.perf_counter() + _SECONDS
        while turns < _LEAST_TURNS or (turns < _MOST_TURNS and time.perf_counter() < stop):
            after = _times(two, batch) if turns % 2 else None
            before = _times(one, batch)
            found.append((before, after or _times(two, batch)))
            turns += 1
    return found


def _times(built: Build, batch: Batch) -> dict[str, float]:
    found: dict[str, float] = {}
    for kernel, milliseconds in built.executable.kernel_calls(*batch):
        if layer := built.kernels.get(kernel):
            found[layer] = found.get(layer, 0.0) + 1e3 * milliseconds
    start = time.perf_counter()
    built.executable(*batch)
    return {**found, MODEL: 1e6 * (time.perf_counter() - start)}


@dataclass
class _Leader:
    """The best candidate of a layer so far."""

    tile: dict[str, int] = field(default_factory=dict)
    share: float = MARGIN  # of the default's time
    tried: int = 0


class Search:
    """A search in one graph.

    Args:
        graph_module: as ``build`` takes it.
        batches: inputs of one call each; a tile must not lose at any of them.
        known: entries of earlier searches; their candidates are not tried again.
        measure: how builds are timed.
        progress: called with a line of text as work goes on.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batches: Sequence[Batch],
        known: Mapping[str, TunedLayer],
        *,
        measure: Measure = measure,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.graph_module, self.batches, self._measure = graph_module, batches, measure
        self._say = progress or (lambda line: None)
        self._say("building the model with default tiles")
        self.default = self._build({})
        self.candidates = {layer: candidates(spec) for layer, spec in self.default.specs.items()}
        self.leaders = {layer: _Leader() for layer in self.candidates}
        self.settled: dict[str, TunedLayer] = {}  # layers of which nothing is left to try
        for layer in self.candidates.keys() & known.keys():
            entry, leader = known[layer], self.leaders[layer]
            leader.tried = min(entry.tried, len(self.candidates[layer]))
            if leader.tried == len(self.candidates[layer]):
                self.settled[layer] = entry
            if entry.tile:
                leader.tile, leader.share = dict(entry.tile), min(entry.us / max(entry.default_us, 1e-9), MARGIN)

    def run(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> Found:
        """Try candidates until all are tried or the time is over; return what won."""
        start = clock()
        while clock() - start < seconds and (tiles := self._next_tiles()):
            left = max(len(self.candidates[layer]) - self.leaders[layer].tried for layer in tiles)
            self._say(f"{left} rounds left: trying other tiles in {len(tiles)} of {len(self.leaders)} kinds of layers")
            self._try(tiles)
        return self._confirm()

    def _next_tiles(self) -> dict[str, dict[str, int]]:
        """Return the next candidate of each layer that has one."""
        return {layer: rest[0] for layer, all_ in self.candidates.items() if (rest := all_[self.leaders[layer].tried :])}

    def _try(self, tiles: Mapping[str, dict[str, int]]) -> None:
        times = self._compare(tiles)
        for layer, tile in tiles.items():
            leader = self.leaders[layer]
            leader.tried += 1
            if (share := _sure_share(times, layer)) < leader.share:
                leader.tile, leader.share = tile, share

    def _confirm(self) -> Found:
        """Measure the leaders together; keep those that win again, and no new one where the model does not."""
        leading = {layer: leader.tile for layer, leader in self.leaders.items() if leader.tile}
        self._say(f"measuring the {len(leading)} best tiles once more")
        kept, times = leading, self._compare(leading)
        won = {layer: tile for layer, tile in leading.items() if layer in self.settled or _sure_share(times, layer) < MARGIN}
        if won != kept:
            kept, times = won, self._compare(won)
        if kept.keys() - self.settled.keys() and _share(times, MODEL) >= 1:
            kept = {layer: tile for layer, tile in kept.items() if layer in self.settled}
            times = self._compare(kept)
        layers = dict(self.settled)
        for layer in self.leaders.keys() - self.settled.keys():
            before, share = _default_time(times, layer), _share(times, layer) if layer in kept else 1.0
            layers[layer] = TunedLayer(
                tile=kept.get(layer, {}), tried=self.leaders[layer].tried, us=round(share * before, 2), default_us=round(before, 2)
            )
        default = _default_time(times, MODEL) / 1e3
        return Found(layers, default, default * (_share(times, MODEL) if kept else 1.0))

    def _compare(self, tiles: Mapping[str, Tile]) -> list[Turns]:
        """Return, for each batch, the times of the model with default tiles and with these."""
        other = self._build(tiles) if tiles else self.default
        return [self._measure(self.default, other, batch) for batch in self.batches]

    def _build(self, tiles: Mapping[str, Tile]) -> Build:
        tiling = Tiling(tiles)
        executable = build(self.graph_module, tiling=tiling)
        return Build(executable, tiles, tiling.kernels, tiling.specs)


def _sure_share(times: Sequence[Turns], layer: str) -> float:
    """Return the share of the default's time that a layer surely takes no more than; infinite where it loses clearly at a batch."""
    shares = [_quantile(turns, layer, _CONFIDENT) for turns in times]
    return math.inf if max(shares) > 1 / MARGIN else statistics.geometric_mean(shares)


def _share(times: Sequence[Turns], layer: str) -> float:
    return statistics.geometric_mean(_quantile(turns, layer, 0.5) for turns in times)


def _quantile(turns: Turns, layer: str, part: float) -> float:
    """Return what a part of the ratios of the turns do not exceed; 1 for a layer that was not timed."""
    ratios = sorted(after[layer] / before[layer] for before, after in turns if before.get(layer) and after.get(layer))
    return ratios[min(int(part * len(ratios)), len(ratios) - 1)] if ratios else 1.0


def _default_time(times: Sequence[Turns], layer: str) -> float:
    return sum(statistics.median(before.get(layer, 0.0) for before, _ in turns) for turns in times)

"""Tuning: tiles change no result, the same table gives the same code, and a search takes what wins by the times it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qcompile.backends.cpu import tuning
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.convolution_spec import Blocks, Convolution
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.target import TARGET, _cache_place
from qcompile.backends.cpu.tiling import MOST_TRIED, Tiling, candidates, layer_name, with_tile
from qcompile.backends.cpu.tuning import MODEL, Build, Search

import qcompile
from qcompile.graph import Graph
from qcompile.kernel_tiles import KernelTiles, TunedLayer, parse_tiles, read_tiles

Compiled = Callable[..., qcompile.Artifact]


nn = torch.nn
NETS = {  # of sizes that no block divides; with the shape of an input and a recipe
    "linear": (nn.Sequential(nn.Linear(550, 70)), (550,), "w8a8"),
    "linear int4": (nn.Sequential(nn.Linear(550, 70)), (550,), "w4a8"),
    "convolution": (nn.Sequential(nn.Conv2d(7, 36, 3, padding=1), nn.ReLU(), nn.Conv2d(36, 50, 1)), (7, 11, 11), "w8a8"),
    "grouped": (nn.Sequential(nn.Conv2d(50, 22, 3, stride=2, groups=2)), (50, 11, 11), "w8a8"),
}


@pytest.fixture(scope="module")
def net() -> Callable[[str], Graph]:
    """Return the graph of a net by name."""
    made: dict[str, Graph] = {}

    def graph(name: str = "linear") -> Graph:
        if name not in made:
            module, shape, recipe = NETS[name]
            generator = torch.Generator().manual_seed(5)
            for parameter in module.parameters():
                parameter.data.uniform_(-0.1, 0.1, generator=generator)
            x = torch.randn(2, *shape, generator=generator)
            sizes = [{0: "batch"}]
            made[name] = qcompile.compile(
                module.eval(), (x,), recipe=recipe, target="reference", calibration=[(x,)], dynamic_shapes=sizes
            ).graph
        return made[name]

    return graph


def tiling_of(graph: Graph) -> Tiling:
    """Return the tiling of a build with default tiles."""
    tiling = Tiling()
    build(graph.module, tiling=tiling)
    return tiling


@pytest.fixture(scope="module")
def specs(net: Callable[[str], Graph]) -> dict[str, Linear | Convolution]:
    return tiling_of(net()).specs


# ---- tiles ----------------------------------------------------------------------------------------------------------------

SPECS = [
    Linear(384, 1536),
    Linear(33, 5, x="int8", x_per_token=True, x_affine=False),
    Linear(4096, 4096, bits=4, group=32),
    Linear(4096, 4096, bits=4, group=128),
    Linear(640, 200, x="float32", bits=2, group=32),
    Linear(300, 300, x="float32", bits=32),
    Convolution(64, 64, 56, 56, (3, 3), padding=(1, 1)),
    Convolution(3, 32, 224, 224, (3, 3), (2, 2), (1, 1)),
    Convolution(96, 24, 7, 7, (1, 1)),
    Convolution(32, 48, 20, 20, (3, 3), groups=4, x="float32"),
]


@pytest.mark.parametrize("name", isa.KNOWN)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{type(spec).__name__}-{SPECS.index(spec)}")
def test_candidates_are_few_different_and_fit(spec: Linear | Convolution, name: str) -> None:
    spec = replace(spec, isa=name, **({"tile": None} if isinstance(spec, Linear) else {}))
    found = candidates(spec)
    assert 1 <= len(found) <= MOST_TRIED
    assert found == candidates(spec)
    cut = [with_tile(spec, tile) for tile in found]
    assert None not in cut
    assert len({*cut, spec}) == len(found) + 1
    if isinstance(spec, Linear):
        assert all(each.task_rows % 4 == 0 for each in cut)


WRONG = [
    {"rows": 8, "vectors": 1, "words": 128},
    {"rows": 8, "vectors": 1, "words": 128, "packed_bytes": 1 << 20, "threads": 2},
    {"rows": 10**9, "vectors": 1, "words": 128, "packed_bytes": 1 << 20},
    {"rows": 8, "vectors": 10**9, "words": 128, "packed_bytes": 1 << 20},
    {"rows": 8, "vectors": 1, "words": 100, "packed_bytes": 1 << 20},
    {"rows": 8, "vectors": 1, "words": 128, "packed_bytes": 1 << 30},
    {"rows": 8, "vectors": 1, "packed_bytes": 1 << 30},
    {"rows": 400, "vectors": 1, "packed_bytes": 1 << 18},
    {"rows": 0, "vectors": 1, "packed_bytes": 1 << 18},
    {"rows": 0, "vectors": 1, "words": 128, "packed_bytes": 1 << 18},
    {"rows": 16, "vectors": -1, "words": 128, "packed_bytes": 1 << 18},
    {"rows": 8, "vectors": 20, "packed_bytes": 1 << 18},
]


@pytest.mark.parametrize("tile", WRONG)
@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[6:7], ids=["linear", "convolution"])
def test_sizes_that_a_kernel_cannot_have_are_no_tile(spec: Linear | Convolution, tile: Mapping[str, int]) -> None:
    assert with_tile(spec, tile) is None
    fits = {"rows": 16, "vectors": 1, "words": 128, "packed_bytes": 1 << 18}
    assert with_tile(spec, {key: fits[key] for key in fits if key != "words" or isinstance(spec, Linear)}) is not None


def test_rows_that_a_task_cannot_hold_are_no_tile() -> None:
    """A task's rows are cut to multiples of four: twenty-five blocks of ten rows are none."""
    spec = Linear(4000, 64, isa=isa.AVX512_VNNI, x="float32", bits=32)
    assert with_tile(spec, {"rows": 10, "vectors": 2, "words": 128, "packed_bytes": 32 << 10}) is None
    assert with_tile(spec, {"rows": 12, "vectors": 2, "words": 128, "packed_bytes": 32 << 10}) is not None


def test_blocks_of_a_convolution_are_what_was_asked_for() -> None:
    tiled = Convolution(64, 64, 14, 14, (3, 3), padding=(1, 1), isa=isa.AMX)
    assert tiled.tiled
    for blocks, plan in ((Blocks(28, 1), (2, 14, 1)), (Blocks(12, 2), (1, 12, 2))):
        cut = replace(tiled, blocks=blocks)
        assert (cut.plan.block, cut.plan.rows, cut.plan.vectors) == plan
        assert cut.tile == (blocks.rows, blocks.vectors)
    cut = replace(tiled, isa=isa.AVX512_VNNI, blocks=Blocks(7, 3, 64 << 10))
    assert cut.tile == (7, 3)
    assert cut.tasks[0] * 7 * cut.pitch * 4 <= 64 << 10


@pytest.mark.parametrize(
    ("name", "instruction_set", "each"),  # every, or every third, as a build of four bits takes longest
    [
        ("linear", isa.AMX, 1),
        ("linear", isa.AVX2, 1),
        ("linear int4", isa.AVX512_VNNI, 3),
        ("convolution", isa.AMX, 1),
        ("grouped", isa.AVX512_VNNI, 1),
    ],
    indirect=["instruction_set"],
)
@pytest.mark.slow
def test_no_tile_changes_a_result(
    net: Callable[[str], Graph], instruction_set: str, name: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each build has one candidate of every layer; every layer's sums are exact, whatever the blocks."""
    monkeypatch.setenv(isa.CHOICE, instruction_set)
    graph, shape = net(name), NETS[name][1]
    lists = {layer: candidates(spec)[::each] for layer, spec in tiling_of(graph).specs.items()}
    for turn in range(max(map(len, lists.values()))):
        chosen = {layer: tiles[turn] for layer, tiles in lists.items() if turn < len(tiles)}
        built = build(graph.module, tiling=Tiling(chosen))
        for batch in (1, 3, 70):
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
            assert torch.equal(built(x)[0], graph(x)[0]), chosen


# ---- names ----------------------------------------------------------------------------------------------------------------


def test_a_layer_is_named_by_what_its_speed_depends_on(net: Callable[[str], Graph], tiny_artifact: Compiled) -> None:
    def names(graph: Graph) -> list[str]:
        return [name for node in graph.nodes if (name := layer_name(node))]

    schemes = "weight int8 channel=0 sym; x uint8 tensor affine"
    assert names(net("linear")) == [f"qc.linear 550x70, any rows; {schemes}"]
    assert names(net("convolution")) == [
        f"qc.conv2d 3x3, 7 to 36 of 11x11, stride 1x1, padding 1x1, dilation 1x1, groups 1; {schemes}",
        f"qc.conv2d 1x1, 36 to 50 of 11x11, stride 1x1, padding 0x0, dilation 1x1, groups 1; {schemes}",
    ]
    assert names(net("grouped")) == [f"qc.conv2d 3x3, 50 to 22 of 11x11, stride 2x2, padding 0x0, dilation 1x1, groups 2; {schemes}"]
    floats = names(tiny_artifact("mlp", "float").graph)
    assert floats == [f"aten.linear {sizes}, any rows; weight float32; x float32" for sizes in ("8x32", "32x4")]


@pytest.mark.parametrize(("rows", "named"), [(1, "1-8"), (8, "1-8"), (9, "9-64"), (512, "65-512"), (513, "513 or more")])
def test_rows_known_beforehand_are_named_by_class(rows: int, named: str) -> None:
    graph = torch.export.export(torch.nn.Linear(4, 4), (torch.zeros(rows, 4),)).graph
    assert [name for node in graph.nodes if (name := layer_name(node))] == [f"aten.linear 4x4, {named} rows; weight float32; x float32"]


# ---- the table decides the code -------------------------------------------------------------------------------------------


def entry(tile: Mapping[str, int], tried: int = 1) -> TunedLayer:
    return TunedLayer(tile=dict(tile), tried=tried, us=1.0, default_us=2.0)


def table(specs: Mapping[str, Any], number: int = 0) -> KernelTiles:
    """Return a table with a candidate of each layer."""
    return KernelTiles({TARGET.machine(): {layer: entry(candidates(spec)[number]) for layer, spec in specs.items()}})


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's table in a cache that knows nothing."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "kernel_tiles.json"


def test_the_same_table_gives_the_same_code(net: Callable[[str], Graph], specs: Mapping[str, Any], own_table: Path) -> None:
    graph = net()
    default = TARGET.native_code(graph)
    assert set(default) == {"library.so"}
    own_table.write_bytes(table(specs).to_json())
    tuned = TARGET.native_code(graph)
    assert tuned == TARGET.native_code(graph)
    assert tuned["library.so"] != default["library.so"]
    assert json.loads(tuned["tiles.json"]) == {layer: candidates(spec)[0] for layer, spec in specs.items()}
    own_table.unlink()
    assert TARGET.native_code(graph) == default
    assert TARGET.with_tiles(table(specs)).native_code(graph) == tuned


def test_entries_that_do_not_fit_change_nothing(net: Callable[[str], Graph], specs: Mapping[str, Any], own_table: Path) -> None:
    graph = net()
    default = TARGET.native_code(graph)
    wrong = {layer: entry({"rows": 10**6, "vectors": 7, "words": 64, "packed_bytes": 1 << 20}) for layer in specs}
    own_table.write_bytes(KernelTiles({TARGET.machine(): wrong}).to_json())
    assert TARGET.native_code(graph)["library.so"] == default["library.so"]
    own_table.write_bytes(KernelTiles({"another machine": table(specs).of(TARGET.machine())}).to_json())
    assert TARGET.native_code(graph) == default


def test_the_cache_of_built_code_knows_tables_apart(net: Callable[[str], Graph], specs: Mapping[str, Any], own_table: Path) -> None:
    graph, x = net(), torch.randn(3, 550)
    for number in (0, 1):
        own_table.write_bytes(table(specs, number).to_json())
        assert torch.equal(TARGET.build(graph)([x])[0], graph(x)[0])
    own_table.unlink()
    TARGET.build(graph)
    places = sorted((own_table.parent / "cpu").iterdir())
    assert len(places) == 3
    TARGET.build(graph)
    assert sorted((own_table.parent / "cpu").iterdir()) == places


def test_the_own_table_goes_before_the_shipped_one(net: Callable[[str], Graph], specs: Mapping[str, Any], own_table: Path) -> None:
    shipped, graph = TARGET.with_tiles(table(specs, 1)), net()
    layer = next(iter(specs))
    assert shipped._tiles(graph) == {name: candidates(spec)[1] for name, spec in sorted(specs.items())}
    own_table.write_bytes(KernelTiles({TARGET.machine(): {layer: entry(candidates(specs[layer])[0])}}).to_json())
    assert shipped._tiles(graph)[layer] == candidates(specs[layer])[0]
    own_table.write_bytes(KernelTiles({TARGET.machine(): {layer: entry({})}}).to_json())
    assert layer not in shipped._tiles(graph)


def test_native_code_runs_with_the_tiles_it_was_built_with(net: Callable[[str], Graph], specs: Mapping[str, Any], own_table: Path) -> None:
    """Its constants are packed for it, not for what a table says later."""
    graph, x = net(), torch.randn(3, 550)
    own_table.write_bytes(table(specs).to_json())
    code = TARGET.native_code(graph)
    for child in (own_table.parent / "cpu").iterdir():
        child.rename(own_table.parent / child.name)  # or the packed constants would be found there
    own_table.write_bytes(table(specs, 1).to_json())
    assert torch.equal(TARGET.load_native(graph, code)([x])[0], graph(x)[0])


# ---- files ----------------------------------------------------------------------------------------------------------------

DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b'{"m": 1}',
    b'{"m": {"layer": {"tile": {"rows": "8"}, "tried": 1, "us": 1.0, "default_us": 1.0}}}',
    b'{"m": {"layer": {"tile": {"rows": -8}, "tried": 1, "us": 1.0, "default_us": 1.0}}}',
    b'{"m": {"layer": {"tile": {"rows": true}, "tried": 1, "us": 1.0, "default_us": 1.0}}}',
    b'{"m": {"layer": {"tile": {}, "tried": 1, "us": NaN, "default_us": 1.0}}}',
    b'{"m": {"layer": {"tile": {}, "tried": 1, "us": 1.0}}}',
    b"[" * 100000,
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:40])
def test_a_damaged_table_is_ignored_with_a_warning(
    content: bytes, own_table: Path, net: Callable[[str], Graph], caplog: pytest.LogCaptureFixture
) -> None:
    own_table.write_bytes(content)
    assert TARGET._tiles(net()) == {}
    (message,) = [record.getMessage() for record in caplog.records if record.name == "qcompile.kernel_tiles"]
    assert message.startswith(f"{own_table} is no table of kernel tiles and is ignored: ")


def test_a_table_that_cannot_be_read_is_ignored_with_a_warning(own_table: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_table.mkdir()
    assert read_tiles(own_table) == KernelTiles()
    assert str(own_table) in caplog.text
    own_table.rmdir()
    caplog.clear()
    assert read_tiles(own_table) == KernelTiles()
    assert not caplog.records


def test_a_table_is_read_as_it_was_written_and_joined_by_layer() -> None:
    old = KernelTiles({"m": {"a": entry({"rows": 1}), "b": entry({})}, "n": {"a": entry({})}})
    new = KernelTiles({"m": {"b": entry({"rows": 2})}, "o": {}})
    assert parse_tiles(old.to_json(), "here") == old
    joined = old.updated(new)
    assert joined.machines == {"m": {"a": entry({"rows": 1}), "b": entry({"rows": 2})}, "n": {"a": entry({})}, "o": {}}


def test_an_artifact_carries_its_table(tiny_artifact: Compiled, tmp_path: Path, own_table: Path) -> None:
    plain = tiny_artifact("mlp", "w8a8", "cpu")
    plain.save(tmp_path / "plain.qc")
    artifact = qcompile.load(tmp_path / "plain.qc")
    assert artifact.tiles == KernelTiles()
    found = tiling_of(artifact.graph).specs
    artifact.tiles = table(found)
    artifact.save(tmp_path / "tuned.qc")
    loaded = qcompile.load(tmp_path / "tuned.qc")
    assert loaded.tiles == artifact.tiles
    loaded.save(tmp_path / "again.qc")
    assert (tmp_path / "again.qc").read_bytes() == (tmp_path / "tuned.qc").read_bytes()
    assert torch.equal(loaded(*loaded.golden_inputs), plain(*plain.golden_inputs))
    assert _cache_place(loaded.graph, TARGET.with_tiles(loaded.tiles)._tiles(loaded.graph)).is_dir()


# ---- the search -----------------------------------------------------------------------------------------------------------


class Bench:
    """Fake builds and fake times: ``speed`` says what share of the default's time a layer takes with a tile."""

    def __init__(self, specs: Mapping[str, Linear | Convolution], monkeypatch: pytest.MonkeyPatch) -> None:
        self.specs, self.tried, self.batches, self.noise = dict(specs), [], ["batch"], [1.0] * 9
        self.speed: Callable[[str, Mapping[str, int], int], float] = lambda layer, tile, turn: 1.0
        self.model: Callable[[Mapping[str, Any]], float] | None = None

        def build(_graph: Any, *, tiling: Tiling) -> None:
            tiling.specs = dict(self.specs)
            self.tried.append(dict(tiling.chosen))

        monkeypatch.setattr(tuning, "build", build)

    def measure(self, default: Build, other: Build, batch: Any) -> list[tuple[dict[str, float], dict[str, float]]]:
        number = self.batches.index(batch)
        shares = {layer: self.speed(layer, other.tiles[layer], number) if layer in other.tiles else 1.0 for layer in self.specs}
        whole = self.model(other.tiles) if self.model else sum(shares.values()) / len(shares)
        before = {**dict.fromkeys(shares, 100.0), MODEL: 1000.0}
        return [(before, {**{layer: 100.0 * s * n for layer, s in shares.items()}, MODEL: 1e3 * whole}) for n in self.noise]

    def search(self, known: Mapping[str, TunedLayer] | None = None, seconds: float = 1e9, clock: Any = lambda: 0.0) -> tuning.Found:
        self.tried.clear()
        return Search(None, self.batches, known or {}, measure=self.measure).run(seconds, clock)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench({"a": SPECS[0], "b": SPECS[2], "c": SPECS[6]}, monkeypatch)


def tiles_of(found: tuning.Found) -> dict[str, dict[str, int]]:
    return {layer: dict(tuned.tile) for layer, tuned in found.layers.items() if tuned.tile}


def test_the_fastest_tile_of_each_layer_is_found(bench: Bench) -> None:
    lists = {layer: candidates(spec) for layer, spec in bench.specs.items()}
    best = {"a": lists["a"][2], "c": lists["c"][0]}
    bench.speed = lambda layer, tile, _: 0.5 if tile == best.get(layer) else 0.9 if (layer, tile) == ("a", lists["a"][1]) else 1.2
    found = bench.search()
    assert tiles_of(found) == best
    assert {layer: tuned.tried for layer, tuned in found.layers.items()} == {layer: len(tiles) for layer, tiles in lists.items()}
    assert (found.layers["a"].us, found.layers["a"].default_us) == (50.0, 100.0)
    assert (found.layers["b"].us, found.layers["b"].default_us) == (100.0, 100.0)
    assert found.default_ms == 1.0
    assert found.tuned_ms == pytest.approx(2 / 3)
    assert bench.tried[0] == {}
    assert bench.tried[1] == {layer: tiles[0] for layer, tiles in lists.items()}
    assert bench.tried[-1] == best


@pytest.mark.parametrize(("share", "taken"), [(0.96, True), (0.975, False), (1.0, False)])
def test_a_tile_must_win_by_three_per_cent(bench: Bench, share: float, taken: bool) -> None:
    bench.speed = lambda layer, tile, _: share
    assert bool(tiles_of(bench.search())) is taken


@pytest.mark.parametrize(("slow_turns", "taken"), [(0, True), (2, True), (4, False)])
def test_two_thirds_of_the_turns_must_show_it(bench: Bench, slow_turns: int, taken: bool) -> None:
    """A few slow turns are other processes' doing; the smallest time would not even see many."""
    bench.speed = lambda layer, tile, _: 0.5
    bench.noise = [10.0] * slow_turns + [1.0] * (9 - slow_turns)
    assert bool(tiles_of(bench.search())) is taken


def test_a_tile_must_not_lose_at_any_batch(bench: Bench) -> None:
    bench.batches = ["one", "another"]
    bench.speed = lambda layer, tile, batch: {"a": (0.5, 1.1), "b": (0.5, 1.02), "c": (0.9, 0.9)}[layer][batch]
    assert set(tiles_of(bench.search())) == {"b", "c"}


def test_a_tile_must_win_twice(bench: Bench) -> None:
    first = candidates(bench.specs["a"])[0]
    lucky = iter([0.5])
    bench.speed = lambda layer, tile, _: next(lucky, 1.0) if tile == first else 0.9 if layer == "c" else 1.0
    assert set(tiles_of(bench.search())) == {"c"}


def test_tiles_that_do_not_make_the_model_faster_are_not_kept(bench: Bench) -> None:
    bench.speed = lambda layer, tile, _: 0.9
    bench.model = lambda tiles: 1.001 if tiles else 1.0
    found = bench.search()
    assert tiles_of(found) == {}
    assert found.tuned_ms == found.default_ms


def test_a_search_stops_when_its_time_is_over_and_another_goes_on(bench: Bench) -> None:
    bench.speed = lambda layer, tile, _: 0.9 if tile == candidates(bench.specs[layer])[1] else 1.0
    clock = iter(range(100))
    first = bench.search(seconds=3, clock=lambda: next(clock))
    assert {tuned.tried for tuned in first.layers.values()} == {2}
    assert set(tiles_of(first)) == set(bench.specs)
    second = bench.search(first.layers)
    lists = {layer: candidates(spec) for layer, spec in bench.specs.items()}
    assert bench.tried[1] == {layer: tiles[2] for layer, tiles in lists.items() if len(tiles) > 2}
    assert tiles_of(second) == tiles_of(first)
    third = bench.search(second.layers)
    assert third.layers == second.layers
    assert bench.tried == [{}, tiles_of(first)]


def test_no_time_tries_nothing(bench: Bench) -> None:
    found = bench.search(seconds=0)
    assert tiles_of(found) == {}
    assert bench.tried == [{}]
    assert {tuned.tried for tuned in found.layers.values()} == {0}


def test_what_is_settled_is_not_judged_again(bench: Bench) -> None:
    """A new search of the same candidates on a busy machine must not lose what a quiet one found."""
    lists = {layer: candidates(spec) for layer, spec in bench.specs.items()}
    known = {"a": entry(lists["a"][0], len(lists["a"]))}
    bench.speed = lambda layer, tile, _: 1.5
    assert tiles_of(bench.search(known)) == {"a": lists["a"][0]}


def test_measured_turns_hold_every_layer(net: Callable[[str], Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    search = Search(net().module, [], {})
    batch = [torch.randn(2, 550)]
    turns = tuning.measure(search.default, search.default, batch)
    assert len(turns) == tuning._PLACES * tuning._LEAST_TURNS
    assert all(set(times) == {*search.candidates, MODEL} for turn in turns for times in turn)


# ---- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one candidate for each layer, and it takes 0.8 of the default's time."""

    def times(built: Build, _batch: Sequence[torch.Tensor]) -> dict[str, float]:
        return {**{layer: 8.0 if layer in built.tiles else 10.0 for layer in built.specs}, MODEL: 16.0 if built.tiles else 20.0}

    monkeypatch.setattr(tuning, "candidates", lambda spec: candidates(spec)[:1])
    monkeypatch.setattr(tuning, "_times", times)
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)


@pytest.fixture
def saved(tiny_artifact: Compiled, tmp_path: Path) -> Path:
    tiny_artifact("mlp", "w8a8", "cpu").save(tmp_path / "model.qc")
    return tmp_path / "model.qc"


@pytest.mark.usefixtures("fake_times")
def test_tune_keeps_its_results_and_writes_them_into_an_artifact(cli: Any, saved: Path, own_table: Path, tmp_path: Path) -> None:
    done = cli("tune", saved, "--shape", "batch=3", "--shape", "batch=20", "-o", tmp_path / "tuned.qc")
    assert done.code == 0, done.err
    assert (
        done.out.splitlines()[-3]
        == "2 of 2 kinds of layers are faster; a call takes 0.032 ms, with default tiles 0.040 ms (1.250 times as fast)"
    )
    assert done.out.splitlines()[-2:] == [f"table: {own_table} ({TARGET.machine()})", f"artifact: {tmp_path / 'tuned.qc'}"]
    assert "measuring the 2 best tiles once more" in done.err
    first = read_tiles(own_table)
    tuned = qcompile.load(tmp_path / "tuned.qc")
    assert tuned.tiles == first
    assert cli("verify", tmp_path / "tuned.qc").code == 0
    content = cli("tune", saved, "--json").json
    assert {layer["name"]: layer["tile"] for layer in content["layers"]} == {n: e.tile for n, e in first.of(TARGET.machine()).items()}
    assert (content["machine"], content["table"], content["artifact"]) == (TARGET.machine(), str(own_table), None)
    assert read_tiles(own_table) == first


@pytest.mark.usefixtures("fake_times")
def test_tune_keeps_what_the_table_says_of_others_and_replaces_a_damaged_one(cli: Any, saved: Path, own_table: Path) -> None:
    others = KernelTiles({"another machine": {"layer": entry({"rows": 3})}, TARGET.machine(): {"layer": entry({"rows": 4})}})
    own_table.write_bytes(others.to_json())
    assert cli("tune", saved, "--seconds", 0).code == 0
    found = read_tiles(own_table)
    assert found.updated(others) == found
    assert len(found.of(TARGET.machine())) == 3
    own_table.write_bytes(b"damaged")
    assert cli("tune", saved, "--seconds", 0).code == 0
    assert len(read_tiles(own_table).of(TARGET.machine())) == 2


@pytest.mark.usefixtures("fake_times")
def test_tune_builds_native_code_anew(cli: Any, saved: Path, own_table: Path, tmp_path: Path) -> None:
    artifact = qcompile.load(saved)
    artifact.native = qcompile.native_code.build_native_code(TARGET, artifact.graph)
    artifact.save(saved)
    assert cli("tune", saved, "-o", saved).code == 0
    tuned = qcompile.load(saved)
    own_table.unlink()
    assert set(tuned.native.files) == {"library.so", "tiles.json"}
    assert tuned.native.files["library.so"] != artifact.native.files["library.so"]
    assert torch.equal(tuned(*tuned.golden_inputs), artifact(*artifact.golden_inputs))


REFUSED = [
    ("tune MODEL --shape bach=2", "'bach=2' is no size of a symbol"),
    ("tune MODEL -o absent/model.qc", "there is no such folder"),
    ("tune MODEL --seconds -1", "Invalid value for '--seconds'"),
    ("tune absent.qc", "there is no such file"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_tune_refuses(cli: Any, saved: Path, own_table: Path, line: str, message: str) -> None:
    done = cli(*line.replace("MODEL", str(saved)).split())
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not own_table.exists()


def test_tune_refuses_a_target_without_kernels(cli: Any, tiny_artifact: Compiled, tmp_path: Path) -> None:
    tiny_artifact("mlp").save(tmp_path / "model.qc")
    done = cli("tune", tmp_path / "model.qc")
    assert done.code == 2
    assert done.err == f"qcompile: {tmp_path / 'model.qc'}: target reference has no kernels to tune\n"


def test_an_interrupted_search_says_that_nothing_is_kept(cli: Any, saved: Path, own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompile.backends.cpu.target.CpuTarget.tune", interrupted)
    done = cli("tune", saved)
    assert done.code == 3
    assert done.err.strip() == "qcompile: interrupted; no tile of this search is kept; --seconds ends a search in time"
    assert not own_table.exists()

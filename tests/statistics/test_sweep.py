"""The sweep: the same results however the graph is cut, memory of the border only, and a cache that survives damage."""

import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qcompile.calibration import from_iterable
from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import parse_graph
from qcompile.graph.graph import Graph, tensor_digest
from qcompile.statistics import Gram, Histogram, MinMax, collect, collect_sequentially, sweep
from qcompile.statistics.regions import assign_regions, product_count, split_regions

CONSTANTS = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
A, B, C = (tensor_digest(constant)[:16] for constant in CONSTANTS)
TEXT = f"""graph @main float(%x: f32[batch,tokens,8]) where batch in 1..64, tokens in 1..64 {{
  %a = const f32[8,8] @{A}
  %b = const f32[8,8] @{B}
  %c = const f32[8,8] @{C}
  %linear = aten.linear(%x, %a) : f32[batch,tokens,8]
  %relu = aten.relu(%linear) : f32[batch,tokens,8]
  %linear_1 = aten.linear(%relu, %b) : f32[batch,tokens,8]
  %add = aten.add.Tensor(%linear_1, %x) : f32[batch,tokens,8]
  %linear_2 = aten.linear(%add, %c) : f32[batch,tokens,8]
  return %linear_2 as "y"
}}
"""


@pytest.fixture
def graph() -> Graph:
    return parse_graph(TEXT, {tensor_digest(constant)[:16]: constant for constant in CONSTANTS})


def batches(sizes: tuple[tuple[int, int], ...] = ((2, 3), (1, 7), (4, 2))) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(b, t, 8, generator=generator),) for b, t in sizes]


REQUESTS = [MinMax("x"), Histogram("relu"), Gram("relu"), Gram("add"), MinMax("linear_2")]


@pytest.mark.parametrize(
    "regions", [None, [["linear"], ["relu", "linear_1", "add"], ["linear_2"]], [["linear", "linear_1"], ["linear_2"]], [["linear_2"]]]
)
def test_regions_change_nothing_and_batches_of_any_size_work(graph: Graph, regions: list[list[str]] | None) -> None:
    found = collect(graph, REQUESTS, batches(), regions=regions)
    add = torch.cat([(torch.relu(x @ CONSTANTS[0].T) @ CONSTANTS[1].T + x).reshape(-1, 8) for (x,) in batches()]).double()
    torch.testing.assert_close(found[Gram("add")]["gram"], add.T @ add / len(add), rtol=1e-5, atol=1e-6)
    assert int(found[Gram("add")]["rows"]) == len(add) == 21
    assert found[MinMax("x")]["max"] == max(x.max() for (x,) in batches())
    assert list(found) == REQUESTS


class Watched:
    """A source that knows which of its batches are still alive."""

    digest = "watched"

    def __init__(self) -> None:
        self.alive: list[int] = []

    def batches(self, graph: Graph) -> Iterator[tuple[torch.Tensor, ...]]:
        given: list[weakref.ref[torch.Tensor]] = []
        for seed in range(6):
            x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(seed))
            self.alive.append(sum(ref() is not None for ref in given))
            given.append(weakref.ref(x))
            yield (x,)
            del x


def test_batches_are_dropped_unless_a_later_region_reads_them(graph: Graph) -> None:
    whole, cut, late = Watched(), Watched(), Watched()
    collect(graph, [Gram("relu")], whole)
    assert max(whole.alive) <= 1
    collect(graph, [Gram("relu")], cut, regions=[["linear"], ["relu"]])
    assert max(cut.alive) <= 1  # the border is %linear alone
    collect(graph, [Gram("add")], late, regions=[["linear"], ["linear_1", "add"]])
    assert max(late.alive) == 5  # %add reads x: it is on the border


def test_split_regions_cuts_where_little_is_alive(graph: Graph) -> None:
    regions = split_regions(graph, 1, product_count)
    assert [[node.name for node in region if product_count(graph, node)] for region in regions] == [["linear"], ["linear_1"], ["linear_2"]]
    assert [len(split_regions(graph, limit)) for limit in (8 * 8 * 4, 2**28)] == [3, 1]
    # %add is the only value alive between the last two; cutting before it would keep %linear_1 and %x.
    assert [node.name for node in regions[2]] == ["linear_2"]


def test_a_node_of_a_region_moves_behind_what_it_reads(graph: Graph) -> None:
    _, second = assign_regions(graph, [["linear_1"], ["linear"]])
    assert "linear_1" in [node.name for node in second]
    with pytest.raises(Refused, match="two regions"):
        assign_regions(graph, [["linear"], ["linear"]])
    with pytest.raises(Refused, match="not in the graph"):
        assign_regions(graph, [["nothing"]])


def test_cache_is_used_private_and_repaired(graph: Graph, tmp_path: Path) -> None:
    data, calls = from_iterable(batches()), []

    def count(done: int, total: int) -> None:
        calls.append((done, total))

    fresh = collect(graph, REQUESTS, data, cache=tmp_path, progress=count)
    assert len(calls) == 3
    again = collect(graph, REQUESTS, from_iterable(batches()), cache=tmp_path, progress=count)
    assert len(calls) == 3
    assert all(torch.equal(fresh[r][key], again[r][key]) for r in REQUESTS for key in fresh[r])
    files = sorted((tmp_path / "statistics").iterdir())
    assert len(files) == len(REQUESTS)
    assert stat.S_IMODE((tmp_path / "statistics").stat().st_mode) == 0o700
    damaged = files[0].read_bytes()
    for bad in (damaged[:-3], damaged[:-1] + bytes([damaged[-1] ^ 1]), b"", files[1].read_bytes()):
        calls.clear()
        files[0].write_bytes(bad)
        repaired = collect(graph, REQUESTS, data, cache=tmp_path, progress=count)
        assert len(calls) == 3
        assert all(torch.equal(fresh[r][key], repaired[r][key]) for r in REQUESTS for key in fresh[r])
        assert files[0].read_bytes() == damaged


def test_cache_tells_graphs_and_data_apart(graph: Graph, tmp_path: Path) -> None:
    request = MinMax("linear_2")
    first = collect(graph, [request], batches(), cache=tmp_path)[request]
    other_data = collect(graph, [request], [(x * 2,) for (x,) in batches()], cache=tmp_path)[request]
    graph.set_constant(graph.node("c"), CONSTANTS[2] * 3)
    other_graph = collect(graph, [request], batches(), cache=tmp_path)[request]
    assert len({float(r["max"]) for r in (first, other_data, other_graph)}) == 3


def test_sequential_visits_see_what_earlier_regions_became(graph: Graph) -> None:
    seen = []

    def visit(nodes, statistics) -> bool:  # type: ignore[no-untyped-def]
        seen.append({request.node: result for request, result in statistics.items()})
        if "x" in seen[-1]:
            graph.set_constant(graph.node("a"), CONSTANTS[0] * 0)
            return True
        return False

    collect_sequentially(
        graph, [MinMax("x"), MinMax("relu"), MinMax("add")], batches(), visit, regions=split_regions(graph, 1, product_count)
    )
    found = {name: result for part in seen for name, result in part.items()}
    assert found["add"] == {"min": min(x.min() for (x,) in batches()), "max": max(x.max() for (x,) in batches())}


def test_refusals_name_the_node(graph: Graph) -> None:
    with pytest.raises(Refused, match=r"^gone: there is no such node"):
        collect(graph, [MinMax("gone")], batches())
    with pytest.raises(Refused, match="no calibration data"):
        collect(graph, [MinMax("x")], [])
    graph.set_constant(graph.node("a"), torch.full((8, 8), 1e38))
    with pytest.raises(Refused, match=r"^linear .*not finite"):
        collect(graph, [MinMax("linear")], [(torch.ones(1, 1, 8) * 9,)])


def test_quantizers_and_constants_are_computed_once_for_a_region(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.graph.quantizer import Quantizer
    from qcompile.graph.stage import Stage

    node = graph.node("linear_1")
    quantizer = graph.call_quantizer(Quantizer(parse_scheme("int8 channel=0 sym")), graph.node("b"), before=node, name="b_quantizer")
    node.replace_input_with(graph.node("b"), quantizer)
    graph.stage = Stage.SIMULATED
    graph.clean()
    calls = []
    forward = Quantizer.forward
    monkeypatch.setattr(Quantizer, "forward", lambda self, x: calls.append(1) or forward(self, x))
    collect(graph, [MinMax("linear_2"), MinMax("b_quantizer")], batches())
    assert len(calls) == 1


def test_values_are_dropped_after_their_last_use(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = {}
    run_node = sweep._run_node

    def watch(interpreter, node):  # type: ignore[no-untyped-def]
        alive[node.name] = {other.name for other in interpreter.env if other.op != "get_attr"}
        return run_node(interpreter, node)

    monkeypatch.setattr(sweep, "_run_node", watch)
    collect(graph, [MinMax("linear_2")], batches())
    assert alive == {"linear": {"x"}, "relu": {"x", "linear"}, "linear_1": {"x", "relu"}, "add": {"x", "linear_1"}, "linear_2": {"add"}}

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qcompile.capture.torch_export import capture_module
from qcompile.graph import Graph
from qcompile.graph.regions import (
    attention_regions,
    divide_channels,
    orthogonal_matrix,
    repeated_blocks,
    residual_streams,
    scale_edges,
    sweep_regions,
)
from qcompile.graph.regions.layout import axis_channels, channel_layout, expand_layout, view_layout
from qcompile.graph.rewrite import RewriteLog
from qcompile.pipeline import sqnr_db


class Attention(nn.Module):
    """Grouped-query attention: the value path of transformers' Llama, or the fused operator."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d, self.fused = heads, kv_heads, width // heads, fused
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, kv_heads * self.d), nn.Linear(width, kv_heads * self.d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            return self.o(torch.ops.qc.attention(q, k, v, None, self.heads, self.kv_heads, self.d**-0.5, True))
        q = q.view(*x.shape[:2], -1, self.d).transpose(1, 2)
        k, v = (t.view(*x.shape[:2], -1, self.d).transpose(1, 2) for t in (k, v))
        k, v = (
            t[:, :, None].expand(-1, -1, self.heads // self.kv_heads, -1, -1).reshape(x.shape[0], self.heads, -1, self.d) for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class Layer(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, fused: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = norm(16), norm(16), Attention(fused=fused)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A small pre-norm decoder with a head."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, fused: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(32, 16), nn.Parameter(torch.randn(8, 16))
        self.layers = nn.ModuleList(Layer(norm, fused) for _ in range(layers))
        self.norm, self.head = norm(16), nn.Linear(16, 32)
        for module in self.modules():  # gains of one and biases of zero would hide mistakes
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, 1.0, 0.3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.places[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@cache
def captured(norm: type[nn.Module], fused: bool, layers: int) -> Graph:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    return capture_module(Decoder(norm, fused, layers), (tokens,), [{0: "batch", 1: "tokens"}])


def decoder(norm: type[nn.Module] = nn.RMSNorm, fused: bool = False, layers: int = 2) -> Graph:
    return captured(norm, fused, layers).copy()


def convolutions(*between: nn.Module, groups: int = 1, head: nn.Module | None = None) -> Graph:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *between, head or nn.Conv2d(8, 8, 3, groups=groups))
    return capture_module(net, (torch.randn(2, 3, 12, 12),), [{0: "batch"}])


def kinds(graph: Graph) -> list[tuple[str, int, int]]:
    return [(edge.kind, edge.block, len(edge.consumers)) for edge in scale_edges(graph)]


@pytest.mark.parametrize("fused", [False, True])
def test_scale_edges_of_a_decoder(fused) -> None:
    layer = [("norm", 0, 3), ("value", 4, 1), ("norm", 0, 2), ("gate", 1, 1)]
    graph = decoder(fused=fused)
    assert kinds(graph) == [*layer, *layer, ("norm", 0, 1)]
    value = next(edge for edge in scale_edges(graph) if edge.kind == "value")
    # Two query heads read each value head.
    assert value.consumers[0].columns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


@pytest.mark.parametrize("fused", [False, True])
def test_dividing_any_edge_of_a_decoder_changes_no_output(fused) -> None:
    graph, tokens = decoder(fused=fused, layers=1), torch.randint(0, 32, (2, 5))
    before, edges = graph(tokens)[0], scale_edges(graph)
    assert len(edges) == 5  # two norms, values and down projection of the layer, the last norm
    for edge in edges:
        divide_channels(graph, edge, torch.rand(edge.channels, dtype=torch.float64) * 4 + 0.25)
        assert sqnr_db(before, graph(tokens)[0]) > 110, edge.kind


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    "between",
    [(), (nn.ReLU(),), (nn.ReLU6(),), (nn.ReLU(), nn.MaxPool2d(2)), (nn.AvgPool2d(2), nn.ReLU6()), (nn.Hardtanh(0, 0.25), nn.Dropout())],
)
def test_dividing_between_convolutions_changes_no_output(between, groups) -> None:
    graph, x = convolutions(*between, groups=groups), torch.randn(2, 3, 12, 12) * 8
    before = graph(x)[0]
    (edge,) = scale_edges(graph)
    divide_channels(graph, edge, torch.rand(8, dtype=torch.float64) * 4 + 0.25)
    graph.clean()
    assert sqnr_db(before, graph(x)[0]) > 110
    (again,) = scale_edges(graph)  # a ReLU6 that is scaled already is scaled again
    divide_channels(graph, again, torch.rand(8, dtype=torch.float64) * 4 + 0.25)
    graph.clean()
    assert sqnr_db(before, graph(x)[0]) > 110


def test_flattened_pictures_are_read_by_a_linear() -> None:
    graph = convolutions(nn.ReLU(), nn.Flatten(), head=nn.Linear(800, 4))
    (edge,) = scale_edges(graph)
    assert torch.equal(edge.consumers[0].columns, torch.arange(8).repeat_interleave(100))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ((nn.GELU(),), "%gelu (aten.gelu) reads it"),
        ((nn.Hardtanh(-1, 1),), "%hardtanh (aten.hardtanh) reads it"),
        ((nn.Softmax(1),), "%softmax (aten.softmax.int) reads it"),
    ],
)
def test_no_scale_moves_through_what_is_not_homogeneous(between, reason) -> None:
    log = RewriteLog()
    assert scale_edges(convolutions(*between), log) == []
    assert log.why_not("conv2d") == [f"scale-edge: {reason}"]


def test_no_scale_moves_where_a_sum_or_the_output_reads_the_value() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + y, self.c(x)

    log = RewriteLog()
    assert scale_edges(capture_module(Net(), (torch.randn(2, 4),)), log) == []
    assert log.why_not("linear") == ["scale-edge: %add (aten.add.Tensor) reads it"]
    assert log.why_not("linear_2") == ["scale-edge: it is an output of the model"]


def test_shared_weights_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    log = RewriteLog()
    assert scale_edges(capture_module(Net(), (torch.randn(2, 4),)), log) == []
    assert log.why_not("linear") == ["scale-edge: %a.weight is used elsewhere too"]


@given(st.permutations([2, 3, 4]), st.sampled_from([2, 3, 4, 6, 8, 12]))
def test_layouts_follow_what_torch_does(order, split) -> None:
    """Carry a layout and the tensor of channel numbers through the same views; they must agree."""
    size = 24
    numbers = torch.arange(size).expand(1, 5, size)
    layout = channel_layout((1, 5, size), -1)
    if size % split:
        return
    shape = (1, 5, split, size // split)
    numbers, viewed = numbers.reshape(shape), view_layout(layout, shape)
    assert viewed is not None
    numbers, viewed = (
        numbers[:, :, :, None].expand(1, 5, split, 2, -1),
        expand_layout((*viewed[:3], ((1, 0),), viewed[3]), (1, 5, split, 2, size // split)),
    )
    axes = [0, 1, *order]
    numbers, viewed = numbers.permute(axes), tuple(viewed[d] for d in axes)
    merged = view_layout(viewed, (1, 5, 2 * size))
    assert merged is not None
    assert torch.equal(axis_channels(merged[2]), numbers.reshape(1, 5, -1)[0, 0])


def test_layout_refuses_an_uneven_cut() -> None:
    assert view_layout(channel_layout((5, 6), -1), (5, 4, 2)) is None
    assert view_layout(channel_layout((2, 6), -1), (3, 4)) is None


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_residual_stream_of_a_pre_norm_decoder(norm) -> None:
    (stream,) = residual_streams(decoder(norm))
    assert stream.refused == ""
    assert [node.op if node.op == "get_attr" else node.name for node in stream.writers] == [
        "get_attr", "embedding", "linear_3", "linear_6", "linear_10", "linear_13",
    ]  # fmt: skip
    assert [len(read.readers) for read in stream.norms] == [3, 2, 3, 2, 1]


def test_residual_stream_of_a_post_norm_layer_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n1, self.n2 = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x):
            x = self.n1(x + self.a(x))
            return self.n2(x + self.b(x))

    streams = residual_streams(capture_module(Net(), (torch.randn(2, 8),)))
    assert "the normalization %layer_norm stands on the stream itself (post-norm)" in {stream.refused for stream in streams}
    assert all(stream.refused for stream in streams)


def test_residual_stream_that_is_an_output_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Linear(8, 8), nn.Linear(8, 8), nn.RMSNorm(8)

        def forward(self, x):
            x = self.a(x)
            return x + self.b(self.n(x))

    (stream,) = residual_streams(capture_module(Net(), (torch.randn(2, 8),)))
    assert stream.refused == "it is an output of the model"


@pytest.mark.parametrize("fused", [False, True])
def test_attention_regions(fused) -> None:
    regions = attention_regions(decoder(fused=fused))
    names = [tuple(node.name for node in (r.query, r.key, r.value, r.output)) for r in regions]
    assert names == [("linear", "linear_1", "linear_2", "linear_3"), ("linear_7", "linear_8", "linear_9", "linear_10")]
    assert {(r.heads, r.kv_heads) for r in regions} == {(4, 2)}


@pytest.mark.parametrize("scopes", [True, False])
def test_repeated_blocks(scopes) -> None:
    graph = decoder(layers=3)
    if not scopes:
        for node in graph.nodes:
            node.meta["scope"] = ""
    blocks = repeated_blocks(graph)
    assert len(blocks) == 3
    assert len({len(block.nodes) for block in blocks}) == 1
    assert [block.name for block in blocks] == ([f"layers.{i}" for i in range(3)] if scopes else [f"block{i}" for i in range(3)])
    assert [len(block.outputs) for block in blocks] == [1] * 3
    assert all(block.outputs[0] in after.inputs for block, after in pairwise(blocks))


def test_sweep_regions_hold_every_operator_once() -> None:
    graph = decoder(layers=3)
    regions = sweep_regions(graph)
    assert [node for region in regions for node in region] == [node for node in graph.nodes if node.op == "call_function"]
    assert len(regions) == 5


@pytest.mark.parametrize("size", [8, 12, 43])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_orthogonal_matrices(size, kind) -> None:
    matrix = orthogonal_matrix(size, kind, 3)
    assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < 1e-12
    assert torch.equal(matrix, orthogonal_matrix(size, kind, 3))
    assert not torch.equal(matrix, orthogonal_matrix(size, kind, 4))

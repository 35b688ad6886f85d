from __future__ import annotations

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.rotate import Rotate
from torch import nn
from torch.nn import functional as F

from qcompile.capture.torch_export import capture_module
from qcompile.graph import Graph
from qcompile.pipeline import Context, Pipeline

GOLDEN = """graph @main float(%x: f32[n,4]) where n in 1..64 {
  %a = const @a
  %g = const @g
  %b = const @b
  %c = const @c
  %s = aten.linear(%x, %a) : f32[n,4]
  %norm = aten.rms_norm(%s) {normalized_shape=[4], weight=%g, eps=1e-05} : f32[n,4]
  %up = aten.linear(%norm, %b) : f32[n,8]
  %act = aten.gelu(%up) : f32[n,8]
  %down = aten.linear(%act, %c) : f32[n,4]
  %t = aten.add.Tensor(%s, %down) : f32[n,4]
  %last = aten.rms_norm(%t) {normalized_shape=[4], weight=%g, eps=1e-05} : f32[n,4]
  %y = aten.linear(%last, %a) : f32[n,4]
  return %y as "y"
}
"""


class Block(nn.Module):
    """A pre-norm block; heads of 4, an MLP of 24."""

    def __init__(self, norm: type[nn.Module], gated: bool) -> None:
        super().__init__()
        self.n1, self.n2 = norm(12), norm(12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(12, 24), nn.Linear(12, 24) if gated else None, nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.n1(x)
        q, k, v = (p(y).view(*x.shape[:2], 3, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y) if self.gate else F.gelu(self.up(y)))


class Encoder(nn.Module):
    def __init__(self, norm: type[nn.Module], gated: bool, layers: int = 2) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(20, 12), nn.Embedding(8, 12)
        self.blocks = nn.Sequential(*(Block(norm, gated) for _ in range(layers)))
        self.norm, self.head = norm(12), nn.Linear(12, 3)
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, 1.0, 0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)).mean(1))


def encoder(norm: type[nn.Module], gated: bool, dtype: torch.dtype = torch.float64) -> Graph:
    return capture_module(Encoder(norm, gated).to(dtype), (torch.zeros(2, 5, dtype=torch.int64),), [{0: "batch", 1: "tokens"}])


def relative_error(ran, *inputs: torch.Tensor) -> float:
    before, after = ran.before(*inputs)[0], ran.after(*inputs)[0]
    return float((after - before).norm() / before.norm())


def test_golden(build, run_pass, golden) -> None:
    values = {"a": torch.eye(4), "g": torch.arange(1.0, 5.0), "b": torch.ones(8, 4), "c": torch.ones(4, 8)}
    ran = run_pass(build(GOLDEN, **values), Rotate())
    golden("passes/rotate", ran.golden_text)
    assert ran.sqnr(torch.randn(3, 4)) > 110


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_outputs_stay_in_double_precision(run_pass, norm, gated, kind) -> None:
    ran = run_pass(encoder(norm, gated), Rotate(kind=kind, seed=1))
    assert ran.changes == 1 + 2 + 2  # the stream, two value projections, two down projections
    assert relative_error(ran, torch.randint(0, 20, (3, 6))) < 1e-12
    assert ran.operators.count("qc.hadamard") == 2
    assert "aten.layer_norm" not in ran.operators


def test_outputs_stay_in_single_precision(run_pass) -> None:
    assert relative_error(run_pass(encoder(nn.LayerNorm, True, torch.float32), Rotate()), torch.randint(0, 20, (3, 6))) < 1e-5


def test_outliers_of_the_stream_spread(run_pass) -> None:
    graph = encoder(nn.RMSNorm, True)
    for node in graph.nodes:
        if "table" in str(node.target) and node.op == "get_attr":
            value = graph.constant(node).clone()
            value[:, 5] = 100
            graph.set_constant(node, value)
    ran = run_pass(graph, Rotate(mlp=False))
    assert "qc.hadamard" not in ran.operators

    def peak(run: Graph) -> float:
        table = next(value for name, value in run.constants.items() if "table" in name)
        return float(table.abs().max() / table.square().mean().sqrt())

    assert peak(ran.after) < peak(ran.before) / 1.5


def test_the_seed_decides(run_pass) -> None:
    graph = encoder(nn.RMSNorm, True)
    assert run_pass(graph, Rotate(seed=1)).text == run_pass(graph, Rotate(seed=1)).text
    assert run_pass(graph, Rotate(seed=1)).text != run_pass(graph, Rotate(seed=2)).text


def test_a_post_norm_stream_is_not_rotated(run_pass) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n1, self.n2 = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x):
            x = self.n1(x + self.a(x))
            return self.n2(x + self.b(F.gelu(self.a(x))))

    ran = run_pass(capture_module(Net(), (torch.randn(2, 8),)), Rotate())
    assert ran.changes == 1  # the online rotation after the GELU
    assert "rotate: the normalization %layer_norm stands on the stream itself (post-norm)" in [
        reason for reasons in ran.context.log.reasons.values() for reason in reasons
    ]
    assert ran.sqnr(torch.randn(2, 8)) > 110


def test_keys_and_queries_are_rotated_alike(run_pass, build) -> None:
    text = (
        """graph @main float(%q: f32[b,s,24], %k: f32[b,s,12], %v: f32[b,s,12]) where b in 1..4, s in 1..32 {
      %a = qc.attention(%q, %k, %v) {heads=2, kv_heads=1, scale=0.3, causal=true} : f32[b,s,24]
      return %a as "y"
    }
    """.replace("      %", "  %")
        .replace("      return", "  return")
        .replace("    }", "}")
    )
    ran = run_pass(build(text), Rotate(keys=True))
    assert ran.operators == ["qc.hadamard", "qc.hadamard", "qc.attention"]
    assert "block=12" in ran.text
    assert ran.context.log.why_not("a") == ["rotate: no one linear gives the values"]
    assert ran.sqnr(*(torch.randn(2, 7, n) for n in (24, 12, 12))) > 110


def test_values_of_a_fused_projection_stay_and_say_why(run_pass) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).split(8, -1))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    ran = run_pass(capture_module(Fused(), (torch.randn(2, 5, 8),), [{0: "batch", 1: "seq"}]), Rotate())
    assert ran.changes == 0
    assert ran.context.log.why_not("linear")[0].startswith("rotate: %split")


@pytest.mark.parametrize(("option", "left"), [("stream", 4), ("heads", 3), ("mlp", 3)])
def test_each_part_can_be_left_out(run_pass, option, left) -> None:
    ran = run_pass(encoder(nn.RMSNorm, True), Rotate(**{option: False}))
    assert ran.changes == left
    assert relative_error(ran, torch.randint(0, 20, (3, 6))) < 1e-12


def test_an_odd_size_gets_no_online_rotation(run_pass) -> None:
    net = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4))
    ran = run_pass(capture_module(net, (torch.randn(2, 4),)), Rotate())
    assert ran.changes == 0
    assert ran.context.log.why_not("linear_1") == ["rotate: no Hadamard matrix above size 2 divides its 7 inputs"]


def test_the_wikilm_decoder_keeps_its_logits(data_folder) -> None:
    folder = data_folder / "wikilm-5m"
    if not folder.is_dir():
        pytest.skip("wikilm-5m is absent")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens, use_cache=False).logits

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 4096, (2, 16))
    graph = capture_module(Logits(model), (tokens,), [{0: "batch", 1: "tokens"}])
    before = graph(tokens)[0]
    (step,) = Pipeline((Rotate(),)).run(graph, Context(target=ReferenceTarget()))
    assert step.changes == 1 + 6 + 6
    assert float((graph(tokens)[0] - before).norm() / before.norm()) < 1e-5

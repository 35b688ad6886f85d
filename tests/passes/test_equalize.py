from __future__ import annotations

import pytest
import torch
from qcompile.passes.absorb_bias import AbsorbBias
from qcompile.passes.equalize import Equalize
from qcompile.passes.replace_relu6 import ReplaceRelu6
from torch import nn

from qcompile.capture.torch_export import capture_module
from qcompile.graph import Graph

TEXT = """graph @main float(%x: f32[n,2,4,4]) where n in 1..64 {
  %a.weight = const @a
  %a.bias = const @b
  %b.weight = const @w
  %c = aten.conv2d(%x, %a.weight, %a.bias) : f32[n,2,4,4] !{bn_mean=@mean, bn_std=@std}
  %r = aten.relu(%c) : f32[n,2,4,4]
  %y = aten.conv2d(%r, %b.weight) : f32[n,1,4,4]
  return %y as "y"
}
"""


def small(build, text: str = TEXT) -> Graph:
    """A 1x1 convolution with rows of range 4 and 1, read by columns of range 1 and 4: the factors are 2 and 1/2."""
    a = torch.tensor([[4.0, 1.0], [-1.0, 0.5]]).view(2, 2, 1, 1)
    w = torch.tensor([[1.0, -4.0]]).view(1, 2, 1, 1)
    graph = build(text.replace(" !{bn_mean=@mean, bn_std=@std}", ""), a=a, b=torch.tensor([8.0, 3.0]), w=w)
    graph.node("c").meta["notes"] |= {"bn_mean": torch.tensor([8.0, 2.0]), "bn_std": torch.tensor([1.0, 1.0])}
    return graph


def inverted_residual(activation: type[nn.Module] = nn.ReLU) -> Graph:
    """Expand, depthwise, project, expand again: channel ranges spread over four orders of magnitude."""
    convs = [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)]
    for conv in convs:
        conv.weight.data *= (10 ** (torch.rand(conv.weight.shape[0]) * 4 - 2)).view(-1, 1, 1, 1)
    net = nn.Sequential(convs[0], activation(), convs[1], activation(), convs[2], convs[3])
    return capture_module(net, (torch.randn(2, 4, 6, 6),), [{0: "batch"}])


def test_golden(build, run_pass, golden) -> None:
    golden("passes/equalize", run_pass(small(build), Equalize()).golden_text)


def test_ranges_meet_in_the_middle_and_notes_follow(build, run_pass) -> None:
    after = run_pass(small(build), Equalize()).after
    assert after.constants["a.weight"].flatten(1).abs().amax(1).tolist() == pytest.approx([2, 2], rel=1e-3)
    assert after.constants["b.weight"].abs().flatten().tolist() == pytest.approx([2, 2], rel=1e-3)
    assert after.node("c").meta["notes"]["bn_mean"].tolist() == pytest.approx([4, 4], rel=1e-3)
    assert after.node("c").meta["notes"]["bn_std"].tolist() == pytest.approx([0.5, 2], rel=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity])
def test_chains_keep_their_outputs_and_become_even(run_pass, activation) -> None:
    ran = run_pass(inverted_residual(activation), Equalize())
    assert ran.changes == 3
    assert ran.sqnr(torch.randn(3, 4, 6, 6) * 10) > 100

    def spread(graph: Graph) -> float:
        """Return the largest ratio of row ranges inside one weight that an equalized edge leaves."""
        rows = [graph.constants[f"{i}.weight"].flatten(1).abs().amax(1) for i in (0, 2)]
        return max(float(row.max() / row.min()) for row in rows)

    assert spread(ran.after) < spread(ran.before) / 5


def test_does_not_equalize_past_a_gelu(run_pass) -> None:
    ran = run_pass(inverted_residual(nn.GELU), Equalize())
    assert ran.changes == 1  # only the pair with nothing between
    assert ran.context.log.why_not("conv2d") == ["scale-edge: %gelu (aten.gelu) reads it"]


def test_dead_channels_stay(build, run_pass) -> None:
    text = TEXT.replace("f32[n,2,4,4] !{bn_mean=@mean, bn_std=@std}", "f32[n,2,4,4]")
    a = torch.tensor([[4.0, 1.0], [0.0, 0.0]]).view(2, 2, 1, 1)
    ran = run_pass(build(text, a=a, b=torch.tensor([0.0, 3.0]), w=torch.ones(1, 2, 1, 1)), Equalize())
    assert ran.after.constants["a.bias"][1] == 3


def test_replace_relu6(run_pass, golden) -> None:
    ran = run_pass(inverted_residual(nn.ReLU6), ReplaceRelu6())
    assert ran.changes == 2
    assert "aten.hardtanh" not in ran.text
    x = torch.randn(3, 4, 6, 6) * 1e-3
    assert ran.sqnr(x) > 100


def test_other_clamps_are_not_replaced(run_pass) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(-1, 1))
    ran = run_pass(capture_module(net, (torch.randn(2, 4),)), ReplaceRelu6())
    assert ran.changes == 0
    assert ran.context.log.why_not("hardtanh") == ["replace-clamp-0-6: it cuts at -1 and 1, which is no ReLU6"]


def test_absorbed_bias(build, run_pass) -> None:
    """Where beta is 8 and gamma 1, 5 move: beta - 3 gamma is below 0 for the second channel."""
    ran = run_pass(small(build), AbsorbBias())
    assert ran.changes == 1
    assert ran.after.constants["a.bias"].tolist() == [3, 3]
    assert ran.after.constants["b.bias"].tolist() == [5]
    assert ran.after.node("c").meta["notes"]["bn_mean"].tolist() == [3, 2]
    assert ran.sqnr(torch.rand(2, 2, 4, 4) * 0.2) > 110


def test_bias_is_not_absorbed_by_a_padded_convolution(build, run_pass) -> None:
    text = TEXT.replace("%y = aten.conv2d(%r, %b.weight) : f32[n,1,4,4]", "%y = aten.conv2d(%r, %b.weight) {padding=[1, 1]} : f32[n,1,6,6]")
    graph = small(build, text)
    ran = run_pass(graph, AbsorbBias())
    assert ran.changes == 0
    assert ran.context.log.why_not("c") == ["absorb-bias: %y pads with zeros"]


@pytest.mark.parametrize("activations", [True, False])
def test_with_activations_the_wider_of_weight_and_activation_meets_the_columns(build, run_pass, activations: bool) -> None:
    graph = small(build)
    graph.set_constant(graph.node("b_weight"), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
    ran = run_pass(graph, Equalize(activations=activations))
    notes = ran.after.node("c").meta["notes"]
    spans = notes["bn_mean"] + 6 * notes["bn_std"]  # behind the ReLU ranges start at zero
    rows, columns = ran.after.constants["a.weight"].flatten(1).abs().amax(1), ran.after.constants["b.weight"].abs().flatten()
    shares = [part / part.max() for part in (rows, spans, columns)]
    met = bool(torch.maximum(shares[0], shares[1]).allclose(shares[2], rtol=1e-2))
    assert met == activations
    assert ran.sqnr(torch.randn(3, 2, 4, 4)) > 100

from __future__ import annotations

import pytest
import torch
from qcompile.passes.fold_batch_norm import FoldBatchNorm

NORM = "{training=false, momentum=0.1, eps=1e-05, cudnn_enabled=false}"


def constants(channels: int = 6, inputs: int = 4, groups: int = 1) -> dict[str, torch.Tensor]:
    statistics = {
        "gain": torch.randn(channels),
        "shift": torch.randn(channels),
        "mean": torch.randn(channels),
        "variance": torch.rand(channels) + 0.2,
    }
    return {"w": torch.randn(6, inputs // groups, 3, 3), "b": torch.randn(6), **statistics}


def conv_norm(conv: str = "%w, %b", options: str = " {padding=[1, 1]}", norm: str = NORM, result: str = '%y as "y"', more: str = "") -> str:
    names = "\n".join(
        f"  %{name} = const @{name}" for name in ("w", "b", "gain", "shift", "mean", "variance") if name != "b" or "%b" in conv
    )
    return f"""graph @main float(%x: f32[n,4,8,8]) where n in 1..64 {{
{names}
  %c = aten.conv2d(%x, {conv}){options} : f32[n,6,8,8]
  %y = aten.batch_norm(%c, %gain, %shift, %mean, %variance) {norm} : f32[n,6,8,8]
{more}  return {result}
}}
"""


def test_golden(build, run_pass, golden) -> None:
    ones = torch.ones(6)
    fixed = {
        "w": torch.arange(54.0).reshape(6, 1, 3, 3),
        "gain": -2 * ones,
        "shift": torch.arange(6.0),
        "mean": ones,
        "variance": 4 * ones - 1e-5,
    }
    text = conv_norm("%w", " {padding=[1, 1], groups=2}").replace("f32[n,4,8,8]", "f32[n,2,8,8]")
    golden("passes/fold_batch_norm", run_pass(build(text, **fixed), FoldBatchNorm()).golden_text)


@pytest.mark.parametrize("conv", ["%w", "%w, %b"])
@pytest.mark.parametrize("groups", [1, 2])
def test_folds_into_the_convolution_before(build, run_pass, conv, groups) -> None:
    values = constants(groups=groups)
    given = values if "%b" in conv else {key: value for key, value in values.items() if key != "b"}
    ran = run_pass(build(conv_norm(conv, f" {{padding=[1, 1], groups={groups}}}"), **given), FoldBatchNorm())
    assert ran.operators == ["aten.conv2d"]
    assert ran.sqnr(torch.randn(2, 4, 8, 8)) > 110
    notes = ran.after.node("c").meta["notes"]
    assert torch.equal(notes["bn_mean"], values["shift"])
    assert torch.equal(notes["bn_std"], values["gain"].abs())


def test_does_not_fold_where_the_convolution_is_read_elsewhere(build, run_pass) -> None:
    ran = run_pass(build(conv_norm(result='%y as "y", %c as "c"'), **constants()), FoldBatchNorm())
    assert ran.changes == 0
    assert ran.context.log.why_not("y") == ["fold-batch-norm: c has other users"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("training=false", "training=true"), "the normalisation is in training mode"),
        (("%variance = const @variance", "%variance = aten.abs(%shift) : f32[6]"), "the normalisation has no constant statistics"),
    ],
)
def test_does_not_fold_what_depends_on_the_batch(build, run_pass, change, reason) -> None:
    values = constants()
    if "aten.abs" in change[1]:
        del values["variance"]
    ran = run_pass(build(conv_norm().replace(*change), **values), FoldBatchNorm())
    assert ran.changes == 0
    assert ran.context.log.why_not("y") == [f"fold-batch-norm: {reason}"]


def test_a_shared_weight_is_folded_in_a_copy(build, run_pass) -> None:
    text = conv_norm(more="  %z = aten.conv2d(%x, %w, %b) {padding=[1, 1]} : f32[n,6,8,8]\n", result='%y as "y", %z as "z"')
    values = constants()
    ran = run_pass(build(text, **values), FoldBatchNorm())
    assert ran.changes == 1
    assert ran.sqnr(torch.randn(2, 4, 8, 8)) > 110
    assert torch.equal(ran.before.constant(ran.before.node("w")), values["w"]), "the caller's tensor was written"


def before_layer(padding: int, groups: int) -> str:
    return f"""graph @main float(%x: f32[n,4,8,8]) where n in 1..64 {{
  %w = const @w
  %b = const @b
  %gain = const @gain
  %shift = const @shift
  %mean = const @mean
  %variance = const @variance
  %t = aten.batch_norm(%x, %gain, %shift, %mean, %variance) {NORM} : f32[n,4,8,8]
  %y = aten.conv2d(%t, %w, %b) {{padding=[{padding}, {padding}], groups={groups}}} : f32[n,6,{6 + 2 * padding},{6 + 2 * padding}]
  return %y as "y"
}}
"""


@pytest.mark.parametrize("groups", [1, 2])
def test_folds_into_the_convolution_after(build, run_pass, groups) -> None:
    ran = run_pass(build(before_layer(0, groups), **constants(4, groups=groups)), FoldBatchNorm())
    assert ran.operators == ["aten.conv2d"]
    assert ran.sqnr(torch.randn(2, 4, 8, 8)) > 110


def test_does_not_fold_before_a_layer_that_pads(build, run_pass) -> None:
    ran = run_pass(build(before_layer(1, 1), **constants(4)), FoldBatchNorm())
    assert ran.changes == 0
    assert "pads with zeros" in ran.context.log.why_not("y")[0]


def test_folds_into_a_linear_layer_of_two_axes_only(build, run_pass) -> None:
    def text(shape: str) -> str:
        return f"""graph @main float(%x: f32[{shape}4]) where n in 1..64 {{
  %w = const @w
  %mean = const @mean
  %variance = const @variance
  %c = aten.linear(%x, %w) : f32[{shape}6]
  %y = aten.batch_norm(%c, none, none, %mean, %variance) {NORM} : f32[{shape}6]
  return %y as "y"
}}
"""

    values = {"w": torch.randn(6, 4), "mean": torch.randn(6), "variance": torch.rand(6) + 0.2}
    ran = run_pass(build(text("n,"), **values), FoldBatchNorm())
    assert ran.operators == ["aten.linear"]
    assert ran.sqnr(torch.randn(5, 4)) > 110
    three = run_pass(build(text("n,6,"), **values), FoldBatchNorm())
    assert three.changes == 0
    assert "the normalised axis is not the layer's output" in three.context.log.why_not("y")[0]

"""bfloat16 from a recipe to the targets and through the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import Refused
from qcompile.formats import BFloat16
from qcompile.graph.text import operator_name
from qcompile.probe import probe_digests
from qcompile.recipe import Recipe, Schemes
from qcompile.verification import verify

STEPS = "canonicalize,recognize-attention,assign-bits,insert-quantizers,quantize-weights,materialize,fuse-epilogue"


class Net(nn.Module):
    """An embedding, three layers of one input, one after another with an activation and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.q, self.k, self.v = (nn.Linear(64, n) for n in (64, 64, 64))
        self.up, self.down = nn.Linear(64, 130), nn.Linear(130, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(ids))
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.gelu(self.up(y)))


def _compiled(recipe: Any = "bf16") -> Any:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 7))
    return qcompile.compile(Net().eval(), (ids,), recipe=recipe, target="cpu", dynamic_shapes=[{0: "batch", 1: "seq"}])


@pytest.fixture(scope="module")
def compiled() -> Any:
    return _compiled()


def test_a_model_runs_in_bfloat16(compiled: Any) -> None:
    names = [name for name, _ in compiled.executable.built.kernel_calls(*compiled.golden_inputs)]
    assert [name for name in names if name.startswith(("linear", "layer_norm", "attention", "quantize", "embedding"))] == [
        "embedding", "layer_norm_bfloat16", "linear_bfloat16_3_w16_64x192", "attention_2x32_bfloat16", "linear_bfloat16_w16_64x130_gelu",
        "linear_bfloat16_w16_130x64",
    ]  # fmt: skip
    assert compiled.report["bits_per_weight"] == 16.0
    assert {(layer["weight"], layer["activation"]) for layer in compiled.report["layers"]} == {("bf16", "bf16"), ("bf16", "float32")}
    weights = [t for t in compiled.graph.constants.values() if t.ndim == 2]
    assert {t.dtype for t in weights} == {torch.int16}
    found = verify(compiled)
    assert found["ok"]
    assert len(found["layers"]) == 5


def test_the_artifact_gives_the_same_on_the_reference(compiled: Any, tmp_path: Path) -> None:
    """A sum differs by its order; where the rounding of a value to bfloat16 goes the other way, that is 2**-8 of it at one place."""
    compiled.save(tmp_path / "model.qc")
    for rows in (1, 40):
        ids = torch.randint(0, 50, (1, rows))
        mine, reference = (qcompile.load(tmp_path / "model.qc", target=target)(ids) for target in ("cpu", "reference"))
        assert float((mine - reference).norm() / reference.norm()) < 2.0**-8


def test_bfloat16_is_near_the_float_model(compiled: Any) -> None:
    assert all(layer["sqnr_db"] > 40 for layer in compiled.report["layers"])  # 2**-9 at most of each value: 54 dB and better


def test_a_wrong_weight_is_found(compiled: Any) -> None:
    """Each probe of a layer meets 37 of its inputs."""
    node = next(n for n in compiled.graph.nodes if n.op == "call_function" and operator_name(n.target) == "qc.linear")
    weight = compiled.graph.constant(node.args[3])
    kept = weight.clone()
    weight[:, :32] ^= 1
    try:
        assert probe_digests(compiled.graph)[node.name] != compiled.report["probes"][node.name]
    finally:
        weight.copy_(kept)
    assert probe_digests(compiled.graph) == compiled.report["probes"]


def test_weights_alone() -> None:
    artifact = _compiled(Recipe(name="weights", pipeline=STEPS, schemes=Schemes(linear="WBF16"), needs_data=False))
    names = [name for name, _ in artifact.executable.built.kernel_calls(*artifact.golden_inputs) if name.startswith("linear")]
    assert names == ["linear_float32_3_w16_64x192", "linear_float32_w16_64x130_gelu", "linear_float32_w16_130x64"]
    expected = artifact.graph(*artifact.golden_inputs)[0]
    assert float((artifact(*artifact.golden_inputs) - expected).abs().max()) < 1e-5
    assert verify(artifact)["ok"]


def test_results_of_any_layer_are_rounded(compiled: Any) -> None:
    """A layer of int8 before one of bfloat16 writes that itself; without a kernel the generic composition gives the same bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 24)).eval()
    recipe = Recipe(name="mixed", pipeline=STEPS, schemes=Schemes(linear="W8A8-dynamic", layers={"2*": "bf16"}), needs_data=False)
    artifact = qcompile.compile(net, (torch.randn(9, 48),), recipe=recipe, target="cpu")
    names = [name for name, _ in artifact.executable.built.kernel_calls(*artifact.golden_inputs)]
    assert [name for name in names if name.startswith(("linear", "quantize_b"))] == [
        "linear_int8_w8_48x40_relu",
        "linear_bfloat16_w16_40x24",
    ]
    assert float((artifact(*artifact.golden_inputs) - artifact.graph(*artifact.golden_inputs)[0]).abs().max()) < 1e-5


def test_the_generic_composition(monkeypatch: pytest.MonkeyPatch, compiled: Any) -> None:
    """What runs where no kernel fits, by generic operators."""
    from qcompile.backends.cpu import build as module
    from qcompile.backends.cpu.legalize import LEGALIZE

    for name in ("qc.linear", "qc.quantize", "qc.embedding", "qc.attention", "aten.layer_norm"):
        monkeypatch.delitem(LEGALIZE, name)
    (found,) = module.build(compiled.graph.module)(*compiled.golden_inputs)
    expected = compiled.graph(*compiled.golden_inputs)[0]
    assert float((found - expected).norm() / expected.norm()) < 2.0**-8


def test_bits_of_the_generic_rounding() -> None:
    class Rounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            codes = torch.ops.qc.quantize(x, None, None, "bf16")
            return torch.ops.qc.dequantize(codes, None, None, "bf16")

    from qcompile.backends.cpu.build import build

    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = torch.cat([(upper << 16 | lower).view(torch.float32) for lower in (0, 1, 0x7FFF, 0x8000, 0x8001)])
    traced = torch.export.export(Rounded(), (x,)).module()
    (found,) = build(torch.fx.GraphModule(traced, traced.graph))(x)
    expected = BFloat16().decode(BFloat16().encode(x))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


# ---- refusals -------------------------------------------------------------------------------------------------------------


def test_targets_without_bfloat16_say_so(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (3, 7))
    with pytest.raises(Refused, match="onnx has no form of bf16: few runtimes multiply it; the target cpu does"):
        qcompile.compile(Net().eval(), (ids,), recipe="bf16", target="onnx")


def test_an_artifact_in_bfloat16_is_not_exported(compiled: Any) -> None:
    from qcompile.backends.onnx.export import export_onnx

    for form in ("qdq", "integer"):
        with pytest.raises(Refused, match="bf16 has no ONNX form"):
            export_onnx(compiled.graph, form)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("weight=bf16; activation=int8 tensor sym", "cpu has no kernel for qc.linear with weight=bf16; activation=int8 tensor sym"),
        ("weight=int8 channel=0 sym; activation=bf16", "cpu has no kernel for qc.linear with weight=int8 channel=0 sym; activation=bf16"),
    ],
)
def test_one_side_with_a_scale_is_refused(scheme: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        _compiled(Recipe(name="mixed", pipeline=STEPS, schemes=Schemes(linear=scheme)))


def test_convolutions_are_refused_on_the_cpu() -> None:
    recipe = Recipe(name="images", pipeline=STEPS, schemes=Schemes(conv2d="bf16"), needs_data=False)
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 6, 6)
    with pytest.raises(Refused, match=r"cpu has no kernel for qc\.conv2d with weight=bf16; activation=bf16"):
        qcompile.compile(model, (x,), recipe=recipe, target="cpu")
    artifact = qcompile.compile(model, (x,), recipe=recipe, target="reference")
    values, weight = (BFloat16().decode(BFloat16().encode(t)).double() for t in (x, model.weight))
    expected = nn.functional.conv2d(values, weight).float() + model.bias.view(-1, 1, 1)
    assert torch.equal(artifact(x), expected)
    assert verify(artifact)["ok"]

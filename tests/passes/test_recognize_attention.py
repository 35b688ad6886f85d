from __future__ import annotations

import math

import pytest
import torch
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.recognize_attention import RecognizeAttention

S = "f32[n,4,t,t]"
V = "f32[n,4,t,8]"


def head(mask: str = "") -> str:
    return f"graph @main float(%x: f32[n,t,32]{mask}) where n in 1..64, t in 1..16 {{\n"


def heads(kv_heads: int = 4) -> str:
    """Three linear layers over %x and their heads: %q, %k, %v [n, heads, t, 8]."""
    lines = ["%n = aten.sym_size.int(%x) {dim=0} : int n", "%t = aten.sym_size.int(%x) {dim=1} : int t"]
    for name, count in (("q", 4), ("k", kv_heads), ("v", kv_heads)):
        lines += [
            f"%w{name} = const @w{name}",
            f"%l{name} = aten.linear(%x, %w{name}) : f32[n,t,{8 * count}]",
            f"%s{name} = aten.view(%l{name}) {{size=[%n, %t, {count}, 8]}} : f32[n,t,{count},8]",
            f"%{name} = aten.transpose.int(%s{name}) {{dim0=1, dim1=2}} : f32[n,{count},t,8]",
        ]
    return "".join(f"  {line}\n" for line in lines)


END = """  %turned = aten.transpose.int(%a) {dim0=1, dim1=2} : f32[n,t,4,8]
  %copy = aten.clone(%turned) {memory_format=memory:contiguous_format} : f32[n,t,4,8]
  %y = aten.view(%copy) {size=[%n, %t, 32]} : f32[n,t,32]
  return %y as "y"
}
"""


def weights(kv_heads: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"wq": 32, "wk": 8 * kv_heads, "wv": 8 * kv_heads}
    return {name: torch.randn(size, 32, generator=generator) / 8 for name, size in sizes.items()}


def whole(mask: str = "", options: str = "", before: str = "") -> str:
    return f"  {before}\n  %a = aten.scaled_dot_product_attention(%q, %k, %v{mask}){options} : {V}\n"


def written(mask: str = "", scores: str = "s") -> str:
    """Attention in small operators; ``mask`` lines go from %s to the scores named."""
    return f"""  %kt = aten.transpose.int(%k) {{dim0=-1, dim1=-2}} : f32[n,4,8,t]
  %p = aten.matmul(%q, %kt) : {S}
  %s = aten.div.Tensor(%p, 2.828427124746) : {S}
{mask}  %soft = aten.softmax.int(%{scores}) {{dim=-1}} : {S}
  %a = aten.matmul(%soft, %v) : {V}
"""


MASK = ", %mask: i64[n,t]"
CAUSAL = """  %ones = aten.ones() {size=[%t, %t], dtype=dtype:bool} : bool[t,t]
  %tril = aten.tril(%ones) : bool[t,t]
"""
PADDING = """  %u = aten.unsqueeze(%mask) {dim=1} : i64[n,1,t]
  %uu = aten.unsqueeze(%u) {dim=2} : i64[n,1,1,t]
"""
FLOAT_PADDING = (
    PADDING
    + """  %f = aten._to_copy(%uu) {dtype=dtype:float32} : f32[n,1,1,t]
  %r = aten.rsub.Scalar(%f, 1.0) : f32[n,1,1,t]
  %big = aten.mul.Tensor(%r, -10000.0) : f32[n,1,1,t]
"""
)
MASKED = PADDING + "  %hidden = aten.eq.Scalar(%uu, 0) : bool[n,1,1,t]\n"
BOTH = (
    PADDING
    + CAUSAL
    + """  %seen = aten.ne.Scalar(%uu, 0) : bool[n,1,1,t]
  %m = aten.__and__.Tensor(%seen, %tril) : bool[n,1,t,t]
"""
)

FORMS = {  # text of the attention, whether there is a mask input, whether it is causal
    "whole": (whole(), False, False),
    "whole causal": (whole(options=" {is_causal=true}"), False, True),
    "whole scaled": (whole(options=" {scale=0.3}"), False, False),
    "whole with a mask of both": (BOTH + whole(", %m"), True, True),
    "whole with an additive mask": (FLOAT_PADDING + whole(", %big"), True, False),
    "written out": (written(), False, False),
    "written out with tril": (written(CAUSAL + f"  %c = aten.where.ScalarOther(%tril, %s, -1e+30) : {S}\n", "c"), False, True),
    "written out with padding added": (written(FLOAT_PADDING + f"  %c = aten.add.Tensor(%s, %big) : {S}\n", "c"), True, False),
    "written out with padding filled": (written(MASKED + f"  %c = aten.masked_fill.Scalar(%s, %hidden, -inf) : {S}\n", "c"), True, False),
    "written out with two masks": (
        written(
            MASKED + CAUSAL + f"  %b = aten.masked_fill.Scalar(%s, %hidden, -1e+30) : {S}\n"
            f"  %c = aten.where.ScalarOther(%tril, %b, -1e+30) : {S}\n", "c",
        ), True, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(build, run_pass, form) -> None:
    text, masked, causal = FORMS[form]
    ran = run_pass(build(head(MASK * masked) + heads() + text + END, **weights()), Canonicalize(), RecognizeAttention())
    assert ran.operators == ["aten.ne.Scalar"] * masked + ["aten.linear"] * 3 + ["qc.attention"]
    assert f"causal={str(causal).lower()}" in ran.text
    for n, t in ((1, 1), (3, 9), (2, 16)):
        x, mask = torch.randn(n, t, 32), torch.ones(n, t, dtype=torch.long)
        mask[0, t // 2 + 1 :] = 0
        assert ran.sqnr(x, *([mask] if masked else [])) > 100


def test_golden(build, run_pass, golden) -> None:
    constants = {name: torch.ones(32, 32) * i for i, name in enumerate(("wq", "wk", "wv"))}
    graph = build(head(MASK) + heads() + BOTH + whole(", %m") + END, **constants)
    golden("passes/recognize_attention", run_pass(graph, Canonicalize(), RecognizeAttention()).golden_text)


def test_few_keys_for_many_queries(build, run_pass) -> None:
    text = head() + heads(2) + whole(options=" {enable_gqa=true}") + END
    ran = run_pass(build(text, **weights(2)), Canonicalize(), RecognizeAttention())
    assert "heads=4, kv_heads=2" in ran.text
    assert ran.sqnr(torch.randn(2, 5, 32)) > 100


@pytest.mark.parametrize("kind", ["whole", "written"])
def test_repeated_keys_are_read_once(build, run_pass, kind) -> None:
    repeats = "".join(
        f"""  %u{name} = aten.unsqueeze(%{name}) {{dim=2}} : f32[n,2,1,t,8]
  %e{name} = aten.expand(%u{name}) {{size=[-1, -1, 2, -1, -1]}} : f32[n,2,2,t,8]
  %r{name} = aten.reshape(%e{name}) {{shape=[%n, 4, %t, 8]}} : f32[n,4,t,8]
"""
        for name in "kv"
    )
    attention = (whole() if kind == "whole" else written()).replace("%k,", "%rk,").replace("%k)", "%rk)").replace("%v)", "%rv)")
    ran = run_pass(build(head() + heads(2) + repeats + attention + END, **weights(2)), Canonicalize(), RecognizeAttention())
    assert "heads=4, kv_heads=2" in ran.text
    assert ran.operators == ["aten.linear"] * 3 + ["qc.attention"]
    assert ran.sqnr(torch.randn(2, 5, 32)) > 100


def test_a_scale_on_the_query_joins_the_scale(build, run_pass) -> None:
    text = (
        heads().replace("aten.view(%lq)", "aten.view(%zq)").replace("  %sq =", "  %zq = aten.mul.Tensor(%lq, 0.5) : f32[n,t,32]\n  %sq =")
    )
    ran = run_pass(build(head() + text + whole(options=" {scale=1.0}") + END, **weights()), Canonicalize(), RecognizeAttention())
    assert ran.operators == ["aten.linear"] * 3 + ["qc.attention"]
    assert "scale=0.5" in ran.text
    assert ran.sqnr(torch.randn(2, 5, 32)) > 100


def test_a_query_that_sees_no_key_gives_zeros(build, run_pass) -> None:
    ran = run_pass(build(head(MASK) + heads() + BOTH + whole(", %m") + END, **weights()), Canonicalize(), RecognizeAttention())
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # causal: the first two queries of the second row see nothing
    result = ran.after(torch.randn(2, 6, 32), mask)[0]
    assert torch.equal(result[1, :2], torch.zeros(2, 32))
    assert result[1, 2:].abs().amin(-1).gt(0).all()


@pytest.mark.parametrize(
    ("extra", "text", "reason"),
    [
        ("", whole(", %bias", before="%bias = aten.full() {size=[%t, %t], fill_value=0.5} : f32[t,t]"), "adds other numbers than zero"),
        (
            "",
            whole(", %band", before=f"{CAUSAL}  %band = aten.triu(%tril) {{diagonal=-1}} : bool[t,t]"),
            "neither a padding of keys nor causal",
        ),
        (", %bias: f32[n,4,t,t]", whole(", %bias"), "depends on the activation %bias"),
        ("", whole(options=" {dropout_p=0.1}"), "training mode"),
        ("", written().replace("{dim=-1}", "{dim=2}"), "its softmax is not over the last axis"),
        ("", written(f"  %c = aten.tanh(%s) : {S}\n", "c"), "no product of two matrices with scales and masks"),
    ],
)
def test_what_is_no_such_attention_stays_and_says_why(build, run_pass, extra, text, reason) -> None:
    graph = build(head(extra) + heads() + text + END, **weights())
    ran = run_pass(graph, Canonicalize(), RecognizeAttention())
    assert ran.changes == 0
    assert "qc.attention" not in ran.operators
    assert any(reason in line for line in ran.context.log.why_not("a"))


def test_weights_with_another_user_stay(build, run_pass) -> None:
    text = head() + heads() + written() + END.replace('%y as "y"', '%y as "y", %soft as "weights"')
    ran = run_pass(build(text, **weights()), Canonicalize(), RecognizeAttention())
    assert ran.changes == 0
    assert ran.context.log.why_not("a")[-1] == "recognize-attention: its weights have other users"


def test_keys_of_another_layout_are_turned(build, run_pass) -> None:
    """Heads that come from no linear layer at all are right, if not free."""
    text = """graph @main float(%q: f32[n,4,6,8], %k: f32[n,4,9,8], %v: f32[n,4,9,8]) where n in 1..64 {
  %y = aten.scaled_dot_product_attention(%q, %k, %v) : f32[n,4,6,8]
  return %y as "y"
}
"""
    ran = run_pass(build(text), Canonicalize(), RecognizeAttention())
    assert ran.operators.count("qc.attention") == 1
    assert ran.sqnr(torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)) > 100
    causal = run_pass(build(text.replace("%v) :", "%v) {is_causal=true} :")), Canonicalize(), RecognizeAttention())
    assert "not as many queries as keys" in causal.context.log.why_not("y")[-1]
    assert math.isinf(causal.sqnr(torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)))

"""``qcompile compare``: the table, its figures against those of single commands, what is reused, and what fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import Refused
from qcompile.cli.compare import table_lines
from qcompile.comparison import Row, labels, split_recipes

Cli = Callable[..., Any]
PIPELINE = "canonicalize, assign-bits{scheme=W4A16-g8, layers=linear}, insert-quantizers"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 61 of twenty words, and beside it a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("text")
    made = Tokenizer(models.WordLevel({str(i): i for i in range(20)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 20, 61))))
    return folder / "text.txt"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A Hugging Face folder of a decoder of twenty tokens."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("decoder")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((text.parent / "tokenizer.json").read_bytes())
    return folder


def test_the_figures_are_those_of_single_commands(cli: Cli, decoder: Path, text: Path, tmp_path: Path) -> None:
    common = ("--target", "reference", "--text", text, "--context", 16, "-o", tmp_path / "made", "--json")
    done = cli("compare", decoder, "--recipes", "float,w8a8-dynamic", "--plot", tmp_path / "p.svg", *common)
    assert done.code == 0, done.err
    assert (done.json["task"], done.json["target"]) == ("perplexity", "reference")
    exact, low = done.json["rows"]
    assert exact["value"] == pytest.approx(done.json["float_value"], rel=1e-6)
    assert exact["kl"] == pytest.approx(0, abs=1e-9)
    assert exact["top1_agreement"] == 1
    assert exact["change"] == pytest.approx(0, abs=1e-6)
    alone = cli("compile", decoder, "--recipe", "w8a8-dynamic", "--target", "reference", "-o", tmp_path / "alone.qc", "--json").json
    assert (tmp_path / "made" / "w8a8-dynamic.qc").read_bytes() == (tmp_path / "alone.qc").read_bytes()
    assert low["bytes"] == alone["bytes"]
    assert low["bits_per_weight"] == round(alone["bits_per_weight"], 2)
    judged = cli("evaluate", tmp_path / "alone.qc", "--task", "perplexity", "--text", text, "--context", 16, "--speed", "--json").json
    for key in ("value", "float_value", "kl", "top1_agreement", "samples", "unit"):
        assert low[key] == judged[key]
    assert judged["bits_per_weight"] == low["bits_per_weight"]
    assert low["change"] == pytest.approx(judged["value"] / judged["float_value"] - 1)
    assert low["kl"] > 0
    for measured in (low, judged):
        assert measured["prefill_tokens_per_s"] > 0
        assert measured["decode_tokens_per_s"] > 0
        assert 50 < measured["peak_rss_mb"] < 4000
    assert (judged["prompt_tokens"], judged["new_tokens"]) == (32, 32)
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")


def test_what_is_still_the_same_is_reused(cli: Cli, decoder: Path, text: Path, tmp_path: Path) -> None:
    call = ("compare", decoder, "--target", "reference", "--text", text, "--context", 16, "--no-speed", "-o", tmp_path, "--json")
    first = cli(*call, "--recipes", "w8a8-dynamic").json["rows"][0]
    again, other = cli(*call, "--recipes", "w8a8-dynamic,float").json["rows"]
    assert [row["reused"] for row in (first, again, other)] == [False, True, False]
    assert {**first, "reused": True} == again
    (tmp_path / "float.qc").write_bytes((tmp_path / "float.qc").read_bytes()[:-100])  # damaged: made again
    assert cli(*call, "--recipes", "float").json["rows"] == [{**other, "compile_seconds": pytest.approx(other["compile_seconds"], abs=60)}]
    text_of_data = f"text:{text}?length=16"
    with_data = cli(*call, "--recipes", "w8a8", "--calibrate", text_of_data)
    assert with_data.code == 0, with_data.err
    changed = cli(*call, "--recipes", "w8a8", "--calibrate", f"{text_of_data}&limit=1").json["rows"][0]
    assert not changed["reused"]  # other data


def test_a_recipe_that_fails_has_its_reason_in_its_row(cli: Cli, mlp: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(
        "name: wrong\nneeds_data: false\npipeline: [canonicalize, assign-bits]\nschemes: {layers: {secnd: float}}\n"
    )
    call = ("compare", mlp, "--recipes", f"{tmp_path / 'wrong.yaml'}, float", "--target", "reference")
    done = cli(*call, "--json")
    assert done.code == 1
    wrong, exact = done.json["rows"]
    assert "schemes.layers['secnd'] fits no layer" in wrong["reason"]
    assert (wrong["value"], wrong["bytes"]) == (None, None)
    assert (exact["reason"], exact["unit"]) == ("", "dB")
    assert exact["value"] > 100
    shown = cli(*call)
    assert shown.code == 1
    head, first, second = shown.out.splitlines()[:3]
    assert "sqnr dB" in head
    assert "KL" not in head  # a column without figures is left out
    assert "schemes.layers['secnd'] fits no layer" in first
    assert second.split()[:2] == ["float", "32.00"]


def test_an_error_inside_is_a_reason_too(cli: Cli, mlp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr("qcompile.compiler.build_report", fail)
    done = cli("compare", mlp, "--recipes", "float", "--target", "reference", "--json")
    assert (done.code, done.json["rows"][0]["reason"]) == (1, "internal error: ZeroDivisionError: by nothing")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--recipes", "w8a9"), "unknown recipe 'w8a9'"),
        (("--recipes", "float,float"), "float: the recipe is given twice"),
        (("--recipes", ","), "there is no recipe to compare"),
        (("--recipes", "float", "--task", "sts"), "task sts needs data"),
        (("--recipes", "float", "--task", "sts", "--data", "none.csv"), "there is no such file"),
        (("--recipes", "float", "--text", "none.txt"), "the artifact holds no tokenizer"),
        (("--recipes", "float", "--plot", "p.bmp"), "end it in .png or .svg"),
        (("--recipes", "float", "--target", "none"), "unknown target 'none'"),
        (("--recipes", "float", "-o", "none/made"), "there is no such folder"),
        (("--recipes", "float", "--stride", "3", "--task", "sqnr"), "are for --task perplexity"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, mlp: str, tmp_path: Path, monkeypatch: Any, files: Any, words: Any, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("compare", mlp, *words)
    assert (done.code, done.out) == (2, "")
    assert reason in done.err.splitlines()[-1]
    assert files() == []


def test_lists_and_pipelines() -> None:
    assert split_recipes(["w8a8, my recipe.yaml", "float"]) == ["w8a8", "my recipe.yaml", "float"]
    assert split_recipes([PIPELINE, "float"]) == [PIPELINE, "float"]
    named = labels([PIPELINE, "w8a8", "a/mine.yaml", "b/mine.yaml"])
    assert named[1:3] == ["w8a8", "mine"]
    assert len(set(named)) == 4
    assert all("/" not in name and " " not in name for name in named)
    with pytest.raises(Refused, match="given twice"):
        split_recipes(["float", "w8a8,float"])


def test_the_table() -> None:
    rows = [
        Row("w8a8", "w8a8", value=12.5, float_value=12.0, change=0.041666, bits_per_weight=8.1, kl=0.01, unit="per token", samples=7),
        Row("a, b", "pipeline-1", reason="no"),
    ]
    assert table_lines(rows, "perplexity") == [
        "recipe      bits/weight  perplexity  change  KL nats",
        "w8a8               8.10     12.5000  +4.17%  0.01000",
        "pipeline-1  no",
        "float model: perplexity 12.0000 per token on 7 samples",
        "pipeline-1 is a, b",
    ]


def test_artifacts_of_one_capture_are_those_of_their_own(tiny: Any) -> None:
    """Passes that change one copy of a captured model leave the others alone."""
    from qcompile.capture import capture

    module, examples, sizes = tiny.cnn()
    captured = capture(module, examples, sizes)
    before = captured.graph.digest
    for recipe in ("dfq", "w8a8-dynamic", "dfq"):
        shared = qcompile.compile(captured, recipe=recipe, target="reference")
        own = qcompile.compile(module, examples, recipe=recipe, target="reference", dynamic_shapes=sizes)
        assert shared.digest() == own.digest()
    assert captured.graph.digest == before

"""``qcompile generate``: texts from tokens, its JSON, and what is refused before anything is printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcompile
from qcompile.generation import Generator

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def decoder(tiny_artifact: Callable[..., qcompile.Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 20 tokens and a context of 32, without a tokenizer."""
    path = tmp_path_factory.mktemp("decoder") / "decoder.qc"
    tiny_artifact("language_model", "float").save(path)
    return path


def test_one_prompt(cli: Cli, decoder: Path) -> None:
    expected = Generator(qcompile.load(decoder)).generate([1, 2], max_tokens=4)[0].tokens
    ended = cli("generate", decoder, "--prompt-tokens", "1,2", "--max-tokens", 4)
    assert ended.code == 0
    assert ended.out.split() == [str(token) for token in (1, 2, *expected)]
    assert "2 tokens read" in ended.err
    found = cli("generate", decoder, "--prompt-tokens", "1, 2", "--max-tokens", 4, "--json").json
    assert (found["token_ids"], found["end"]) == (expected, "length")
    assert found["cache_bytes"] == 2 * 32 * 8 * 4  # keys and values of one layer, the whole short context, eight float32 each


def test_several_prompts(cli: Cli, decoder: Path) -> None:
    found = cli("generate", decoder, "--prompt-tokens", "1,2", "--prompt-tokens", "7", "--max-tokens", 3, "--json").json
    alone = cli("generate", decoder, "--prompt-tokens", "7", "--max-tokens", 3, "--json").json
    assert [len(text["token_ids"]) for text in found["texts"]] == [3, 3]
    assert found["texts"][1]["token_ids"] == alone["token_ids"]
    lines = cli("generate", decoder, "--prompt-tokens", "1,2", "--prompt-tokens", "7", "--max-tokens", 3).out.splitlines()
    assert [line.split()[0] for line in lines] == ["[0]", "[1]"]


def test_a_seed_decides(cli: Cli, decoder: Path) -> None:
    words = ("generate", decoder, "--prompt-tokens", "1", "--max-tokens", 20, "--temperature", 3, "--json", "--seed")
    first, again, other = (cli(*words, seed).json["token_ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "there is no prompt"),
        (("--prompt", "words"), "the artifact holds no tokenizer"),
        (("--prompt-tokens", "1,x"), "'1,x' are no token numbers"),
        (("--prompt-tokens", "20"), "the prompt holds token 20, the model has 20 tokens"),
        (("--prompt-tokens", "1,2", "--max-tokens", 40), "2 tokens and 40 new ones do not fit in the context of 32"),
        (("--prompt-tokens", "1", "--context", 33), "texts of 1 to 32 tokens"),
        (("--prompt-tokens", "1", "--temperature", -1), "a temperature is 0 or more"),
        (("--prompt-file", "missing.txt"), "cannot be read as UTF-8 text"),
    ],
)
def test_what_cannot_be_generated_is_one_line(cli: Cli, decoder: Path, words: tuple[Any, ...], reason: str) -> None:
    ended = cli("generate", decoder, *words)
    assert (ended.code, ended.out) == (2, "")
    assert reason in ended.err
    assert ended.err.count("\n") == 1


def test_what_is_no_decoder_is_refused(cli: Cli, tiny_artifact: Any, tmp_path: Path) -> None:
    tiny_artifact("mlp").save(tmp_path / "mlp.qc")
    ended = cli("generate", tmp_path / "mlp.qc", "--prompt-tokens", "1")
    assert ended.code == 2
    assert "a decoder takes tokens" in ended.err

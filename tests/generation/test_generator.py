"""Generation against transformers, and what a user may ask of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile
from qcompile import Artifact, Refused
from qcompile.generation import Generator, Sampling
from qcompile.generation.sampling import Sampler

Compiled = tuple[Artifact, torch.nn.Module]


@pytest.fixture(scope="module")
def made(decoder: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder, model = decoder("llama")
    path = tmp_path_factory.mktemp("artifact") / "llama.qc"
    qcompile.compile(str(folder), recipe="float", target="cpu").save(path)
    return path, model


@pytest.fixture
def compiled(made: tuple[Path, torch.nn.Module]) -> Compiled:
    """A Llama of two layers, vocabulary 101, context 64."""
    return qcompile.load(made[0]), made[1]


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    with torch.no_grad():
        for _ in range(count):
            tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens[-count:]


def test_greedy_equals_transformers_for_prompts_of_different_lengths(compiled: Compiled) -> None:
    artifact, model = compiled
    prompts = [np.random.default_rng(row).integers(0, 101, length).tolist() for row, length in enumerate((1, 17, 5))]
    found = Generator(artifact).generate(prompts, max_tokens=20, ignore_end=True)
    for prompt, made in zip(prompts, found, strict=True):
        assert made.tokens == greedy(model, prompt, 20)
        assert (made.prompt_tokens, made.end) == (prompt, "length")


def test_long_prompts_are_read_in_chunks(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, model = compiled
    prompts = [np.random.default_rng(row).integers(0, 101, length).tolist() for row, length in enumerate((40, 3, 16))]
    monkeypatch.setattr("qcompile.generation.session.CHUNK", 7)
    monkeypatch.setattr("qcompile.generation.session.GROWTH", 5)
    found = Generator(artifact).generate(prompts, max_tokens=10, ignore_end=True)
    assert [made.tokens for made in found] == [greedy(model, prompt, 10) for prompt in prompts]


def test_equal_seeds_give_equal_texts_whatever_shares_the_batch(compiled: Compiled) -> None:
    generator, options = (
        Generator(compiled[0]),
        {"max_tokens": 12, "sampling": Sampling(temperature=1.5, top_k=50, seed=4), "ignore_end": True},
    )
    alone = generator.generate([5, 6, 7], **options)[0].tokens
    together = generator.generate([[5, 6, 7], [9]], **options)
    assert together[0].tokens == alone
    assert generator.generate([5, 6, 7], **{**options, "sampling": Sampling(temperature=1.5, top_k=50, seed=5)})[0].tokens != alone


def test_end_tokens_end_a_text_and_the_others_go_on(compiled: Compiled) -> None:
    artifact, _ = compiled
    free = Generator(artifact).generate([[3], [4]], max_tokens=10, ignore_end=True)
    artifact.end_tokens = (free[0].tokens[4],)
    first = free[0].tokens.index(artifact.end_tokens[0])
    ended = Generator(artifact).generate([[3], [4]], max_tokens=10)
    assert ended[0].tokens == free[0].tokens[: first + 1]
    assert ended[0].end == "end"
    if artifact.end_tokens[0] not in free[1].tokens:
        assert ended[1].tokens == free[1].tokens


def test_a_text_may_fill_the_context_and_no_more(compiled: Compiled) -> None:
    generator = Generator(compiled[0], context=20)
    made = generator.generate([1, 2, 3], ignore_end=True)[0]
    assert (len(made.tokens), made.end) == (18, "context")  # the last token is chosen and never read
    assert generator.generate([1, 2, 3], max_tokens=18, ignore_end=True)[0].tokens == made.tokens


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([1, 2, 3], {"max_tokens": 19}, r"prompt 0: 3 tokens and 19 new ones do not fit in the context of 20"),
        ([[1], [1] * 21], {}, r"prompt 1: 21 tokens do not fit in the context of 20"),
        ([[1], []], {}, "the prompt is empty"),
        ([], {}, "there is no prompt"),
        ([1, 101], {}, "the prompt holds token 101, the model has 101 tokens"),
        ("words", {}, "holds no tokenizer"),
        ([1], {"max_tokens": 0}, "max_tokens is 1 or more"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_it_begins(
    compiled: Compiled, prompts: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        Generator(compiled[0], context=20).stream(prompts, **options)


def test_a_context_longer_than_the_models_is_refused(compiled: Compiled) -> None:
    with pytest.raises(Refused, match="texts of 1 to 64 tokens"):
        Generator(compiled[0], context=65)


def test_logits_that_are_no_numbers_are_refused(compiled: Compiled) -> None:
    artifact, _ = compiled
    (head,) = [node for node in artifact.graph.nodes if node.op == "get_attr" and str(node.target).endswith("norm.weight")][-1:]
    artifact.graph.set_constant(head, torch.full((32,), torch.nan))
    with pytest.raises(Refused, match="logits hold NaN"):
        Generator(artifact).generate([1, 2], max_tokens=2)


class Rolling(torch.nn.Module):
    """Reads the token before in a way that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors = self.table(tokens)
        return self.head(vectors + vectors.roll(1, 1))


def test_tokens_mixed_beside_attention_are_refused() -> None:
    tokens = torch.arange(6).view(1, 6)
    artifact = qcompile.compile(Rolling(), (tokens,), recipe="float", target="reference", dynamic_shapes=[{0: "batch", 1: "seq"}])
    with pytest.raises(Refused, match="mixes tokens"):
        Generator(artifact).generate([1, 2, 3], max_tokens=2)


# ---- sampling -------------------------------------------------------------------------------------------------------------


def drawn(sampling: Sampling, logits: torch.Tensor, count: int = 4000) -> Counter[int]:
    sampler = Sampler(sampling, 1)
    return Counter(sampler.choose(0, logits) for _ in range(count))


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -50.0])
    for temperature in (0.5, 1.0, 2.0):
        found = drawn(Sampling(temperature=temperature), logits)
        expected = (logits.double() / temperature).softmax(-1)
        for token in range(4):
            share, wanted = found[token] / 4000, float(expected[token])
            assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 4000) ** 0.5 + 1e-9


def test_top_k_and_top_p_leave_the_most_likely_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert set(drawn(Sampling(temperature=1.0, top_k=2), logits)) == {1, 2}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.4), logits)) == {1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.41), logits)) == {1, 2}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.9), logits)) == {1, 2, 3}
    assert set(drawn(Sampling(temperature=1.0, top_k=1, top_p=0.5), logits)) == {1}
    assert set(drawn(Sampling(), logits, 10)) == {1}


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        Sampling(**options)


# ---- texts ----------------------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_text_that_the_tokenizer_gives(data_folder: Path) -> None:
    """Also where a character has its bytes in several tokens."""
    from qcompile.generation.text import TextStream, read_tokenizer

    tokenizer = read_tokenizer((data_folder / "wikilm-5m" / "tokenizer.json").read_bytes())
    prompt, rest = tokenizer.encode("The name of").ids, tokenizer.encode(" the 猫 is naïve — “söze” 🙂, he said.\n\n = End = ").ids
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token, last=number == len(rest) - 1) for number, token in enumerate(rest)]
    assert "".join(pieces) == tokenizer.decode([*prompt, *rest])[len(tokenizer.decode(prompt)) :]
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") >= 2


def test_wikilm_continues_texts_as_transformers_does(data_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    folder = data_folder / "wikilm-5m"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = Generator(qcompile.compile(str(folder), recipe="float", target="cpu"))
    text = (data_folder / "wikitext2" / "test.raw.txt").read_text(encoding="utf-8")
    prompts = [text[start : start + length] for start, length in ((2000, 80), (90000, 500), (200000, 233))]
    found = generator.generate(prompts, max_tokens=60, ignore_end=True)
    for prompt, made in zip(prompts, found, strict=True):
        tokens = torch.tensor([generator.tokens_of(prompt)])
        with torch.no_grad():
            expected = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert made.tokens == expected[0, tokens.shape[1] :].tolist()
    stopped = generator.generate(prompts[:1], max_tokens=60, ignore_end=True, stop=[found[0].text[10:14]])[0]
    assert stopped.end == "stop"
    assert found[0].text.startswith(stopped.text)
    assert found[0].text[10:14] in stopped.text

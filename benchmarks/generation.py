"""Texts and perplexity of a language model beside transformers: the same tokens, the same figures.

    python benchmarks/generation.py                          # wikilm-5m of the data folder, float
    python benchmarks/generation.py --folder my-model --recipe w4a16 --text held_out.txt

Prints for every prompt how many of the greedy tokens are transformers' own until the first that differs, then the perplexity of the text on
both targets and in transformers, over the same windows. Only a float recipe is expected to agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from models.data import data_folder

import qcompile
from qcompile.evaluation import evaluate
from qcompile.generation import Generator
from qcompile.perplexity import measure, read_windows

PROMPT_CHARACTERS = (40, 900)  # the shortest and the longest prompt


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="A Hugging Face folder [wikilm-5m].")
@click.option("--recipe", default="float", show_default=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Prompts and perplexity are taken from it [WikiText-2 test].")
@click.option("--prompts", default=10, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="New tokens of each prompt.")
@click.option("--windows", default=40, show_default=True, help="Windows of 512 tokens for the perplexity.")
def main(folder: Path | None, recipe: str, text: Path | None, prompts: int, tokens: int, windows: int) -> None:
    """Print the comparison."""
    import transformers

    folder = folder or data_folder() / "wikilm-5m"
    text = text or data_folder() / "wikitext2" / "test.raw.txt"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = {target: qcompile.compile(str(folder), recipe=recipe, target=target) for target in ("cpu", "reference")}
    generator = Generator(made["cpu"])
    chosen = _prompts(text.read_text(encoding="utf-8"), prompts)
    together = generator.generate(chosen, max_tokens=tokens, ignore_end=True)
    for number, (prompt, found) in enumerate(zip(chosen, together, strict=True)):
        coded = generator.tokens_of(prompt)
        expected = _greedy(model, coded, tokens)
        alone = generator.generate(prompt, max_tokens=tokens, ignore_end=True)[0].tokens
        same = [_agreeing(expected, other) for other in (alone, found.tokens)]
        click.echo(f"prompt {number}: {len(coded)} tokens; of {tokens} new ones as transformers' {same[0]} alone, {same[1]} in a batch")
    click.echo(f"decoding one text: {generator.speed.decode_tokens_per_s:.0f} tokens/s")
    data = f"text:{text}?length=512&limit={windows}"
    for target, artifact in made.items():
        click.echo(f"perplexity, target {target}: {evaluate(artifact, 'perplexity', data, None).value:.6f}")
    judged = read_windows(text, generator.tokenizer, 512, None, windows)
    with torch.no_grad():
        found_by_peer = measure(lambda batch: [model(batch[0]).logits], None, judged, model.config.vocab_size)
    click.echo(f"perplexity, transformers: {found_by_peer.perplexity:.6f}, {found_by_peer.tokens} tokens")


def _prompts(text: str, count: int) -> list[str]:
    """Return pieces of a text, spread over it, of different lengths."""
    low, high = PROMPT_CHARACTERS
    sizes = [low + i * (high - low) // max(count - 1, 1) for i in range(count)]
    return [text[start : start + size] for start, size in zip(range(0, len(text), len(text) // count), sizes, strict=False)]


def _agreeing(expected: list[int], found: list[int]) -> int:
    """Return how many tokens are equal before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), len(expected))


def _greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return list(found[0, len(tokens) :].tolist())


if __name__ == "__main__":
    main()

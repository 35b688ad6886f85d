"""``qcompile generate``."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option
from qcompile.errors import Refused
from qcompile.files import map_large_blocks


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="The text to continue; several are continued together.")
@click.option("--prompt-tokens", metavar="NUMBERS", multiple=True, help="A prompt as token numbers, such as 1,15,7.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Take the prompt from a UTF-8 file.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="The most new tokens of each text.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Choose among so many tokens; 0 among all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Choose among tokens of this total probability.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Equal seeds give equal texts.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End a text where this is generated.")
@click.option("--ignore-end", is_flag=True, help="Go on after the model's end tokens.")
@click.option("--context", type=click.IntRange(1), help="The most tokens of a text with its prompt [what the model was made for].")
@click.option("--target", help="Run on another target, such as reference.")
@threads_option()
@trust_option()
@as_json()
def generate(
    artifact: Path,
    prompts: tuple[str, ...],
    prompt_tokens: tuple[str, ...],
    prompt_file: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    ignore_end: bool,
    context: int | None,
    target: str | None,
    threads: int | None,
    trust_code: bool,
    json_: bool,
) -> None:
    """Continue texts with ARTIFACT, a compiled language model; they appear while they are generated."""
    from qcompile.generation import Generator, Sampling

    map_large_blocks()
    asked: list[Any] = [*prompts, *map(_numbers, prompt_tokens), *([_read(prompt_file)] if prompt_file else [])]
    if not asked:
        raise Refused("there is no prompt", way_out="give --prompt TEXT, --prompt-tokens NUMBERS or --prompt-file FILE")
    generator = Generator.open(artifact, target=target, threads=threads, trust_code=trust_code, context=context)
    sampling = Sampling(temperature, top_k, top_p, seed)
    texts, ends = [""] * len(asked), [""] * len(asked)
    tokens: list[list[int]] = [[] for _ in asked]
    alone = len(asked) == 1 and not json_
    pieces = generator.stream(asked, max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_end=ignore_end)
    if alone:
        click.echo(_shown(asked[0]), nl=False)
    for piece in pieces:
        texts[piece.row] += piece.text
        tokens[piece.row].append(piece.token)
        ends[piece.row] = piece.end
        if alone:
            click.echo(piece.text if generator.tokenizer is not None else f" {piece.token}", nl=False)
            sys.stdout.flush()
    speed = generator.speed
    figures = {
        "prefill_tokens_per_s": round(speed.prefill_tokens_per_s, 2),
        "decode_tokens_per_s": round(speed.decode_tokens_per_s, 2),
        "cache_bytes": generator.cache_bytes,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    found = [{"text": t, "token_ids": ids, "end": end} for t, ids, end in zip(texts, tokens, ends, strict=True)]
    if json_:
        return print_json({**found[0], **figures} if len(found) == 1 else {"texts": found, **figures})
    if alone:
        click.echo()
    for number, (prompt, item) in enumerate(zip(asked, found, strict=True)):
        if not alone:
            click.echo(f"[{number}] {_shown(prompt)}{item['text'] or ' '.join(map(str, ['', *item['token_ids']]))}")
    click.echo(
        f"{speed.prefill_tokens} tokens read at {speed.prefill_tokens_per_s:.1f}/s, {sum(map(len, tokens))} written at "
        f"{speed.decode_tokens_per_s:.1f}/s, caches {generator.cache_bytes / 1e6:.2f} MB, peak {figures['peak_rss_mb']:.0f} MB",
        err=True,
    )
    return None


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise Refused(f"'{text}' are no token numbers", way_out="write for example 1,15,7")
    return [int(part) for part in parts]


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("the file cannot be read as UTF-8 text", node=str(path)) from error

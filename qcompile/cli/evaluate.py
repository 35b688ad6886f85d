"""``qcompile evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option
from qcompile.errors import Refused


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(["sqnr", "kl", "top1", "sts", "perplexity"]), default="sqnr", show_default=True)
@click.option(
    "--data",
    metavar="DATA",
    help="sqnr, kl: as for compile; top1: images:FOLDER?..&labels=FILE.csv; sts: FILE.csv with a score and two sentences a row; "
    "perplexity: text:FILE?length=512&stride=512.",
)
@click.option("--text", type=click.Path(path_type=Path), help="perplexity: the text, in place of --data.")
@click.option("--context", type=click.IntRange(2), help="perplexity: tokens of a window [512].")
@click.option("--stride", type=click.IntRange(1), help="perplexity: tokens from window to window [the context: no overlap].")
@click.option("--model", metavar="MODEL", help="The float model [the one this file was compiled from on this machine].")
@click.option("--limit", type=click.IntRange(1), help="The most samples.")
@click.option("--speed", is_flag=True, help="perplexity: also measure tokens per second and peak memory, in a process of its own.")
@click.option("--target", help="Run on another target, such as reference.")
@threads_option()
@trust_option()
@as_json()
def evaluate(
    artifact: Path,
    task: str,
    data: str | None,
    text: Path | None,
    context: int | None,
    stride: int | None,
    model: str | None,
    limit: int | None,
    speed: bool,
    target: str | None,
    threads: int | None,
    trust_code: bool,
    json_: bool,
) -> None:
    """Measure ARTIFACT's accuracy, and that of its float model beside it."""
    from qcompile.artifact import load
    from qcompile.capture import capture
    from qcompile.evaluation import evaluate as run
    from qcompile.generation.speed import measure_speed
    from qcompile.source_notes import find_source

    if text or context or stride:
        data = text_data(task, data, text, context, stride)
    if speed and task != "perplexity":
        raise Refused("--speed is for --task perplexity", way_out="use 'qcompile bench'")
    loaded = load(artifact, target=target, threads=threads, trust_code=trust_code)
    place = model or find_source(artifact)
    found = measure_speed(artifact, target=target, threads=threads, trust_code=trust_code) if speed else None
    result = run(loaded, task, data, capture(place) if place else None, limit)
    if found:
        result.more.update(asdict(found))
    if json_:
        return print_json(
            {
                "task": result.task,
                "value": result.value,
                "unit": result.unit,
                "samples": result.samples,
                "float_value": result.float_value,
                **result.more,
            }
        )
    click.echo(
        f"{result.task}: {result.value:.4f} {result.unit} on {result.samples} samples"
        + ("" if result.float_value is None else f", float {result.float_value:.4f}")
    )
    for name, value in result.more.items():
        click.echo(f"{name}: {value}" if isinstance(value, int) else f"{name}: {value:.5f}")
    return None


def text_data(task: str, data: str | None, text: Path | None, context: int | None, stride: int | None) -> str:
    """Return the options of a text as the one text that tasks take."""
    if task != "perplexity":
        raise Refused("--text, --context and --stride are for --task perplexity")
    if (data is None) == (text is None):
        raise Refused("the text is given twice or not at all", way_out="give --text FILE")
    options = [f"{name}={value}" for name, value in (("length", context), ("stride", stride)) if value]
    head = data or f"text:{text}"
    return "&".join([head if "?" in head else f"{head}?", *options]).replace("?&", "?")

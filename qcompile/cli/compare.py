"""``qcompile compare``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcompile.cli.evaluate import text_data
from qcompile.cli.main import as_json, check_folder, print_json, threads_option

if TYPE_CHECKING:
    from qcompile.comparison import Row

# Column: head, and what it shows of a row; one that shows nothing of any row is left out.
COLUMNS: tuple[tuple[str, Callable[[Row], object], str], ...] = (
    ("bits/weight", lambda row: row.bits_per_weight, ".2f"),
    ("MB", lambda row: None if row.bytes is None else row.bytes / 1e6, ".2f"),
    ("VALUE", lambda row: row.value, ".4f"),
    ("change", lambda row: row.change, "CHANGE"),
    ("KL nats", lambda row: row.kl, ".5f"),
    ("top-1 same", lambda row: row.top1_agreement, ".2%"),
    ("prefill tok/s", lambda row: row.prefill_tokens_per_s, ".0f"),
    ("decode tok/s", lambda row: row.decode_tokens_per_s, ".0f"),
    ("peak MiB", lambda row: row.peak_rss_mb, ".0f"),
    ("compile s", lambda row: row.compile_seconds, ".1f"),
)


@click.command()
@click.argument("model")
@click.option(
    "--recipes", multiple=True, required=True, metavar="LIST", help="Names and YAML files joined by commas, or one pipeline text."
)
@click.option("--target", default="cpu", show_default=True, help="See 'qcompile targets'.")
@click.option("--calibrate", metavar="DATA", help="As for compile.")
@click.option("--task", type=click.Choice(["sqnr", "kl", "top1", "sts", "perplexity"]), help="[perplexity with --text, else sqnr]")
@click.option("--data", metavar="DATA", help="As for evaluate.")
@click.option("--text", type=click.Path(path_type=Path), help="perplexity: the text, in place of --data.")
@click.option("--context", type=click.IntRange(2), help="perplexity: tokens of a window [512].")
@click.option("--stride", type=click.IntRange(1), help="perplexity: tokens from window to window [the context: no overlap].")
@click.option("--limit", type=click.IntRange(1), help="The most samples.")
@click.option("--speed/--no-speed", default=True, help="perplexity: measure tokens per second and peak memory too.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture of the value over bits, .png or .svg.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps the artifacts; it is reused.")
@threads_option()
@as_json()
def compare(
    model: str,
    recipes: tuple[str, ...],
    target: str,
    calibrate: str | None,
    task: str | None,
    data: str | None,
    text: Path | None,
    context: int | None,
    stride: int | None,
    limit: int | None,
    speed: bool,
    plot: Path | None,
    output: Path | None,
    threads: int | None,
    json_: bool,
) -> None:
    """Compile MODEL by each recipe, judge all on the same data beside the float model, and print one table."""
    from qcompile.capture import capture
    from qcompile.comparison import Comparison, as_json, split_recipes
    from qcompile.evaluation import check_data
    from qcompile.recipe import load_recipe
    from qcompile.registry import find_target

    chosen = split_recipes(recipes)
    task = task or ("perplexity" if text or context or stride else "sqnr")
    if text or context or stride:
        data = text_data(task, data, text, context, stride)
    if plot is not None:
        from qcompile.cli.picture import new_figure

        check_folder(plot)
        new_figure(plot, 1, 1)  # what cannot be drawn is refused before the work
    find_target(target)
    for recipe in chosen:
        load_recipe(recipe)
    if output is not None and not output.is_dir():
        check_folder(output)
    captured = capture(model)
    check_data(task, data, captured, limit)
    if output is not None:
        output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as spare:
        folder = output or Path(spare)
        comparison = Comparison(captured, model, target, calibrate, task, data, limit, folder, threads, speed)
        rows = comparison.rows(chosen, (lambda line: None) if json_ else lambda line: click.echo(line, err=True))
    if plot is not None:
        from qcompile.cli.compare_plot import plot_rows

        plot_rows(rows, plot, task, Path(model).name)
    if json_:
        exact = next((row.float_value for row in rows if row.float_value is not None), None)
        print_json({"model": model, "target": target, "task": task, "float_value": exact, "rows": as_json(rows)})
    else:
        for line in table_lines(rows, task):
            click.echo(line)
    if any(row.reason for row in rows):
        raise click.exceptions.Exit(1)


def table_lines(rows: Sequence[Row], task: str) -> list[str]:
    """Return the table; a recipe that failed has its reason in its row."""
    shown = [column for column in COLUMNS if any(column[1](row) is not None for row in rows)]
    lines = [["recipe", *(_head(head, rows, task) for head, _, _ in shown)]]
    lines += [[row.label, *(_cell(value(row), kind, task) for _, value, kind in shown)] for row in rows if not row.reason]
    widths = [max(map(len, cells)) for cells in zip(*[*lines, *([row.label, *[""] * len(shown)] for row in rows)], strict=True)]
    texts = ["  ".join([f"{line[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))]) for line in lines]
    made = iter(texts[1:])
    found = [texts[0], *(f"{row.label:{widths[0]}}  {row.reason}" if row.reason else next(made) for row in rows)]
    exact = next((row for row in rows if row.float_value is not None), None)
    if exact is not None:
        found.append(f"float model: {task} {exact.float_value:.4f} {exact.unit} on {exact.samples} samples")
    found += [f"{row.label} is {row.recipe}" for row in rows if row.recipe != row.label]
    return [line.rstrip() for line in found]


def _head(head: str, rows: Sequence[Row], task: str) -> str:
    unit = next((row.unit for row in rows if row.unit), "")
    return head if head != "VALUE" else task if task == "perplexity" else f"{task} {unit}".strip()


def _cell(value: object, kind: str, task: str) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-" if value is None else str(value)
    if kind == "CHANGE":
        return f"{value:+.2%}" if task == "perplexity" else f"{value:+.4f}"
    return format(value, kind)

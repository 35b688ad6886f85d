"""The recipe w2 beside llama.cpp's Q2_K on the same model: perplexity at two bits and a fraction, everything that is stored counted.

    python benchmarks/two_bits.py                                     # wikilm-5m of the data folder, all of WikiText-2 test
    python benchmarks/two_bits.py --windows 40 --results two_bits.json

llama.cpp's own tool leaves the down projections of this model in other types, because 688 columns are no multiple of 256. Here ggml
quantizes each matrix by itself with its rows padded to whole blocks, so that Q2_K is 2.63 bits on all of them but for the padding, and
gguf-py gives the values back, which our float model runs with. The embedding is the head too: once in Q2_K like all others, once in Q6_K as
llama.cpp's tool has it, and once with the value, output and down projections in Q3_K as well, which is its whole mixture for this type. No
importance matrix. Without llama-cpp-python and gguf only our row is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from models.data import data_folder
from models.ggml_types import missing, round_trip
from solvers import BEFORE, FINISH, Bench

from qcompile.pipeline import Context, parse_pipeline
from qcompile.recipe import Recipe, load_recipe
from qcompile.registry import find_pass, find_target

MORE = ("v_proj", "o_proj", "down_proj")
MIXTURES: dict[str, Callable[[str], str]] = {
    "llama.cpp Q2_K": lambda name: "Q2_K",
    "llama.cpp Q2_K, head Q6_K": lambda name: "Q6_K" if "lm_head" in name else "Q2_K",
    "llama.cpp Q2_K, its mixture": lambda name: "Q6_K" if "lm_head" in name else "Q3_K" if any(part in name for part in MORE) else "Q2_K",
}


@click.command(help=__doc__)
@click.option("--recipe", default="w2", show_default=True, help="Ours.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="A Llama-type Hugging Face folder [wikilm-5m].")
@click.option("--windows", type=click.IntRange(1), help="Windows of 512 tokens that are judged [all].")
@click.option("--results", type=click.Path(path_type=Path), help="Keep what is measured in this JSON file, and do not measure it again.")
def main(recipe: str, folder: Path | None, windows: int | None, results: Path | None) -> None:
    """Print the table."""
    ours = load_recipe(recipe)
    bench = Bench(folder or data_folder() / "wikilm-5m", ours.calibration_samples, windows, results)
    bench.calibration = bench.calibration.replace("length=256", "length=512")
    float_row = bench.measure("float", 32, None)
    rows = [float_row]
    if reason := missing():
        click.echo(reason)
    else:
        rows += [bench.remember(name, 2, lambda kind=kind: _mixture(bench, kind)) for name, kind in MIXTURES.items()]  # type: ignore[misc]
    rows.append(bench.measure(f"qcompile {ours.name}", 2, _simulated(ours)))
    click.echo(f"{'':30} {'bits/weight':>11} {'perplexity':>10} {'to float':>9}   {ours.name} is lower by")
    for row in rows:
        worse = 100 * (row["perplexity"] / float_row["perplexity"] - 1)
        lower = 100 * (1 - rows[-1]["perplexity"] / row["perplexity"])
        click.echo(f"{row['name']:30} {row['bits']:11.2f} {row['perplexity']:10.2f} {worse:+8.1f}%   {lower:.1f}%")


def _mixture(bench: Bench, kind: Callable[[str], str]) -> dict[str, Any]:
    """Measure the float model with every matrix as blocks say it; other constants count as float32."""
    graph, start = bench.captured.graph.copy(), time.perf_counter()
    parse_pipeline(BEFORE, find_pass).run(graph, Context(find_target("reference"), example_inputs=bench.captured.example_inputs))
    weights = size = other = 0
    for node in graph.nodes:
        value = graph.constant(node)
        if value is None or value.ndim != 2:
            other += 0 if value is None else 4 * value.numel()
            continue
        dequantized, stored = round_trip(value, kind(str(node.target)))
        graph.set_constant(node, dequantized)
        weights, size = weights + value.numel(), size + stored
    seconds = time.perf_counter() - start
    bits = 8 * (size + other) / weights
    return {"perplexity": bench.judge.perplexity(graph), "layer_bits": 8 * size / weights, "bits": bits, "seconds": seconds}


def _simulated(recipe: Recipe) -> Recipe:
    """Return the recipe without what makes the graph integer, which ``Bench`` does after it has judged."""
    passes = [str(item) for item in recipe.parsed_pipeline().passes if item.name() not in FINISH.split(", ")]
    return recipe.model_copy(update={"pipeline": ", ".join(passes)})


if __name__ == "__main__":
    main()

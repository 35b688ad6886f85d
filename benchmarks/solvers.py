"""What every weight solver keeps of a language model's perplexity, at 4, 3 and 2 bits.

    python benchmarks/solvers.py                               # wikilm-5m of the data folder
    python benchmarks/solvers.py --only nearest --only gptq --bits 3 --json

Each row compiles the model with one solver and judges WikiText-2 test in windows of 512 tokens; calibration is WikiText-2 valid. The
linear layers of the blocks get the row's bits (integers in groups of 128 inputs, codebooks by output channel); embedding and head, which
share one weight, are int8 by channel in every row, so that rows differ in their solver alone.
``layer bits`` are stored bits for each weight of the blocks, scales and tables included; ``bits`` are those of the whole model, its
one embedding and everything in float included. ``worse`` is the perplexity beyond the float model's, in percent.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from models.data import data_folder

import qcompile
from qcompile.evaluation import evaluate
from qcompile.recipe import Recipe, Schemes

TABLE = "weight=int8 channel=0 sym; activation=float"
GROUPED = "weight=int{bits} group=128 sym; activation=float"
CHANNEL = "weight=codebook{bits} channel=0 sym; activation=float"
BEFORE = "canonicalize, fold-constants, recognize-attention"


@dataclass(frozen=True)
class Row:
    """A line of the table: the passes that solve, the layers' scheme, passes in the float stage, the scheme of embedding and head."""

    solve: str
    scheme: str = GROUPED
    before: str = ""
    table: str = TABLE

    def recipe(self, name: str, bits: int, samples: int) -> Recipe:
        """Return the recipe of this row at so many bits."""
        steps = [BEFORE, self.before, "assign-bits, insert-quantizers", self.solve, "materialize, fuse-epilogue"]
        schemes = Schemes(linear=self.scheme.format(bits=bits), embedding=self.table, layers={"*lm_head": self.table})
        return Recipe(name=name, pipeline=", ".join(step for step in steps if step), schemes=schemes, calibration_samples=samples)


ROWS = {
    "nearest": Row("quantize-weights"),
    "mse": Row("quantize-weights{solver=mse}"),
    "gptq": Row("quantize-weights{solver=gptq}"),
    "gptq, rows by attention (RSQ)": Row("quantize-weights{solver=gptq, rows=attention}"),
    "gptq, rows by gradient (GuidedQuant)": Row("quantize-weights{solver=gptq, rows=gradient}"),
    "gptq, toward float": Row("quantize-weights{solver=gptq, toward_float=true}"),
    "ldlq (QuIP)": Row("quantize-weights{solver=ldlq}"),
    "ldlq, toward float": Row("quantize-weights{solver=ldlq, toward_float=true}"),
    "comq": Row("quantize-weights{solver=comq}"),
    "gpfq": Row("quantize-weights{solver=gpfq}"),
    "boa": Row("quantize-weights{solver=boa}"),
    "lqer, rank 16 beside nearest": Row("quantize-weights, add-low-rank{weigh=none}"),
    "l2qer, rank 16 beside nearest": Row("quantize-weights, add-low-rank"),
    "low rank 16 by gram, beside ldlq": Row("quantize-weights{solver=ldlq}, add-low-rank{weigh=gram}"),
    "kmeans": Row("quantize-weights{solver=kmeans, table_rows=1}", CHANNEL),
    "lnq": Row("quantize-weights{solver=lnq}", CHANNEL),
    "lnq, rows by gradient (GuidedQuant)": Row("quantize-weights{solver=lnq, rows=gradient, row_groups=4}", CHANNEL),
    "lnq, toward float": Row("quantize-weights{solver=lnq, toward_float=true}", CHANNEL),
    "small: lnq toward float, int4 head": Row(
        "quantize-weights{solver=lnq, toward_float=true}", CHANNEL, table="weight=int4 group=64 sym scale=f16; activation=float"
    ),
}


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Rows whose name begins with this; may be given more than once.")
@click.option("--bits", multiple=True, type=click.IntRange(1, 8), default=(4, 3, 2), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="A Hugging Face folder [wikilm-5m].")
@click.option("--samples", default=64, show_default=True, help="Calibration samples of 256 tokens.")
@click.option("--windows", default=40, show_default=True, help="Windows of 512 tokens that are judged.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON document instead of the table.")
def main(only: tuple[str, ...], bits: tuple[int, ...], folder: Path | None, samples: int, windows: int, json_: bool) -> None:
    """Print the table."""
    folder = folder or data_folder() / "wikilm-5m"
    chosen = {name: row for name, row in ROWS.items() if not only or any(name.startswith(start) for start in only)}
    exact = _measure(folder, "float", samples, windows)
    rows = [{**exact, "solver": "float", "bits_of": 32, "bits": 32.0, "worse": 0.0}]
    if not json_:
        click.echo(f"{'solver':40} {'layer bits':>10} {'bits':>6} {'perplexity':>10} {'worse':>8} {'seconds':>8}")
        click.echo(_line(rows[0]))
    for name, row in chosen.items():
        for width in bits:
            found = _measure(folder, row.recipe(name, width, samples), samples, windows)
            worse = 100 * (found["perplexity"] / exact["perplexity"] - 1)
            rows.append({**found, "solver": name, "bits_of": width, "bits": 32 * found["bytes"] / exact["bytes"], "worse": worse})
            if not json_:
                click.echo(_line(rows[-1]))
    if json_:
        click.echo(json.dumps(rows, indent=1))


def _line(row: dict[str, Any]) -> str:
    bits = f"{row['layer_bits']:10.2f} {row['bits']:6.2f}"
    return f"{row['solver']:40} {bits} {row['perplexity']:10.2f} {row['worse']:7.1f}% {row['seconds']:8.1f}"


def _measure(folder: Path, recipe: str | Recipe, samples: int, windows: int) -> dict[str, Any]:
    """Return perplexity, bits and the seconds of the compile."""
    data = data_folder() / "wikitext2"
    start = time.perf_counter()
    calibration = f"text:{data / 'valid.raw.txt'}?length=256&limit={samples}"
    artifact = qcompile.compile(str(folder), recipe=recipe, target="reference", calibration=calibration)
    seconds = time.perf_counter() - start
    judged = evaluate(artifact, "perplexity", f"text:{data / 'test.raw.txt'}?length=512&limit={windows}", None)
    layers = artifact.report["layers"]
    blocks = [layer for layer in layers if not layer["op"].endswith(".embedding") and "lm_head" not in layer["name"]]
    elements = sum(layer["elements"] for layer in blocks)
    return {
        "perplexity": judged.value,
        "layer_bits": sum(layer["bits_per_weight"] * layer["elements"] for layer in blocks) / elements,
        "bytes": artifact.report["bytes"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()

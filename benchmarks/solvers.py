"""What every weight solver and every fold keeps of a language model's perplexity, at 4, 3 and 2 bits.

    python benchmarks/solvers.py --windows 40                         # wikilm-5m of the data folder, quickly
    python benchmarks/solvers.py --only nearest --only gptq --bits 3 --windows 40
    python benchmarks/solvers.py --results solvers.json --write docs/results_solvers.md

Each row changes the model by one pipeline and judges WikiText-2 test in windows of 512 tokens, by default all of it (402,668 tokens, about
a minute a row); calibration is WikiText-2 valid. The linear layers of the blocks get the row's bits (integers in groups of 128 inputs,
codebooks by output channel, pyramids with one scale); embedding and head, which share one weight unless a fold parts them, are int8 by
channel in every row but ``small``, so that rows differ in their solver or fold alone.
``layer bits`` are stored bits for each weight of the blocks, scales and tables included; ``bits`` are those of the whole model over its
5.4 million weights, its one embedding and everything in float included. ``worse`` is the perplexity beyond the float model's, in percent.

``--results`` keeps what is measured: rows that it holds are not measured again, so that a run can be stopped and go on. ``--write`` writes
the table of all that the file holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from models.data import data_folder
from models.judge import Judge

from qcompile.calibration import parse_calibration
from qcompile.capture import Captured, capture
from qcompile.files import atomic_file
from qcompile.pipeline import Context, parse_pipeline
from qcompile.recipe import Recipe, Schemes
from qcompile.registry import find_pass, find_target
from qcompile.report import build_report

TABLE = "weight=int8 channel=0 sym; activation=float"
GROUPED = "int{bits} group=128 sym"
CHANNEL = "codebook{bits} channel=0 sym"
PYRAMIDS = {4: "pvq6k18g3", 3: "pvq8k14g3", 2: "pvq16k12g3"}  # no more bits than integers in groups
PYRAMID = "{pyramid} tensor sym"
BEFORE = "canonicalize, fold-constants, recognize-attention, recognize-rotary"
SIMULATE = "assign-bits, insert-quantizers"
FINISH = "materialize, fuse-epilogue"
FOLLOW = '{weight="WEIGHT", activation="float"}'  # folds that look at the rounding to come


@dataclass(frozen=True)
class Row:
    """A line of the table: the passes that solve, the layers' scheme, passes in the float stage, the scheme of embedding and head."""

    solve: str
    weight: str = GROUPED
    fold: str = ""
    table: str = TABLE

    def recipe(self, name: str, bits: int, samples: int) -> Recipe:
        """Return the recipe of this row at so many bits, to the end of the simulated stage."""
        weight = self.weight.format(bits=bits, pyramid=PYRAMIDS.get(bits, PYRAMIDS[2]))
        pipeline = ", ".join(step for step in (BEFORE, self.fold.replace("WEIGHT", weight), SIMULATE, self.solve) if step)
        linear = f"weight={weight}; activation=float"
        schemes = Schemes(linear=linear, embedding=self.table, layers={"*lm_head*": self.table})
        return Recipe(name=name, pipeline=pipeline, schemes=schemes, calibration_samples=samples)


NEAREST, GPTQ = "quantize-weights", "quantize-weights{solver=gptq}"
SOLVERS = {
    "nearest": Row(NEAREST),
    "mse": Row("quantize-weights{solver=mse}"),
    "gptq": Row(GPTQ),
    "gptq, rows by attention (RSQ)": Row("quantize-weights{solver=gptq, rows=attention}"),
    "gptq, rows by gradient (GuidedQuant)": Row("quantize-weights{solver=gptq, rows=gradient}"),
    "gptq, toward float": Row("quantize-weights{solver=gptq, toward_float=true}"),
    "ldlq (QuIP)": Row("quantize-weights{solver=ldlq}"),
    "ldlq, toward float": Row("quantize-weights{solver=ldlq, toward_float=true}"),
    "comq": Row("quantize-weights{solver=comq}"),
    "gpfq": Row("quantize-weights{solver=gpfq}"),
    "boa": Row("quantize-weights{solver=boa}"),
    "awq: scale and clip, nearest": Row(NEAREST, fold='smooth{method=awq, weight="WEIGHT"}, clip-weights{weight="WEIGHT"}'),
    "lqer, rank 16 beside nearest": Row(f"{NEAREST}, add-low-rank{{weigh=none}}"),
    "l2qer, rank 16 beside nearest": Row(f"{NEAREST}, add-low-rank"),
    "low rank 16 by gram, beside ldlq": Row("quantize-weights{solver=ldlq}, add-low-rank{weigh=gram}"),
    "kmeans": Row("quantize-weights{solver=kmeans, table_rows=1}", CHANNEL),
    "lnq": Row("quantize-weights{solver=lnq}", CHANNEL),
    "lnq, rows by gradient (GuidedQuant)": Row("quantize-weights{solver=lnq, rows=gradient, row_groups=4}", CHANNEL),
    "lnq, toward float": Row("quantize-weights{solver=lnq, toward_float=true}", CHANNEL),
    "pvq": Row("quantize-weights{solver=pvq}", PYRAMID),
    "pvq, toward float": Row("quantize-weights{solver=pvq, toward_float=true}", PYRAMID),
    "small: lnq toward float, int4 head": Row(
        "quantize-weights{solver=lnq, toward_float=true}", CHANNEL, table="weight=int4 group=64 sym scale=f16; activation=float"
    ),
}
FOLDS = {
    "smooth": "smooth",
    "cross-scale": "cross-scale",
    "learn-scales": f"learn-scales{FOLLOW}",
    "reassemble-channels": f"reassemble-channels{FOLLOW}",
    "rotate stream": "rotate{heads=false, mlp=false}",
    "rotate heads": "rotate{stream=false, mlp=false}",
    "rotate mlp": "rotate{stream=false, heads=false}",
    "rotate": "rotate",
}
ROWS = {
    **SOLVERS,
    **{f"{name}, then nearest": Row(NEAREST, fold=fold) for name, fold in FOLDS.items()},
    "nearest, then tweak-norms": Row(f"{NEAREST}, tweak-norms"),
    **{f"{name}, then gptq": Row(GPTQ, fold=fold) for name, fold in FOLDS.items()},
    "gptq, then tweak-norms": Row(f"{GPTQ}, tweak-norms"),
}


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="A row, or all whose name begins with this; may be given more than once.")
@click.option("--bits", multiple=True, type=click.IntRange(1, 8), default=(4, 3, 2), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="A Hugging Face folder [wikilm-5m].")
@click.option("--samples", default=64, show_default=True, help="Calibration samples of 256 tokens.")
@click.option("--windows", type=click.IntRange(1), help="Windows of 512 tokens that are judged [all].")
@click.option("--results", type=click.Path(path_type=Path), help="Keep what is measured in this JSON file, and do not measure it again.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the table as Markdown.")
def main(
    only: tuple[str, ...],
    bits: tuple[int, ...],
    folder: Path | None,
    samples: int,
    windows: int | None,
    results: Path | None,
    write: Path | None,
) -> None:
    """Print the table."""
    folder = folder or data_folder() / "wikilm-5m"
    bench = Bench(folder, samples, windows, results)
    exact = bench.measure("float", 32, None)
    click.echo(f"{'':40} {'layer bits':>10} {'bits':>6} {'perplexity':>10} {'worse':>8} {'seconds':>8}")
    click.echo(_line(exact, exact))
    chosen = [name for name in ROWS if not only or any(name == one or (one not in ROWS and name.startswith(one)) for one in only)]
    for name in chosen:
        for width in bits:
            row = ROWS[name]
            click.echo(_line(bench.measure(name, width, row.recipe(name, width, samples)), exact))
            if write:
                write.write_text(bench.markdown())


class Bench:
    """Measures rows, or remembers them.

    Attributes:
        found: name of a measurement -> its row, those of other runs in the results file included.
    """

    def __init__(self, folder: Path, samples: int, windows: int | None, results: Path | None) -> None:
        data = data_folder() / "wikitext2"
        self.samples, self.results, self.windows = samples, results, windows
        self.captured: Captured = capture(str(folder))
        self.judge = Judge(folder, data / "test.raw.txt", windows)
        self.calibration = f"text:{data / 'valid.raw.txt'}?length=256"
        self.found: dict[str, dict[str, Any]] = {}

    def measure(self, name: str, bits: int, recipe: Recipe | None) -> dict[str, Any]:
        """Return ``perplexity``, ``layer_bits``, ``bits`` and the ``seconds`` that solving took."""
        return self.remember(name, bits, lambda: self._measured(recipe))

    def remember(self, name: str, bits: int, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row that is known, or measure it and keep it."""
        key = f"{name} | {bits} bits | {self.samples} samples | {self.windows or 'all'} windows"
        self._read()
        if key not in self.found:
            row = {"name": name, "width": bits, "samples": self.samples, "windows": self.windows, **measured()}
            self._read()  # another process may have added rows
            self.found[key] = row
            if self.results:
                with atomic_file(self.results) as file:
                    file.write(json.dumps(self.found, indent=1).encode())
        return self.found[key]

    def _read(self) -> None:
        if self.results and self.results.exists():
            self.found |= json.loads(self.results.read_text())

    def _measured(self, recipe: Recipe | None) -> dict[str, Any]:
        graph, start = self.captured.graph.copy(), time.perf_counter()
        data = parse_calibration(
            self.calibration, example_inputs=self.captured.example_inputs, tokenizer_folder=self.captured.folder, limit=self.samples
        )
        context = Context(find_target("reference"), recipe, data, self.captured.example_inputs)
        parse_pipeline(recipe.pipeline if recipe else BEFORE, find_pass).run(graph, context)
        seconds = time.perf_counter() - start
        perplexity = self.judge.perplexity(graph)
        weights = sum(t.numel() for t in self.captured.graph.constants.values() if t.ndim == 2)
        if recipe:
            parse_pipeline(FINISH, find_pass).run(graph, context)
        report = build_report(graph, context, {})
        blocks = [layer for layer in report["layers"] if not layer["op"].endswith("embedding") and "lm_head" not in layer["name"]]
        stored = sum(layer["bits_per_weight"] * layer["elements"] for layer in blocks)
        elements = sum(layer["elements"] for layer in blocks if "low_rank" not in layer["name"])
        return {"perplexity": perplexity, "layer_bits": stored / elements, "bits": 8 * report["bytes"] / weights, "seconds": seconds}

    def markdown(self) -> str:
        """Return the table of all rows that were measured on as many samples and windows as this run's."""
        rows = [row for row in self.found.values() if (row["samples"], row["windows"]) == (self.samples, self.windows)]
        exact = next(row["perplexity"] for row in rows if row["name"] == "float")
        widths = sorted({row["width"] for row in rows if row["name"] != "float"}, reverse=True)
        limit = f" --windows {self.windows}" if self.windows else ""
        lines = [
            "# Every solver and every fold on a language model",
            "",
            f"Written by `python benchmarks/solvers.py{limit} --results FILE --write THIS`; the script says what is measured.",
            f"wikilm-5m, {self.judge.tokens} tokens of WikiText-2 test, calibrated on {self.samples} times 256 tokens of WikiText-2 valid;",
            f"float perplexity {exact:.2f}. A cell: perplexity, how much worse than float, stored bits for each weight of the blocks (in",
            "brackets all weights of the model with embedding and head). What is not there was not measured: the command goes",
            "on where its FILE ends.",
            "",
            "| | " + " | ".join(f"{width} bits" for width in widths) + " |",
            "| --- |" + " --- |" * len(widths),
        ]
        for name in ROWS:
            cells = [next((_cell(row, exact) for row in rows if (row["name"], row["width"]) == (name, width)), "") for width in widths]
            lines += [f"| {name} | " + " | ".join(cells) + " |"] * any(cells)
        return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], exact: float) -> str:
    worse = f"{100 * (row['perplexity'] / exact - 1):+.{1 if row['perplexity'] < 2 * exact else 0}f} %"
    return f"{row['perplexity']:.2f} {worse}, {row['layer_bits']:.2f} ({row['bits']:.2f})"


def _line(row: dict[str, Any], exact: dict[str, Any]) -> str:
    worse = f"{100 * (row['perplexity'] / exact['perplexity'] - 1):7.1f}%"
    return f"{row['name']:40} {row['layer_bits']:10.2f} {row['bits']:6.2f} {row['perplexity']:10.2f} {worse} {row['seconds']:8.1f}"


if __name__ == "__main__":
    main()

"""Perplexity after each fold, with and without planted outlier channels: what nearest rounding loses, and the share that a fold recovers.

    python benchmarks/folds.py                              # wikilm-5m of the data folder: weights 4, activations 8, cache 4 bits
    python benchmarks/folds.py --scheme W4A4 --only float,nearest,rotate

The model is calibrated on WikiText-2 valid and judged on WikiText-2 test. Planted outliers are four channels of every normalization times
30, with the columns that read them divided by 30: the float function is the same. A fold recovers (nearest - fold) / (nearest - float) of
the perplexity that nearest rounding loses on the same model, and in the last column (nearest planted - fold planted) /
(nearest planted - nearest) of what it loses by the outliers alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch
from models.planted import plant_outliers

from qcompile.calibration import parse_calibration
from qcompile.capture import Captured, capture
from qcompile.generation.text import read_tokenizer
from qcompile.graph import Graph
from qcompile.perplexity import measure, read_windows
from qcompile.pipeline import Context, parse_pipeline
from qcompile.registry import find_pass, find_target

CAPTURED = "canonicalize, fold-constants, fold-batch-norm, recognize-attention"
CACHE = ", quantize-cache{key=4, value=4}"
SCHEMES = {
    "W4A8KV4": ("weight=int4 channel=0 sym; activation=int8 token sym dynamic", CACHE),
    "W4A4KV4": ("weight=int4 channel=0 sym; activation=int4 token sym dynamic", CACHE),
    "W4A4": ("weight=int4 channel=0 sym; activation=int4 token sym dynamic", ""),
    "W8A8": ("weight=int8 channel=0 sym; activation=int8 tensor sym", ""),
    "W8A8-token": ("weight=int8 channel=0 sym; activation=int8 token sym dynamic", ""),
    "W3": ("weight=int3 group=64 sym; activation=float", ""),
    "W2": ("weight=int2 group=64 sym; activation=float", ""),
}  # fmt: skip
FOLDS = {
    "nearest": "",
    "smooth": "smooth",
    "cross-scale": "cross-scale",
    "learn-scales": 'learn-scales{{weight="{weight}", activation="{activation}"}}',
    "reassemble-channels": 'reassemble-channels{{weight="{weight}", activation="{activation}"}}',
    "rotate stream": "rotate{{heads=false, mlp=false}}",
    "rotate heads": "rotate{{stream=false, mlp=false}}",
    "rotate mlp": "rotate{{stream=false, heads=false}}",
    "rotate": "rotate",
    "rotate with keys": "rotate{{keys=true}}",
}
SOLVED = {"gptq": "", "smooth + gptq": "smooth", "rotate + gptq": "rotate{{keys=true}}"}
TWEAKED = {"tweak-norms": ""}


@click.command(help=__doc__)
@click.option("--scheme", type=click.Choice(sorted(SCHEMES)), default="W4A8KV4", show_default=True)
@click.option("--only", help="Rows to print, joined by commas [all].")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens that are judged.")
@click.option("--samples", default=64, show_default=True, help="Windows for calibration.")
def main(scheme: str, only: str | None, windows: int, samples: int) -> None:
    """Print the table."""
    folder = Path(os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    captured = capture(str(folder / "wikilm-5m"))
    valid = f"text:{folder / 'wikitext2' / 'valid.raw.txt'}"
    plain = captured.graph
    parse_pipeline(CAPTURED, find_pass).run(plain, _context(captured, valid, samples))
    planted = plain.copy()
    plant_outliers(planted)
    judged = folder / "wikitext2" / "test.raw.txt"

    def perplexity(graph: Graph) -> float:
        assert captured.folder is not None
        tokenizer = read_tokenizer((captured.folder / "tokenizer.json").read_bytes())
        return measure(lambda batch: graph(*batch), None, read_windows(judged, tokenizer, 512, None, windows), 4096).perplexity

    exact = perplexity(plain)
    click.echo(f"{scheme}, float {exact:.3f}, {windows} windows")
    click.echo(f"{'':24s} {'plain':>10s} {'recovered':>10s} {'planted':>10s} {'recovered':>10s} {'of outliers':>12s}")
    chosen = [name for name in {**FOLDS, **SOLVED, **TWEAKED} if only is None or name in only.split(",")]
    nearest: tuple[float, float] | None = None
    for name in ["nearest", *(name for name in chosen if name != "nearest")]:
        found = []
        for graph in (plain, planted):
            made, context = graph.copy(), _context(captured, valid, samples)
            parse_pipeline(_pipeline(name, scheme), find_pass).run(made, context)
            found.append(perplexity(made))
        told = next((f"  {place}: {note}" for place, note in context.notes if note.startswith(name)), "")  # of the planted graph
        nearest = nearest or (found[0], found[1])
        shares = [100 * (lost - value) / (lost - exact) for lost, value in zip(nearest, found, strict=True)]
        outliers = 100 * (nearest[1] - found[1]) / (nearest[1] - nearest[0])
        click.echo(f"{name:24s} {found[0]:10.3f} {shares[0]:9.1f}% {found[1]:10.3f} {shares[1]:9.1f}% {outliers:11.1f}%{told}")


def _context(captured: Captured, data: str, samples: int) -> Context:
    calibration = parse_calibration(data, example_inputs=captured.example_inputs, tokenizer_folder=captured.folder, limit=samples)
    return Context(find_target("reference"), calibration=calibration, example_inputs=captured.example_inputs)


def _pipeline(name: str, scheme: str) -> str:
    text, cache = SCHEMES[scheme]
    weight, activation = (part.partition("=")[2] for part in text.split("; "))
    fold = {**FOLDS, **SOLVED, **TWEAKED}[name].format(weight=weight, activation=activation)
    solver = "{solver=gptq}" if name in SOLVED else ""
    tweak = ", tweak-norms" if name in TWEAKED else ""
    return f'{fold + ", " if fold else ""}assign-bits{{scheme="{text}"}}, insert-quantizers{cache}, quantize-weights{solver}{tweak}'


if __name__ == "__main__":
    with torch.no_grad():
        main()

"""Perplexity of small caches at equal bits: codes with scales, codes of coupled channels, and either with the step at hand in float.

    python benchmarks/caches.py                             # wikilm-5m of the data folder
    python benchmarks/caches.py --only kv2,coupled4

Nothing but the caches is quantized. Tables are learned on WikiText-2 valid, perplexity is that of WikiText-2 test in windows of 512 tokens.
Under ``past_only`` it is that of reading token by token, where a token meets its own key and value in float and codes of all others. Bytes
are those that one token takes in all caches, scales and zero points counted; tables of vectors are counted once, beside them.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch
from qcompile.passes.materialize import Materialize

from qcompile.calibration import parse_calibration
from qcompile.capture import capture
from qcompile.generation import decoder_entries
from qcompile.generation.text import read_tokenizer
from qcompile.perplexity import measure, read_windows
from qcompile.pipeline import Context, Pipeline, parse_pipeline
from qcompile.registry import find_pass, find_target

CAPTURED = "canonicalize, fold-constants, fold-batch-norm, recognize-attention, recognize-rotary"
CACHES = {
    "kv4": "key=4, value=4",
    "kv4-token": "key=4, value=4, per=token",
    "kv4-before-rotary": "key=4, value=4, rotary=before",
    "coupled2": "coupled=2, rotary=before",
    "kv2": "key=2, value=2",
    "kv2-token": "key=2, value=2, per=token",
    "kv2-before-rotary": "key=2, value=2, rotary=before",
    "coupled4": "coupled=4, rotary=before",
    "coupled4-fisher": "coupled=4, rotary=before, fisher=true",
    "coupled8": "coupled=8, rotary=before",
    "coupled8-fisher": "coupled=8, rotary=before, fisher=true",
}


@click.command(help=__doc__)
@click.option("--only", help="Rows to print, joined by commas [all].")
@click.option("--windows", default=40, show_default=True, help="Windows of 512 tokens that are judged.")
@click.option("--samples", default=64, show_default=True, help="Windows that tables are learned from.")
@click.option("--rows", default=8192, show_default=True, help="Tokens of these windows that a table is learned from.")
def main(only: str | None, windows: int, samples: int, rows: int) -> None:
    """Print the table."""
    folder = Path(os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    captured = capture(str(folder / "wikilm-5m"))
    assert captured.folder is not None
    tokenizer = read_tokenizer((captured.folder / "tokenizer.json").read_bytes())
    text, target = f"text:{folder / 'wikitext2' / 'valid.raw.txt'}?length=512", find_target("reference")
    data = parse_calibration(text, example_inputs=captured.example_inputs, tokenizer_folder=captured.folder, limit=samples)
    context = Context(target, calibration=data, example_inputs=captured.example_inputs)
    parse_pipeline(CAPTURED, find_pass).run(captured.graph, context)

    def perplexity(graph) -> float:  # type: ignore[no-untyped-def]
        judged = read_windows(folder / "wikitext2" / "test.raw.txt", tokenizer, 512, None, windows)
        return measure(lambda batch: graph(*batch), None, judged, 4096).perplexity

    click.echo(f"float {perplexity(captured.graph):.3f}, {windows} windows")
    click.echo(f"{'':24s} {'perplexity':>10s} {'past only':>10s} {'bytes/token':>12s} {'tables, kB':>11s}")
    for name, options in CACHES.items():
        if only and name not in only.split(","):
            continue
        found = []
        for more in ("", ", past_only=true"):
            graph = captured.graph.copy()
            parse_pipeline(f"quantize-cache{{{options}{more}, rows={rows}}}", find_pass).run(graph, context)
            found.append(perplexity(graph))
        tables = sum(value.nbytes for key, value in graph.constants.items() if key.endswith(".vectors"))
        Pipeline((Materialize(),)).run(graph, context)
        entries = decoder_entries(graph, 512)
        click.echo(f"{name:24s} {found[0]:10.3f} {found[1]:10.3f} {entries.bytes_per_token:12d} {tables / 1e3:11.0f}")


if __name__ == "__main__":
    with torch.no_grad():
        main()

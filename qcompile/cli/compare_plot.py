"""The picture of a comparison: what each recipe reaches over the bits it stores for a weight, the float model as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qcompile.cli.picture import new_figure
from qcompile.comparison import Row


def plot_rows(rows: Sequence[Row], path: Path, task: str, title: str) -> None:
    """Write a PNG or SVG picture, by the path's ending; rows that failed are left out.

    Raises:
        Refused: another ending, or matplotlib is not installed.
    """
    figure = new_figure(path, 7, 5)
    axes = figure.subplots()
    made = [row for row in rows if not row.reason]
    axes.scatter([row.bits_per_weight for row in made], [row.value for row in made])
    for row in made:
        axes.annotate(row.label, (row.bits_per_weight, row.value), xytext=(5, 4), textcoords="offset points", fontsize="small")
    exact = next((row.float_value for row in made if row.float_value is not None), None)
    if exact is not None:
        axes.axhline(exact, color="gray", linestyle="--", linewidth=1)
        axes.annotate("float model", (1, exact), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
                      ha="right", color="gray", fontsize="small")  # fmt: skip
    if task == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.6g}")
        axes.yaxis.set_minor_formatter("{x:.6g}")
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel(f"{task} ({made[0].unit})" if made else task)
    axes.set_title(title)
    figure.savefig(path, dpi=150)

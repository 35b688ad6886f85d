"""The picture of a bench: one bar for each runtime, from the median, with the span of the smallest time to the 90th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.cli.picture import new_figure


def plot_runs(runs: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG or SVG picture, by the path's ending.

    Raises:
        Refused: another ending, or matplotlib is not installed.
    """
    figure = new_figure(path, 7, 1 + 0.4 * len(runs))
    axes = figure.subplots()
    medians = [run["median_ms"] for run in runs]
    below, above = [run["median_ms"] - run["min_ms"] for run in runs], [run["p90_ms"] - run["median_ms"] for run in runs]
    colors = ["tab:blue" if run["name"] == "qcompile" else "lightgray" for run in runs]
    bars = axes.barh([run["name"] for run in runs], medians, xerr=[below, above], color=colors, ecolor="gray", capsize=3)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("ms a call (median; bar: smallest to 90th percentile)")
    axes.set_title(title)
    figure.savefig(path, dpi=150)

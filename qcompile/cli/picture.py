"""Pictures that commands draw: one figure, written as the file's ending says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompile.errors import Refused


def new_figure(path: Path, width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this size in inches, to be saved under ``path``.

    Raises:
        Refused: the name ends in neither .png nor .svg, or matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise Refused(f"'{path}' is no name of a picture", way_out="end it in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused("matplotlib is not installed", way_out="pip install qcompile[bench]") from error
    return Figure(figsize=(width, height), layout="constrained")

"""The published methods behind the project, and which of them work.

A method counts when its check runs as a command on real data and passes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Method:
    """A method: its number and name, the shared piece it stands on (A to Q), its status, and the command that shows it.

    The status is ``works``, ``partial`` or ``planned``.
    """

    number: int
    name: str
    piece: str
    status: str
    command: str


def read_methods() -> list[Method]:
    """Return all methods by number, as ``methods.csv`` lists them."""
    text = resources.files("qcompile").joinpath("methods.csv").read_text()
    return [
        Method(int(row["number"]), row["name"], row["piece"], row["status"], row["command"]) for row in csv.DictReader(text.splitlines())
    ]

"""The table of measured kernel times: a readable file, an input of the build.

A key names operator, shapes, scheme and machine; a value holds the smallest microseconds of the low-bit kernel and of the float kernel
it would replace. What was measured once is reused, so the same table gives the same artifact.
"""

from __future__ import annotations

import json
from pathlib import Path

from qcompile.errors import Refused
from qcompile.files import write_atomic


class KernelTimes:
    """Measured times, read from and written to one JSON file.

    Args:
        path: the file; it need not exist.

    Raises:
        Refused: the file exists and is no such table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: dict[str, dict[str, float]] = {}
        self.entries: dict[str, dict[str, float]] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
                self.entries = {
                    str(key): {"low_us": float(value["low_us"]), "float_us": float(value["float_us"])} for key, value in content.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Refused(
                    "the table of kernel times is damaged", node=str(path), way_out="remove the file; it will be measured again"
                ) from error

    def get(self, key: str) -> dict[str, float] | None:
        """Return the entry of a key and note that it was used, or None."""
        if key in self.entries:
            self.used[key] = self.entries[key]
        return self.entries.get(key)

    def add(self, key: str, low_us: float, float_us: float) -> None:
        """Record a measurement and write the table at once: a killed compile has not measured in vain."""
        self.entries[key] = {"low_us": round(low_us, 2), "float_us": round(float_us, 2)}
        write_atomic(self.path, (json.dumps(self.entries, indent=1, sort_keys=True) + "\n").encode())

"""The table of tiles that kernels were tuned to: a readable file, an input of the build.

    {"sapphirerapids amx 2 threads": {
      "qc.linear 384x1536, 65-512 rows; weight int8 channel=0 sym; x uint8 tensor affine": {
        "tile": {"packed_bytes": 524288, "rows": 32, "vectors": 2, "words": 512}, "tried": 9, "us": 205.1, "default_us": 224.6}}}

A tile is a set of block sizes, meaningful to the target alone. It decides how fast a kernel is and in which order its weights lie in
memory, never what an integer kernel computes; a tile that a kernel cannot have is passed over. So no table is needed for a right
result, and no table spoils one. The same graph, processor and tiles give the same code. The times beside a tile decide nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

logger = logging.getLogger(__name__)

Tile = Mapping[str, int]


class TunedLayer(BaseModel):
    """What was found for a layer on a machine.

    Attributes:
        tile: the fastest sizes; empty where they are the target's own choice.
        tried: how many others were measured, in the target's order; a later search goes on behind them.
        us: microseconds that the layer's kernels take with the tile, all of them in one call of the model.
        default_us: the same with the target's own choice, measured in turns with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    tile: dict[str, Annotated[int, Field(ge=1, le=1 << 31)]]
    tried: int = Field(ge=0)
    us: float = Field(ge=0)
    default_us: float = Field(ge=0)


_TABLE = TypeAdapter(dict[str, dict[str, TunedLayer]])


@dataclass(frozen=True)
class KernelTiles:
    """Tuned layers by machine and by the target's name of the layer."""

    machines: Mapping[str, Mapping[str, TunedLayer]] = field(default_factory=dict)

    def of(self, machine: str) -> Mapping[str, TunedLayer]:
        """Return what is known of a machine."""
        return self.machines.get(machine, {})

    def updated(self, newer: KernelTiles) -> KernelTiles:
        """Return both tables as one; of a layer that both know, the newer entry."""
        names = {**self.machines, **newer.machines}
        return KernelTiles({name: {**self.of(name), **newer.of(name)} for name in names})

    def to_json(self) -> bytes:
        """Return the table as it stands in a file."""
        content = {machine: {name: layer.model_dump() for name, layer in layers.items()} for machine, layers in self.machines.items()}
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def parse_tiles(content: bytes, place: str) -> KernelTiles:
    """Return the table that a file holds. A damaged one counts as empty; a warning then names the place it came from."""
    try:
        return KernelTiles(_TABLE.validate_json(content))
    except ValidationError as error:
        logger.warning("%s is no table of kernel tiles and is ignored: %s", place, " ".join(str(error.errors()[0]["msg"]).split())[:200])
        return KernelTiles()


def read_tiles(path: Path) -> KernelTiles:
    """Return the table in a file; a missing file is an empty table, a damaged one too, with a warning."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return KernelTiles()
    except OSError as error:
        logger.warning("%s cannot be read and is ignored: %s", path, error.strerror)
        return KernelTiles()
    return parse_tiles(content, str(path))


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        machine: the name of the machine in the table.
        table: the file that now holds the result too.
        layers: of the model, by the target's names.
        default_ms, tuned_ms: smallest milliseconds of a call of the model before and after, measured in turns.
    """

    machine: str
    table: Path
    layers: Mapping[str, TunedLayer]
    default_ms: float
    tuned_ms: float

    def tiles(self) -> KernelTiles:
        """Return the layers as a table."""
        return KernelTiles({self.machine: self.layers})

"""What a caller must know of built code, and of the folder that it is saved in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from qcompile.backends.cpu.kernels.processor import CHOICE
from qcompile.backends.cpu.kernels.processor import machine as processor_machine
from qcompile.backends.lowering.fallback import Fallback

from qcompile.errors import Refused

# Files of the folder: the code, the code that launches its parallel loops, its constants, its interface.
LIBRARY, TEAM, CONSTANTS, INTERFACE = "library.so", "team.so", "constants.safetensors", "interface.json"


@dataclass(frozen=True)
class Port:
    """An input: its name, dtype and shape; a symbol stands for a size known at the call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Interface:
    """What a caller must know of the code.

    Attributes:
        inputs: in order.
        outputs: their names, taps last.
        taps: how many outputs are taps.
        constants: their names, in order.
        fallbacks: nodes without a kernel of this target.
        machine: the architecture that the code is for.
        features: LLVM features of the processor that the code may use.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    taps: int
    constants: tuple[str, ...]
    fallbacks: tuple[Fallback, ...] = field(default=())
    machine: str = field(default_factory=processor_machine)
    features: tuple[str, ...] = ()


def check_shape(port: Port, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    if len(shape) != len(port.shape):
        raise Refused(f"has {len(port.shape)} axes, not {len(shape)}", node=port.name)
    for expected, size in zip(port.shape, shape, strict=True):
        wanted = sizes.setdefault(expected, size) if isinstance(expected, str) and expected.isidentifier() else expected
        if isinstance(wanted, int) and wanted != size:
            raise Refused(f"has the shape {list(port.shape)}, not {list(shape)}", node=port.name)


def check_processor(interface: Interface, folder: Path, available: frozenset[str]) -> None:
    """Refuse code that would stop the process at an instruction this processor does not have."""
    lacks = ""
    if interface.machine != processor_machine():
        lacks = f"the code is for {interface.machine}, this machine is {processor_machine()}"
    elif missing := sorted(set(interface.features) - available):
        lacks = f"the code uses {', '.join(missing)}, which this processor lacks"
    if lacks:
        raise Refused(lacks, node=str(folder), way_out=f"compile the model on this machine, or with {CHOICE} set to what it has")


def read_interface(folder: Path) -> Interface:
    """Return the interface of saved code."""
    read = json.loads((folder / INTERFACE).read_text())
    return Interface(
        tuple(Port(port["name"], port["dtype"], tuple(port["shape"])) for port in read["inputs"]),
        tuple(read["outputs"]),
        read["taps"],
        tuple(read["constants"]),
        tuple(Fallback(**fallback) for fallback in read["fallbacks"]),
        read["machine"],
        tuple(read["features"]),
    )

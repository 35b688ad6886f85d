"""Boards: the core, its clock, and the memories that a model has to fit into.

Sizes are those of the data sheets named with each board. RAM is what lies in one piece and holds variables: memories for instructions
alone, retention and caches do not count, and neither does RAM outside the chip. Flash is the chip's own, or, where that has none, the
board's.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.backends.edge.processors import PROCESSORS, Processor

from qcompile.errors import Refused
from qcompile.nearest import nearest_name

KILOBYTE = 1024


@dataclass(frozen=True)
class Board:
    """A board that one can buy, or one that QEMU emulates.

    Attributes:
        name: for ``--board``.
        processor: name of its core in ``processors.py``.
        clock_mhz: the fastest that the data sheet allows.
        flash_bytes: of it, all; a boot loader takes its part of it.
        ram_bytes: of it, all; stack, heap and other software take their part.
        chip: whose data sheet says so.
    """

    name: str
    processor: str
    clock_mhz: int
    flash_bytes: int
    ram_bytes: int
    chip: str

    @property
    def core(self) -> Processor:
        """What its processor can do."""
        return PROCESSORS[self.processor]


def _board(name: str, processor: str, clock_mhz: int, flash: int, ram: int, chip: str) -> Board:
    return Board(name, processor, clock_mhz, flash * KILOBYTE, ram * KILOBYTE, chip)


_ALL = (
    _board("rp2040", "cortex-m0+", 133, 2048, 264, "RP2040 (six banks in one piece) with the flash of a Raspberry Pi Pico"),
    _board("nrf52840", "cortex-m4", 64, 1024, 256, "nRF52840"),
    _board("arduino-nano-33-ble", "cortex-m4", 64, 1024, 256, "nRF52840"),
    _board("microbit-v2", "cortex-m4", 64, 512, 128, "nRF52833"),
    _board("nucleo-f446re", "cortex-m4", 180, 512, 128, "STM32F446RE (SRAM1 and SRAM2)"),
    _board("nucleo-f412zg", "cortex-m4", 100, 1024, 256, "STM32F412ZG"),
    _board("stm32f4-discovery", "cortex-m4", 168, 1024, 128, "STM32F407VG (SRAM1 and SRAM2, without 64 KB of CCM)"),
    _board("nucleo-l4r5zi", "cortex-m4", 120, 2048, 640, "STM32L4R5ZI (SRAM1, SRAM2 and SRAM3)"),
    _board("stm32f746-disco", "cortex-m7", 216, 1024, 320, "STM32F746NG (DTCM, SRAM1 and SRAM2)"),
    _board("nucleo-h743zi", "cortex-m7", 480, 2048, 512, "STM32H743ZI (AXI SRAM)"),
    _board("nrf5340-dk", "cortex-m33", 128, 1024, 512, "nRF5340, application core"),
    _board("rp2350", "cortex-m33", 150, 4096, 520, "RP2350 (ten banks in one piece) with the flash of a Raspberry Pi Pico 2"),
    _board("esp32-c3", "riscv32imc", 160, 4096, 384, "ESP32-C3 (without 16 KB of cache) with the flash of an ESP32-C3-MINI-1"),
    _board("mps2-an386", "cortex-m4", 25, 4096, 4096, "Arm application note AN386 (emulated)"),
    _board("mps2-an500", "cortex-m7", 25, 4096, 4096, "Arm application note AN500 (emulated)"),
    _board("mps2-an505", "cortex-m33", 20, 4096, 4096, "Arm application note AN505 (emulated)"),
    _board("mps3-an547", "cortex-m55", 32, 8192, 4096, "Arm application note AN547 (emulated)"),
)

BOARDS = {board.name: board for board in _ALL}


def find_board(name: str) -> Board:
    """Return the board of this name, such as ``stm32f746-disco``.

    Raises:
        Refused: there is none; the message gives the nearest name.
    """
    if name not in BOARDS:
        raise Refused(f"unknown board '{name}'", way_out=nearest_name(name, BOARDS))
    return BOARDS[name]

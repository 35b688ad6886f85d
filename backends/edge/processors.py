"""Processors that C is made for: the compiler and its flags, what the core can do, and the QEMU machine that proves it.

Everything here is data. A processor without an operating system has an emulated machine with memories of its own; the sizes of a real
board's memories stand in ``boards.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.errors import Refused
from qcompile.nearest import nearest_name

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Machine:
    """Where an emulated machine without an operating system has its memories.

    Attributes:
        vectors_at: address of the vector table that the core reads first.
        flash_at: address of what is only read; the machines have RAM there.
        ram_at: address of arena, stack and variables.
        flash_bytes: size of the first.
        ram_bytes: size of the second.
    """

    vectors_at: int
    flash_at: int
    ram_at: int
    flash_bytes: int = 4 * MEGABYTE - 4096  # without the vectors
    ram_bytes: int = 4 * MEGABYTE


@dataclass(frozen=True)
class Processor:
    """A core, or a family of cores that run the same instructions.

    Attributes:
        name: after ``edge:`` on the command line.
        summary: one line for the docs' table.
        prefix: of the GNU tools: ``arm-none-eabi-``.
        flags: that choose the core.
        link: more flags for linking a program.
        port: ``example/port_NAME.c`` starts the example: ``cortex_m``, ``riscv32`` or ``hosted``.
        emulator: the command of QEMU that runs a program; its name follows.
        machine: its memories; None where there is an operating system.
        features: instructions that C cannot say plainly: ``dsp`` (SMLAD), ``mve``, ``fpu``, ``neon``, ``dotprod``, ``i8mm``.
        alignment: bytes that an arena begins at a multiple of.
    """

    name: str
    summary: str
    prefix: str
    flags: tuple[str, ...]
    link: tuple[str, ...]
    port: str
    emulator: tuple[str, ...]
    machine: Machine | None = None
    features: frozenset[str] = field(default_factory=frozenset)
    alignment: int = 16

    @property
    def tools(self) -> tuple[str, ...]:
        """The commands that building and running the example take, beside make."""
        return (f"{self.prefix}gcc", self.emulator[0])


# Without a C library's own start-up; --specs=nano.specs has the smaller memcpy.
_BARE = ("--specs=nano.specs", "-nostartfiles", "-Wl,-T,example/link.ld")
_SEMIHOSTING = ("-nographic", "-semihosting-config", "enable=on,target=native", "-kernel")


def _cortex_m(name: str, summary: str, flags: str, machine: str, memory: Machine, features: str = "", more: tuple[str, ...] = (),
              alignment: int = 8) -> Processor:  # fmt: skip
    emulator = ("qemu-system-arm", "-M", machine, *more, *_SEMIHOSTING)
    known = frozenset(features.split())
    return Processor(name, summary, "arm-none-eabi-", (*flags.split(), "-mthumb"), _BARE, "cortex_m", emulator, memory, known, alignment)


def _linux(name: str, summary: str, prefix: str, flags: str, emulator: str, features: str = "") -> Processor:
    known = frozenset(features.split())
    return Processor(name, summary, prefix, (*flags.split(), "-fno-pie"), ("-static",), "hosted", tuple(emulator.split()), features=known)


# The machine has 256 KB and 16 KB; more of both lets every model be tried on the one Cortex-M0 there is. Like a Cortex-M0+ it traps at
# what is not aligned; the two run the same instructions.
_LARGER_MICROBIT = ("-global", "nrf51-soc.flash-size=0x400000", "-global", "nrf51-soc.sram-size=0x400000")

_ALL = (
    _cortex_m("cortex-m0+", "Armv6-M: no long multiply, no division, everything aligned", "-mcpu=cortex-m0plus", "microbit",
              Machine(0, 0x1000, 0x2000_0000), more=_LARGER_MICROBIT, alignment=4),
    _cortex_m("cortex-m4", "Armv7E-M with FPU: two 16-bit products in an instruction",
              "-mcpu=cortex-m4 -mfloat-abi=hard -mfpu=fpv4-sp-d16", "mps2-an386", Machine(0, 0x1000, 0x2000_0000), "dsp fpu"),
    _cortex_m("cortex-m7", "Armv7E-M with FPU, two instructions at once",
              "-mcpu=cortex-m7 -mfloat-abi=hard -mfpu=fpv5-sp-d16", "mps2-an500", Machine(0, 0x1000, 0x2000_0000), "dsp fpu"),
    _cortex_m("cortex-m33", "Armv8-M Mainline with DSP and FPU",
              "-mcpu=cortex-m33 -mfloat-abi=hard -mfpu=fpv5-sp-d16", "mps2-an505",
              Machine(0x1000_0000, 0x1000_1000, 0x3800_0000), "dsp fpu"),
    _cortex_m("cortex-m55", "Armv8.1-M with vectors of 128 bits (Helium)", "-mcpu=cortex-m55 -mfloat-abi=hard", "mps3-an547",
              Machine(0, 0x6000_0000, 0x2100_0000), "dsp fpu mve", alignment=16),
    _linux("aarch64", "Armv8-A with Advanced SIMD", "aarch64-linux-gnu-", "-march=armv8-a", "qemu-aarch64 -cpu cortex-a53", "neon"),
    _linux("aarch64-dotprod", "Armv8.2-A with products of four bytes", "aarch64-linux-gnu-", "-march=armv8.2-a+dotprod",
           "qemu-aarch64 -cpu cortex-a76", "neon dotprod"),
    _linux("aarch64-i8mm", "Armv8.2-A with products of matrices of bytes", "aarch64-linux-gnu-", "-march=armv8.2-a+dotprod+i8mm",
           "qemu-aarch64 -cpu max", "neon dotprod i8mm"),
    _linux("armv7", "Armv7-A with Advanced SIMD", "arm-linux-gnueabihf-", "-march=armv7-a -mfpu=neon-vfpv4 -mfloat-abi=hard",
           "qemu-arm -cpu cortex-a7", "neon"),
    Processor("riscv32imc", "RISC-V of 32 bits with multiplication", "riscv64-unknown-elf-",
              ("-march=rv32imc", "-mabi=ilp32", "--specs=picolibc.specs"),
              ("-nostartfiles", "-Wl,-e,start"), "riscv32",
              ("qemu-riscv32", "-cpu", "rv32,a=off,f=off,d=off"), alignment=4),
    _linux("riscv64gc", "RISC-V of 64 bits", "riscv64-linux-gnu-", "-march=rv64gc -mabi=lp64d", "qemu-riscv64 -cpu sifive-u54"),
    _linux("x86-64", "any x86 of 64 bits", "", "-march=x86-64 -mno-red-zone", "qemu-x86_64"),
)  # fmt: skip

PROCESSORS = {processor.name: processor for processor in _ALL}

# The Debian packages that bring each tool.
PACKAGES = {
    "make": ("make",),
    "gcc": ("gcc", "libc6-dev"),
    "arm-none-eabi-gcc": ("gcc-arm-none-eabi", "libnewlib-arm-none-eabi"),
    "aarch64-linux-gnu-gcc": ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"),
    "arm-linux-gnueabihf-gcc": ("gcc-arm-linux-gnueabihf", "libc6-dev-armhf-cross"),
    "riscv64-linux-gnu-gcc": ("gcc-riscv64-linux-gnu", "libc6-dev-riscv64-cross"),
    "riscv64-unknown-elf-gcc": ("gcc-riscv64-unknown-elf", "picolibc-riscv64-unknown-elf"),
    "qemu-system-arm": ("qemu-system-arm",),
    **{f"qemu-{name}": ("qemu-user",) for name in ("aarch64", "arm", "riscv32", "riscv64", "x86_64")},
}


def find_processor(name: str) -> Processor:
    """Return the processor of this name, such as ``cortex-m4``.

    Raises:
        Refused: there is none; the message gives the nearest name.
    """
    if name not in PROCESSORS:
        raise Refused(f"unknown processor '{name}'", way_out=nearest_name(name, PROCESSORS))
    return PROCESSORS[name]

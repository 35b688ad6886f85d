"""Instruction sets that the kernels are written for, and the TVM target of a machine.

A kernel is written in vectors of sixteen lanes; what differs between sets is the product of bytes (``byte_products``), how many vectors
fit the registers, and whether there is a fused multiply-add. ``SETS`` declares these; tests run every set of it.

The set is chosen when code is made: the best one of this machine, or the one that the environment variable ``QCOMPILE_CPU`` names, which
makes code for every processor that has it. Whether a machine can run finished code is checked when it is loaded (``missing_features``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import tvm
from qcompile.backends.cpu.kernels.processor import CHOICE, FLAGS, VECTOR_BITS, machine, permitted
from qcompile.backends.cpu.kernels.processor import system_flags as _system_flags
from qcompile.backends.cpu.kernels.processor import thread_count as thread_count  # noqa: PLC0414  (kernels ask for it here)
from tvm.target import codegen

from qcompile.errors import Refused

# TVM's thread pool would pin the calling thread to one core, for good and for every other library in the process (measured:
# sched_getaffinity shrinks from two cores to one at the first parallel kernel). The pool reads this when it starts.
os.environ.setdefault("TVM_BIND_THREADS", "0")


PORTABLE = "portable"
AVX2 = "avx2"
AVX_VNNI = "avxvnni"
AVX512 = "avx512"
AVX512_VNNI = "avx512vnni"
AVX512_BF16 = "avx512bf16"
AMX = "amx"
NEON = "neon"
DOTPROD = "dotprod"
I8MM = "i8mm"
SVE = "sve"


@dataclass(frozen=True)
class InstructionSet:
    """What kernels need to know of an instruction set.

    Attributes:
        name: one of ``KNOWN``.
        machine: its architecture as ``platform.machine`` says it, empty for every architecture.
        features: LLVM features that the kernels rely on.
        mcpu, mattr: LLVM's oldest processor that has them, and what to add to it.
        register_lanes: 4-byte lanes of a vector register.
        registers: number of vector registers.
        signed_x: byte products take x as signed bytes; else as unsigned ones.
        widens: byte products keep each register of weights, and x, as two registers of int16.
        temporaries: registers that a byte product needs besides its operands.
        fused: it has a fused multiply-add.
        pairs: it multiplies pairs of bfloat16 in vectors in less time than two float32 (``bfloat16``).
        tiles: it has tile registers (``tiles``) besides, for bytes and for bfloat16.
        vector_bits: the length of scalable vectors that code is made for, and that a processor must have; 0 where length is no choice.
        mtriple: for code made on another architecture.
    """

    name: str
    machine: str
    features: tuple[str, ...]
    mcpu: str
    mattr: tuple[str, ...]
    register_lanes: int
    registers: int
    signed_x: bool = False
    widens: bool = False
    temporaries: int = 0
    fused: bool = True
    pairs: bool = False
    tiles: bool = False
    vector_bits: int = 0
    mtriple: str = ""

    @property
    def parts(self) -> int:
        """Registers of a vector of sixteen lanes."""
        return 16 // self.register_lanes

    @property
    def options(self) -> list[str]:
        """LLVM's command line options for the set's code."""
        return [f"-aarch64-sve-vector-bits-{bound}:int={self.vector_bits}" for bound in ("min", "max")] if self.vector_bits else []

    def block_rows(self, vectors: int, integer: bool) -> int:
        """Return the most rows of a register block: sums [rows][vectors], the vectors' weights and one x are held at a time."""
        twice, temporaries = (2 if self.widens else 1, self.temporaries) if integer else (1, 0)
        return (self.registers - twice * (vectors * self.parts + 1) - temporaries) // (vectors * self.parts)


_AVX2_FEATURES = ("avx2", "fma")
_AVX512_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
_NEON = InstructionSet(
    NEON, "aarch64", ("neon",), "generic", ("+neon",), 4, 32, signed_x=True, temporaries=8, mtriple="aarch64-linux-gnu"
)  # fmt: skip
_AVX512_VNNI = InstructionSet(AVX512_VNNI, "x86_64", (*_AVX512_FEATURES, "avx512vnni"), "x86-64-v4", ("+avx512vnni",), 16, 32)
_AVX512_BF16 = replace(
    _AVX512_VNNI, name=AVX512_BF16, features=(*_AVX512_VNNI.features, "avx512bf16"), mattr=("+avx512vnni", "+avx512bf16"), pairs=True
)  # fmt: skip
# No pairs: on Sapphire Rapids one ``vdpbf16ps`` takes the time of four fused multiply-adds (measured in a loop of each: 0.53 and 0.13 ns).
_AMX = replace(
    _AVX512_VNNI, name=AMX, features=(*_AVX512_VNNI.features, "amx-tile", "amx-int8", "amx-bf16"),
    mattr=("+avx512vnni", "+amx-tile", "+amx-int8", "+amx-bf16"), tiles=True,
)  # fmt: skip
_DOTPROD = replace(_NEON, name=DOTPROD, features=("neon", "dotprod"), mattr=("+neon", "+dotprod"), temporaries=0)
_I8MM = replace(_DOTPROD, name=I8MM, features=("neon", "dotprod", "i8mm"), mattr=("+neon", "+dotprod", "+i8mm"), signed_x=False)
# Longer than NEON's vectors, so of use only there; on processors whose scalable vectors have 128 bits, NEON's are as good.
_SVE = replace(
    _I8MM, name=SVE, features=(*_I8MM.features, "sve"), mattr=(*_I8MM.mattr, "+sve"), register_lanes=8, vector_bits=VECTOR_BITS
)  # fmt: skip

# From the best to the one that runs everywhere.
SETS = {
    found.name: found
    for found in (
        _AMX,
        _AVX512_BF16,
        _AVX512_VNNI,
        InstructionSet(AVX_VNNI, "x86_64", (*_AVX2_FEATURES, "avxvnni"), "x86-64-v3", ("+avxvnni",), 8, 16),
        InstructionSet(AVX512, "x86_64", _AVX512_FEATURES, "x86-64-v4", (), 16, 32, widens=True, temporaries=2),
        InstructionSet(AVX2, "x86_64", _AVX2_FEATURES, "x86-64-v3", (), 8, 16, widens=True, temporaries=2),
        _SVE,
        _I8MM,
        _DOTPROD,
        _NEON,
        InstructionSet(PORTABLE, "", (), "", (), 8, 16, widens=True, temporaries=2, fused=False),
    )
}
KNOWN = tuple(SETS)


def detect(mcpu: str | None = None, mattr: str | None = None) -> str:
    """Return the best instruction set of ``KNOWN`` for an LLVM processor name; by default the chosen one, or this machine's best.

    Raises:
        Refused: ``QCOMPILE_CPU`` names no set, or one that this machine cannot run.
    """
    if mcpu is None and mattr is None:
        chosen = os.environ.get(CHOICE)
        return _refuse_foreign(chosen) if chosen else _best_here()
    has = features_of(target_description(mcpu, mattr))
    known = ((name, found) for name, found in SETS.items() if not found.vector_bits)  # no processor's name tells their length
    return next(name for name, found in known if found.machine in ("", machine()) and has.issuperset(found.features))


def target_description(
    mcpu: str | None = None, mattr: str | None = None, threads: int | None = None, isa: str | None = None
) -> dict[str, Any]:
    """Return the TVM target, as a dict: of an LLVM processor name, of an instruction set, else of the code made on this machine.

    Without any of these, it is the chosen instruction set's, or this processor's with everything it has.

    Raises:
        Refused: as ``detect``.
    """
    description: dict[str, Any] = {"kind": "llvm"}
    name = isa
    if not name and mcpu is None and mattr is None and os.environ.get(CHOICE):
        name = detect()
    if name:
        found = SETS[check(name)]
        description["mcpu"] = found.mcpu or {"x86_64": "x86-64"}.get(machine(), "generic")
        features = list(found.mattr)
        if found.machine not in ("", machine()):
            description["mtriple"] = found.mtriple
    else:
        description["mcpu"] = mcpu or codegen.llvm_get_system_cpu()
        found = SETS[_best_here() if mcpu is None and mattr is None else PORTABLE]
        features = mattr.split(",") if mattr else [] if mcpu else _corrections()
    if features:
        description["mattr"] = features
    if found.options:
        description["cl-opt"] = found.options
    description["num-cores"] = threads or thread_count()
    return description


def check(isa: str) -> str:
    """Return ``isa``.

    Raises:
        ValueError: it is not one of ``KNOWN``.
    """
    if isa not in SETS:
        raise ValueError(f"unknown instruction set '{isa}'; known are {', '.join(KNOWN)}")
    return isa


def _refuse_foreign(isa: str) -> str:
    if isa not in SETS:
        raise Refused(f"{CHOICE} is '{isa}', no known instruction set", way_out=f"use one of {', '.join(KNOWN)}")
    if reason := cannot_run(isa):
        raise Refused(f"{CHOICE} is '{isa}', but {reason}", way_out=f"leave {CHOICE} unset to get the best set of this machine")
    return isa


@functools.cache
def _best_here() -> str:
    return next(name for name in SETS if not cannot_run(name))


# ---- what a processor has ---------------------------------------------------------------------------------------------------


def features_of(description: dict[str, Any]) -> frozenset[str]:
    """Return the LLVM features of a target description."""
    return frozenset(codegen.llvm_get_cpu_features(tvm.target.Target(description)))


def required_features(description: dict[str, Any]) -> tuple[str, ...]:
    """Return the features that code for a target may use and that a processor can lack, sorted."""
    architecture = "aarch64" if description.get("mtriple", "").startswith("aarch64") else machine()
    return tuple(sorted(features_of(description) & FLAGS.get(architecture, {}).keys()))


def missing_features(required: Iterable[str]) -> list[str]:
    """Return those of the LLVM features that this machine lacks."""
    return sorted(set(required) - features_here())


def cannot_run(isa: str) -> str:
    """Return why this machine cannot run code for an instruction set; empty where it can."""
    found = SETS[check(isa)]
    if found.machine not in ("", machine()):
        return f"{isa} is of {found.machine}, this machine is {machine()}"
    missing = missing_features(found.features)
    return f"this processor lacks {', '.join(missing)}" if missing else ""


@functools.cache
def features_here() -> frozenset[str]:
    """Return this processor's features by the operating system, or by LLVM's table of processors where it does not tell."""
    flags, known = _system_flags(), FLAGS.get(machine(), {})
    by_model = features_of({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}) & known.keys()
    return permitted(frozenset(name for name, flag in known.items() if flag in flags) if flags else by_model)


def _corrections() -> list[str]:
    """Return what this machine's processor has more or less than LLVM says of its model; of more, only what kernels are written for.

    A virtual machine may hide some of what the model has, and may show a name of an older model.
    """
    by_model = features_of({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    hidden = (by_model & FLAGS.get(machine(), {}).keys()) - features_here()
    more = set(SETS[_best_here()].features) - by_model
    return [*(f"-{feature}" for feature in sorted(hidden)), *(f"+{feature}" for feature in sorted(more))]

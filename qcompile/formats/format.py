"""What an element format is: a finite set of values, each with a code of a fixed number of bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from qcompile.formats import packing


class Format(ABC):
    """How one element is coded. Formats are frozen values with one text form, ``str(format)``.

    Codes live in ``storage``, one per element; ``qcompile.formats.packing`` makes them dense. A format speaks of
    values in units of the scale: a scheme divides by the scale (and shifts by the zero point) before ``encode``.
    """

    bits: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The one text form, as ``parse_format`` reads it."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The most negative value, in units of the scale."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The most positive value, in units of the scale."""

    @property
    @abstractmethod
    def storage(self) -> torch.dtype:
        """The dtype that holds one code per element: int8 or uint8, or int16 for codes of 16 bits."""

    @property
    def scaled(self) -> bool:
        """Whether values are codes times a scale; else they are the codes' own, and there is neither scale nor zero point."""
        return True

    @property
    def dense(self) -> bool:
        """Whether stored codes are laid end to end in ``bits`` each, as integers and places in tables are."""
        return True

    @property
    def apart(self) -> bool:
        """Whether any code may stand beside any other, so that a solver can choose them one by one."""
        return True

    @property
    def family(self) -> str:
        """The formats that share a parser and kernels: the name without bits."""
        return self.name.rstrip("0123456789")

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the code of the nearest value (ties to even), saturating, for each element. NaN is the caller's to refuse."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the value of each code, in units of the scale."""

    def packed_size(self, size: int) -> int:
        """Return the bytes of a packed row of so many codes."""
        return -(-size * self.bits // 8)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack codes [.., n] into bytes [.., packed_size(n)]; 8-bit codes are returned unchanged."""
        return packing.pack(codes, self.bits)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """Undo ``pack``: return codes [.., size].

        Raises:
            ValueError: bytes that ``pack`` never gives, see ``check_packed``.
        """
        return packing.unpack(packed, self.bits, self.storage == torch.int8, size)

    def check_packed(self, packed: torch.Tensor) -> None:
        """Raise ValueError for bytes that ``pack`` never gives; in whole bits every byte means something."""
        return

    def __str__(self) -> str:
        return self.name


_families: list[Callable[[str], Format | None]] = []


def register_family(parse: Callable[[str], Format | None]) -> Callable[[str], Format | None]:
    """Add a parser of format names; it returns None for names that are not its own."""
    _families.append(parse)
    return parse


def parse_format(name: str) -> Format:
    """Return the format of this name, such as ``int4``.

    Raises:
        ValueError: no family knows the name.
    """
    found = [format for parse in _families if (format := parse(name)) is not None]
    if not found:
        raise ValueError(
            f"unknown format '{name}'; known are "
            "int1 to int8, uint1 to uint8, ternary, nf2 to nf4, codebook1 to codebook4, pvq8k6g3 and the like, and bf16"
        )
    if len(found) > 1:
        raise ValueError(f"'{name}' belongs to two formats")
    return found[0]

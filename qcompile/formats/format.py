"""What an element format is: a finite set of values, each with a code of a fixed number of bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


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
        """The dtype that holds one code per element: int8 or uint8."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the code of the nearest value (ties to even), saturating, for each element. NaN is the caller's to refuse."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the value of each code, in units of the scale."""

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
        raise ValueError(f"unknown format '{name}'; known are int1 to int8 and uint1 to uint8")
    if len(found) > 1:
        raise ValueError(f"'{name}' belongs to two formats")
    return found[0]

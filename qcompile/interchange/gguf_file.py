"""The GGUF container, version 2 and 3, little endian: metadata by key, and tensors by name, type and place.

    "GGUF" version:u32 tensors:u64 entries:u64
    entries:  key, type:u32, value                    a string is length:u64 and bytes, an array type:u32, count:u64 and values
    tensors:  name, rank:u32, sizes:u64 .. (the fastest first), type:u32, offset:u64 (from the begin of the data)
    padding to general.alignment, data

Files come from anywhere, so every length is held to what is left of the file before anything is made of it. (The package ``gguf``, made
for files of one's own, takes counts and offsets as they come.) Source: ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import Refused

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_LONGEST_NAME = 1 << 16
_MOST_SIZES = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> struct's letter
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its sizes as PyTorch has them (the slowest first), ggml's number of its type, and its offset in the data."""

    shape: tuple[int, ...]
    type: int
    offset: int


class GgufFile:
    """A file that is open for reading.

    Attributes:
        metadata: key -> number, bool, text or list of them.
        tensors: name -> info.

    Raises:
        Refused: it is no GGUF file, or damaged; the message names what is wrong and where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data: bytes | mmap.mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        except OSError as error:
            raise Refused(f"cannot be read: {error.strerror}", node=str(path)) from error
        self._place = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def read(self, name: str, size: int) -> memoryview:
        """Return the bytes of a tensor; ``size`` is what its type and shape take.

        Raises:
            Refused: they lie beyond the file's end.
        """
        start = self._start + self.tensors[name].offset
        if start + size > len(self._data):
            raise Refused(f"the tensor's {size} bytes lie beyond the file's end", node=f"{self.path} {name}")
        return memoryview(self._data)[start : start + size]

    # ---- header -----------------------------------------------------------------------------------------------------------

    def _read_header(self) -> None:
        if bytes(self._data[:4]) != MAGIC:
            raise Refused("no GGUF file", node=str(self.path))
        self._place = 4
        version, tensors, entries = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, VERSION):
            raise Refused(f"the file has GGUF version {version}, read are 2 and 3, little endian", node=str(self.path))
        # The smallest entry is a key of one letter with a byte, the smallest tensor a name of one letter without sizes.
        self._require(entries * 14, f"{entries} entries")
        for _ in range(entries):
            key = self._text(_LONGEST_NAME)
            if key in self.metadata:
                raise Refused(f"the key {key!r} stands twice", node=str(self.path))
            self.metadata[key] = self._value(self._scalar("I"), key)
        self._require(tensors * 25, f"{tensors} tensors")
        for _ in range(tensors):
            self._read_info()
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise Refused(f"an alignment of {alignment} is none", node=str(self.path))
        self._start = self._place + -self._place % alignment
        for name, info in self.tensors.items():
            if info.offset % alignment:
                raise Refused(f"the tensor lies at {info.offset}, not aligned to {alignment}", node=f"{self.path} {name}")

    def _read_info(self) -> None:
        name = self._text(_LONGEST_NAME)
        rank = self._scalar("I")
        if rank > _MOST_SIZES or name in self.tensors:
            raise Refused(f"the tensor has {rank} sizes, or stands twice", node=f"{self.path} {name}")
        sizes = [self._scalar("Q") for _ in range(rank)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        elements = 1
        for size in sizes:
            elements *= size
        if elements < 1 or elements > 16 * len(self._data):  # no type stores more than four elements in a byte
            raise Refused(f"the tensor's sizes {sizes} do not fit in the file", node=f"{self.path} {name}")
        self.tensors[name] = TensorInfo(tuple(reversed(sizes)), kind, offset)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(len(self._data))
        if kind != _ARRAY:
            return self._scalar(self._letter(kind, key))
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner == _STRING:
            self._require(count * 8, f"{count} texts of {key!r}")
            return [self._text(len(self._data)) for _ in range(count)]
        letter = self._letter(inner, key)
        self._require(count * struct.calcsize(letter), f"{count} values of {key!r}")
        values = list(struct.unpack_from(f"<{count}{letter}", self._data, self._place))
        self._place += count * struct.calcsize(letter)
        return values

    def _letter(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise Refused(f"the entry {key!r} has the unknown type {kind}", node=str(self.path))
        return _SCALARS[kind]

    def _scalar(self, letter: str) -> Any:
        self._require(struct.calcsize(letter), "a number")
        (value,) = struct.unpack_from(f"<{letter}", self._data, self._place)
        self._place += struct.calcsize(letter)
        return value

    def _text(self, longest: int) -> str:
        length = self._scalar("Q")
        if length > longest:
            raise Refused(f"a name of {length} bytes at byte {self._place}", node=str(self.path))
        self._require(length, "a text")
        data = bytes(self._data[self._place : self._place + length])
        self._place += length
        return data.decode("utf-8", errors="replace")

    def _require(self, size: int, what: str) -> None:
        if size > len(self._data) - self._place:
            raise Refused(f"the file ends inside of {what} at byte {self._place}", node=str(self.path))


# ---- writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Typed:
    """A metadata value with ggml's number of its type, where Python's own type does not say it."""

    type: int
    value: Any


def write_gguf(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    """Return a file of version 3.

    Args:
        metadata: bool, int (u32), float (f32), text, lists of one of them, or Typed.
        tensors: name, sizes (the slowest first), type and bytes.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    head += [_packed_text(key) + _packed(value) for key, value in metadata.items()]
    offset, data = 0, []
    for name, shape, kind, content in tensors:
        sizes = tuple(reversed(shape))
        head.append(_packed_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset))
        padded = content + bytes(-len(content) % ALIGNMENT)
        data.append(padded)
        offset += len(padded)
    header = b"".join(head)
    return b"".join([header, bytes(-len(header) % ALIGNMENT), *data])


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: Any) -> int:
    return 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6 if isinstance(value, float) else _STRING


def _packed(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0]) if value else _STRING
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_bare(kind, item) for item in value)
    typed = value if isinstance(value, Typed) else Typed(_kind(value), value)
    if isinstance(typed.value, list):
        return struct.pack("<IIQ", _ARRAY, typed.type, len(typed.value)) + b"".join(_bare(typed.type, item) for item in typed.value)
    return struct.pack("<I", typed.type) + _bare(typed.type, typed.value)


def _bare(kind: int, value: Any) -> bytes:
    return _packed_text(value) if kind == _STRING else struct.pack(f"<{_SCALARS[kind]}", value)

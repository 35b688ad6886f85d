"""Calibration data: named, digestible sources of batches that can be read again and again.

| text | source |
| --- | --- |
| ``data.npz`` | arrays named like the model's inputs, first axis = samples |
| ``data.npy`` | one array, for a model with one input |
| ``images:FOLDER?resize=256&crop=224&mean=0.485,0.456,0.406&std=0.229,0.224,0.225`` | pictures, RGB, float32 [batch, 3, height, width] |
| ``text:FILE?length=128`` | text, cut into samples and coded by the model's ``tokenizer.json`` |
| ``random?seed=0`` | noise of the inputs' shapes: a pipeline runs with it, accuracy is not what it is for |

Every source takes ``limit`` (samples, default 128) and ``batch`` (samples in a batch where the graph leaves that open, default 8).
What does not fit the graph is refused in one line that names the file and the input.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.errors import Refused
from qcompile.graph.graph import Graph, tensor_digest
from qcompile.graph.types import TensorType, short_dtype
from qcompile.nearest import nearest_name

LIMIT, BATCH = 128, 8
Batch = tuple[torch.Tensor, ...]


class Calibration(ABC):
    """A source of batches.

    Attributes:
        name: what messages call it: a path, or the kind of the source.
        limit: the most samples that are read.
        batch: samples in a batch, where the graph's first size is a symbol.
    """

    def __init__(self, name: str, limit: int = LIMIT, batch: int = BATCH) -> None:
        if limit < 1 or batch < 1:
            raise Refused(f"limit and batch of calibration data are at least 1, not {limit} and {batch}", node=name)
        self.name, self.limit, self.batch = name, limit, batch

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the batches, for one graph."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.limit} {self.batch}".encode())
        for part in self._digested():
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many samples there are, after ``limit``."""

    @abstractmethod
    def _digested(self) -> Iterator[bytes]:
        """Yield the bytes that the batches are made from."""

    @abstractmethod
    def _read(self, graph: Graph) -> Iterator[Batch]:
        """Yield unchecked batches."""

    def batches(self, graph: Graph) -> Iterator[Batch]:
        """Yield the graph's inputs in order, batch by batch; every batch fits the graph's input types and is finite.

        Raises:
            Refused: there is no data, or it does not fit; the message names the source and the input.
        """
        empty = True
        for batch in self._read(graph):
            check_batch(graph, batch, self.name)
            empty = False
            yield batch
        if empty:
            raise Refused("there is no calibration data in it", node=self.name)

    def _batch_size(self, graph: Graph) -> int:
        """Return the first size of the inputs: the graph's where it is fixed, else ``batch`` within the symbol's range."""
        first = graph.input_types[0].shape[0] if graph.input_types and graph.input_types[0].shape else self.batch
        if isinstance(first, int):
            return first
        low, high = graph.symbols.ranges.get(first, (1, self.batch))
        return min(max(self.batch, low), high)


def check_batch(graph: Graph, batch: Sequence[torch.Tensor], origin: str) -> None:
    """Raise Refused unless the tensors fit the graph's inputs in number, dtype and shape and hold no NaN or infinity."""
    if len(batch) != len(graph.inputs):
        names = ", ".join(node.name for node in graph.inputs)
        raise Refused(f"{len(batch)} tensors for {len(graph.inputs)} inputs ({names})", node=origin)
    sizes: dict[str, int] = {}
    for node, expected, tensor in zip(graph.inputs, graph.input_types, batch, strict=True):
        if not _fits(tensor, expected, graph, sizes):
            found = f"{short_dtype(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"
            where = "".join(
                f", {name} in {graph.symbols.ranges[name][0]}..{graph.symbols.ranges[name][1]}"
                for name in dict.fromkeys(expected.shape)
                if isinstance(name, str) and name in graph.symbols.ranges
            )
            raise Refused(f"input '{node.name}' is {expected}{where}, the data is {found}", node=origin)
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
            raise Refused(f"input '{node.name}' holds NaN or infinity", node=origin)


def _fits(tensor: torch.Tensor, expected: TensorType, graph: Graph, sizes: dict[str, int]) -> bool:
    """Compare with a type; ``sizes`` gains the symbols' sizes, which must agree between inputs."""
    if tensor.dtype != expected.dtype or tensor.ndim != len(expected.shape):
        return False
    for size, name in zip(tensor.shape, expected.shape, strict=True):
        if isinstance(name, int):
            if size != name:
                return False
            continue
        low, high = graph.symbols.ranges.get(name, (0, size))
        if sizes.setdefault(name, size) != size or not low <= size <= high:
            return False
    return True


def by_name(graph: Graph, arrays: Mapping[str, Any], origin: str) -> list[Any]:
    """Return the graph's inputs in order out of a mapping; other names are left alone.

    Raises:
        Refused: a name is missing.
    """
    missing = [node.name for node in graph.inputs if node.name not in arrays]
    if missing:
        raise Refused(f"input '{missing[0]}' is missing; it has {', '.join(map(str, arrays)) or 'nothing'}", node=origin)
    return [arrays[node.name] for node in graph.inputs]


# ---- choosing by text -----------------------------------------------------------------------------------------------------


def parse_calibration(
    text: str,
    *,
    example_inputs: Sequence[torch.Tensor] | None = None,
    tokenizer_folder: str | Path | None = None,
    limit: int | None = None,
) -> Calibration:
    """Return the source that a text names, see the module's table.

    Args:
        text: such as ``images:photos?crop=224``.
        example_inputs: give ``random`` its shapes and value ranges.
        tokenizer_folder: where ``text:`` finds ``tokenizer.json``.
        limit: the most samples, where the text has no ``limit``.

    Raises:
        Refused: an unknown source or option, or a file that is not there.
    """
    from qcompile.calibration_sources import Arrays, Images, Random, Text

    head, options = split_options(text)
    limit = whole_number(options.pop("limit", limit or LIMIT), "limit")
    general = {"limit": limit, "batch": whole_number(options.pop("batch", BATCH), "batch")}
    kind, _, place = head.partition(":")
    if kind == "random" and not place:
        seed = whole_number(options.pop("seed", 0), "seed")
        _no_more(options, head, ["seed"])
        return Random(example_inputs, seed, **general)
    if kind == "images":
        known = ("resize", "crop", "mean", "std", "order", "scale")
        _no_more(options, head, known)
        return Images(_existing(place), options, **general)
    if kind == "text":
        _no_more(options, head, ("length", "split"))
        return Text(_existing(place), tokenizer_folder, options, **general)
    if head.endswith((".npz", ".npy")):
        _no_more(options, head, ())
        return Arrays(_existing(head), **general)
    raise Refused(f"'{text}' is no calibration data", way_out="give FILE.npz, FILE.npy, images:FOLDER, text:FILE or random")


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Return what stands before ``?`` and the options ``name=value&name=value`` after it.

    Raises:
        Refused: an option is written otherwise, or twice.
    """
    head, mark, tail = text.rpartition("?")
    if not mark or (tail and "=" not in tail):
        return text, {}
    options: dict[str, Any] = {}
    for part in filter(None, tail.split("&")):
        name, equals, value = part.partition("=")
        if not equals or not value or name in options:
            raise Refused(f"the option '{part}' is not understood", node=head, way_out="write name=value&name=value")
        options[name] = value
    return head, options


def whole_number(value: Any, name: str) -> int:
    """Return the value of a numeric option; raise Refused naming it where it is none."""
    if not str(value).isdecimal():
        raise Refused(f"{name} of data is a number, not '{value}'")
    return int(value)


def _no_more(options: Mapping[str, Any], head: str, known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            raise Refused(f"unknown option '{name}'", node=head, way_out=nearest_name(name, [*known, "limit", "batch"]))


def _existing(place: str) -> Path:
    path = Path(place).expanduser()
    if not path.exists():
        raise Refused("there is no such file or folder", node=place)
    return path


# ---- from Python ----------------------------------------------------------------------------------------------------------


class Given(Calibration):
    """Batches from Python: an iterable of tuples, dicts by input name, or tensors where the model has one input.

    It is read more than once and must give the same batches each time; a one-shot iterator is read into memory first.
    """

    def __init__(self, data: Iterable[Any], name: str, limit: int) -> None:
        super().__init__(name, limit)
        if isinstance(data, (torch.Tensor, np.ndarray, Mapping)):
            data = [data]
        self.data = list(_limited(data, limit)) if iter(data) is data else data

    @cached_property
    def samples(self) -> int:
        return sum(_sample_count(item) for item in _limited(self.data, self.limit))

    def _digested(self) -> Iterator[bytes]:
        for item in _limited(self.data, self.limit):
            names = list(item) if isinstance(item, Mapping) else []
            yield " ".join([*map(str, names), *(tensor_digest(_tensor(value, self.name)) for value in _values(item))]).encode()

    def _read(self, graph: Graph) -> Iterator[Batch]:
        for item in _limited(self.data, self.limit):
            values = by_name(graph, item, self.name) if isinstance(item, Mapping) else _values(item)
            yield tuple(_tensor(value, self.name) for value in values)


def from_iterable(data: Iterable[Any], *, name: str = "calibration data", limit: int = 2**62) -> Calibration:
    """Return a source of batches from Python; ``limit`` is in samples, and the batch that reaches it is the last."""
    return data if isinstance(data, Calibration) else Given(data, name, limit)


def _values(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return list(item.values())
    return list(item) if isinstance(item, (tuple, list)) else [item]


def _tensor(value: Any, name: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(value))
    raise Refused(f"a batch holds {type(value).__name__}", node=name, way_out="give tensors or numeric NumPy arrays")


def _sample_count(item: Any) -> int:
    first = next(iter(_values(item)), None)
    return int(first.shape[0]) if isinstance(first, (torch.Tensor, np.ndarray)) and first.ndim else 1


def _limited(data: Iterable[Any], limit: int) -> Iterator[Any]:
    taken = 0
    for item in data:
        yield item
        taken += _sample_count(item)
        if taken >= limit:
            return

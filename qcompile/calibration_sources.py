"""The sources of calibration data that a text can name: arrays, pictures, text, noise."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from qcompile.calibration import Batch, Calibration, by_name
from qcompile.errors import Refused
from qcompile.graph.graph import Graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.graph.types import TensorType

logger = logging.getLogger(__name__)

_LARGEST = 2**33  # bytes that arrays may take in memory
_EXPANSION = 64  # times its size on disk that a large archive may take in memory: an honest one holds numbers, which hardly shrink
_PIXELS = 89_478_485  # of one picture: Pillow's own bound against decompression bombs


# ---- arrays ---------------------------------------------------------------------------------------------------------------


class Arrays(Calibration):
    """``.npz``: arrays by input name; ``.npy``: the one input. The first axis counts samples."""

    def __init__(self, path: Path, limit: int, batch: int) -> None:
        super().__init__(str(path), limit, batch)
        self.path = path

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, cut to ``limit`` samples."""
        try:
            found = self._load_archive() if self.path.suffix == ".npz" else {"": np.lib.format.open_memmap(self.path, mode="r")}
        except Refused:
            raise
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise Refused(f"the file cannot be read: {str(error).splitlines()[0]}", node=self.name) from error
        for name, array in found.items():
            label = f"array '{name}'" if name else "the array"
            if array.ndim == 0 or not len(array):
                raise Refused(f"{label} has no samples", node=self.name)
            if array.dtype.kind not in "fiub":
                raise Refused(f"{label} is of {array.dtype}, which is no number", node=self.name)
        if len({len(array) for array in found.values()}) > 1:
            counts = ", ".join(f"{name}: {len(array)}" for name, array in found.items())
            raise Refused(f"the arrays have different numbers of samples ({counts})", node=self.name)
        return {name: array[: self.limit] for name, array in found.items()}

    def _load_archive(self) -> dict[str, np.ndarray]:
        with zipfile.ZipFile(self.path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            declared = 0
            for member in members:
                with archive.open(member) as file:
                    declared += max(_declared_bytes(file, self.name, member.filename), member.file_size)
            if declared > _LARGEST or declared > max(2**26, _EXPANSION * self.path.stat().st_size):
                raise Refused(f"it would expand from {self.path.stat().st_size} to {declared} bytes", node=self.name)
            return {m.filename.removesuffix(".npy"): _read_member(archive, m) for m in members}

    @property
    def samples(self) -> int:
        return len(next(iter(self.arrays.values()), ()))

    def _digested(self) -> Iterator[bytes]:
        yield self.path.read_bytes()

    def _read(self, graph: Graph) -> Iterator[Batch]:
        arrays: Mapping[str, np.ndarray] = self.arrays
        if list(arrays) == [""]:
            if len(graph.inputs) != 1:
                names = ", ".join(node.name for node in graph.inputs)
                raise Refused(f"one array for {len(graph.inputs)} inputs ({names})", node=self.name, way_out="give an .npz")
            arrays = {graph.inputs[0].name: arrays[""]}
        found, size = by_name(graph, arrays, self.name), self._batch_size(graph)
        for start in range(0, self.samples, size):
            parts = [np.array(array[start : start + size]) for array in found]
            if isinstance(graph.input_types[0].shape[0], str) or len(parts[0]) == size or not start:
                yield tuple(torch.from_numpy(part) for part in parts)


def _declared_bytes(file: IO[bytes], origin: str, member: str) -> int:
    """Return the bytes that an array's header asks for, without reading the array."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise Refused(f"'{member}' holds Python objects", node=origin)
    return math.prod(shape) * dtype.itemsize


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


# ---- pictures -------------------------------------------------------------------------------------------------------------


class Images(Calibration):
    """Pictures of a folder and its subfolders, sorted by path; with a limit, evenly spaced ones.

    Options: ``resize`` (shorter side, or HxW; bilinear), ``crop`` (middle square, or HxW), ``scale`` (divisor of the bytes, 255),
    ``mean`` and ``std`` (one number or one for each channel, of the scaled values), ``order`` (``rgb`` or ``bgr``). A model
    input with one channel gets grey.
    """

    def __init__(self, folder: Path, options: Mapping[str, str], limit: int, batch: int) -> None:
        super().__init__(str(folder), limit, batch)
        if options.get("order", "rgb") not in ("rgb", "bgr"):
            raise Refused(f"order is rgb or bgr, not '{options['order']}'", node=self.name)
        self.folder, self.options = folder, dict(options)
        self.resize, self.crop = self._sizes("resize"), self._sizes("crop")
        self.scale, self.mean, self.std = self._numbers("scale", "255"), self._numbers("mean", "0"), self._numbers("std", "1")
        if 0 in self.std or 0 in self.scale:
            raise Refused("std and scale are not zero", node=self.name)

    def _sizes(self, name: str) -> tuple[int, ...]:
        parts = self.options.get(name, "").split("x") if name in self.options else []
        if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= 2**14 for part in parts):
            raise Refused(f"{name} is a size or HxW, not '{self.options[name]}'", node=self.name)
        return tuple(int(part) for part in parts)

    def _numbers(self, name: str, default: str) -> list[float]:
        try:
            numbers = [float(part) for part in self.options.get(name, default).split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            raise Refused(f"{name} is one number or three, not '{self.options[name]}'", node=self.name)
        return numbers

    @cached_property
    def files(self) -> list[Path]:
        """The pictures that are read."""
        endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm")
        found = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
        count = min(len(found), self.limit)
        return [found[i * len(found) // count] for i in range(count)]

    @property
    def samples(self) -> int:
        return len(self.files)

    def _digested(self) -> Iterator[bytes]:
        yield repr(sorted(self.options.items())).encode()
        for path in self.files:
            yield str(path.relative_to(self.folder)).encode()
            yield path.read_bytes()

    def _read(self, graph: Graph) -> Iterator[Batch]:
        if len(graph.inputs) != 1 or len(graph.input_types[0].shape) != 4:
            types = ", ".join(map(str, graph.input_types))
            raise Refused(f"pictures are for one input of four axes, the model has {types}", node=self.name, way_out="give an .npz")
        channels, size = graph.input_types[0].shape[1], self._batch_size(graph)
        for start in range(0, len(self.files), size):
            pictures = [self._picture(path, grey=channels == 1) for path in self.files[start : start + size]]
            shapes = {p.shape for p in pictures}
            if len(shapes) > 1:
                raise Refused("its pictures have different sizes", node=self.name, way_out="add ?resize=HxW, or resize= and crop=")
            if isinstance(graph.input_types[0].shape[0], str) or len(pictures) == size or not start:
                yield (torch.stack(pictures),)

    def _picture(self, path: Path, grey: bool) -> torch.Tensor:
        """Return one picture, float32 [channels, height, width]."""
        from PIL import Image

        try:
            with Image.open(path) as opened:
                if opened.width * opened.height > _PIXELS:
                    raise Refused(f"the picture has {opened.width} x {opened.height} pixels", node=str(path))
                picture = opened.convert("L" if grey else "RGB")
        except (OSError, SyntaxError, ValueError) as error:  # a broken PNG is a SyntaxError to Pillow
            if isinstance(error, Refused):
                raise
            raise Refused("the picture cannot be read", node=str(path)) from error
        if self.resize:
            height, width = self.resize if len(self.resize) == 2 else self._shorter_side(picture.height, picture.width)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
        pixels = (pixels.unsqueeze(-1) if grey else pixels).permute(2, 0, 1)
        if self.crop:
            height, width = self.crop if len(self.crop) == 2 else self.crop * 2
            top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
            if top < 0 or left < 0:
                raise Refused(f"the picture is smaller than the crop of {height} x {width}", node=str(path), way_out="add resize=")
            pixels = pixels[:, top : top + height, left : left + width]
        if self.options.get("order") == "bgr":
            pixels = pixels.flip(0)
        scale, mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (self.scale, self.mean, self.std))
        return ((pixels / scale - mean) / std).contiguous()

    def _shorter_side(self, height: int, width: int) -> tuple[int, int]:
        (side,) = self.resize
        return (side, round(width * side / height)) if height <= width else (round(height * side / width), side)


# ---- text -----------------------------------------------------------------------------------------------------------------


class Text(Calibration):
    """A UTF-8 text coded by the model's own tokenizer.

    Options: ``length`` (tokens of a sample, 128) and ``split``: ``lines`` (a sample for each line that is not empty, with the tokenizer's
    special tokens) or ``chunks`` (the whole text in pieces of ``length``). By default lines for a tokenizer that closes a
    sequence with a special token, as encoders' do. Samples of equal length make a batch, so padding is needed only where the
    graph's own sizes ask for it.
    """

    def __init__(self, path: Path, tokenizer_folder: str | Path | None, options: Mapping[str, str], limit: int, batch: int) -> None:
        super().__init__(str(path), limit, batch)
        length, self.split = options.get("length", "128"), options.get("split", "")
        if not length.isdecimal() or int(length) < 1:
            raise Refused(f"length is a number of tokens, not '{length}'", node=self.name)
        if self.split not in ("", "lines", "chunks"):
            raise Refused(f"split is lines or chunks, not '{self.split}'", node=self.name)
        self.path, self.length = path, int(length)
        self.tokenizer_file = Path(tokenizer_folder or ".") / "tokenizer.json"
        if not self.tokenizer_file.is_file():
            raise Refused(
                "text needs the model's tokenizer.json beside the model", node=self.name, way_out=f"none at {self.tokenizer_file}"
            )

    def _digested(self) -> Iterator[bytes]:
        yield f"{self.length} {self.split}".encode()
        yield self.path.read_bytes()
        yield self.tokenizer_file.read_bytes()

    @property
    def samples(self) -> int:
        return len(self._samples(self.length))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, without its own padding and truncation."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Refused("text needs the package tokenizers", node=self.name, way_out="pip install qcompile[hf]") from error
        try:
            tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        except Exception as error:  # the Rust side raises plain Exception
            raise Refused("the tokenizer cannot be read", node=str(self.tokenizer_file)) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def _samples(self, length: int) -> list[list[int]]:
        """Return the tokens of each sample."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refused("the file is no UTF-8 text", node=self.name) from error
        probe = self.tokenizer.encode("a").special_tokens_mask
        if (self.split or ("lines" if len(probe) > 1 and probe[-1] else "chunks")) == "lines":
            self.tokenizer.enable_truncation(length)  # keeps the closing token
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            count = min(len(lines), self.limit)
            coded = self.tokenizer.encode_batch([lines[i * len(lines) // count] for i in range(count)])
            self.tokenizer.no_truncation()
            return [item.ids for item in coded if item.ids]
        opening = self.tokenizer.encode("a").ids[:1] if probe[0] else []
        body = length - len(opening)
        head = text[: 64 * max(length, 1) * self.limit]  # no tokenizer makes tokens of 64 letters on average
        ids = self.tokenizer.encode(head, add_special_tokens=False).ids
        pieces = [ids[i : i + body] for i in range(0, len(ids), body)] if body else []
        return [opening + piece for piece in pieces if len(piece) == body or len(pieces) == 1][: self.limit]

    def _read(self, graph: Graph) -> Iterator[Batch]:
        sizes = graph.input_types[0].shape
        if len(sizes) != 2:
            raise Refused(f"text is for inputs [batch, tokens], '{graph.inputs[0].name}' is {graph.input_types[0]}", node=self.name)
        tokens = sizes[1]
        longest = tokens if isinstance(tokens, int) else min(self.length, graph.symbols.ranges.get(tokens, (1, self.length))[1])
        samples = self._samples(longest)
        for group in self._groups(samples, graph, fixed=isinstance(tokens, int)):
            width = tokens if isinstance(tokens, int) else max(map(len, group))
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in group])
            ids = torch.tensor([[*ids, *[self._pad_id] * (width - len(ids))] for ids in group])
            if not mask.all() and not any("mask" in node.name for node in graph.inputs):
                raise Refused(f"samples are shorter than {width} tokens and the model has no attention mask", node=self.name)
            yield tuple(text_inputs(graph)(ids, mask))

    def _groups(self, samples: Sequence[list[int]], graph: Graph, *, fixed: bool) -> Iterator[list[list[int]]]:
        size, rest = self._batch_size(graph), isinstance(graph.input_types[0].shape[0], str)
        by_length: dict[int, list[list[int]]] = {}
        for ids in samples:
            by_length.setdefault(len(ids) if rest and not fixed else 0, []).append(ids)
        for group in by_length.values():
            parts = [group[i : i + size] for i in range(0, len(group), size)]
            yield from (part for part in parts if rest or len(part) == size)

    @cached_property
    def _pad_id(self) -> int:
        found = (self.tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"))
        return next((number for number in found if number is not None), 0)


def text_inputs(graph: Graph) -> Callable[..., list[torch.Tensor]]:
    """Return a function that fills a graph's inputs by their names from tokens i64[batch, tokens] and a mask, by default all ones."""

    def fill(ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        shown = torch.ones_like(ids) if mask is None else mask
        return [_text_input(node.name, type, ids, shown) for node, type in zip(graph.inputs, graph.input_types, strict=True)]

    return fill


def _text_input(name: str, type: TensorType, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if "mask" in name:
        return mask.to(type.dtype)
    if "position" in name:
        return torch.arange(ids.shape[1]).expand_as(ids).to(type.dtype).contiguous()
    if "type" in name:
        return torch.zeros_like(ids).to(type.dtype)
    if "ids" in name or "token" in name or name in ("input", "x", "idx"):
        return ids.to(type.dtype)
    raise Refused(f"input '{name}' is not one that text gives (ids, mask, token types, positions)", way_out="give an .npz")


# ---- noise ----------------------------------------------------------------------------------------------------------------


class Random(Calibration):
    """Noise by a seed: normal for float inputs, with the mean and deviation of the example where there is one.

    Integer inputs are drawn from the example's value range; without an example, from the rows of the embedding they index, else 0 and 1.
    Inputs whose name has "mask" are all ones.
    """

    def __init__(self, example_inputs: Sequence[torch.Tensor] | None, seed: int, limit: int, batch: int) -> None:
        super().__init__("random", limit, batch)
        self.examples, self.seed = list(example_inputs or ()), seed

    @property
    def samples(self) -> int:
        return self.limit

    def _digested(self) -> Iterator[bytes]:
        yield f"{self.seed} {' '.join(map(tensor_digest, self.examples))}".encode()

    def _read(self, graph: Graph) -> Iterator[Batch]:
        logger.warning("calibrating on random data: ranges will not be those of real data; accuracy is for real data to show")
        if self.examples and len(self.examples) != len(graph.inputs):
            raise Refused(f"{len(self.examples)} example inputs for {len(graph.inputs)} inputs", node=self.name)
        generator = torch.Generator().manual_seed(self.seed)
        size = self._batch_size(graph)
        symbols = self._sizes(graph)
        for _ in range(max(1, self.limit // size)):
            yield tuple(self._draw(graph, i, size, symbols, generator) for i in range(len(graph.inputs)))

    def _sizes(self, graph: Graph) -> dict[str, int]:
        """Return a size for each symbol: the examples' where there are examples, else a middling one within its range."""
        sizes = {name: min(max(64, low), high) for name, (low, high) in graph.symbols.ranges.items()}
        for type, example in zip(graph.input_types, self.examples, strict=False):
            sizes |= {name: size for name, size in zip(type.shape, example.shape, strict=False) if isinstance(name, str)}
        return sizes

    def _draw(self, graph: Graph, index: int, size: int, symbols: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        type, node = graph.input_types[index], graph.inputs[index]
        first = graph.input_types[0].shape[:1]
        shape = [s if isinstance(s, int) else size if (s,) == first else symbols.get(s, 64) for s in type.shape]
        example = self.examples[index] if self.examples else None
        if type.dtype.is_floating_point:
            noise = torch.randn(shape, generator=generator)
            if example is not None and example.numel() > 1:
                noise = noise * example.float().std() + example.float().mean()
            return noise.to(type.dtype)
        if type.dtype == torch.bool or "mask" in node.name:
            return torch.ones(shape, dtype=type.dtype)
        low, high = (
            (int(example.min()), int(example.max())) if example is not None and example.numel() else (0, _highest_index(graph, index))
        )
        return torch.randint(low, high + 1, shape, generator=generator).to(type.dtype)


def _highest_index(graph: Graph, index: int) -> int:
    """Return the last row of the smallest embedding that an input indexes directly, or 1."""
    rows = [
        len(table)
        for user in graph.inputs[index].users
        if user.op == "call_function" and operator_name(user.target) == "aten.embedding"
        if (table := graph.constant(bound_arguments(user)["weight"])) is not None
    ]
    return min(rows) - 1 if rows else 1

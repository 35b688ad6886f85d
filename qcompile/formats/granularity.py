"""Granularities: which elements of a tensor share one scale.

Shape of the scale for a tensor of shape ``[.., rows, columns]``:

| granularity | text | scale shape |
| --- | --- | --- |
| Tensor | ``tensor`` | ``[]`` |
| Channel(axis) | ``channel=0`` | ``[shape[axis]]`` |
| Group(size, axis) | ``group=128`` | shape with ``axis`` (default last) divided by size, rounded up |
| Block(rows, columns) | ``block=16x16`` | ``[.., ceil(rows/r), ceil(columns/c)]`` |
| Token | ``token`` | shape with the last axis 1 |
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Granularity:
    """Base of all granularities; a granularity is a frozen value with one text form."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale of a tensor of this shape."""
        raise NotImplementedError

    def expand(self, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the scale as a tensor that broadcasts against a tensor of this shape."""
        raise NotImplementedError

    def reduce_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the minimum and maximum of x over the elements that share a scale, both of the scale's shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tensor(Granularity):
    """One scale for the whole tensor."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def expand(self, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return scale

    def reduce_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.amin(), x.amax()

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class Channel(Granularity):
    """One scale for each index of one axis."""

    axis: int = 0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[self.axis],)

    def expand(self, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        view = [1] * len(shape)
        view[self.axis] = -1
        return scale.reshape(view)

    def reduce_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        return (x.amin(others), x.amax(others)) if others else (x, x)

    def __str__(self) -> str:
        return f"channel={self.axis}"


@dataclass(frozen=True)
class Group(Granularity):
    """One scale for each run of ``size`` elements along an axis; the last run may be shorter."""

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least 1 element, not {self.size}")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self.axis % len(shape)
        return (*shape[:axis], math.ceil(shape[axis] / self.size), *shape[axis + 1 :])

    def expand(self, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return scale.repeat_interleave(self.size, self.axis).narrow(self.axis, 0, shape[self.axis])

    def reduce_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axis = self.axis % x.ndim
        missing = -x.shape[axis] % self.size
        if missing:  # repeating the last element changes no range
            x = torch.cat([x, x.narrow(axis, x.shape[axis] - 1, 1).expand(*x.shape[:axis], missing, *x.shape[axis + 1 :])], axis)
        runs = x.unflatten(axis, (-1, self.size))
        return runs.amin(axis + 1), runs.amax(axis + 1)

    def __str__(self) -> str:
        return f"group={self.size}" if self.axis == -1 else f"group={self.size},axis={self.axis}"


@dataclass(frozen=True)
class Block(Granularity):
    """One scale for each rectangle of the last two axes."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], math.ceil(shape[-2] / self.rows), math.ceil(shape[-1] / self.columns))

    def expand(self, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        tall = scale.repeat_interleave(self.rows, -2).narrow(-2, 0, shape[-2])
        return tall.repeat_interleave(self.columns, -1).narrow(-1, 0, shape[-1])

    def reduce_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = Group(self.columns, -1).reduce_range(x)
        return Group(self.rows, -2).reduce_range(low)[0], Group(self.rows, -2).reduce_range(high)[1]

    def __str__(self) -> str:
        return f"block={self.rows}x{self.columns}"


@dataclass(frozen=True)
class Token(Granularity):
    """One scale for each row of the last axis: each token of an activation."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], 1)

    def expand(self, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return scale

    def reduce_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)

    def __str__(self) -> str:
        return "token"


_PATTERNS = (
    (re.compile(r"tensor"), lambda m: Tensor()),
    (re.compile(r"token"), lambda m: Token()),
    (re.compile(r"channel=(-?\d+)"), lambda m: Channel(int(m[1]))),
    (re.compile(r"group=(\d+)(?:,axis=(-?\d+))?"), lambda m: Group(int(m[1]), int(m[2] or -1))),
    (re.compile(r"block=(\d+)x(\d+)"), lambda m: Block(int(m[1]), int(m[2]))),
)


def parse_granularity(text: str) -> Granularity:
    """Parse the text form of a granularity, such as ``group=128``.

    Raises:
        ValueError: the text is no granularity.
    """
    for pattern, make in _PATTERNS:
        if match := pattern.fullmatch(text):
            return make(match)
    raise ValueError(f"unknown granularity '{text}'; known are tensor, token, channel=AXIS, group=SIZE, block=RxC")

"""Pyramid vector quantization: runs of weights are integer points on a pyramid, times a gain.

``pvq8k6g3``: each run of D = 8 weights along the last axis is m p, p integers with |p_1| + .. + |p_D| = K = 6, m an integer of 3 bits.

    value = scale * code        code = m p_i, one int8 for each weight: a kernel reads integers of 8 bits

What is stored of a run is the number of p among the N(D, K) points of the pyramid (Fischer 1986) and m: ceil(log2 N(D, K)) + 3 bits, here
18 for 8 weights, laid end to end in each row (PVQ, van der Ouderaa et al. 2024, arXiv 2410.16926). No codebook is stored: with
N(d, k) = N(d-1, k) + N(d, k-1) + N(d-1, k-1), the points whose first coordinate is 0, 1, -1, 2, -2, .. follow each other in this order,
each block again in the order of the next coordinate.

The paper stores p / ||p||_2 and quantizes the norm of the run at quantiles of its Beta distribution. Here m = norm / (||p||_2 scale) has
equal steps: then the weight is integers times the scale of its channel or group, which integer kernels multiply exactly; m = 0 is a run of
zeros. D <= 16, and K times the largest m is at most 127.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

from qcompile.formats.format import register_family
from qcompile.formats.integer import Integer

_NAME = re.compile(r"pvq(\d+)k(\d+)g(\d)")
_AT_ONCE = 1 << 20  # runs; on the way each takes some hundred bytes
_HIGHEST = 127


@dataclass(frozen=True)
class Pyramid(Integer):
    """``pvq8k6g3``: kernels see int8; what is stored are numbers of points and gains.

    Attributes:
        length: D, weights of a run; the last run of a row may be shorter: its points lie where there are weights.
        pulses: K, the sum of magnitudes of a point.
        gain_bits: of m.
    """

    bits: int = field(default=8, init=False)
    signed: bool = field(default=True, init=False)
    length: int
    pulses: int
    gain_bits: int

    def __post_init__(self) -> None:
        if not (1 <= self.length <= 16 and self.pulses >= 1 and 1 <= self.gain_bits <= 6 and self.highest <= _HIGHEST):
            raise ValueError(
                f"{self.name}: a run has 1 to 16 weights, a gain 1 to 6 bits, and pulses times the largest gain are at most 127"
            )

    @property
    def name(self) -> str:
        return f"pvq{self.length}k{self.pulses}g{self.gain_bits}"

    @property
    def family(self) -> str:
        return "pvq"

    @property
    def dense(self) -> bool:
        return False

    @property
    def apart(self) -> bool:
        return False

    @property
    def largest_gain(self) -> int:
        return 2**self.gain_bits - 1

    @property
    def lowest(self) -> float:
        return -self.highest

    @property
    def highest(self) -> float:
        return float(self.pulses * self.largest_gain)

    @property
    def points(self) -> int:
        """N(D, K), how many points the pyramid has."""
        return count_points(self.length, self.pulses)

    @property
    def run_bits(self) -> int:
        """Stored bits of a run."""
        return math.ceil(math.log2(self.points)) + self.gain_bits

    def packed_size(self, size: int) -> int:
        return -(-(-(-size // self.length) * self.run_bits) // 8)

    # ---- values and codes ---------------------------------------------------------------------------------------------------

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return a point times a gain for each run of the last axis.

        First the nearest direction, greedily, and its gain; then the nearest point for this gain, and the gain that is best for it.
        """
        runs, real = self.runs(values.to(torch.float64))
        points = nearest_points(runs, self.pulses, real)
        points = move_pulses(runs, points, self.nearest_gains(runs, points), real)
        gains = self.nearest_gains(runs, points)
        return (points * gains.unsqueeze(-1)).flatten(-2)[..., : values.shape[-1]].to(torch.int8).contiguous()

    def nearest_gains(self, runs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Return the m of least squared error, [..], for runs and their points [.., D]."""
        return ((runs * points).sum(-1) / points.square().sum(-1).clamp(min=1)).round().clamp(0, self.largest_gain)

    def runs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values [.., runs, D], zeros after the last, and which of them are real, [runs, D]."""
        size = values.shape[-1]
        padded = torch.nn.functional.pad(values, (0, -size % self.length)).unflatten(-1, (-1, self.length))
        return padded, (torch.arange(padded.shape[-2] * self.length) < size).reshape(-1, self.length)

    # ---- storage ------------------------------------------------------------------------------------------------------------

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack codes int8 [.., n] into bytes [.., packed_size(n)]: of each run first the gain's bits, then the point's number.

        Raises:
            ValueError: a run is no point of the pyramid times a gain.
        """
        runs, _ = self.runs(codes.to(torch.int64))
        total = runs.abs().sum(-1, keepdim=True)
        gains = total // self.pulses
        points = runs // gains.clamp(min=1)
        if bool(((gains * self.pulses != total) | (points * gains != runs).any(-1, keepdim=True) | (gains > self.largest_gain)).any()):
            raise ValueError(f"codes of {self} are points of {self.pulses} pulses times a gain; these are not")
        numbers = _in_parts(lambda part: _rank(part, self.pulses), points)
        words = torch.where(gains.squeeze(-1) > 0, numbers << self.gain_bits | gains.squeeze(-1), 0)
        return _in_parts(self._bytes, words)

    def _bytes(self, words: torch.Tensor) -> torch.Tensor:
        bits = (words.unsqueeze(-1) >> torch.arange(self.run_bits)).to(torch.uint8) & 1  # [.., runs, run_bits]
        padded = torch.nn.functional.pad(bits.flatten(-2), (0, -bits.shape[-2] * self.run_bits % 8)).unflatten(-1, (-1, 8))
        return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        self.check_packed(packed)
        return _in_parts(lambda part: self._unpack(part, size), packed)

    def _unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        words = self._words(packed)[..., : -(-size // self.length)]
        gains, numbers = words & self.largest_gain, words >> self.gain_bits
        codes = (_unrank(numbers, self.length, self.pulses) * gains.unsqueeze(-1)).flatten(-2)
        if bool(codes[..., size:].any()):
            raise ValueError(f"a row of {self} has pulses behind its end: the bytes are damaged")
        return codes[..., :size].to(torch.int8).contiguous()

    def _words(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the stored numbers of all runs, int64 [.., runs]."""
        count = packed.shape[-1] * 8 // self.run_bits
        bits = ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)[..., : count * self.run_bits]
        return (bits.unflatten(-1, (count, self.run_bits)).to(torch.int64) << torch.arange(self.run_bits)).sum(-1)

    def check_packed(self, packed: torch.Tensor) -> None:
        if packed.dtype != torch.uint8:
            raise ValueError(f"{self} is stored as bytes, not as {packed.dtype}")
        words = _in_parts(self._words, packed)
        numbers, gains = words >> self.gain_bits, words & self.largest_gain
        if bool((numbers >= self.points).any() or (numbers[gains == 0] != 0).any()):
            raise ValueError(f"numbers of points of {self} lie below {self.points}, and are 0 where the gain is; these are damaged")


@register_family
def parse_pyramid(name: str) -> Pyramid | None:
    """Parse ``pvq8k6g3``; any other name belongs to another family."""
    match = _NAME.fullmatch(name)
    return Pyramid(*(int(part) for part in match.groups())) if match else None


def nearest_points(runs: torch.Tensor, pulses: int, real: torch.Tensor) -> torch.Tensor:
    """Return points float64 [.., D] of a pyramid near to the direction of runs [.., D].

    Magnitudes are cut to whole pulses, p = floor(K |x| / |x|_1), and what is missing is added pulse by pulse where <|x|, p> / ||p||_2
    becomes largest (the paper rounds, and takes pulses away too). A run of zeros gets all pulses on its first weight.

    Args:
        runs: float64.
        pulses: K.
        real: bool, broadcasts to runs: where there may be pulses.
    """
    size = runs.abs()
    total = size.sum(-1, keepdim=True)
    # A little more than the quotient: points times a gain come back as themselves after rounding to float32 and back.
    p = (pulses * size / total.clamp(min=torch.finfo(size.dtype).tiny) + 1e-4).floor()
    missing = pulses - p.sum(-1, keepdim=True)
    # A run without a direction, and the last run's empty places, get nothing by the rule below unless all are equal.
    blocked = torch.where(real, 0.0, -torch.inf)
    for step in range(int(missing.max()) if missing.numel() else 0):
        product, square = (size * p).sum(-1, keepdim=True), p.square().sum(-1, keepdim=True)
        gained = (product + size).square() / (square + 2 * p + 1) + blocked
        best = gained.argmax(-1, keepdim=True)
        p.scatter_add_(-1, best, (missing > step).to(p.dtype))
    return torch.where(runs < 0, -p, p)


def move_pulses(runs: torch.Tensor, points: torch.Tensor, gains: torch.Tensor, real: torch.Tensor, moves: int = 4) -> torch.Tensor:
    """Return points after moving pulses, one at a time, to where they lower |x - m p|^2 for the gain m that a run has.

    The nearest direction is not the nearest point: a gain is rounded, and what it lacks or has too much is spread over all weights.
    """
    target = runs.abs() / gains.clamp(min=1).unsqueeze(-1)
    p = points.abs()
    for _ in range(moves):
        given = (1 + 2 * (target - p)).masked_fill(p < 1, torch.inf)  # what the squared error gains by one pulse less
        taken = (1 - 2 * (target - p)).masked_fill(~real, torch.inf)  # and by one more
        (less, giver), (more, taker) = given.min(-1, keepdim=True), taken.min(-1, keepdim=True)
        moved = (less + more < -1e-6).to(p.dtype)
        if not moved.any():
            break
        p = p.scatter_add(-1, giver, -moved).scatter_add(-1, taker, moved)
    return torch.where(runs < 0, -p, p)


# ---- numbers of points ------------------------------------------------------------------------------------------------------


@cache
def count_points(length: int, pulses: int) -> int:
    """Return N(D, K), the integer points of D coordinates whose magnitudes sum to K."""
    if not pulses:
        return 1
    if not length:
        return 0
    return count_points(length - 1, pulses) + count_points(length, pulses - 1) + count_points(length - 1, pulses - 1)


@cache
def _starts(length: int, pulses: int) -> torch.Tensor:
    """Return int64 [K + 1, 2 K + 2]: where the block of a first coordinate begins among the points of ``length`` coordinates and k pulses.

    Column 0 is for 0, 2 j - 1 for j, 2 j for -j; places behind the last block, and the last column, hold a number above all.
    """
    starts = torch.full((pulses + 1, 2 * pulses + 2), torch.iinfo(torch.int64).max, dtype=torch.int64)
    for k in range(pulses + 1):
        place = 0
        for column in range(2 * k + 1):
            inside = count_points(length - 1, k - (column + 1) // 2)
            if inside:
                starts[k, column] = place
                place += inside
    return starts


def _rank(points: torch.Tensor, pulses: int) -> torch.Tensor:
    """Return the number of each point int64 [.., D]; of the point of no pulses, 0."""
    left = points.abs().sum(-1)
    number = torch.zeros_like(left)
    for place, value in enumerate(points.unbind(-1)):
        column = 2 * value.abs() - (value > 0).to(torch.int64)
        number += _starts(points.shape[-1] - place, pulses)[left, column]
        left = left - value.abs()
    return number


def _unrank(numbers: torch.Tensor, length: int, pulses: int) -> torch.Tensor:
    """Return points int64 [.., D] of numbers [..]."""
    left = torch.full_like(numbers, pulses)
    point = []
    for place in range(length):
        starts = _starts(length - place, pulses)[left]  # [.., 2 K + 2]
        # Blocks that hold no point have no start of their own: count those at or below the number, and take the last of them.
        below = starts <= numbers.unsqueeze(-1)
        column = torch.where(below, torch.arange(starts.shape[-1]), -1).amax(-1)
        numbers = numbers - starts.gather(-1, column.unsqueeze(-1)).squeeze(-1)
        size = (column + 1) // 2
        point.append(torch.where(column % 2 == 1, size, -size))
        left = left - size
    return torch.stack(point, -1)


def _in_parts(change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return ``change`` of a tensor, a part of its rows at a time where there are many."""
    if x.ndim < 2 or x.numel() <= _AT_ONCE:
        return change(x)
    rows = max(_AT_ONCE * len(x) // x.numel(), 1)
    return torch.cat([change(x[start : start + rows]) for start in range(0, len(x), rows)])

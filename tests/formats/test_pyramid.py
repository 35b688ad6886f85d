"""Pyramids: every point has its number, what is stored is what was coded, and encoding goes where it should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.formats import Pyramid, bits_per_weight, parse_format, parse_scheme
from qcompile.formats.pyramid import _rank, _unrank, count_points, nearest_points

sizes = st.integers(1, 8)


def all_points(length: int, pulses: int) -> list[tuple[int, ...]]:
    places = itertools.product(range(-pulses, pulses + 1), repeat=length)
    return [point for point in places if sum(map(abs, point)) == pulses]


@pytest.mark.parametrize(("length", "pulses"), [(1, 1), (1, 5), (2, 3), (3, 4), (4, 4), (5, 3)])
def test_numbers_are_those_of_the_points_in_order(length: int, pulses: int) -> None:
    def order(point: tuple[int, ...]) -> list[int]:
        return [2 * abs(x) - (x > 0) for x in point]

    points = sorted(all_points(length, pulses), key=order)
    assert count_points(length, pulses) == len(points)
    assert torch.equal(_unrank(torch.arange(len(points)), length, pulses), torch.tensor(points))
    assert torch.equal(_rank(torch.tensor(points), pulses), torch.arange(len(points)))


@given(length=sizes, pulses=sizes, seed=st.integers(0, 2**31))
def test_a_number_comes_back_for_all_runs_up_to_eight_and_eight_pulses(length: int, pulses: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, count_points(length, pulses), (3, 50), generator=generator)
    numbers[0, :2] = torch.tensor([0, count_points(length, pulses) - 1])
    points = _unrank(numbers, length, pulses)
    assert bool((points.abs().sum(-1) == pulses).all())
    assert torch.equal(_rank(points, pulses), numbers)


@given(length=st.integers(1, 16), gain_bits=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_packing_round_trip(length: int, gain_bits: int, columns: int, seed: int) -> None:
    format = Pyramid(length, 8, gain_bits)
    codes = format.encode(4 * torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(seed)))
    codes[0, 0] = 0  # a row of zeros
    packed = format.pack(codes)
    assert packed.shape == (2, 3, format.packed_size(columns))
    assert torch.equal(format.unpack(packed, columns), codes)
    assert torch.equal(format.encode(codes.float()), codes)


@pytest.mark.parametrize(("text", "bits"), [("pvq8k6g3", 15 + 3), ("pvq8k4g4", 12 + 4), ("pvq16k12g3", 32 + 3), ("pvq1k1g1", 1 + 1)])
def test_bits_are_those_of_the_number_and_the_gain(text: str, bits: int) -> None:
    format = parse_format(text)
    assert str(format) == text
    assert format.run_bits == bits
    assert 2 ** (bits - format.gain_bits) >= format.points > 2 ** (bits - format.gain_bits - 1)
    assert bits_per_weight(parse_scheme(f"{text} channel=0 sym"), (4, 16 * 8)) == pytest.approx(bits / format.length + 32 / 128)


@pytest.mark.parametrize("name", ["pvq8k6", "pvq17k2g1", "pvq8k0g1", "pvq8k19g3", "pvq8k6g7", "pvq0k1g1", "pvq8k6g0"])
def test_other_pyramids_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown format|a run has 1 to 16 weights"):
        parse_format(name)


def test_damaged_bytes_are_refused() -> None:
    format = parse_format("pvq8k6g3")
    packed = format.pack(format.encode(torch.randn(2, 8)))
    damaged = packed.clone()
    damaged[1] = 255
    with pytest.raises(ValueError, match="lie below 27008"):
        format.unpack(damaged, 8)
    with pytest.raises(ValueError, match="behind its end"):
        format.unpack(format.pack(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 6]], dtype=torch.int8)), 7)
    with pytest.raises(ValueError, match="not as"):
        format.check_packed(packed.to(torch.int8))


@pytest.mark.parametrize("codes", [[6, 1, 0, 0], [9, 0, 0, 0], [4, -1, 7, 0], [48, 0, 0, 0]])
def test_codes_that_are_no_points_are_not_packed(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="these are not"):
        Pyramid(4, 6, 3).pack(torch.tensor([codes], dtype=torch.int8))


def test_points_are_near_the_best_direction() -> None:
    """Against all points: the greedy one has at least 97 % of the largest cosine, and mostly the largest itself."""
    runs = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = nearest_points(runs, 5, torch.ones(4, dtype=torch.bool))
    every = torch.tensor(all_points(4, 5), dtype=torch.float64)
    cosines = (runs @ every.T) / every.norm(dim=1)
    found = (runs * points).sum(1) / points.norm(dim=1)
    ratio = found / cosines.amax(1)
    assert float(ratio.min()) > 0.97
    assert float((ratio > 1 - 1e-12).double().mean()) > 0.8


@given(st.integers(0, 2**31))
def test_gains_are_the_best_for_their_points(seed: int) -> None:
    format, values = Pyramid(4, 5, 3), 6 * torch.randn(20, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    codes = format.encode(values).double()
    points = nearest_points(values, 5, torch.ones(4, dtype=torch.bool))
    errors = torch.stack([(values - m * points).square().sum(1) for m in range(8)])
    assert bool(((values - codes).square().sum(1) <= errors.amin(0) + 1e-9).all())  # equal before pulses move
    m = codes.abs().sum(1, keepdim=True) / 5
    again = torch.stack([(values - k * codes / m.clamp(min=1)).square().sum(1) for k in range(8)])
    assert bool(((values - codes).square().sum(1) <= again.amin(0) + 1e-9).all())


def test_more_bits_lose_less_of_a_normal_weight() -> None:
    """The signal-to-noise ratio stays within 3.7 dB of 6.02 dB a bit, which no code passes."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for text in ("pvq8k5g3", "pvq8k6g3", "pvq8k9g3", "pvq16k12g3", "pvq8k14g3"):
        format = parse_format(text)
        error = min(float((values - format.encode(values / s).double() * s).square().mean()) for s in torch.linspace(0.05, 0.4, 50))
        gap = 6.02 * format.run_bits / format.length + 10 * math.log10(error)
        assert 0 < gap < 3.7, (text, gap)

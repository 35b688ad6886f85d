"""Formats whose codes are places in a table, and the ternary format's five codes in a byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.formats import (
    Codebook,
    NormalFloat,
    Quantized,
    Ternary,
    bits_per_weight,
    check_table,
    dequantize,
    parse_format,
    parse_layer_scheme,
    parse_scheme,
    quantize_tensor,
    stored_bytes,
)  # fmt: skip

LOOKUPS = [NormalFloat(bits) for bits in (2, 3, 4)] + [Codebook(bits) for bits in (1, 2, 3, 4)]

# Dettmers et al. 2023, appendix E. Their code rounds the outermost quantile to 0.9677083 and works in float32.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_levels_of_nf4_are_the_published_ones() -> None:
    assert NormalFloat(4).levels == pytest.approx(NF4, abs=3e-7)
    assert Codebook(4).levels == tuple(round(127 * level) for level in NF4)


@pytest.mark.parametrize("format", [*LOOKUPS, Ternary()], ids=str)
def test_text_levels_and_codes(format) -> None:
    assert parse_format(str(format)) == format
    values = torch.tensor([-1.0, 0.0, 1.0]) if isinstance(format, Ternary) else torch.tensor(format.levels)
    codes = format.encode(values)
    assert codes.dtype == format.storage
    assert torch.equal(format.decode(codes), values)
    assert (values[1:] > values[:-1]).all()
    assert (format.lowest, format.highest) == (float(values[0]), float(values[-1]))


@pytest.mark.parametrize("format", LOOKUPS, ids=str)
def test_encoding_is_nearest(format) -> None:
    values = torch.linspace(1.2 * format.lowest, 1.2 * format.highest, 1001)
    distance = (values.unsqueeze(1) - torch.tensor(format.levels)).abs()
    assert torch.equal(format.decode(format.encode(values)), torch.tensor(format.levels)[distance.argmin(1)])


@pytest.mark.parametrize("name", ["nf1", "nf5", "codebook5", "codebook0", "ternary2", "nf"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="unknown format"):
        parse_format(name)


@pytest.mark.parametrize("format", ["nf4", "codebook4"])
def test_places_in_a_table_have_no_zero_point(format: str) -> None:
    with pytest.raises(ValueError, match="is symmetric"):
        parse_scheme(f"{format} channel=0 affine")


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("nf4", "nf4 group=128 sym", "float"),
        ("NF4-g64", "nf4 group=64 sym", "float"),
        ("codebook4", "codebook4 channel=0 sym", "float"),
        ("codebook3-a8-g32-dynamic", "codebook3 group=32 sym", "int8 token sym dynamic"),
        ("ternary-a8", "ternary channel=0 sym", "uint8 tensor affine"),
    ],
)
def test_names_of_layers(name: str, weight: str, activation: str) -> None:
    assert str(parse_layer_scheme(name)) == f"weight={weight}; activation={activation}"


@pytest.mark.parametrize("text", ["nf4 group=5 sym", "codebook3 channel=0 sym", "ternary tensor sym", "ternary group=7 sym"])
def test_stored_bytes_are_those_of_the_tensors(text: str) -> None:
    scheme, shape = parse_scheme(text), (7, 13)
    found = quantize_tensor(torch.randn(shape), scheme)
    assert stored_bytes(scheme, shape) == found.packed().numel() + 4 * found.scale.numel()
    assert torch.equal(scheme.format.unpack(found.packed(), 13), found.codes)


def test_largest_magnitude_meets_the_outermost_level() -> None:
    x = torch.randn(6, 40)
    found = quantize_tensor(x, parse_scheme("nf4 group=20 sym"))
    largest = x.abs().unflatten(1, (2, 20)).amax(2)
    assert torch.equal(found.scale, largest)
    worst = (NormalFloat(4).levels[1] + 1) / 2  # half of the widest step
    assert ((found.dequantize() - x).abs() <= worst * largest.repeat_interleave(20, 1) * (1 + 1e-6)).all()


# ---- tables ---------------------------------------------------------------------------------------------------------------


def test_each_table_serves_its_run_of_rows() -> None:
    scheme = parse_scheme("codebook2 channel=0 sym")
    codes = torch.randint(0, 4, (6, 9), dtype=torch.uint8)
    table = torch.tensor([[-100, -3, 4, 90], [-7, -6, 0, 5], [-128, 1, 2, 127]], dtype=torch.int8)
    scale = torch.rand(6)
    value = dequantize(codes, scale, None, scheme, table)
    for row in range(6):
        for column in range(9):
            assert value[row, column] == table[row // 2, int(codes[row, column])].float() * scale[row]
    assert torch.equal(Quantized(codes, scale, None, scheme, table).dequantize(), value)


def test_damaged_tables_are_refused() -> None:
    good, format = torch.tensor([[-100, -3, 4, 90]], dtype=torch.int8), Codebook(2)
    check_table(good, format, 6)
    for table, wrong, reason in (
        (good.float(), format, "is int8"),
        (good[:, :3], format, "is int8"),
        (good[0], format, "is int8"),
        (good.flip(1), format, "do not ascend"),
        (good.expand(4, 4), format, "equal parts"),
        (good[:0], format, "equal parts"),
        (good, NormalFloat(2), "no table of its own"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_table(table, wrong, 6)


# ---- five ternary codes in a byte -----------------------------------------------------------------------------------------


def test_all_bytes_are_numbers_to_base_three() -> None:
    bytes_ = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    codes = Ternary().unpack(bytes_, 5)
    for number, digits in enumerate(codes.tolist()):
        assert number == sum((digit + 1) * 3**i for i, digit in enumerate(digits))
    assert torch.equal(Ternary().pack(codes), bytes_)


@pytest.mark.parametrize("byte", [243, 250, 255])
def test_other_bytes_are_refused(byte: int) -> None:
    packed = torch.tensor([[7, byte], [3, 4]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="below 243; these are damaged"):
        Ternary().unpack(packed, 9)


@given(st.integers(1, 23), st.integers(1, 4))
def test_ternary_packing_round_trip(size: int, rows: int) -> None:
    codes = torch.randint(-1, 2, (2, rows, size)).to(torch.int8)
    packed = Ternary().pack(codes)
    assert packed.shape == (2, rows, Ternary().packed_size(size))
    assert torch.equal(Ternary().unpack(packed, size), codes)


def test_ternary_weights_take_one_point_six_bits() -> None:
    assert bits_per_weight(parse_scheme("ternary tensor sym"), (4, 400)) == 1.6 + 32 / 1600
    assert bits_per_weight(parse_scheme("ternary group=128 sym"), (4, 640)) == 1.6 + 32 / 128

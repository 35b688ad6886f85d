"""Collectors against what NumPy and torch say of the whole data at once, for any cut into batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.statistics import AbsMax, AbsMean, Gram, Histogram, MinMax, Moments, Request, Samples, range_request

EVERY = [MinMax("x"), Histogram("x", 64), AbsMax("x", 1), AbsMean("x", 1), Moments("x"), Gram("x"), Samples("x", 5, seed=3)]
EXACT = (MinMax, Histogram, AbsMax, Samples)


def gather(request: Request, parts: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> dict[str, torch.Tensor]:
    collector = request.start()
    for part in parts:
        collector.update(part)
    return collector.result()


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    exponents=st.lists(st.integers(-20, 20), min_size=5),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("request_", EVERY, ids=lambda r: type(r).__name__)
def test_result_does_not_depend_on_batches(request_: Request, seed: int, sizes: list[int], exponents: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, 4, generator=generator) * 2.0 ** exponents[i] for i, n in enumerate(sizes)]
    parts[0][0, 0, 0] = 2.0 ** exponents[0]  # a power of two lies on the border between two ranges of the histogram
    split, whole = gather(request_, parts), gather(request_, [torch.cat(parts)])
    assert split.keys() == whole.keys()
    for key in whole:
        if isinstance(request_, EXACT):
            assert torch.equal(split[key], whole[key]), key
        else:
            torch.testing.assert_close(split[key], whole[key], rtol=1e-6, atol=0 if key == "count" else 1e-12)


def test_histogram_counts_are_numpys() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    found = gather(Histogram("x", 128), list(x.split(999)))
    edges = torch.linspace(float(found["low"]), float(found["high"]), len(found["counts"]) + 1, dtype=torch.float64)
    assert found["counts"].tolist() == torch.histogram(x.double(), edges).hist.long().tolist()
    assert (found["min"], found["max"]) == (x.min(), x.max())
    assert found["low"] <= x.min() <= x.max() <= found["high"]
    assert (edges[1] - edges[0]) * 128 <= x.abs().max()  # so many bins from zero to the largest magnitude


def test_histogram_of_zeros_is_one_bin() -> None:
    found = gather(Histogram("x"), [torch.zeros(7), torch.zeros(2)])
    assert found["counts"].tolist() == [9]


def test_moments_keep_a_small_variance_beside_a_large_mean() -> None:
    x = torch.randn(600, 2, generator=torch.Generator().manual_seed(1)) * 1e-2 + 1000
    found = gather(Moments("x"), list(x.split(7)))
    torch.testing.assert_close(found["mean"], x.double().mean(0))
    torch.testing.assert_close(found["variance"], x.double().var(0, correction=0), rtol=1e-9, atol=0)
    assert int(found["count"]) == 600


def test_channels_of_an_inner_axis() -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(gather(AbsMax("x", 1), [x])["abs_max"], x.abs().amax((0, 2)))
    torch.testing.assert_close(gather(AbsMean("x", 1), [x])["abs_mean"], x.abs().mean((0, 2)))


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 1), 2), ((1, 2), (0, 1), (2, 1), 4)]
)
def test_convolution_gram_gives_the_energy_of_the_output(stride, padding, dilation, groups) -> None:  # type: ignore[no-untyped-def]
    """Sum over places of conv(x, w)^2 = rows * w H w^T, whatever the weight."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 7, 6, generator=generator)
    w = torch.randn(8, 4 // groups, 3, 2, generator=generator)
    found = gather(Gram("x", (3, 2, stride, padding, dilation, groups)), list(x.split(2)))
    gram = found["gram"] if groups > 1 else found["gram"].unsqueeze(0)
    rows = w.double().reshape(groups, 8 // groups, -1)
    energy = ((rows @ gram) * rows).sum(2).flatten() * found["rows"]
    y = torch.nn.functional.conv2d(x.double(), w.double(), None, stride, padding, dilation, groups)
    torch.testing.assert_close(energy, y.square().sum((0, 2, 3)), rtol=1e-6, atol=0)


def test_samples_are_rows_of_the_data_and_change_with_the_seed() -> None:
    x = torch.arange(300.0).view(100, 3)
    first, second = (gather(Samples("x", 10, seed), [x])["rows"] for seed in (0, 1))
    assert first.shape == (10, 3)
    assert all(any(torch.equal(row, other) for other in x) for row in first)
    assert first[:, 0].tolist() == sorted(first[:, 0].tolist())
    assert not torch.equal(first, second)
    assert torch.equal(gather(Samples("x", 200), [x])["rows"], x)


def test_samples_are_drawn_evenly() -> None:
    """Rows of the first and the second half: 4000 draws of 8000, so 2000 each with a deviation of about 32."""
    rows = gather(Samples("x", 4000), [torch.arange(8000.0).view(-1, 1)])["rows"]
    assert 1840 < int((rows < 4000).sum()) < 2160


def test_text_form_is_stable() -> None:
    assert str(Gram("conv", (3, 3, (1, 1), (0, 0), (1, 1), 1))) == (
        "Gram(%conv, unfold=(3, 3, (1, 1), (0, 0), (1, 1), 1), weights=None, cross=False)"
    )
    assert str(Samples("x")) == "Samples(%x, rows=512, seed=0)"


def test_range_request() -> None:
    assert range_request("minmax", "x") == MinMax("x")
    assert range_request("entropy", "x") == Histogram("x")
    with pytest.raises(Refused, match="unknown range 'max'"):
        range_request("max", "x")


def test_no_values_are_refused() -> None:
    with pytest.raises(Refused, match="gave no value"):
        AbsMax("x").start().result()

"""Statistics of activations: passes ask for them, one sweep over the calibration data gathers them."""

from qcompile.statistics.collectors import (
    AbsMax,
    AbsMean,
    Gram,
    Histogram,
    MinMax,
    Moments,
    Request,
    Samples,
    range_request,
    sampled_places,
)
from qcompile.statistics.sweep import Statistics, collect, collect_sequentially

__all__ = [
    "AbsMax",
    "AbsMean",
    "Gram",
    "Histogram",
    "MinMax",
    "Moments",
    "Request",
    "Samples",
    "Statistics",
    "collect",
    "collect_sequentially",
    "range_request",
    "sampled_places",
]

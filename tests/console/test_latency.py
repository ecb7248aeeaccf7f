"""Percentiles from histograms: against the observations that were counted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from anabranch.console.latency import RecentPercentiles, percentile, snapshot

BOUNDS = (0.01, 0.1, 1.0, 10.0)


def counted(values: list[float]) -> dict[float, float]:
    return {b: float(sum(v <= b for v in values)) for b in (*BOUNDS, math.inf)}


@given(st.lists(st.floats(0.0001, 9.9), min_size=1), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_percentile_lies_in_the_bucket_of_the_right_observation(
    values: list[float], rank: float
) -> None:
    found = percentile(counted(values), rank)
    right = sorted(values)[math.ceil(rank * len(values) - 1e-9) - 1]
    edges = (0.0, *BOUNDS)
    low = max(edge for edge in edges if edge < right)
    high = min(edge for edge in edges if edge >= right)
    assert found is not None and low - 1e-12 <= found <= high + 1e-12


def test_nothing_observed_has_no_percentile_and_overflow_is_a_lower_limit() -> None:
    assert percentile({}, 0.5) is None
    assert percentile(counted([]), 0.5) is None
    assert percentile(counted([50.0]), 0.5) == 10.0


def test_only_the_window_counts() -> None:
    recent = RecentPercentiles(window=10)
    assert recent.percentiles([0.5]) == [None]
    recent.observe(0, counted([]))
    recent.observe(5, counted([0.005] * 4))
    (fast,) = recent.percentiles([0.5])
    assert fast == pytest.approx(0.005)
    recent.observe(16, counted([0.005] * 4 + [5.0] * 4))
    (slow,) = recent.percentiles([0.5])
    assert slow == pytest.approx(5.5)  # the middle of the bucket from 1 to 10
    recent.observe(30, counted([0.005] * 4 + [5.0] * 4))
    assert recent.percentiles([0.5]) == [None]


def test_snapshot_reads_one_models_series() -> None:
    histogram = Histogram("h", "text", ["model"], buckets=BOUNDS, registry=CollectorRegistry())
    histogram.labels("a").observe(0.05)
    histogram.labels("b").observe(5)
    assert snapshot(histogram, "a") == {0.01: 0, 0.1: 1, 1.0: 1, 10.0: 1, math.inf: 1}
    assert snapshot(histogram, "c") == {}

"""Percentiles of what happened lately, from histograms that only count up.

Pure: snapshots in, numbers out.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from prometheus_client import Histogram

Buckets = Mapping[float, float]
"""Upper bound -> how many observations were at most that, as Prometheus counts them."""


class RecentPercentiles:
    """Percentiles over the last ``window`` seconds of one histogram's life."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._snapshots: deque[tuple[float, Buckets]] = deque()

    def observe(self, now: float, buckets: Buckets) -> None:
        """The counts as of ``now`` (seconds, never decreasing)."""
        snapshots = self._snapshots
        snapshots.append((now, buckets))
        # The newest snapshot that is a window old stays: it is where the window begins.
        while len(snapshots) > 2 and snapshots[1][0] <= now - self._window:
            snapshots.popleft()

    def percentiles(self, ranks: Sequence[float]) -> list[float | None]:
        """One value for each rank (0 to 1); None if nothing was observed in the window."""
        if len(self._snapshots) < 2:
            return [None] * len(ranks)
        before, after = self._snapshots[0][1], self._snapshots[-1][1]
        grown = {bound: after[bound] - before.get(bound, 0.0) for bound in after}
        return [percentile(grown, rank) for rank in ranks]


def percentile(buckets: Buckets, rank: float) -> float | None:
    """The value below which a share ``rank`` lies, linear inside a bucket.

    What lies beyond the last finite bound counts as that bound, which is then a lower limit.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    wanted = rank * total
    index = bisect.bisect_left([buckets[bound] for bound in bounds], wanted)
    if math.isinf(bounds[index]):
        return bounds[index - 1] if index else None
    low = bounds[index - 1] if index else 0.0
    below = buckets[bounds[index - 1]] if index else 0.0
    inside = buckets[bounds[index]] - below
    return low + (bounds[index] - low) * ((wanted - below) / inside if inside else 1.0)


def snapshot(histogram: Histogram, model: str) -> Buckets:
    """The present counts of one model's series; empty before its first observation."""
    counts = {
        float(sample.labels["le"]): sample.value
        for metric in histogram.collect()
        for sample in metric.samples
        if sample.name.endswith("_bucket") and sample.labels["model"] == model
    }
    assert all(low <= high for low, high in pairwise(counts[b] for b in sorted(counts)))
    return counts

"""Figures of one cell, and their medians over rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median


@dataclass(frozen=True)
class Metrics:
    """Times in seconds, memory in bytes. ``ttft``: time to the first token, queueing included."""

    tokens_per_second: float
    ttft_p50: float
    ttft_p95: float
    gap_p50: float
    gap_p95: float
    peak_memory: float

    @classmethod
    def of(cls, times: Sequence[Sequence[float]], peak_memory: int) -> Metrics:
        """From the times ``[requests, tokens]`` at which tokens arrived."""
        first = [tokens[0] for tokens in times]
        gaps = [after - before for tokens in times for before, after in pairwise(tokens)] or [0.0]
        tokens = sum(map(len, times))
        return cls(
            tokens_per_second=tokens / max(map(max, times)),
            ttft_p50=percentile(first, 50),
            ttft_p95=percentile(first, 95),
            gap_p50=percentile(gaps, 50),
            gap_p95=percentile(gaps, 95),
            peak_memory=float(peak_memory),
        )

    @classmethod
    def middle(cls, rounds: Sequence[Metrics]) -> Metrics:
        """The median of each figure by itself."""
        return cls(*(median(getattr(r, f.name) for r in rounds) for f in fields(cls)))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

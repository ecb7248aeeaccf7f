"""How well something works: workloads, metrics and benchmarks that several systems share.

What belongs here: replaying traffic on an engine, quality metrics, testbeds. A claim combines them
into a verdict (``claims``).
"""

from anabranch.evaluation.traffic import (
    Arrival,
    RequestTimes,
    effective_throughput,
    percentile,
    poisson_trace,
    replay,
    times_between_tokens,
)

__all__ = [
    "Arrival",
    "RequestTimes",
    "effective_throughput",
    "percentile",
    "poisson_trace",
    "replay",
    "times_between_tokens",
]

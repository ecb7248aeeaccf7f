"""S23, Flag Aggregator: what a common subspace explains, however many lie."""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class SubspaceAggregation(Claim):
    """Flag against the mean, Krum and Multi-Krum while 3 of 15 workers attack."""

    id = "S23"
    name = "flag-aggregator"
    system = "Flag Aggregator (robust aggregation by subspace estimation)"
    paper = "with 1 to 3 of 15 random workers more accurate than Bulyan, Multi-Krum and median"
    baseline = "mean, Krum and Multi-Krum, the last two told how many attack"
    method = "Flag, not told; rank 8, 5 iterations, scaled by the median length"
    threshold = (
        "uniform random gradients, unlike workers and batches of 2: at most 0.04 below the mean "
        "without attack, not below Krum, at most 0.01 below Multi-Krum, the mean at most 0.2; "
        "without attack at most 0.01 below the mean"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Four settings, with and without attack."""
        from anabranch.claims.federated_experiments.flag import measure

        return measure(seed, progress)

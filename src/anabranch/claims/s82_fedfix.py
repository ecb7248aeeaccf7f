"""S82, FedFix: aggregation at fixed times is quick and steady."""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class FixedWindowAggregation(Claim):
    """FedFix against synchronous and asynchronous averaging, in virtual time."""

    id = "S82"
    name = "fedfix"
    system = "FedFix (asynchronous aggregation in fixed windows)"
    paper = "as stable as synchronous averaging, and faster than it and than asynchronous averaging"
    baseline = "FedAvg, and FedAsync (0.9, exponent 0.5), on the same devices and splits"
    method = "FedFix, window measured, weights by counting; also with equal weights"
    threshold = (
        "digits, 10 log-uniform devices: fewer virtual seconds to 90 % than FedAvg and FedAsync, "
        "mean of 3 seeds; accuracy jitter at most 0.6 of FedAsync's"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Four methods for 30 virtual seconds."""
        from anabranch.claims.federated_experiments.asynchronous import fedfix

        return fedfix(seed, progress)

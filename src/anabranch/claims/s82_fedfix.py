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
        "digits, 10 devices: with exponential times, 3 seeds, virtual seconds to 90 % <= 0.7x "
        "FedAvg's and <= 0.85x those with equal weights, accuracy jitter <= 0.6x FedAsync's; with "
        "log-uniform times, 5 seeds, fewer seconds than FedAvg and than FedAsync"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Four methods for 15 virtual seconds, on two kinds of devices."""
        from anabranch.claims.federated_experiments.asynchronous import fedfix

        return fedfix(seed, progress)

"""S73, FedAMD: fewer rounds where few clients of many take part.

The same clients, rounds and local steps for FedAMD and FedAvg.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class AnchorSampling(Claim):
    """FedAMD against FedAvg in rounds to an accuracy."""

    id = "S73"
    name = "fedamd"
    system = "FedAMD (anchor sampling)"
    paper = "fewer rounds to an accuracy than FedAvg, SCAFFOLD and FedPAGE on Fashion-MNIST, EMNIST"
    baseline = "FedAvg with equal weights, at its own best rate"
    method = "fedamd, all anchors in every second round, at its own best rate"
    threshold = "fewer rounds to 80 % accuracy than FedAvg on at least 4 of 5 splits"

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Train both on five splits of digits into shards."""
        from anabranch.claims.federated_experiments.anchors import measure

        return measure(seed, progress)

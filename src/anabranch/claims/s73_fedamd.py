"""S73, FedAMD: fewer rounds where few clients of many take part.

The same clients, rounds and local steps for FedAMD and FedAvg.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class AnchorSampling(Claim):
    """FedAMD against FedAvg in rounds to a nearly stationary objective."""

    id = "S73"
    name = "fedamd"
    system = "FedAMD (anchor sampling)"
    paper = "up to 1/epsilon fewer rounds to a stationary point; fewer to an accuracy on EMNIST"
    baseline = "FedAvg with equal weights, at its own best local and server rate"
    method = "fedamd, all anchors in every second round, at its own best rates"
    threshold = "fewer rounds to a gradient norm of 0.05 than FedAvg on at least 4 of 5 splits"

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Train both on five Dirichlet splits of digits."""
        from anabranch.claims.federated_experiments.anchors import measure

        return measure(seed, progress)
